"""Looking at what another peer has generated: whether it is what its commit promises, and whether the model wrote it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from peer.judging import Judgement, judge_samples
from peer.pieces import is_promised, most_bytes, unpack
from peer.rounds.planning import sample_spans
from peer.rounds.training import TrainingThread
from peer.rounds.values import CommitFacts, RosterMember
from swarm.audits import FAILED

SAMPLES = 4


@dataclass(frozen=True)
class Proofreader:
    """Reads pieces of a round with this roster, in which all together had `batch_samples` samples to write."""

    training: TrainingThread
    round_index: int
    roster: Sequence[RosterMember]
    batch_samples: int

    def most_bytes(self, commit: CommitFacts) -> int:
        """The size that a peer's piece has at most."""
        return most_bytes(commit.weight, self._span(commit)[1])

    async def judged(self, commit: CommitFacts, raw: bytes, seed: bytes) -> Judgement | None:
        """What to say of a piece, some of whose samples, drawn by the audit's `seed`, are computed again; None when stopped.

        Raises `Rejected` for bytes that are no piece.
        """
        generator, why_stopped = self.training.generator, self.training.why_stopped
        piece = unpack(raw, generator.writer.sampling, generator.writer.vocabulary, commit.peer)
        if not is_promised(piece, self._span(commit), commit.weight, commit.loss):
            return Judgement(FAILED, "piece")
        looked = await self.training.in_thread(lambda: generator.look(piece, SAMPLES, seed, why_stopped))
        return None if looked is None else judge_samples(looked.place, looked.problem, looked.gap, looked.tolerance)

    def _span(self, commit: CommitFacts) -> tuple[int, int]:
        return sample_spans(self.round_index, self.roster, self.batch_samples).get(commit.peer, (0, 0))
