"""Who was proven guilty: evidence on disk, one file for each, and what others are told of it."""

from __future__ import annotations

import errno
from dataclasses import dataclass, field
from pathlib import Path

import structlog

from peer.evidence import MAX_EVIDENCE_BYTES, Verdict, verify_evidence
from swarm.errors import Rejected
from swarm.merkle import blob_hash
from swarm.rpc.v1.signed_pb2 import EvidenceNotice

SUFFIX = ".evidence"
MOST_KEPT = 1024

log = structlog.get_logger(__name__)


@dataclass
class Docket:
    """The proofs of one run."""

    directory: Path
    run_id: bytes
    proven: dict[str, Verdict] = field(default_factory=dict)
    notices: dict[str, EvidenceNotice] = field(default_factory=dict)
    _accused: dict[bytes, str] = field(default_factory=dict)

    def load(self) -> None:
        """Read and check again what is on disk. Files that prove nothing are left alone."""
        for path in sorted(self.directory.glob(f"*{SUFFIX}"))[:MOST_KEPT]:
            try:
                if path.stat().st_size <= MAX_EVIDENCE_BYTES:
                    raw = path.read_bytes()
                    verdict = verify_evidence(raw)
                    if self._note(verdict) and path == self._path(verdict.accused):
                        self._offer(verdict, raw)
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

    def lookup(self, name: bytes) -> bytes | None:
        """Evidence by its hash, for who was told of it; None without the file."""
        accused = self._accused.get(name)
        try:
            return None if accused is None else self._path(accused).read_bytes()
        except OSError:
            return None

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
        path = self._path(verdict.accused)
        temporary = path.with_suffix(".tmp")
        try:
            self.directory.mkdir(parents=True, exist_ok=True, mode=0o700)
            temporary.write_bytes(raw)
            temporary.replace(path)
        except OSError as error:
            log.warning("evidence_not_saved", error=errno.errorcode.get(error.errno or 0, str(error)))
            return
        self._offer(verdict, raw)

    def _offer(self, verdict: Verdict, raw: bytes) -> None:
        name = blob_hash(raw)
        self._accused[name] = verdict.accused
        self.notices[verdict.accused] = EvidenceNotice(
            run_id=verdict.run_id, round=verdict.round_index, hash=name, size_bytes=len(raw), accused=verdict.accused
        )

    def _path(self, accused: str) -> Path:
        return self.directory / f"{accused}{SUFFIX}"
