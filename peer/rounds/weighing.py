"""Weighing a contribution that can't be computed again: what it does to the loss on its author's samples and on others."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from peer.codec import Vector
from peer.data import Indices
from peer.judging import Gain
from peer.rounds.training import TrainingThread
from peer.rounds.values import CommitFacts

WEIGHED_TOKENS = 1 << 13
FEWEST_WEIGHED, MOST_WEIGHED = 64, 256


@dataclass
class Scales:
    """Losses at `theta`, [parameters], which round `round_index` started from, on samples that an audit's `seed` draws."""

    training: TrainingThread
    round_index: int
    theta: Vector
    seed: bytes
    _others_before: NDArray[np.float64] | None = None

    async def gain(self, commit: CommitFacts, update: Vector) -> Gain | None:
        """What a peer's update, [parameters], does to its own samples and to others'; None when we were stopped.

        All in one go: training waits for it once, and so does it for training.
        """
        return await self.training.in_thread(lambda: self._weigh(commit, update))

    def _weigh(self, commit: CommitFacts, update: Vector) -> Gain | None:
        trainer = self.training.trainer
        most = min(MOST_WEIGHED, max(FEWEST_WEIGHED, WEIGHED_TOKENS // trainer.sequence_length))
        drawn = np.random.default_rng(list(self.seed)).permutation(commit.weight)[:most]
        own = trainer.samples_of(self.round_index, commit.peer, commit.weight)[np.sort(drawn)]
        others = trainer.samples_of(self.round_index, self.seed.hex(), most)  # what nobody's name gives
        if self._others_before is None:
            self._others_before = self._losses(self.theta, others)
        before = self._losses(self.theta, own)
        after = self._losses(self.theta - update, np.concatenate([own, others]))
        if self._others_before is None or before is None or after is None:
            return None
        return Gain.of(before - after[: len(own)], self._others_before - after[len(own) :])

    def _losses(self, theta: Vector, samples: Indices) -> NDArray[np.float64] | None:
        return self.training.trainer.losses(theta, samples, self.training.why_stopped)
