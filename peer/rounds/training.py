"""The training thread: one job at a time, stopped by a reason, never blocking the network."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar

from peer.generator import Generator
from peer.rounds.run import Contribution
from peer.sketch import Sketcher
from peer.trainer import Early, Joined, Progress, TrainedUpdate, Trainer, Vector

T = TypeVar("T")


NOTHING = Contribution(None, 0, 0.0, 0.0)


@dataclass(frozen=True)
class _Ahead:
    """A round that was begun early."""

    round_index: int
    early: Early
    job: asyncio.Future[TrainedUpdate]


@dataclass(frozen=True)
class _Begun:
    """A round that was begun as soon as its weights were there."""

    round_index: int
    theta: Vector
    quota: int
    job: asyncio.Future[TrainedUpdate]


@dataclass
class TrainingThread:
    """Runs a `Trainer`, or where the run generates a `Generator`, in a thread of its own."""

    worker: Trainer | Generator
    on_progress: Callable[[Progress], None] = lambda progress: None
    on_trained: Callable[[TrainedUpdate], None] = lambda trained: None
    _reason: str | None = None
    _held: str | None = None
    _ahead: _Ahead | None = None
    _begun: _Begun | None = None
    _pool: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, thread_name_prefix="training"))

    @property
    def trainer(self) -> Trainer:
        """What trains. Raises `ValueError` where the run generates."""
        if isinstance(self.worker, Generator):
            raise ValueError("the run generates")
        return self.worker

    @property
    def generator(self) -> Generator:
        """What generates. Raises `ValueError` where the run trains."""
        if not isinstance(self.worker, Generator):
            raise ValueError("the run trains")
        return self.worker

    async def write(self, first: int, count: int) -> Contribution:
        """Write samples, from number `first` on; nothing where we were told to stop before. Cancelled like `train`."""
        if self._held is not None:
            return NOTHING
        self._reason = None
        generator = self.generator
        return await self._outcome(self._submit(lambda: generator.write_round(first, count, self.why_stopped, self.on_progress)))

    async def train(
        self, theta: Vector, round_index: int, peer: str, quota: int, tokens: int, sketcher: Sketcher | None = None
    ) -> Contribution:
        """Train one round; nothing, without loading the model, where we were told to stop before it began.

        A cancelled call stops the thread at its next micro-batch and waits for it.
        """
        begun = self._begun
        if begun is not None and (begun.round_index, begun.quota) == (round_index, quota) and begun.theta is theta:
            self._begun = None
            return await self._outcome(begun.job)
        await self.drop_early()
        if self._held is not None:
            return NOTHING
        return await self._outcome(self._train(theta, round_index, peer, quota, tokens, sketcher))

    def begin(self, theta: Vector, round_index: int, peer: str, quota: int, tokens: int) -> None:
        """Begin a round before all about it is settled; `train` with the same weights and quota goes on from there."""
        self._begun = _Begun(round_index, theta, quota, self._train(theta, round_index, peer, quota, tokens, None))

    def _train(
        self, theta: Vector, round_index: int, peer: str, quota: int, tokens: int, sketcher: Sketcher | None
    ) -> asyncio.Future[TrainedUpdate]:
        self._reason = None
        return self._submit(
            lambda: self.trainer.train_round(
                theta, round_index, peer, quota, tokens, self.why_stopped, self.on_progress, sketcher
            )
        )

    def begin_early(self, round_index: int, peer: str, quota: int, tokens: int) -> None:
        """Go on training for a round whose base isn't agreed yet; `quota` and `tokens` are guesses."""
        self._reason = None
        early = Early()
        job = self._submit(
            lambda: self.trainer.train_ahead(early, round_index, peer, quota, tokens, self.why_stopped, self.on_progress)
        )
        self._ahead = _Ahead(round_index, early, job)

    def is_ahead(self, round_index: int) -> bool:
        """Whether this round has been begun early."""
        return self._ahead is not None and self._ahead.round_index == round_index

    async def join_early(self, theta: Vector, quota: int, tokens: int) -> Contribution:
        """Let the round that was begun early go on from the agreed weights, to its end."""
        ahead, self._ahead = self._ahead, None
        if ahead is None:
            raise ValueError("no round was begun early")
        ahead.early.join(Joined(theta, quota, tokens))
        return await self._outcome(ahead.job)

    async def drop_early(self) -> None:
        """Give up what was begun early."""
        jobs = [started.job for started in (self._ahead, self._begun) if started is not None]
        self._ahead = self._begun = None
        if jobs:
            self._reason = "cancelled"
            await asyncio.gather(*jobs, return_exceptions=True)

    async def start_over(self) -> None:
        """Give up what was begun early, and begin the inner optimizer anew before whatever is trained next."""
        await self.drop_early()
        self._pool.submit(self.trainer.forget_inner)

    def _submit(self, work: Callable[[], TrainedUpdate]) -> asyncio.Future[TrainedUpdate]:
        return asyncio.get_running_loop().run_in_executor(self._pool, work)

    async def _outcome(self, job: asyncio.Future[TrainedUpdate]) -> Contribution:
        try:
            trained = await asyncio.shield(job)
        except asyncio.CancelledError:
            self._reason = "cancelled"
            await asyncio.wait([job])
            raise
        self.on_trained(trained)
        return contribution_of(trained, self.worker.precision)

    def is_stopped(self) -> bool:
        """Whether the job was told to end."""
        return self.why_stopped() is not None

    def why_stopped(self) -> str | None:
        """The reason for which the job was told to end."""
        return self._held or self._reason

    async def in_thread(self, work: Callable[[], T]) -> T:
        """Run something else there, after the present job; what it gives."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, work)

    def stop(self, reason: str) -> None:
        """End the job early, and every other until `go_on`; what it has done so far still counts."""
        self._held = reason

    def go_on(self) -> None:
        """Jobs run again."""
        self._held = None

    async def release(self) -> None:
        """Free the device."""
        await asyncio.get_running_loop().run_in_executor(self._pool, self.worker.release)

    def close(self) -> None:
        """End the thread."""
        self._reason = "closed"
        self._pool.shutdown(wait=True, cancel_futures=True)


def contribution_of(trained: TrainedUpdate, precision: str) -> Contribution:
    """What goes into the commit; nothing where there were values that are not finite."""
    if trained.error is not None or not trained.samples:
        return Contribution(None, 0, 0.0, trained.seconds)
    leaves, piece = trained.leaves, trained.piece
    return Contribution(trained.update, trained.samples, trained.loss_mean, trained.seconds, leaves, precision, piece)
