"""Evaluations over real gRPC: who may say what, what is shown of it, and that it survives a restart."""

from __future__ import annotations

import math
from html import escape
from pathlib import Path

import httpx
import pytest

from coordinator.fsck import check
from coordinator.server import Coordinator
from coordinator.snapshot import read, restore, write
from coordinator.store.sql import SqlStore
from swarm.clock import ManualClock
from swarm.credits import verify_ledger
from swarm.errors import NotAdmitted, Rejected
from swarm.identity import Identity
from swarm.rpc.client import CoordinatorClient
from swarm.rpc.v1.coordinator_pb2 import ListEvaluationsResponse
from swarm.rpc.v1.signed_pb2 import Signed
from tests.coordinator.conftest import Serve, connected
from tests.coordinator.test_web import Outline
from tests.world import NOW_S, OTHER_ROOT, ROOT, World, identity, manifest

SETTINGS = {"every": 2, "evaluators": 3, "quorum": 2, "prompts": ["def "]}
WORLD = World(manifest(evaluation=SETTINGS))
PEERS = [identity(number) for number in range(4)]
SCRIPT = "<script>alert('1')</script>"


async def train(client: CoordinatorClient, rounds: int) -> None:
    """Admit the peers and let them report so many rounds."""
    for peer in PEERS:
        await client.announce(WORLD.announcement(peer))
    for number in range(rounds):
        proposal, reports = WORLD.round(PEERS, number)
        for report in reports:
            await client.submit_report(report, proposal)


async def drawn(client: CoordinatorClient, number: int = 0) -> list[Identity]:
    """Who is asked to measure a round."""
    asked = {peer: (await client.list_evaluations(peer.peer_id)).duties for peer in PEERS}
    return [peer for peer, duties in asked.items() if any(duty.round == number for duty in duties)]


async def refused(client: CoordinatorClient, said: Signed) -> str:
    with pytest.raises(Rejected) as caught:
        await client.submit_evaluation(said)
    return caught.value.reason


async def get(coordinator: Coordinator, path: str) -> httpx.Response:
    async with httpx.AsyncClient() as client:
        return await client.get(f"http://{coordinator.metrics_address}{path}")


async def test_a_quorum_agrees_and_everybody_sees_it(serve: Serve) -> None:
    """Drawn peers tell their losses; the page, the API, the metrics and the ledger's fold show the same agreement."""
    async with serve(ManualClock(NOW_S), WORLD, metrics="127.0.0.1:0") as coordinator, connected(coordinator) as client:
        await train(client, 1)
        before = await get(coordinator, "/")
        evaluators = await drawn(client)
        assert len(evaluators) == 3
        (duty,) = (await client.list_evaluations(evaluators[0].peer_id)).duties
        assert (duty.round, duty.state_root) == (0, ROOT)
        for peer, loss in zip(evaluators, (2.0, 2.015625, 7.0), strict=True):
            await client.submit_evaluation(WORLD.evaluation(peer, 0, loss, texts=[SCRIPT]))
        answer = await client.list_evaluations("")
        page, api, metrics = [(await get(coordinator, path)).text for path in ("/", "/api/evaluations", "/metrics")]
        values = (await get(coordinator, "/api/evaluations")).json()
        checkpoint, _, _ = await client.checkpoint()
        entries = [entry async for entry in client.entries(0, checkpoint.size)]
        decoded = await get(coordinator, f"/ledger/{len(entries) - 1}")
    assert [(each.round, each.loss, each.evaluators, each.statements) for each in answer.agreed] == [(0, 2.0078125, 2, 3)]
    assert answer.drawn_until == 1
    assert "none yet" in before.text
    assert Outline(page).faults == []
    assert page.count('class="held-out"') == 1
    assert "2.0078" in page
    assert "(apart)" in page
    assert SCRIPT not in page
    assert escape(SCRIPT, quote=False) in page.replace("&#39;", "'")
    assert (values["best"]["round"], values["best"]["loss"], values["disputed"]) == (0, 2.0078125, 0)
    assert values["best"]["perplexity"] == pytest.approx(math.exp(2.0078125))
    assert values["written"] == {"round": 0, "by": 2, "texts": [["def ", SCRIPT]]}
    assert [said["agrees"] for said in values["rounds"][0]["statements"]] == [True, True, False]
    assert SCRIPT in api
    assert "swarm_coordinator_evaluation_loss_nats 2.0078125" in metrics
    assert "swarm_coordinator_best_evaluation_loss_nats 2.0078125" in metrics
    assert 'swarm_coordinator_evaluations_total{outcome="accepted"} 3.0' in metrics
    assert "what held-out loss it measured" in decoded.text
    state = verify_ledger(entries, coordinator.identity.peer_id)
    assert [each.loss for each in state.agreed_evaluations(WORLD.run_id)] == [2.0078125]


