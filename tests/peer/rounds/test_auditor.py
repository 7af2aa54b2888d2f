"""What a peer does with others' claims to have evidence."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from peer.network.node import Silent
from peer.rounds.auditor import Auditor
from peer.rounds.docket import Docket
from swarm.errors import Rejected
from swarm.merkle import blob_hash
from swarm.messages import payload_hash, seal
from swarm.rpc.v1.peer_pb2 import Delivery
from swarm.rpc.v1.signed_pb2 import EvidenceNotice
from tests.peer.test_evidence import PEERS, REDUCER, evidence_of_merge, run_of

SENDER, OTHER = PEERS[0].peer_id, PEERS[1].peer_id


class Wire:
    """Blobs that others offer, and who was asked; a blob that isn't there is never answered."""

    def __init__(self) -> None:
        self.blobs: dict[bytes, bytes] = {}
        self.asked: list[str] = []

    async def fetch(self, peer: str, sizes: Mapping[bytes, int]) -> dict[bytes, bytes]:
        self.asked.append(peer)
        if not set(sizes) <= set(self.blobs):
            raise Silent(peer, "no answer")
        return {name: self.blobs[name] for name in sizes}


@pytest.fixture
def wire() -> Wire:
    return Wire()


@pytest.fixture
def auditor(tmp_path: Path, wire: Wire) -> Auditor:
    """Knows the run of the evidence."""
    run_id = payload_hash(evidence_of_merge("int4").manifest)
    refused, proofs = list[tuple[str, str]](), list[str]()
    services: Any = SimpleNamespace(
        manifest=run_of("int4"),
        checker=SimpleNamespace(run_id=run_id),
        transfer=wire,
        pool=ThreadPoolExecutor(1),
        observer=SimpleNamespace(refused=lambda sender, reason: refused.append((sender, reason)), proven=proofs.append),
    )
    return Auditor(services, Docket(tmp_path / "evidence", run_id), 0.02)


def offered(auditor: Auditor, wire: Wire, raw: bytes, accused: str = REDUCER.peer_id, **changes: Any) -> EvidenceNotice:
    """A notice of a blob that can be had."""
    name = blob_hash(raw)
    wire.blobs[name] = raw
    values = {"round": 1, "hash": name, "size_bytes": len(raw), "accused": accused} | changes
    return auditor.check_notice(seal(PEERS[0], EvidenceNotice(run_id=auditor.docket.run_id, **values)))


async def test_a_proof_is_fetched_once_and_believed_after_checking(auditor: Auditor, wire: Wire) -> None:
    """Whoever else offers one about the same peer isn't asked."""
    raw = evidence_of_merge("int4").SerializeToString()
    await auditor.hear(SENDER, offered(auditor, wire, raw))
    assert auditor.docket.barred == {REDUCER.peer_id}
    await auditor.hear(OTHER, offered(auditor, wire, raw))
    await auditor.hear(OTHER, offered(auditor, wire, raw + b"x"))
    assert wire.asked == [SENDER]


async def test_who_offers_nothing_is_not_listened_to_again(auditor: Auditor, wire: Wire) -> None:
    """Evidence of a right merge convicts nobody; a true proof by somebody else still does."""
    wrong = evidence_of_merge("int4", wrong=False).SerializeToString()
    await auditor.hear(SENDER, offered(auditor, wire, wrong))
    raw = evidence_of_merge("int4").SerializeToString()
    await auditor.hear(SENDER, offered(auditor, wire, raw + b"\x00"))
    assert wire.asked == [SENDER]
    assert not auditor.docket.barred
    await auditor.hear(OTHER, offered(auditor, wire, raw))
    assert auditor.docket.barred == {REDUCER.peer_id}


async def test_a_proof_that_cant_be_had_is_nobodys_fault(auditor: Auditor, wire: Wire) -> None:
    """The sender may have died."""
    raw = evidence_of_merge("int4").SerializeToString()
    notice = offered(auditor, wire, raw)
    wire.blobs.clear()
    await auditor.hear(SENDER, notice)
    assert not auditor.docket.barred
    wire.blobs[notice.hash] = raw
    await auditor.hear(SENDER, notice)
    assert auditor.docket.barred == {REDUCER.peer_id}


async def test_leaders_tell_those_who_came_later(auditor: Auditor, wire: Wire) -> None:
    """Each once, however old the round; the accused never. What is told can be had by its hash."""
    raw, told = evidence_of_merge("int4").SerializeToString(), list[tuple[str, Delivery]]()
    await auditor.hear(SENDER, offered(auditor, wire, raw))
    services: Any = auditor.services
    services.identity = PEERS[0]
    services.post = SimpleNamespace(send=lambda peers, delivery: told.extend((peer, delivery) for peer in peers))

    async def after(leader: str, *others: str) -> list[str]:
        run: Any = SimpleNamespace(
            round_index=500, state=SimpleNamespace(spans={}),
            setup=SimpleNamespace(me=SENDER, others=others, all_gather=True),
        )  # fmt: skip
        proposal: Any = SimpleNamespace(leader=leader, contributors=())
        told.clear()
        await auditor.after(run, proposal)
        return [peer for peer, _ in told]

    assert await after(OTHER, OTHER) == []
    assert await after(SENDER, OTHER, REDUCER.peer_id) == [OTHER]
    notice = auditor.check_notice(told[0][1].evidence)
    assert auditor.docket.lookup(notice.hash) == raw
    assert await after(SENDER, OTHER, PEERS[3].peer_id) == [PEERS[3].peer_id]
    assert await after(SENDER, OTHER, PEERS[3].peer_id) == []


@pytest.mark.parametrize("changes", [{"size_bytes": 0}, {"size_bytes": 1 << 40}, {"hash": b"short"}])
def test_notices_that_cant_be_true(auditor: Auditor, wire: Wire, changes: dict[str, Any]) -> None:
    """Before anything is fetched."""
    with pytest.raises(Rejected, match="malformed"):
        offered(auditor, wire, b"evidence", **changes)
