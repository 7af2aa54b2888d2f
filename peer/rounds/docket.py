"""Who was proven guilty: evidence on disk, one file for each."""

from __future__ import annotations

import errno
from dataclasses import dataclass, field
from pathlib import Path

import structlog

from peer.evidence import MAX_EVIDENCE_BYTES, Verdict, verify_evidence
from swarm.errors import Rejected

SUFFIX = ".evidence"
MOST_KEPT = 1024

log = structlog.get_logger(__name__)


@dataclass
class Docket:
    """The proofs of one run."""

    directory: Path
    run_id: bytes
    proven: dict[str, Verdict] = field(default_factory=dict)

    def load(self) -> None:
        """Read and check again what is on disk. Files that prove nothing are left alone."""
        for path in sorted(self.directory.glob(f"*{SUFFIX}"))[:MOST_KEPT]:
            try:
                if path.stat().st_size <= MAX_EVIDENCE_BYTES:
                    self._note(verify_evidence(path.read_bytes()))
            except (OSError, Rejected) as error:
                log.warning("evidence_skipped", file=path.name, error=str(error))

    def add(self, raw: bytes) -> Verdict | None:
        """Keep evidence that proves something new about this run; what it proves. Raises `Rejected` where it proves nothing."""
        verdict = verify_evidence(raw)
        if not self._note(verdict):
            return None
        log.warning("proven", accused=verdict.accused, kind=verdict.kind, round=verdict.round_index, why=verdict.why)
        self._save(verdict, raw)
        return verdict

    @property
    def barred(self) -> frozenset[str]:
        """All of them."""
        return frozenset(self.proven)

    def _note(self, verdict: Verdict) -> bool:
        if verdict.run_id != self.run_id or verdict.accused in self.proven or len(self.proven) >= MOST_KEPT:
            return False
        self.proven[verdict.accused] = verdict
        return True

    def _save(self, verdict: Verdict, raw: bytes) -> None:
        path = self.directory / f"{verdict.accused}{SUFFIX}"
        temporary = path.with_suffix(".tmp")
        try:
            self.directory.mkdir(parents=True, exist_ok=True, mode=0o700)
            temporary.write_bytes(raw)
            temporary.replace(path)
        except OSError as error:
            log.warning("evidence_not_saved", error=errno.errorcode.get(error.errno or 0, str(error)))
