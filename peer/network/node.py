"""One libp2p node: connecting, calling and streaming, with every wait bounded and every frame limited.

hivemind's protobuf streams read a frame of whatever length the sender announces; ours are raw streams with their own limits.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import Awaitable, Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import structlog
from hivemind.p2p import P2P, PeerID
from hivemind.p2p.p2p_daemon_bindings.datastructures import StreamInfo
from hivemind.p2p.p2p_daemon_bindings.utils import (
    P2PDaemonError,
    P2PHandlerError,
    raise_if_failed,
    read_pbmsg_safe,
    write_pbmsg,
)
from hivemind.proto import p2pd_pb2
from hivemind.utils.multiaddr import Multiaddr

from peer.network.p2pd import P2pd, P2pdOptions
from peer.network.traffic import Traffic
from swarm.errors import Rejected
from swarm.identity import public_key_of

MAX_CONCURRENT_CALLS = 256
MAX_CALLS_PER_PEER = 32
CONNECT_TIMEOUT_S = 10.0
NETWORK_ERRORS = (P2PDaemonError, OSError, EOFError)  # what hivemind raises once its daemon has died
REFUSAL = "swarm-rejected:"
REFUSED = re.compile(re.escape(REFUSAL) + r"(\w{0,64})")

CallHandler = Callable[[str, bytes], Awaitable[bytes]]
StreamHandler = Callable[[str, asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]

log = structlog.get_logger(__name__)


class PeerFailure(Exception):
    """A peer didn't do what was asked. `reason` is a short code."""

    reason = "failed"

    def __init__(self, peer: str, detail: str = "") -> None:
        super().__init__(f"{peer}: {detail}" if detail else peer)
        self.peer = peer


class Unreachable(PeerFailure):
    """Positive evidence that the peer can't be reached: refused or reset, not mere silence."""

    reason = "unreachable"


class Silent(PeerFailure):
    """The peer didn't answer in time."""

    reason = "silent"


class Refusal(Exception):
    """How a `Rejected` travels to its caller: libp2p carries the text of a handler's exception."""


