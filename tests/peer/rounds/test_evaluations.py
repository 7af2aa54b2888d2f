"""When a peer measures the held-out loss, what it tells, and which state it keeps as the best."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from prometheus_client import CollectorRegistry

from peer.best import BestCheckpoint, Known
from peer.metrics import PeerMetrics
from peer.model import initial_theta
from peer.outer import initial_state
from peer.rounds import evaluations
from peer.rounds.evaluations import EvaluationDesk
from peer.rounds.training import TrainingThread
from peer.state import Snapshot
from peer.status import Status
from peer.tasks import cancel
from peer.trainer import Trainer
from swarm.clock import ManualClock
from swarm.entries import open_evaluation
from swarm.errors import CoordinatorUnreachable, Rejected
from swarm.manifest import Manifest
from swarm.rpc.v1.coordinator_pb2 import AgreedEvaluation, EvaluationDuty, ListEvaluationsResponse
from swarm.rpc.v1.signed_pb2 import Signed
from tests.waiting import eventually
from tests.world import NOW_S, identity

ME = identity(1)
SETTINGS = {"every": 2, "samples": 4, "prompts": ["the ", "quick "], "text_tokens": 4}


@dataclass
class Coordinator:
    """What a coordinator answers, and what it was told."""

    answer: ListEvaluationsResponse = field(default_factory=ListEvaluationsResponse)
    told: list[Signed] = field(default_factory=list)
    asked: int = 0
    away: bool = False
    refusal: str = ""

    async def list_evaluations(self, peer_id: str) -> ListEvaluationsResponse:
        self.asked += 1
        if self.away:
            raise CoordinatorUnreachable("away", "")
        assert peer_id == ME.peer_id
        return self.answer

    async def submit_evaluation(self, signed: Signed) -> None:
        if self.refusal:
            raise Rejected(self.refusal, "")
        self.told.append(signed)


@dataclass
class Peer:
    """A desk at work over a real trainer."""

    manifest: Manifest
    desk: EvaluationDesk
    coordinator: Coordinator
    status: Status
    folder: Path

    def state_after(self, round_index: int) -> Snapshot:
        state = initial_state(self.manifest.strategy, initial_theta(self.manifest.model))
        return Snapshot.from_state(replace(state, round=round_index + 1))

    async def finish(self, round_index: int) -> Snapshot:
        """A round is over."""
        snapshot = self.state_after(round_index)
        await self.desk.keep(round_index, snapshot, 0.0)
        return snapshot

    def draw(self, round_index: int, root: bytes) -> None:
        """The coordinator asks us to measure a state."""
        self.coordinator.answer.duties.append(EvaluationDuty(round=round_index, state_root=root))

    def agree(self, round_index: int, loss: float) -> None:
        """A quorum has agreed."""
        self.coordinator.answer.agreed.append(AgreedEvaluation(round=round_index, loss=loss, evaluators=2, statements=2))

    def unable(self) -> float:
        return self.status.metrics.evaluations.labels(outcome="unable")._value.get()


@pytest.fixture
async def peer(small_run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Peer]:
    """A peer of a run that is evaluated, which asks often."""
    monkeypatch.setattr(evaluations, "SHORTEST_POLL_S", 0.01)
    monkeypatch.setattr(evaluations, "AWAY_S", 0.01)
    run = small_run("diloco")
    values = run.manifest.model_dump(mode="json") | {"evaluation": SETTINGS}
    manifest = Manifest.model_validate(values)
    status = Status(PeerMetrics(CollectorRegistry()))
    checker = SimpleNamespace(run_id=bytes.fromhex(manifest.run_id))
    services: Any = SimpleNamespace(manifest=manifest, identity=ME, checker=checker, observer=status, clock=ManualClock(NOW_S))
    training = TrainingThread(Trainer(manifest, torch.device("cpu"), run.train, run.validation, micro_batch=4))
    coordinator = Coordinator()

    async def client() -> Any:
        return coordinator

    desk = EvaluationDesk(services, training, client, BestCheckpoint.open(tmp_path, manifest), run.directory)
    work = asyncio.create_task(desk.work())
    yield Peer(manifest, desk, coordinator, status, tmp_path)
    await cancel([work])
    training.close()


async def test_who_is_drawn_measures_tells_and_keeps_the_best(peer: Peer) -> None:
    """The loss of just this state on the manifest's samples, with a text for each prompt, signed; then the agreed loss counts."""
    snapshot = await peer.finish(2)
    peer.draw(2, snapshot.root)
    await eventually(lambda: peer.coordinator.told, "it tells its loss")
    said = open_evaluation(peer.coordinator.told[0])
    trainer = peer.desk.training.trainer
    assert (said.peer_id, said.round, said.state_root, said.samples) == (ME.peer_id, 2, snapshot.root, 4)
    assert said.loss == await peer.desk.training.in_thread(lambda: trainer.evaluate(snapshot.state.theta, 4))
    assert (len(said.texts), said.issued_at) == (2, int(NOW_S))
    peer.coordinator.answer.ClearField("duties")
    peer.agree(2, 3.25)
    await eventually(lambda: peer.desk.best.best, "it keeps the state")
    assert peer.desk.best.best == Known(round=2, loss=3.25, evaluators=2)
    assert len(peer.coordinator.told) == 1


