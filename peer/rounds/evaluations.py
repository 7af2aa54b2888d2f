"""Measuring the held-out loss of what a round came to, where the ledger draws this peer for it, and keeping the best state.

It happens in the training thread between rounds. What was measured is told to the coordinator, signed; what a quorum agrees on
decides which state is the best, or, where none does, what we have measured ourselves.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path

import structlog

from peer.best import BestCheckpoint, Known
from peer.corpus import load_tokenizer
from peer.data import tree_path
from peer.rounds.run import Services
from peer.rounds.training import TrainingThread
from peer.state import Snapshot
from swarm.errors import OutOfMemory, Rejected, SwarmError
from swarm.evaluations import cleaned
from swarm.manifest import Evaluation as Settings
from swarm.messages import seal
from swarm.rpc.client import CoordinatorClient
from swarm.rpc.v1.coordinator_pb2 import ListEvaluationsResponse
from swarm.rpc.v1.signed_pb2 import Evaluation

SHORTEST_POLL_S, LONGEST_POLL_S, AWAY_S = 0.5, 30.0, 5.0
POLLS_A_ROUND, MOST_POLLS = 4, 60
KEPT_ROUNDS, KEPT_BYTES = 4, 1 << 30

log = structlog.get_logger(__name__)


@dataclass(eq=False)
class Kept:
    """The state after a round that is evaluated, until it is known what became of that."""

    round_index: int
    snapshot: Snapshot
    round_s: float
    polls: int = 0
    measured: Evaluation | None = None
    is_over: bool = False
    """Whether we have told what we measured, or can't measure it."""


