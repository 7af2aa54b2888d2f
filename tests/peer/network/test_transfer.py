"""Blobs between real nodes: verified, bounded, from several sources at once."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from peer.network.blobs import BlobStore
from peer.network.node import Node, Silent, Unreachable
from peer.network.throttle import TokenBucket
from peer.network.transfer import FETCH_STREAM, FOUND, MAX_HASHES, MAX_REQUEST_BYTES, MissingBlob, Transfer
from swarm.errors import Rejected
from swarm.identity import Identity
from swarm.merkle import blob_hash
from swarm.rpc.v1.peer_pb2 import FetchRequest

RUN = b"\x07" * 32
KIB, MIB = 1 << 10, 1 << 20


def transfer_of(node: Node, contents: list[bytes] = (), *, admits: bool = True, stall_s: float = 5.0) -> Transfer:  # type: ignore[assignment]
    store = BlobStore(256 * MIB)
    for content in contents:
        store.put(content, 1)
    return Transfer(node, store, RUN, lambda peer, token: admits, lambda: None, stall_s=stall_s)


def blobs(count: int, size: int) -> list[bytes]:
    return [index.to_bytes(4, "big") * (size // 4) for index in range(count)]


def sizes_of(contents: list[bytes]) -> dict[bytes, int]:
    return {blob_hash(content): len(content) for content in contents}


async def answer_with(node: Node, header: bytes, body: bytes) -> None:
    """Make a node answer every fetch with these bytes, whatever was asked for."""

    async def serve(peer: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        length = int.from_bytes(await reader.readexactly(4), "big")
        request = FetchRequest.FromString(await reader.readexactly(length))
        for _ in request.hashes:
            writer.write(header + body)
        await writer.drain()
        await reader.read()

    await node.serve_streams(FETCH_STREAM, serve)


async def test_blobs_arrive_whole_and_are_counted(start_node) -> None:
    """What is fetched is what was stored, and both sides count at least its bytes."""
    server = await start_node()
    client = await start_node(knows=(server,))
    contents = [b"", b"x", *blobs(3, MIB)]
    await transfer_of(server.node, contents).start()
    seen: list[bytes] = []
    found = await transfer_of(client.node).fetch(server.peer, sizes_of(contents), keep=lambda name, content: seen.append(name))
    assert [found[name] for name in sizes_of(contents)] == contents
    assert seen == list(sizes_of(contents))
    assert client.node.received_bytes >= 3 * MIB
    assert server.node.sent_bytes >= 3 * MIB


async def test_missing_blobs_do_not_cost_the_others(start_node) -> None:
    """A source that lacks some blobs gives the rest, then says so."""
    server = await start_node()
    client = await start_node(knows=(server,))
    have, lack = blobs(2, KIB), [b"nowhere"]
    await transfer_of(server.node, have).start()
    seen: dict[bytes, bytes] = {}
    with pytest.raises(MissingBlob):
        await transfer_of(client.node).fetch(server.peer, sizes_of([have[0], *lack, have[1]]), keep=seen.__setitem__)
    assert sorted(seen.values()) == sorted(have)


async def test_wrong_and_oversized_bytes_are_never_kept(start_node) -> None:
    """Bytes under a hash that isn't theirs, or more than was announced beforehand, are rejected with the source named."""
    liar, giant, rambler = [await start_node() for _ in range(3)]
    client = await start_node(knows=(liar, giant, rambler))
    wanted = sizes_of([b"what was asked for"])
    await answer_with(liar.node, bytes([FOUND]) + (18).to_bytes(8, "big"), b"what wasn't asked.")
    await answer_with(giant.node, bytes([FOUND]) + (1 << 62).to_bytes(8, "big"), b"")
    await answer_with(rambler.node, bytes([7]) + (18).to_bytes(8, "big"), b"")
    transfer = transfer_of(client.node)
    kept: list[bytes] = []
    for source, reason in ((liar, "wrong_bytes"), (giant, "too_large"), (rambler, "too_large")):
        with pytest.raises(Rejected, match=reason) as caught:
            await transfer.fetch(source.peer, wanted, keep=lambda name, content: kept.append(content))
        assert caught.value.sender == source.peer
    assert kept == []