async def test_who_is_not_drawn_keeps_the_best_as_well(peer: Peer) -> None:
    """It measures nothing and tells nothing; a later worse one isn't kept."""
    await peer.finish(2)
    peer.agree(2, 3.0)
    await eventually(lambda: peer.desk.best.best, "it keeps the state")
    await peer.finish(4)
    peer.agree(4, 3.5)
    await eventually(lambda: not peer.desk._kept, "the round is settled")
    assert peer.desk.best.best == Known(round=2, loss=3.0, evaluators=2)
    assert peer.coordinator.told == []


async def test_other_rounds_are_not_asked_about(peer: Peer) -> None:
    """Nobody is troubled after rounds that aren't evaluated, or without a state of our own."""
    await peer.finish(3)
    await peer.desk.keep(2, None, 0.0)
    await peer.desk.keep(2, peer.state_after(3), 0.0)
    await asyncio.sleep(0)
    assert (peer.desk._kept, peer.coordinator.asked) == ([], 0)


async def test_another_state_than_ours_is_not_measured(peer: Peer) -> None:
    """Whoever holds a state that the ledger doesn't name has nothing to say about it."""
    await peer.finish(2)
    peer.draw(2, b"\x55" * 32)
    asked = peer.coordinator.asked
    await eventually(lambda: peer.coordinator.asked > asked + 2, "it asks again")
    assert peer.coordinator.told == []


async def test_without_a_quorum_our_own_loss_decides(peer: Peer) -> None:
    """The coordinator may be away at the end, or refuse: what we have measured is what we know."""
    snapshot = await peer.finish(2)
    peer.draw(2, snapshot.root)
    peer.coordinator.refusal = "no_evaluation"
    await eventually(lambda: peer.desk._kept[0].is_over, "it has measured, and was refused")
    peer.coordinator.away = True
    await peer.desk.end(0.01)
    assert peer.desk.best.best is not None
    assert peer.desk.best.best.evaluators == 0
    assert peer.coordinator.told == []


async def test_a_pause_puts_measuring_off(peer: Peer) -> None:
    """While training is stopped nothing is measured; afterwards it is."""
    peer.desk.training.stop("pause")
    snapshot = await peer.finish(2)
    peer.draw(2, snapshot.root)
    asked = peer.coordinator.asked
    await eventually(lambda: peer.coordinator.asked > asked + 2, "it asks again")
    assert peer.coordinator.told == []
    assert not peer.desk.training.trainer.is_loaded
    peer.desk.training.go_on()
    await eventually(lambda: peer.coordinator.told, "it tells its loss")


async def test_few_states_wait_and_none_for_ever(peer: Peer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The oldest goes when there are too many, and each after it was asked about often enough."""
    peer.coordinator.away = True
    for number in range(2, 16, 2):
        await peer.finish(number)
    assert [kept.round_index for kept in peer.desk._kept] == [8, 10, 12, 14]
    monkeypatch.setattr(evaluations, "MOST_POLLS", 3)
    await eventually(lambda: not peer.desk._kept, "it gives up")
    assert peer.desk.best.best is None


async def test_what_cant_be_measured_is_counted(peer: Peer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A device that fails, or a loss that is no number, costs the statement and nothing else."""
    monkeypatch.setattr(peer.desk.training.trainer, "held_out_loss", lambda *_: float("nan"))
    snapshot = await peer.finish(2)
    peer.draw(2, snapshot.root)
    await eventually(lambda: peer.unable() == 1, "it is counted")
    peer.agree(2, 3.0)
    await eventually(lambda: peer.desk.best.best, "others' agreement still counts")
    assert peer.coordinator.told == []