async def test_what_the_coordinator_refuses(serve: Serve) -> None:
    """Not drawn, not admitted, another state, no number, stale, said already: each with its reason, and nothing is written."""
    async with serve(ManualClock(NOW_S), WORLD) as coordinator, connected(coordinator) as client:
        await train(client, 2)
        evaluators = await drawn(client)
        first, outsider = evaluators[0], next(peer for peer in PEERS if peer not in evaluators)
        size = len(coordinator.journal.tree)
        assert await refused(client, WORLD.evaluation(outsider, 0)) == "not_an_evaluator"
        assert await refused(client, WORLD.evaluation(first, 1)) == "no_evaluation"
        assert await refused(client, WORLD.evaluation(first, 0, state_root=OTHER_ROOT)) == "wrong_state"
        assert await refused(client, WORLD.evaluation(first, 0, math.nan)) == "not_finite"
        assert await refused(client, WORLD.evaluation(first, 0, samples=1 << 31)) == "malformed"
        assert await refused(client, WORLD.evaluation(first, 0, texts=["x"] * 100)) == "too_large"
        assert await refused(client, WORLD.evaluation(first, 0, texts=["x" * (1 << 14)])) == "too_large"
        assert await refused(client, WORLD.evaluation(first, 0, issued_at=int(NOW_S) - 3600)) == "stale"
        forged = WORLD.evaluation(outsider, 0)
        forged.signer = first.peer_id
        assert await refused(client, forged) == "bad_signature"
        with pytest.raises(NotAdmitted):
            await client.submit_evaluation(WORLD.evaluation(identity(99), 0))
        assert len(coordinator.journal.tree) == size
        said = WORLD.evaluation(first, 0)
        await client.submit_evaluation(said)
        assert await refused(client, said) == "already_evaluated"
        assert await refused(client, WORLD.evaluation(first, 0, 3.0)) == "already_evaluated"
        assert len(coordinator.journal.tree) == size + 1


async def test_disagreement_is_counted_and_shown(serve: Serve) -> None:
    """All have told a loss and differ: a counter, no figure, and nobody is suspended."""
    async with serve(ManualClock(NOW_S), WORLD, metrics="127.0.0.1:0") as coordinator, connected(coordinator) as client:
        await train(client, 1)
        for loss, peer in enumerate(await drawn(client), 1):
            await client.submit_evaluation(WORLD.evaluation(peer, 0, float(loss)))
        page, metrics = (await get(coordinator, "/")).text, (await get(coordinator, "/metrics")).text
        assert (await get(coordinator, "/api/evaluations")).json()["disputed"] == 1
        assert coordinator.journal.suspended_by_audits == 0
    assert "swarm_coordinator_evaluations_disputed_total 1.0" in metrics
    assert "not agreed" in page


async def test_a_restart_and_a_snapshot_keep_evaluations(serve: Serve, tmp_path: Path) -> None:
    """What was told is in the database; the raw ledger is sound, and a snapshot of it says the same."""
    async with serve(ManualClock(NOW_S), WORLD) as coordinator, connected(coordinator) as client:
        await train(client, 1)
        for peer in (await drawn(client))[:2]:
            await client.submit_evaluation(WORLD.evaluation(peer, 0))
        owner = coordinator.identity.peer_id
    async with serve(ManualClock(NOW_S), WORLD) as coordinator, connected(coordinator) as client:
        answer: ListEvaluationsResponse = await client.list_evaluations("")
        assert [each.loss for each in answer.agreed] == [2.0]
        assert len(await drawn(client)) == 1
    store = SqlStore.open(f"sqlite:///{tmp_path / 'state' / 'coordinator.db'}")
    try:
        path = tmp_path / "snapshot"
        write(path, *restore(store, owner))
        sound = check(store, path)
        assert sound.snapshot_entries == store.size()
        assert read(path)[1].panels(WORLD.run_id) == sound.state.panels(WORLD.run_id)
    finally:
        store.close()
