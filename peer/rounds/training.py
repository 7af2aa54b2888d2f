"""The training thread: one job at a time, stopped by a reason, never blocking the network."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from peer.rounds.run import Contribution
from peer.trainer import Progress, TrainedUpdate, Trainer, Vector


@dataclass
class TrainingThread:
    """Runs a `Trainer` in a thread of its own."""

    trainer: Trainer
    on_progress: Callable[[Progress], None] = lambda progress: None
    last: TrainedUpdate | None = None
    _reason: str | None = None
    _pool: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, thread_name_prefix="training"))

    async def train(self, theta: Vector, round_index: int, peer: str, quota: int, tokens: int) -> Contribution:
        """Train one round. A cancelled call stops the thread at its next micro-batch and waits for it."""
        self._reason = None
        loop = asyncio.get_running_loop()
        job = loop.run_in_executor(
            self._pool,
            lambda: self.trainer.train_round(
                theta, round_index, peer, quota, tokens, should_stop=lambda: self._reason, progress=self.on_progress
            ),
        )
        try:
            trained = await asyncio.shield(job)
        except asyncio.CancelledError:
            self._reason = "cancelled"
            await asyncio.wait([job])
            raise
        self.last = trained
        return contribution_of(trained)

    def stop(self, reason: str) -> None:
        """End the job early; what it has done so far still counts."""
        self._reason = reason

    async def release(self) -> None:
        """Free the device."""
        await asyncio.get_running_loop().run_in_executor(self._pool, self.trainer.release)

    def close(self) -> None:
        """End the thread."""
        self._reason = "closed"
        self._pool.shutdown(wait=True, cancel_futures=True)


def contribution_of(trained: TrainedUpdate) -> Contribution:
    """What goes into the commit; nothing where there were values that are not finite."""
    if trained.error is not None or not trained.samples:
        return Contribution(None, 0, 0.0, trained.seconds)
    return Contribution(trained.update, trained.samples, trained.loss_mean, trained.seconds)