@dataclass
class EvaluationDesk:
    """Asks which evaluations are due, and makes them; `files` has the run's tokenizer."""

    services: Services
    training: TrainingThread
    client: Callable[[], Awaitable[CoordinatorClient]]
    best: BestCheckpoint
    files: Path
    _kept: list[Kept] = field(default_factory=list)
    _changed: asyncio.Event = field(default_factory=asyncio.Event)

    async def keep(self, round_index: int, snapshot: Snapshot | None, round_s: float) -> None:
        """Remember the state after a round that is evaluated, in the place of the oldest one if there are too many."""
        if not self.services.manifest.is_evaluated(round_index) or snapshot is None or snapshot.round != round_index + 1:
            return
        most = max(1, min(KEPT_ROUNDS, KEPT_BYTES // snapshot.size_bytes))
        for kept in self._kept[: max(0, len(self._kept) + 1 - most)]:
            await self._give_up(kept)
        self._kept.append(Kept(round_index, snapshot, round_s))
        self._changed.set()

    async def work(self) -> None:
        """Look for evaluations for as long as there are states to measure, for ever."""
        while True:
            while not self._kept:
                self._changed.clear()
                await self._changed.wait()
            pause_s = min(LONGEST_POLL_S, max(SHORTEST_POLL_S, self._kept[-1].round_s / POLLS_A_ROUND))
            try:
                await self._look()
            except (SwarmError, Rejected) as error:
                log.info("evaluations_not_asked_for", error=str(error))
                pause_s = AWAY_S
            await asyncio.sleep(pause_s)

    async def end(self, patience_s: float) -> None:
        """Wait so long for the last evaluations; then go by what we have measured ourselves."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(patience_s):
                while self._kept:
                    self._changed.clear()
                    await self._changed.wait()
        for kept in list(self._kept):
            await self._give_up(kept)

    async def _look(self) -> None:
        """Do what is due, the oldest first."""
        for kept in list(self._kept):
            kept.polls += 1
            if kept.polls > MOST_POLLS:
                await self._give_up(kept)
        answer = await (await self.client()).list_evaluations(self.services.identity.peer_id)
        await asyncio.to_thread(self.best.learn, answer.agreed)
        for kept in list(self._kept):
            await self._settle(kept, answer)

    async def _settle(self, kept: Kept, answer: ListEvaluationsResponse) -> None:
        """Measure a state where we are asked to; keep it as the best or forget it, once a quorum has agreed."""
        due = _is_due(answer, kept)
        if due:
            await self._measure(kept)
        if kept.measured is not None and not kept.is_over:
            await self._tell(kept, kept.measured)
        agreed = next((each for each in answer.agreed if each.round == kept.round_index), None)
        if agreed is not None and (kept.is_over or not due):
            known = Known(round=agreed.round, loss=agreed.loss, evaluators=agreed.evaluators)
            await asyncio.to_thread(self.best.offer, kept.snapshot, known)
            self._forget(kept)

    async def _measure(self, kept: Kept) -> None:
        """Measure in the training thread, unless that is done or was told to stop; then again later."""
        if kept.measured is not None or kept.is_over:
            return
        try:
            kept.measured = await self.training.in_thread(lambda: self._measured(kept))
        except (OutOfMemory, SwarmError, RuntimeError) as error:  # a device that fails is the trainer's to report
            log.warning("not_evaluated", round=kept.round_index, error=str(error))
            self.services.observer.evaluated("unable")
            kept.is_over = True
            return
        if kept.measured is not None:
            log.info("evaluated", round=kept.round_index, loss=kept.measured.loss)
            self.services.observer.evaluated("measured", kept.measured.loss)

    def _measured(self, kept: Kept) -> Evaluation | None:
        """What there is to state, but for when; None when we were stopped, or there is no loss that is a number."""
        manifest, training = self.services.manifest, self.training
        settings = manifest.evaluation
        if settings is None:
            return None
        theta, samples = kept.snapshot.state.theta, manifest.evaluation_samples
        loss = training.trainer.held_out_loss(theta, samples, training.why_stopped)
        if loss is None:
            return None
        if not math.isfinite(loss):
            raise SwarmError("the held-out loss is no number", "")
        texts = self._texts(settings, kept)
        if texts is None:
            return None
        root = kept.snapshot.root
        return Evaluation(round=kept.round_index, state_root=root, samples=samples, loss=loss, texts=texts)

    def _texts(self, settings: Settings, kept: Kept) -> list[str] | None:
        """What the model writes after each prompt; None when stopped."""
        if not settings.prompts:
            return []
        tokenizer = load_tokenizer(tree_path(self.files, self.services.manifest.tokenizer))
        prompts = [tokenizer(prompt, add_special_tokens=False)["input_ids"] for prompt in settings.prompts]
        key = self.services.checker.run_id + kept.round_index.to_bytes(8, "big")
        written = self.training.trainer.continuations(
            kept.snapshot.state.theta, prompts, settings.text_tokens, key, tokenizer.eos_token_id, self.training.why_stopped
        )
        return None if written is None else [cleaned(tokenizer.decode(ids, skip_special_tokens=True)) for ids in written]

    async def _tell(self, kept: Kept, measured: Evaluation) -> None:
        """Sign it and hand it in. Raises `SwarmError` where the coordinator can't be reached."""
        measured.run_id, measured.issued_at = self.services.checker.run_id, int(self.services.clock.wall_s())
        try:
            await (await self.client()).submit_evaluation(seal(self.services.identity, measured))
        except Rejected as error:
            log.info("evaluation_not_taken", round=kept.round_index, reason=error.reason)
        kept.is_over = True

    async def _give_up(self, kept: Kept) -> None:
        """Wait no longer for others: what counts is what we have measured ourselves."""
        self._forget(kept)
        if kept.measured is not None:
            known = Known(round=kept.round_index, loss=kept.measured.loss, evaluators=0)
            await asyncio.to_thread(self.best.offer, kept.snapshot, known)

    def _forget(self, kept: Kept) -> None:
        """Free the memory that a state takes."""
        if kept in self._kept:
            self._kept.remove(kept)
            self._changed.set()


def _is_due(answer: ListEvaluationsResponse, kept: Kept) -> bool:
    """Whether we are asked to measure just this state."""
    duties = {(duty.round, duty.state_root) for duty in answer.duties}
    return (kept.round_index, kept.snapshot.root) in duties