@dataclass
class Node:
    """A libp2p node. Peers are named by base58 peer id. `on_rejected(peer, reason)` hears of requests that broke a rule."""

    options: P2pdOptions
    daemon: P2pd
    peer_id: str
    addresses: tuple[str, ...]
    on_rejected: Callable[[str, str], None] = lambda peer, reason: None
    traffic: Traffic = field(default_factory=Traffic)
    _busy: dict[str, int] = field(default_factory=dict)
    _known: dict[str, tuple[str, ...]] = field(default_factory=dict)
    _dial_only: set[str] = field(default_factory=set)
    _calls: dict[str, Any] = field(default_factory=dict)
    _streams: dict[str, Any] = field(default_factory=dict)

    @classmethod
    async def start(cls, options: P2pdOptions) -> Node:
        """Start the daemon and learn our own addresses."""
        daemon = await P2pd.start(options)
        node = cls(options, daemon, daemon.p2p.peer_id.to_base58(), await _own_addresses(daemon.p2p, options))
        node.traffic.follow(daemon.pid)
        return node

    async def rebuild(self) -> None:
        """Start anew after the daemon has ended: same identity, same handlers. Streams that were open are gone."""
        self.traffic.close()
        await self.daemon.close()
        self.daemon = await P2pd.start(self.options)
        self.traffic.follow(self.daemon.pid)
        self.addresses = await _own_addresses(self.p2p, self.options)
        for name, call in self._calls.items():
            await self.p2p._client.add_unary_handler(name, call)
        for name, stream in self._streams.items():
            await self.p2p.add_binary_stream_handler(name, stream)

    @property
    def p2p(self) -> P2P:
        """hivemind's client, for the DHT."""
        return self.daemon.p2p

    @property
    def sent_bytes(self) -> int:
        """What we have handed over for sending, without framing."""
        return self.traffic.sent["bulk"] + self.traffic.sent["control"]

    @property
    def received_bytes(self) -> int:
        """What has come from other peers, without framing."""
        return self.traffic.received["bulk"] + self.traffic.received["control"]

    async def close(self) -> None:
        """End the daemon."""
        self.traffic.close()
        await self.daemon.close()

    def learn(self, peer: str, addresses: Iterable[str]) -> None:
        """Remember where a peer said that it can be dialled."""
        plain = (address.partition("/p2p/")[0] for address in addresses if len(address) < 256)
        kept = tuple(address for address in plain if "/udp/" not in address)[:16]
        if kept and peer != self.peer_id:
            if len(self._known) > 4096:
                self._known.pop(next(iter(self._known)))
            self._known[peer] = kept

    def learn_reachability(self, peer: str, accepts_inbound: bool) -> None:
        """Remember whether a peer can be dialled at all; one that can't is reached over connections that it dialled."""
        if accepts_inbound:
            self._dial_only.discard(peer)
        elif len(self._dial_only) < 4096:
            self._dial_only.add(peer)

    def is_dial_only(self, peer: str) -> bool:
        """Whether the peer is known to accept no connections."""
        return peer in self._dial_only

    def known_peers(self) -> tuple[str, ...]:
        """Peers that have addresses."""
        return tuple(self._known)

    def known_addresses(self, peer: str) -> tuple[str, ...]:
        """What `learn` kept."""
        return self._known.get(peer, ())

    async def connect(self, peer: str, timeout_s: float = CONNECT_TIMEOUT_S) -> None:
        """Dial a peer at its known addresses. Raises `Unreachable` or `Silent`."""
        try:
            addresses = [Multiaddr(address) for address in self._known.get(peer, ())]
        except Exception as error:
            raise Unreachable(peer, "bad address") from error
        encoded = [address.to_bytes() for address in addresses]
        connect = p2pd_pb2.ConnectRequest(peer=_peer(peer).to_bytes(), addrs=encoded)
        with _translated(peer):
            _, writer = await asyncio.wait_for(self._ask_daemon("CONNECT", connect=connect), timeout_s)
            writer.close()

    async def connected(self) -> frozenset[str]:
        """Peers to which a connection is open now."""
        with _translated("p2pd"):
            return frozenset(info.peer_id.to_base58() for info in await asyncio.wait_for(self.p2p.list_peers(), 5))

    async def call(self, peer: str, name: str, request: bytes, timeout_s: float) -> bytes:
        """Call a handler of `peer`. Raises `Unreachable`, `Silent`, or `Rejected` with the peer's own error."""
        self.traffic.count("sent", "control", len(request))
        with _translated(peer):
            response: bytes = await asyncio.wait_for(self.p2p._client.call_unary_handler(_peer(peer), name, request), timeout_s)
        self.traffic.count("received", "control", len(response))
        return response

    async def open_stream(self, peer: str, name: str, timeout_s: float) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Open a raw stream to a handler of `peer`. Raises `Unreachable` or `Silent`."""
        opening = p2pd_pb2.StreamOpenRequest(peer=_peer(peer).to_bytes(), proto=[name])
        with _translated(peer):
            return await asyncio.wait_for(self._ask_daemon("STREAM_OPEN", streamOpen=opening), timeout_s)

    async def serve_calls(self, name: str, handler: CallHandler) -> None:
        """Answer calls; a peer that keeps too many open is refused."""

        async def answer(request: bytes, remote: PeerID) -> bytes:
            peer = remote.to_base58()
            self.traffic.count("received", "control", len(request))
            try:
                with self._admitted(peer):
                    response = await handler(peer, request)
            except Rejected as error:
                self.on_rejected(peer, error.reason)
                raise Refusal(f"{REFUSAL}{error.reason}") from error
            self.traffic.count("sent", "control", len(response))
            return response

        self._calls[name] = answer
        await self.p2p._client.add_unary_handler(name, answer)

    async def serve_streams(self, name: str, handler: StreamHandler) -> None:
        """Serve raw streams; a peer that keeps too many open is refused."""

        async def serve(info: StreamInfo, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            peer = info.peer_id.to_base58()
            try:
                with self._admitted(peer):
                    await handler(peer, reader, writer)
            except Rejected as error:
                self.on_rejected(peer, error.reason)
            except (OSError, EOFError, TimeoutError, PeerFailure) as error:
                log.debug("stream_ended", peer=peer, error=str(error))
            finally:
                writer.close()

        self._streams[name] = serve
        await self.p2p.add_binary_stream_handler(name, serve)

    async def _ask_daemon(self, kind: str, **body: object) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Put one request to the daemon; its connection. Unlike hivemind's client, nothing stays open when it fails."""
        reader, writer = await self.p2p._client.control.daemon_connector.open_connection()
        try:
            await write_pbmsg(writer, p2pd_pb2.Request(type=kind, **body))
            response = p2pd_pb2.Response()
            await read_pbmsg_safe(reader, response)
            raise_if_failed(response)
        except BaseException:
            writer.close()
            raise
        return reader, writer

    @contextlib.contextmanager
    def _admitted(self, peer: str) -> Iterator[None]:
        if self._busy.get(peer, 0) >= MAX_CALLS_PER_PEER or sum(self._busy.values()) >= MAX_CONCURRENT_CALLS:
            raise Rejected("busy", "too many calls at once", peer)
        self._busy[peer] = self._busy.get(peer, 0) + 1
        try:
            yield
        finally:
            self._busy[peer] -= 1
            if not self._busy[peer]:
                del self._busy[peer]


async def _own_addresses(p2p: P2P, options: P2pdOptions) -> tuple[str, ...]:
    """Where others can dial us, without the peer id at the end."""
    if not options.accept_inbound:
        return ()
    return tuple(str(address).partition("/p2p/")[0] for address in await p2p.get_visible_maddrs(latest=True))


@contextlib.contextmanager
def _translated(peer: str) -> Iterator[None]:
    """hivemind's and the operating system's errors as ours."""
    try:
        yield
    except TimeoutError as error:
        raise Silent(peer) from error
    except P2PHandlerError as error:
        text = str(error)
        if refused := REFUSED.search(text):
            raise Rejected("refused", refused[1], peer) from error
        raise Unreachable(peer, text[:200]) from error
    except NETWORK_ERRORS as error:
        raise Unreachable(peer, str(error)[:200]) from error


def _peer(peer: str) -> PeerID:
    public_key_of(peer)
    return PeerID.from_base58(peer)
