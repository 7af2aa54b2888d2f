"""Calls and streams between two real libp2p nodes."""

from __future__ import annotations

import asyncio

import pytest
from hivemind.p2p import PeerID

from peer.network.node import MAX_CALLS_PER_PEER, Node, Silent, Unreachable
from swarm.errors import Rejected
from swarm.identity import Identity
from tests.waiting import eventually

ECHO = "test/echo"
MIB = 1 << 20


async def test_a_call_names_its_caller_and_counts_bytes(start_node) -> None:
    """A handler sees the caller's authenticated peer id; both sides count what crossed."""
    server = await start_node()
    client = await start_node(knows=(server,))
    callers = []

    async def echo(peer: str, request: bytes) -> bytes:
        callers.append(peer)
        return request * 2

    await server.node.serve_calls(ECHO, echo)
    assert await client.node.call(server.peer, ECHO, b"12345", 10) == b"1234512345"
    assert callers == [client.identity.peer_id]
    assert (client.node.sent_bytes, client.node.received_bytes) == (5, 10)
    assert (server.node.sent_bytes, server.node.received_bytes) == (10, 5)


async def test_a_peer_behind_nat_is_called_over_its_own_connection(start_node) -> None:
    """A peer that accepts no connections answers calls over the one that it dialled."""
    server = await start_node()
    hidden = await start_node(knows=(server,), accept_inbound=False)

    async def hello(peer: str, request: bytes) -> bytes:
        return b"hello"

    await hidden.node.serve_calls(ECHO, hello)
    assert hidden.node.addresses == ()
    await eventually(lambda: _connected(server.node, hidden.peer), "the connection")
    assert await server.node.call(hidden.peer, ECHO, b"", 10) == b"hello"


async def test_unreachable_and_silent_are_different(start_node) -> None:
    """No route, a closed port and a missing handler are evidence of absence; a slow handler is only silent."""
    server = await start_node()
    client = await start_node(knows=(server,))
    stranger = Identity.generate().peer_id
    client.node.learn(stranger, ["/ip4/127.0.0.1/tcp/1"])
    with pytest.raises(Unreachable):
        await client.node.connect(stranger)
    with pytest.raises(Unreachable):
        await client.node.call(stranger, ECHO, b"", 10)
    with pytest.raises(Unreachable):
        await client.node.call(Identity.generate().peer_id, ECHO, b"", 10)
    with pytest.raises(Unreachable):
        await client.node.open_stream(server.peer, "test/nothing", 10)
    never = asyncio.Event()

    async def sleep(peer: str, request: bytes) -> bytes:
        await never.wait()
        return b""

    await server.node.serve_calls(ECHO, sleep)
    with pytest.raises(Silent):
        await client.node.call(server.peer, ECHO, b"", 0.2)


async def test_peer_ids_and_addresses_of_strangers_are_checked(start_node) -> None:
    """What isn't an Ed25519 peer id or a multiaddress never reaches the daemon; own and oversized addresses aren't kept."""
    member = await start_node()
    node: Node = member.node
    with pytest.raises(Rejected, match="bad_peer_id"):
        await node.call("not a peer", ECHO, b"", 1)
    other = Identity.generate().peer_id
    node.learn(other, ["/nonsense/x"])
    with pytest.raises(Unreachable, match="bad address"):
        await node.connect(other)
    node.learn(other, ["/ip4/127.0.0.1/tcp/1" + "0" * 300])
    assert node.known_addresses(other) == ("/nonsense/x",)
    node.learn(other, [f"/ip4/127.0.0.1/tcp/{port}/p2p/{other}" for port in range(1, 30)])
    assert len(node.known_addresses(other)) == 16
    assert all("/p2p/" not in address for address in node.known_addresses(other))
    node.learn(node.peer_id, ["/ip4/127.0.0.1/tcp/1"])
    assert node.known_peers() == (other,)


async def test_a_refusal_is_not_an_absence(start_node) -> None:
    """A handler's rejection reaches the caller as `Rejected`, and the server counts it with the sender named."""
    refused = []
    server = await start_node()
    server.node.on_rejected = lambda peer, reason: refused.append((peer, reason))
    client = await start_node(knows=(server,))

    async def refuse(peer: str, request: bytes) -> bytes:
        raise Rejected("not_admitted", "sync", peer)

    async def refuse_stream(peer: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        raise Rejected("malformed", "fetch", peer)

    await server.node.serve_calls(ECHO, refuse)
    await server.node.serve_streams("test/stream", refuse_stream)
    with pytest.raises(Rejected, match="not_admitted"):
        await client.node.call(server.peer, ECHO, b"", 10)
    reader, writer = await client.node.open_stream(server.peer, "test/stream", 10)
    assert await asyncio.wait_for(reader.read(), 10) == b""
    writer.close()
    assert refused == [(client.peer, "not_admitted"), (client.peer, "malformed")]


async def test_one_peer_can_not_occupy_a_node(start_node) -> None:
    """Calls beyond a peer's share are refused as busy, those within it are answered, and the share comes back."""
    server = await start_node()
    client = await start_node(knows=(server,))
    release = asyncio.Event()
    arrived = 0

    async def wait(peer: str, request: bytes) -> bytes:
        nonlocal arrived
        arrived += 1
        await release.wait()
        return b"done"

    await server.node.serve_calls(ECHO, wait)
    calls = [asyncio.create_task(client.node.call(server.peer, ECHO, b"", 60)) for _ in range(MAX_CALLS_PER_PEER)]
    await eventually(lambda: arrived == MAX_CALLS_PER_PEER, "all calls")
    with pytest.raises(Rejected, match="busy"):
        await client.node.call(server.peer, ECHO, b"", 10)
    release.set()
    assert await asyncio.gather(*calls) == [b"done"] * MAX_CALLS_PER_PEER
    assert await client.node.call(server.peer, ECHO, b"", 10) == b"done"


async def test_an_oversized_call_hurts_nobody(start_node) -> None:
    """A request above the daemon's limit fails at the sender; both nodes go on talking."""
    server = await start_node()
    client = await start_node(knows=(server,))

    async def size(peer: str, request: bytes) -> bytes:
        return str(len(request)).encode()

    await server.node.serve_calls(ECHO, size)
    assert await client.node.call(server.peer, ECHO, bytes(3 * MIB), 20) == str(3 * MIB).encode()
    for large in (5 * MIB, 9 * MIB):
        with pytest.raises((Unreachable, Silent)):
            await client.node.call(server.peer, ECHO, bytes(large), 3)
    assert await client.node.call(server.peer, ECHO, b"123", 20) == b"3"


async def test_an_answer_to_a_call_that_was_given_up_does_not_deafen_the_node(start_node) -> None:
    """An answer that arrives in the moment in which its call is given up is dropped; later calls are answered."""
    server = await start_node()
    client = await start_node(knows=(server,))
    release = asyncio.Event()

    async def wait(peer: str, request: bytes) -> bytes:
        await release.wait()
        return request

    await server.node.serve_calls(ECHO, wait)
    pending = client.node.p2p._client.control._pending_calls
    call = asyncio.create_task(client.node.call(server.peer, ECHO, b"late", 30))
    await eventually(lambda: len(pending) == 1, "the call")
    ((number, future),) = pending.items()
    future.set_result(b"settled")
    assert await call == b"settled"
    pending[number] = future
    release.set()
    assert await client.node.call(server.peer, ECHO, b"still here", 10) == b"still here"


async def _connected(node: Node, peer: str) -> bool:
    assert PeerID.from_base58(peer)
    return peer in await node.connected()
