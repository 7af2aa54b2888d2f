"""Whatever comes over a stream: an answer, a rejection or an end, and never much memory."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any, cast

from hypothesis import example, given, settings
from hypothesis import strategies as st

from peer.network.blobs import BlobStore
from peer.network.node import PeerFailure
from peer.network.traffic import Traffic
from peer.network.transfer import FOUND, MAX_REQUEST_BYTES, MISSING, Transfer
from swarm.errors import Rejected
from swarm.merkle import HASH_BYTES, blob_hash
from swarm.rpc.v1.peer_pb2 import FetchRequest
from tests.peer.codec.codec_cases import allocating_at_most

RUN = b"\x07" * 32
CONTENT = b"what is served" * 100
NAME = blob_hash(CONTENT)
MIB = 1 << 20
SLACK_BYTES = 8 << 20  # tracemalloc counts what other threads allocate meanwhile, too
HUGE = st.integers(0, (1 << 64) - 1)


class Sink:
    """A writer that counts."""

    def __init__(self) -> None:
        self.size = 0

    def write(self, content: bytes) -> None:
        self.size += len(content)

    async def drain(self) -> None:
        pass

    def close(self) -> None:
        pass


def transfer(answer: bytes = b"") -> Transfer:
    """A transfer whose only peer answers every request with these bytes and closes."""

    async def open_stream(peer: str, name: str, timeout_s: float) -> tuple[asyncio.StreamReader, Sink]:
        return reader_of(answer), Sink()

    node = SimpleNamespace(traffic=Traffic(), peer_id="me", open_stream=open_stream)
    made = Transfer(cast("Any", node), BlobStore(4 * MIB), RUN, lambda peer, token: True, lambda: None, stall_s=1.0)
    made.store.put(CONTENT, 1)
    return made


def reader_of(content: bytes) -> asyncio.StreamReader:
    reader = asyncio.StreamReader()
    reader.feed_data(content)
    reader.feed_eof()
    return reader


def bounded(work: Callable[[], Awaitable[Any]]) -> Any:
    """The outcome of `work`; only failures that name the peer, and little memory, are allowed."""

    async def limited() -> Any:
        with contextlib.suppress(Rejected, PeerFailure, OSError, EOFError):
            return await asyncio.wait_for(work(), 10)

    with allocating_at_most(SLACK_BYTES):
        return asyncio.run(limited())


def framed(raw: bytes) -> bytes:
    return len(raw).to_bytes(4, "big") + raw


requests = st.builds(
    FetchRequest,
    run_id=st.one_of(st.just(RUN), st.binary(max_size=40)),
    hashes=st.lists(st.one_of(st.just(NAME), st.binary(max_size=40), st.binary(min_size=HASH_BYTES, max_size=HASH_BYTES))),
    offset=HUGE,
)


@given(st.binary(max_size=600))
@example(b"\xff\xff\xff\xff")
@example((MAX_REQUEST_BYTES + 1).to_bytes(4, "big") + bytes(100))
@example((MAX_REQUEST_BYTES).to_bytes(4, "big") + bytes(100))
@settings(max_examples=60, deadline=None)
def test_any_bytes_may_be_asked(content: bytes) -> None:
    """A server takes no memory for what is only announced, and gives nothing for nonsense."""
    serving, sink = transfer(), Sink()
    bounded(lambda: serving._serve("stranger", reader_of(content), cast("Any", sink)))
    assert sink.size == 0


@given(st.lists(requests, max_size=3), st.lists(st.tuples(st.integers(0, 1 << 16), st.integers(1, 255)), max_size=4))
@settings(max_examples=80, deadline=None)
def test_requests_with_any_fields_are_answered_or_refused(asked: list[FetchRequest], flips: list[tuple[int, int]]) -> None:
    """Hashes of any length, offsets of any size, damaged messages: at most the blobs that were asked for come back."""
    serving, sink = transfer(), Sink()
    content = bytearray(b"".join(framed(request.SerializeToString()) for request in asked))
    for place, mask in flips:
        if content:
            content[place % len(content)] ^= mask
    bounded(lambda: serving._serve("stranger", reader_of(bytes(content)), cast("Any", sink)))
    assert sink.size <= sum(len(request.hashes) for request in asked) * (len(CONTENT) + 9)


@given(st.binary(max_size=600), st.integers(0, 1 << 20))
@settings(max_examples=60, deadline=None)
def test_any_bytes_may_be_answered(answer: bytes, limit: int) -> None:
    """Nothing is kept but what has the hash that was asked for."""
    fetching, kept = transfer(answer), []
    bounded(lambda: fetching.fetch("stranger", {NAME: limit}, keep=lambda name, content: kept.append(content)))
    assert kept == []


@given(st.sampled_from([FOUND, MISSING, 2, 255]), HUGE, st.binary(max_size=300), st.integers(0, 4000))
@example(FOUND, (1 << 64) - 1, b"", 4000)
@example(FOUND, 1 << 40, bytes(300), 4000)
@example(FOUND, len(CONTENT), CONTENT, len(CONTENT) - 1)
@settings(max_examples=80, deadline=None)
def test_announced_sizes_take_no_memory(status: int, size: int, body: bytes, limit: int) -> None:
    """A blob larger than its limit is refused by its header alone."""
    answer = bytes([status]) + size.to_bytes(8, "big") + body
    kept: list[bytes] = []
    fetching = transfer(answer)
    bounded(lambda: fetching.fetch("stranger", {NAME: limit}, keep=lambda name, content: kept.append(content)))
    assert kept == []


def test_a_limit_is_no_allocation() -> None:
    """Even where a large blob is expected, memory is taken only for what has come."""
    answer = bytes([FOUND]) + (1 << 30).to_bytes(8, "big") + bytes(1000)
    bounded(lambda: transfer(answer).fetch("stranger", {NAME: 1 << 30}))


def test_what_is_pulled_for_others_is_bounded() -> None:
    """A peer that asks us to pass on endless blobs from its accomplice fills neither memory nor disk."""
    blobs = {blob_hash(bytes([index]) * MIB): bytes([index]) * MIB for index in range(100)}

    async def ask() -> int:
        serving, sink = transfer(), Sink()
        pulled = 0

        async def fetch(peer: str, sizes: dict[bytes, int], *, origin: str = "", keep: Any = None) -> None:
            nonlocal pulled
            for name in sizes:
                keep(name, blobs[name])
                pulled += 1

        serving.fetch = fetch  # type: ignore[method-assign, assignment]
        request = FetchRequest(run_id=RUN, hashes=list(blobs), origin="accomplice")
        await serving._serve("stranger", reader_of(framed(request.SerializeToString())), cast("Any", sink))
        memory, disk = serving.store.size_bytes
        assert memory + disk <= 5 * MIB
        return pulled

    assert asyncio.run(ask()) <= 64
