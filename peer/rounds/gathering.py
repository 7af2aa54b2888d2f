"""The pieces of a run that generates: every peer keeps those of all contributors, with the commits that name them by hash.

So samples outlive the peers that wrote them, and any peer's folder is enough to make data of.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import structlog

from peer.network.node import PeerFailure
from peer.network.transfer import Transfer
from peer.pieces import most_bytes
from peer.rounds.planning import sample_spans
from peer.rounds.values import CommitFacts, RosterMember
from swarm.errors import Rejected
from swarm.manifest import Manifest
from swarm.merkle import blob_hash
from swarm.messages import open_signed, parse
from swarm.rpc.v1.signed_pb2 import Commit, Signed

COMMIT, PIECE = ".commit", ".piece"
WAIT_S = 10.0

log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class Committed:
    """A piece that somebody has committed to."""

    round_index: int
    peer: str
    raw: bytes


@dataclass
class PieceFolder:
    """Pieces on disk, and their commits, signed."""

    directory: Path
    _names: dict[bytes, Path] = field(default_factory=dict)

    def keep(self, commit: Signed, evidence_root: bytes, round_index: int, raw: bytes) -> None:
        """Write a piece, whose hash was checked, and then what names it."""
        self.directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        path = self._path(round_index, commit.signer)
        for place, content in ((path, raw), (path.with_suffix(COMMIT), commit.SerializeToString(deterministic=True))):
            temporary = place.with_name(f".{place.name}")
            temporary.write_bytes(content)
            temporary.replace(place)
        self._names[evidence_root] = path

    def load(self, run_id: bytes) -> None:
        """Serve what an earlier start has kept."""
        self._names |= {blob_hash(kept.raw): self._path(kept.round_index, kept.peer) for kept in self.pieces(run_id)}

    def _path(self, round_index: int, peer: str) -> Path:
        return self.directory / f"{round_index:010d}-{peer}{PIECE}"

    def lookup(self, name: bytes) -> bytes | None:
        """The piece of that hash, for others."""
        path = self._names.get(name)
        if path is None:
            return None
        try:
            content = path.read_bytes()
        except OSError:
            return None
        return content if blob_hash(content) == name else None

    def pieces(self, run_id: bytes) -> Iterator[Committed]:
        """All whole pieces of a run whose commits are their authors', by round and author; damaged ones are told and left out."""
        for path in sorted(self.directory.glob(f"*{COMMIT}")):
            try:
                signed = parse(Signed, path.read_bytes())
                commit = open_signed(signed, Commit, run_id=run_id)
                raw = path.with_suffix(PIECE).read_bytes()
                if blob_hash(raw) != commit.evidence_root:
                    raise Rejected("bad_piece", "another hash", signed.signer)
            except (OSError, Rejected) as error:
                log.warning("piece_left_out", path=str(path), error=str(error))
                continue
            yield Committed(int(commit.round), signed.signer, raw)


@dataclass(frozen=True)
class _Wanted:
    """A piece that is to be kept."""

    round_index: int
    commit: CommitFacts
    samples: int


@dataclass
class Gatherer:
    """Fetches the pieces of a round's contributors, for a while, before the round is called done; later what is lacking."""

    manifest: Manifest
    transfer: Transfer
    folder: PieceFolder
    wait_s: float = WAIT_S
    _lacking: list[_Wanted] = field(default_factory=list)

    async def gather(self, round_index: int, roster: Sequence[RosterMember], commits: Iterable[CommitFacts]) -> None:
        """Keep all pieces of these commits that can be had, and of earlier ones for as long as auditors may ask for them."""
        spans = sample_spans(round_index, roster, self.manifest.strategy.batch_samples)
        wanted = [_Wanted(round_index, item, spans[item.peer][1]) for item in commits if item.weight and item.peer in spans]
        oldest = round_index - self.manifest.audit.within_rounds
        wanted += [item for item in self._lacking if item.round_index >= oldest]
        kept = await asyncio.gather(*map(self._keep, wanted))
        self._lacking = [item for item, done in zip(wanted, kept, strict=True) if not done]

    async def _keep(self, wanted: _Wanted) -> bool:
        """Whether a piece is kept now."""
        commit, store = wanted.commit, self.transfer.store
        name, raw = commit.evidence_root, store.get(commit.evidence_root)
        try:
            if raw is None:
                sizes = {name: most_bytes(commit.weight, wanted.samples)}
                async with asyncio.timeout(self.wait_s):
                    raw = (await self.transfer.fetch(commit.peer, sizes, patience_s=self.wait_s))[name]
                store.put_verified(name, raw, wanted.round_index)
                store.keep_until((name,), wanted.round_index + self.manifest.audit.within_rounds)
            await asyncio.to_thread(self.folder.keep, commit.signed.commit, name, wanted.round_index, bytes(raw))
        except (PeerFailure, Rejected, OSError, TimeoutError) as error:
            reason = str(error) or type(error).__name__
            log.warning("piece_not_kept", round=wanted.round_index, peer=commit.peer, error=reason)
            return False
        return True
