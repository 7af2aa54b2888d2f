"""Keeping everybody's pieces: what can be had at once, what comes later, and what nobody shows."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import pytest

from peer.network.blobs import BlobStore
from peer.network.node import Unreachable
from peer.rounds.gathering import Gatherer, PieceFolder
from peer.rounds.values import CommitFacts, RosterMember
from swarm.errors import Rejected
from swarm.identity import Identity
from swarm.manifest import Manifest
from swarm.merkle import blob_hash
from swarm.messages import seal
from swarm.rpc.v1.peer_pb2 import Ack
from swarm.rpc.v1.signed_pb2 import AnnouncedCommit, Commit
from tests.writing import writing_run

RUN = b"r" * 32


@dataclass
class Others:
    """What other peers show, and what was asked of them."""

    store: BlobStore = field(default_factory=lambda: BlobStore(1 << 20))
    shown: dict[bytes, bytes | Exception] = field(default_factory=dict)
    asked: list[tuple[str, dict[bytes, int]]] = field(default_factory=list)

    async def fetch(self, peer: str, sizes: Mapping[bytes, int], *, patience_s: float) -> dict[bytes, bytes]:
        """As `Transfer` does."""
        del patience_s
        self.asked.append((peer, dict(sizes)))
        (name,) = sizes
        found = self.shown.get(name)
        if found is None:
            await asyncio.Event().wait()
        if isinstance(found, Exception):
            raise found
        return {name: cast("bytes", found)}


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return writing_run(tmp_path_factory.mktemp("run"))[0]


@dataclass
class Swarm:
    """Two others of whom each has committed to a piece in a round."""

    others: Others
    gatherer: Gatherer
    identities: list[Identity]

    def commit(self, place: int, round_index: int, raw: bytes) -> CommitFacts:
        """What one of them has committed to."""
        key, name = self.identities[place], blob_hash(raw)
        signed = seal(key, Commit(run_id=RUN, round=round_index, evidence_root=name))
        return CommitFacts(key.peer_id, b"", 9, (), evidence_root=name, signed=AnnouncedCommit(commit=signed))

    async def gather(self, round_index: int, *commits: CommitFacts) -> list[tuple[int, bytes]]:
        """What is kept after a round."""
        roster = [RosterMember(key.peer_id, 5) for key in self.identities]
        await self.gatherer.gather(round_index, roster, commits)
        return [(kept.round_index, kept.raw) for kept in self.gatherer.folder.pieces(RUN)]


@pytest.fixture
def swarm(manifest: Manifest, tmp_path: Path) -> Swarm:
    others = Others()
    gatherer = Gatherer(manifest, cast("Any", others), PieceFolder(tmp_path / "pieces"), wait_s=0.05)
    return Swarm(others, gatherer, sorted((Identity.generate() for _ in range(2)), key=lambda key: key.peer_id))


async def test_our_own_is_at_hand_and_others_are_fetched(swarm: Swarm) -> None:
    """With a limit that follows from what the commit says; afterwards anybody can have them from us."""
    own, other = b"ours", b"theirs"
    swarm.others.store.put(own, 1)
    swarm.others.shown[blob_hash(other)] = other
    nothing = CommitFacts(swarm.identities[0].peer_id, b"", 0, ())
    found = await swarm.gather(1, swarm.commit(0, 1, own), swarm.commit(1, 1, other), nothing)
    assert sorted(found) == [(1, own), (1, other)]
    assert swarm.others.asked == [(swarm.identities[1].peer_id, {blob_hash(other): 64 + 4 * 9 + 16 * 5})]
    assert swarm.others.store.get(blob_hash(other)) == other
    assert swarm.gatherer.folder.lookup(blob_hash(other)) == other


@pytest.mark.parametrize("failure", [None, Unreachable("somebody"), Rejected("wrong_hash", "", "somebody")])
async def test_what_is_not_shown_is_asked_for_again(swarm: Swarm, failure: Exception | None) -> None:
    """Somebody silent holds nobody up for long; what comes in a later round is kept under its own."""
    late = b"late"
    if failure is not None:
        swarm.others.shown[blob_hash(late)] = failure
    assert await swarm.gather(1, swarm.commit(0, 1, late)) == []
    swarm.others.shown[blob_hash(late)] = late
    assert await swarm.gather(2) == [(1, late)]
    asked = len(swarm.others.asked)
    await swarm.gather(3)
    assert len(swarm.others.asked) == asked == 2


async def test_what_nobody_keeps_any_more_is_not_asked_for(swarm: Swarm, manifest: Manifest) -> None:
    """After as many rounds as auditors may ask."""
    await swarm.gather(1, swarm.commit(0, 1, b"gone"))
    await swarm.gather(2 + manifest.audit.within_rounds)
    assert len(swarm.others.asked) == 1


async def test_a_commit_of_something_else_is_no_piece(swarm: Swarm, tmp_path: Path) -> None:
    """Files that are no signed commits, or not of this run, are left out."""
    swarm.others.store.put(b"ours", 1)
    await swarm.gather(1, swarm.commit(0, 1, b"ours"))
    (path,) = (tmp_path / "pieces").glob("*.commit")
    elsewhere = seal(swarm.identities[0], Commit(run_id=b"x" * 32))
    (tmp_path / "pieces" / "0000000002-other.commit").write_bytes(elsewhere.SerializeToString())
    (tmp_path / "pieces" / "0000000003-other.commit").write_bytes(b"\xff\xff" + Ack().SerializeToString())
    assert [kept.raw for kept in swarm.gatherer.folder.pieces(RUN)] == [b"ours"]
    path.with_suffix(".piece").write_bytes(b"else")
    assert list(swarm.gatherer.folder.pieces(RUN)) == []
