"""What a peer knows of held-out losses, and the checkpoint of the best state: one, beside the newest ones.

In a peer's folder: `evaluations.json`, and `best/` with a checkpoint in the usual form.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import structlog
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from peer.folders import write_atomically
from peer.state import Snapshot, save_checkpoint
from swarm.errors import DiskFull
from swarm.evaluations import perplexity
from swarm.manifest import Manifest
from swarm.rpc.v1.coordinator_pb2 import AgreedEvaluation

RECORD = "evaluations.json"
BEST = "best"
MOST_KNOWN = 1024

log = structlog.get_logger(__name__)


class Known(BaseModel):
    """The held-out loss after a round, in nats per token, on which so many agreed; 0 of them: this peer's own."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    round: int = Field(ge=0)
    loss: float = Field(ge=0, allow_inf_nan=False)
    evaluators: int = Field(ge=0)


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    run_id: str
    agreed: list[Known] = Field([], max_length=MOST_KNOWN)
    best: Known | None = None


@dataclass
class BestCheckpoint:
    """The losses on which quorums agreed, in the order of their rounds, and which state is kept as the best."""

    directory: Path
    run_id: str
    agreed: list[Known]
    best: Known | None = None

    @classmethod
    def open(cls, directory: Path, run: Manifest) -> BestCheckpoint:
        """What an earlier start has left; nothing where that is damaged, or of another run."""
        try:
            record = _Record.model_validate_json((directory / RECORD).read_bytes())
        except (OSError, ValidationError):
            record = _Record(run_id=run.run_id)
        if record.run_id != run.run_id:
            record = _Record(run_id=run.run_id)
        best = record.best
        if best is not None and not (directory / BEST / f"round-{best.round + 1:012d}.json").exists():
            best = None
        return cls(directory, run.run_id, list(record.agreed), best)

    def learn(self, told: Iterable[AgreedEvaluation]) -> None:
        """Take what the coordinator says into the record."""
        known = {each.round: each for each in self.agreed}
        for each in told:
            if 0 <= each.loss < math.inf:
                known[each.round] = Known(round=each.round, loss=each.loss, evaluators=each.evaluators)
        agreed = [known[number] for number in sorted(known)[-MOST_KNOWN:]]
        if agreed != self.agreed:
            self.agreed = agreed
            self._write()

    def offer(self, snapshot: Snapshot, known: Known) -> bool:
        """Keep the state if it is better than the kept one, which goes then; whether it was kept."""
        if self.best is not None and known.loss >= self.best.loss:
            return False
        try:
            save_checkpoint(self.directory / BEST, snapshot, self.run_id, keep=1)
        except (DiskFull, OSError) as error:
            log.warning("best_not_kept", round=known.round, error=str(error))
            return False
        self.best = known
        self._write()
        log.info("best_kept", round=known.round, loss=known.loss, evaluators=known.evaluators)
        return True

    def loss_of(self, round_index: int) -> float | None:
        """The held-out loss after a round, as far as it is known."""
        found = [each for each in [*self.agreed, *filter(None, [self.best])] if each.round == round_index]
        return found[0].loss if found else None

    def describe(self) -> dict[str, Any]:
        """For `swarm status`: what was agreed on last, and the best."""
        newest = self.agreed[-1] if self.agreed else None
        return {name: _described(each) for name, each in (("newest", newest), ("best", self.best)) if each is not None}

    def _write(self) -> None:
        """Keep the record; a full disk costs only that."""
        record = _Record(run_id=self.run_id, agreed=self.agreed, best=self.best)
        try:
            write_atomically(self.directory / RECORD, record.model_dump_json().encode())
        except OSError as error:
            log.warning("evaluations_not_saved", error=error.strerror)


def _described(known: Known) -> dict[str, Any]:
    return {**known.model_dump(), "perplexity": perplexity(known.loss)}
