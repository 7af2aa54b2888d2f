"""A round's parts among real nodes: who sends what to whom, and that everybody gets the same."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from peer.codec import make_codec
from peer.network.blobs import BlobStore
from peer.network.transfer import Transfer
from peer.rounds.exchange import Exchange
from peer.rounds.residuals import Residuals
from peer.rounds.values import BallotNumber, CommitFacts, IncludedCommit, ProposalFacts
from swarm import manifest
from swarm.identity import Identity

RUN = bytes(32)
VALUES = 1 << 22
CODEC = make_codec(manifest.Codec.model_validate({"kind": "sparse", "part_values": 1 << 16}), VALUES)
UPDATE_BYTES = sum(CODEC.part_size_limit(part) for part in range(CODEC.part_count))
SLOW, FAST = 64_000, 2_000_000
ROUND = 5


@dataclass
class Seat:
    """A peer in the round."""

    member: Any
    exchange: Exchange
    update: np.ndarray
    commit: CommitFacts

    @property
    def peer(self) -> str:
        return str(self.member.peer)

    @property
    def sent_updates(self) -> float:
        """How many whole updates this peer has sent."""
        return float(self.member.node.traffic.sent["bulk"] / UPDATE_BYTES)


Meet = Callable[[Sequence[int]], Awaitable[list[Seat]]]


@pytest.fixture
async def meet(start_node: Any, tmp_path: Path) -> AsyncIterator[Meet]:
    """Peers with these uplinks, held to them, that know each other and have published an update each."""
    with ExitStack() as stack:

        async def start(uploads: Sequence[int]) -> list[Seat]:
            members: list[Any] = []
            for _ in uploads:
                members.append(await start_node(knows=tuple(members)))
            seats = []
            for number, (member, upload) in enumerate(zip(members, uploads, strict=True)):
                pool = stack.enter_context(ThreadPoolExecutor(1))
                transfer = Transfer(member.node, BlobStore(1 << 28), RUN, lambda peer, token: True, lambda: None, stall_s=20)
                transfer.limit(upload, 0)
                await transfer.start()
                exchange = Exchange(
                    ROUND, member.peer, CODEC, transfer, pool, manifest.Mean(), Residuals(tmp_path / str(number), RUN.hex())
                )
                update = np.random.default_rng(number).standard_normal(VALUES).astype(np.float32)
                hashes = await exchange.publish(update)
                commit = CommitFacts(member.peer, bytes(32), 1, hashes, upload_bytes_per_s=int(transfer.upload_meter.bytes_per_s))
                seats.append(Seat(member, exchange, update, commit))
            return seats

        yield start


async def exchange_all(seats: Sequence[Seat], *listeners: CommitFacts) -> list[np.ndarray]:
    """Everybody pulls everybody's parts and merges; the results. Listeners are in the round but contribute nothing."""
    entries = [*(seat.commit for seat in seats), *listeners]
    included = tuple(IncludedCommit(item.peer, bytes(32), item.weight) for item in entries)
    proposal = ProposalFacts(b"p" * 32, BallotNumber(), seats[0].peer, bytes(32), included, ())
    commits = {item.peer: item for item in entries}

    async def play(seat: Seat) -> np.ndarray:
        seat.exchange.begin(proposal.proposal_hash)
        others = tuple(other.peer for other in seats if other is not seat)
        await seat.exchange.reduce(proposal, commits, range(CODEC.part_count), publish=False, holders=others)
        merged = seat.exchange.merged(proposal)
        assert merged is not None
        return merged

    return list(await asyncio.gather(*(play(seat) for seat in seats)))


@pytest.mark.timeout(180)
async def test_a_slow_author_sends_its_parts_about_once(meet: Meet) -> None:
    """Under a slow cap the author sends its update about once, the others pass it on, and all end with the same bits."""
    seats = await meet((SLOW, FAST, FAST, FAST, FAST))
    merged = await exchange_all(seats)
    assert all(np.array_equal(result, merged[0]) for result in merged)
    assert 1.0 <= seats[0].sent_updates < 1.1
    assert sum(seat.sent_updates for seat in seats) == pytest.approx(5 * 4, rel=0.05)


@pytest.mark.timeout(180)
async def test_equal_uplinks_send_to_each_directly(meet: Meet) -> None:
    """Where nobody is slower, every peer sends its update to each of the others."""
    seats = await meet((0, 0, 0))
    merged = await exchange_all(seats)
    assert all(np.array_equal(result, merged[0]) for result in merged)
    assert [round(seat.sent_updates, 1) for seat in seats] == [2.0, 2.0, 2.0]


@pytest.mark.timeout(180)
async def test_a_relay_that_is_gone_costs_only_time(meet: Meet) -> None:
    """What a peer that has vanished should have passed on comes from its author."""
    seats = await meet((SLOW, FAST, FAST, FAST))
    ghost = CommitFacts(Identity.generate().peer_id, bytes(32), 0, upload_bytes_per_s=50 * FAST)
    merged = await exchange_all(seats, ghost)
    assert all(np.array_equal(result, merged[0]) for result in merged)
    assert 1.5 < seats[0].sent_updates < 3.1


@pytest.mark.timeout(180)
async def test_a_relay_that_lies_is_named(meet: Meet) -> None:
    """Wrong bytes from a relay are counted against it, and the right ones come from the author."""
    seats = await meet((SLOW, FAST, FAST, FAST))
    liar = seats[1]
    named: list[tuple[str, str]] = []
    seats[2].member.node.on_rejected = lambda peer, reason: named.append((peer, reason))
    serve = liar.exchange.transfer.store.get
    own = set(liar.commit.part_hashes)

    def lie(name: bytes) -> bytes | memoryview | None:
        content = serve(name)
        return content if content is None or name in own else bytes(len(content))

    liar.exchange.transfer.store.get = lie  # type: ignore[method-assign]
    included = tuple(IncludedCommit(seat.peer, bytes(32), 1) for seat in seats)
    proposal = ProposalFacts(b"p" * 32, BallotNumber(), seats[0].peer, bytes(32), included, ())
    commits = {seat.peer: seat.commit for seat in seats}
    seats[2].exchange.begin(proposal.proposal_hash)
    await seats[2].exchange.reduce(proposal, commits, range(CODEC.part_count), publish=False)
    assert seats[2].exchange.merged(proposal) is not None
    assert named == [(liar.peer, "wrong_bytes")]