async def test_a_source_that_stalls_or_breaks_off_is_given_up(start_node) -> None:
    """Silence in the middle of a blob ends within the stall limit, a broken stream at once."""
    sleeper, quitter = await start_node(), await start_node()
    client = await start_node(knows=(sleeper, quitter))
    await answer_with(sleeper.node, bytes([FOUND]) + (100).to_bytes(8, "big"), b"half")

    async def quit_early(peer: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readexactly(4)
        writer.write(bytes([FOUND]) + (100).to_bytes(8, "big") + b"half")
        await writer.drain()

    await quitter.node.serve_streams(FETCH_STREAM, quit_early)
    transfer = transfer_of(client.node, stall_s=0.5)
    with pytest.raises(Silent):
        await transfer.fetch(sleeper.peer, {blob_hash(b"a"): 100})
    with pytest.raises(Unreachable):
        await transfer.fetch(quitter.peer, {blob_hash(b"a"): 100})


async def test_a_download_survives_liars_sleepers_and_the_absent(start_node) -> None:
    """With one honest source among a liar, a sleeper, one that has nothing and one that is gone, everything arrives."""
    honest, liar, sleeper, empty = [await start_node() for _ in range(4)]
    client = await start_node(knows=(honest, liar, sleeper, empty))
    contents = blobs(40, 64 * KIB)
    await transfer_of(honest.node, contents).start()
    await transfer_of(empty.node).start()
    await answer_with(liar.node, bytes([FOUND]) + (4).to_bytes(8, "big"), b"lies")
    await answer_with(sleeper.node, b"", b"")
    gone = Identity.generate().peer_id
    sources = [sleeper.peer, liar.peer, gone, empty.peer, honest.peer]
    received: dict[bytes, bytes] = {}

    def keep(name: bytes, content: bytes) -> None:
        assert name not in received
        received[name] = content

    transfer = transfer_of(client.node, stall_s=1.0)
    failed = await transfer.download_all(sources, sizes_of(contents), keep, batch_bytes=256 * KIB)
    assert received == {blob_hash(content): content for content in contents}
    assert failed[liar.peer] == "wrong_bytes"
    assert failed[gone] == "unreachable"
    assert failed[empty.peer] == "missing"
    assert honest.peer not in failed


async def test_a_download_that_nobody_can_complete_says_so(start_node) -> None:
    """What was found is kept; what nobody has is an error, not a wait."""
    one, two = await start_node(), await start_node()
    client = await start_node(knows=(one, two))
    contents = blobs(3, KIB)
    await transfer_of(one.node, contents[:1]).start()
    await transfer_of(two.node, contents[1:2]).start()
    received: dict[bytes, bytes] = {}
    with pytest.raises(MissingBlob, match="1 blobs are nowhere"):
        await transfer_of(client.node).download_all([one.peer, two.peer], sizes_of(contents), received.__setitem__)
    assert set(received) == set(sizes_of(contents[:2]))


async def test_several_sources_share_the_work(start_node) -> None:
    """Two sources that are held to the same rate both give a part."""
    one, two = await start_node(), await start_node()
    client = await start_node(knows=(one, two))
    contents = blobs(32, 64 * KIB)
    for server in (one, two):
        serving = transfer_of(server.node, contents)
        serving.upload = TokenBucket(4 * MIB)
        await serving.start()
    received: dict[bytes, bytes] = {}
    transfer = transfer_of(client.node)
    await transfer.download_all([one.peer, two.peer], sizes_of(contents), received.__setitem__, batch_bytes=128 * KIB)
    assert len(received) == len(contents)
    assert min(one.node.sent_bytes, two.node.sent_bytes) > 256 * KIB


async def test_what_is_small_is_shared_too_and_hardly_anything_is_sent_twice(start_node) -> None:
    """Less than one batch still comes from all sources, and only its last blobs come from more than one."""
    servers = [await start_node() for _ in range(3)]
    client = await start_node(knows=tuple(servers))
    contents = blobs(36, 64 * KIB)
    for server in servers:
        serving = transfer_of(server.node, contents)
        serving.upload = TokenBucket(2 * MIB)
        await serving.start()
    received: dict[bytes, bytes] = {}
    sources = [server.peer for server in servers]
    assert await transfer_of(client.node).download_all(sources, sizes_of(contents), received.__setitem__) == {}
    assert len(received) == len(contents)
    sent = [server.node.traffic.sent["bulk"] for server in servers]
    assert min(sent) > 4 * 64 * KIB
    assert sum(sent) < 46 * 64 * KIB


@pytest.mark.parametrize("problem", ["not_admitted", "wrong_run", "too_large", "malformed", "bad_hash"])
async def test_requests_that_break_a_rule_get_nothing(start_node, problem: str) -> None:
    """Strangers, other runs, oversized and malformed requests: the stream closes without a byte, and the rule is counted."""
    server = await start_node()
    client = await start_node(knows=(server,))
    refused: list[tuple[str, str]] = []
    server.node.on_rejected = lambda peer, reason: refused.append((peer, reason))
    content = b"secret"
    await transfer_of(server.node, [content], admits=problem != "not_admitted").start()
    names = [b"short"] if problem == "bad_hash" else [blob_hash(content)]
    raw = FetchRequest(run_id=b"other" if problem == "wrong_run" else RUN, hashes=names).SerializeToString()
    if problem == "malformed":
        raw = b"\xff" * 20
    length = MAX_REQUEST_BYTES + 1 if problem == "too_large" else len(raw)
    reader, writer = await client.node.open_stream(server.peer, FETCH_STREAM, 5)
    writer.write(length.to_bytes(4, "big") + raw)
    await writer.drain()
    assert await asyncio.wait_for(reader.read(), 10) == b""
    writer.close()
    expected = {"wrong_run": "not_admitted", "bad_hash": "malformed"}.get(problem, problem)
    assert refused == [(client.peer, expected)]


async def test_more_hashes_than_one_request_may_hold(start_node) -> None:
    """A long list is asked for in several requests over one stream."""
    server = await start_node()
    client = await start_node(knows=(server,))
    contents = blobs(MAX_HASHES + 10, 4)
    await transfer_of(server.node, contents).start()
    found = await transfer_of(client.node).fetch(server.peer, sizes_of(contents))
    assert len(found) == len(contents)


async def test_a_relay_pulls_what_it_lacks(start_node) -> None:
    """A peer that is asked for another's blobs gets them first, and serves them then."""
    origin = await start_node()
    relay = await start_node(knows=(origin,))
    client = await start_node(knows=(relay,))
    contents = blobs(3, KIB)
    await transfer_of(origin.node, contents).start()
    await transfer_of(relay.node).start()
    found = await transfer_of(client.node).fetch(relay.peer, sizes_of(contents), origin=origin.peer)
    assert list(found.values()) == contents


async def test_a_broken_download_resumes_on_disk(start_node, tmp_path: Path) -> None:
    """After a source vanished in the middle, only what is missing is fetched again."""
    first, second = await start_node(), await start_node()
    client = await start_node(knows=(first, second))
    contents = blobs(8, 64 * KIB)
    await transfer_of(first.node, contents[:3]).start()
    second_transfer = transfer_of(second.node, contents)
    await second_transfer.start()
    store = BlobStore(0, 64 * MIB, tmp_path / "blobs")
    transfer = transfer_of(client.node)

    def keep(name: bytes, content: bytes) -> None:
        store.put_verified(name, content, 1)

    with pytest.raises(MissingBlob):
        await transfer.download_all([first.peer], sizes_of(contents), keep)
    missing = store.missing(sizes_of(contents))
    assert len(missing) == 5
    await transfer.download_all([second.peer], dict.fromkeys(missing, 64 * KIB), keep)
    assert not store.missing(sizes_of(contents))
    assert second.node.sent_bytes < 6 * 64 * KIB


async def test_what_is_on_its_way_is_not_asked_for_twice(start_node) -> None:
    """Several who want the same blobs at once cost their source one transfer, and a failed one is tried anew by the others."""
    server, empty = await start_node(), await start_node()
    client = await start_node(knows=(server, empty))
    contents = blobs(8, 64 * KIB)
    serving = transfer_of(server.node, contents)
    serving.upload = TokenBucket(2 * MIB)
    await serving.start()
    await transfer_of(empty.node).start()
    transfer = transfer_of(client.node)

    def keep(name: bytes, content: bytes) -> None:
        transfer.store.put_verified(name, content, 1)

    sizes = sizes_of(contents)
    outcomes = await asyncio.gather(
        transfer.obtain(empty.peer, dict(list(sizes.items())[:2]), keep),
        *(transfer.obtain(server.peer, sizes, keep) for _ in range(3)),
        return_exceptions=True,
    )
    assert [type(outcome) for outcome in outcomes] == [MissingBlob, type(None), type(None), type(None)]
    assert not transfer.store.missing(sizes)
    assert server.node.traffic.sent["bulk"] < 1.01 * 8 * 64 * KIB
    assert transfer._coming == {}


async def test_a_used_up_quota_serves_and_downloads_nothing(start_node) -> None:
    """Others hear that we don't have it and go elsewhere; what a round in progress needs still comes."""
    server = await start_node()
    client = await start_node(knows=(server,))
    contents = blobs(2, KIB)
    serving, transfer = transfer_of(server.node, contents), transfer_of(client.node)
    await serving.start()
    transfer.may_move = lambda: False
    with pytest.raises(MissingBlob, match="quota_used"):
        await transfer.download_all([server.peer], sizes_of(contents), lambda name, content: None)
    assert len(await transfer.fetch(server.peer, sizes_of(contents))) == 2
    serving.may_move = lambda: False
    with pytest.raises(MissingBlob, match="lacks 2 of 2"):
        await transfer.fetch(server.peer, sizes_of(contents))


async def test_sources_are_measured(start_node) -> None:
    """What each source gives per second is known afterwards, and a faster one is asked for larger batches."""
    fast, slow = await start_node(), await start_node()
    client = await start_node(knows=(fast, slow))
    contents = blobs(4, 128 * KIB)
    for server, rate in ((fast, 0.0), (slow, 1.0 * MIB)):
        serving = transfer_of(server.node, contents)
        serving.upload = TokenBucket(rate)
        await serving.start()
    transfer = transfer_of(client.node)
    for server in (fast, slow):
        await transfer.fetch(server.peer, sizes_of(contents))
    assert transfer.speed_of(slow.peer) < 2.5 * MIB
    assert transfer.speed_of(fast.peer) > transfer.speed_of(slow.peer)
    assert transfer.speed_of("stranger") == 0.0


async def test_a_source_that_trickles_holds_nobody_up(start_node) -> None:
    """A source that sends a byte now and then never stalls long enough to be given up; the others do its share."""
    trickler, honest = await start_node(), await start_node()
    client = await start_node(knows=(trickler, honest))
    contents = blobs(20, 64 * KIB)

    async def trickle(peer: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(bytes([FOUND]) + (64 * KIB).to_bytes(8, "big"))
        while True:
            writer.write(b"x")
            await writer.drain()
            await asyncio.sleep(0.1)

    await trickler.node.serve_streams(FETCH_STREAM, trickle)
    await transfer_of(honest.node, contents).start()
    received: dict[bytes, bytes] = {}
    download = transfer_of(client.node).download_all(
        [trickler.peer, honest.peer], sizes_of(contents), received.__setitem__, batch_bytes=256 * KIB
    )
    assert await asyncio.wait_for(download, 60) == {}
    assert received == {blob_hash(content): content for content in contents}
