"""Sending protocol messages to peers: bounded in time, retried once, with the outcome told to whoever needs to know."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import structlog

from peer.network.node import Node, Silent, Unreachable
from swarm.errors import Rejected
from swarm.messages import parse
from swarm.rpc.v1.peer_pb2 import Ack, Delivery, RelayReply, RelayRequest, SyncReply, SyncRequest

DELIVER = "swarm/1/deliver"
SYNC = "swarm/1/sync"
PING = "swarm/1/ping"
RELAY = "swarm/1/relay"
RELAYED = frozenset({DELIVER, SYNC, PING})
MAX_RELAYS_TRIED = 2
DELIVER_TIMEOUT_S = 15.0
PING_TIMEOUT_S = 2.0
MAX_TASKS = 4096

log = structlog.get_logger(__name__)


@dataclass
class Post:
    """Delivers to peers in the background; `on_lost(peer)` hears of peers that can't be reached."""

    node: Node
    on_lost: Callable[[str], None] = lambda peer: None
    on_refused: Callable[[str, str], None] = lambda peer, reason: None
    relays: Callable[[str], Sequence[str]] = lambda peer: ()
    relay_request: Callable[[str, str, bytes], RelayRequest | None] = lambda peer, call, payload: None
    _tasks: set[asyncio.Task[Any]] = field(default_factory=set)

    def send(self, peers: Iterable[str], delivery: Delivery) -> None:
        """Deliver to each peer, without waiting."""
        raw = delivery.SerializeToString()
        for peer in peers:
            if peer != self.node.peer_id:
                self.spawn(self._deliver(peer, raw))

    def spawn(self, work: Coroutine[Any, Any, object]) -> asyncio.Task[Any]:
        """Run a task that ends with this post."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._finished)
        return task

    async def ping(self, peer: str, timeout_s: float = PING_TIMEOUT_S) -> bool:
        """Whether the peer answers in time. Raises `Unreachable`."""
        try:
            await self.call(peer, PING, b"", timeout_s)
        except Silent:
            return False
        except Rejected:
            return True
        return True

    async def sync(self, peer: str, request: SyncRequest, timeout_s: float = DELIVER_TIMEOUT_S) -> SyncReply:
        """Ask where the run stands. Raises `Unreachable`, `Silent` or `Rejected`."""
        return parse(SyncReply, await self.call(peer, SYNC, request.SerializeToString(), timeout_s), peer)

    async def call(self, peer: str, name: str, payload: bytes, timeout_s: float) -> bytes:
        """Call a peer: directly, after dialling it anew, or through another that can reach it.

        Raises `Unreachable`, `Silent` or `Rejected`.
        """
        try:
            return await self.node.call(peer, name, payload, timeout_s)
        except Unreachable as error:
            failure = error
        if self.node.known_addresses(peer):
            with contextlib.suppress(Unreachable):
                await self.node.connect(peer, timeout_s)
                return await self.node.call(peer, name, payload, timeout_s)
        for relay in list(self.relays(peer))[:MAX_RELAYS_TRIED]:
            request = self.relay_request(peer, name, payload)
            if request is None:
                break
            with contextlib.suppress(Unreachable, Silent, Rejected):
                raw = await self.node.call(relay, RELAY, request.SerializeToString(), timeout_s)
                reply = parse(RelayReply, raw, relay)
                if not reply.failed:
                    return reply.payload
        raise failure

    async def relay(self, request: RelayRequest) -> RelayReply:
        """Pass a call on for an admitted peer."""
        if request.call not in RELAYED or len(request.to) > 64:
            return RelayReply(failed="refused")
        try:
            return RelayReply(payload=await self.node.call(request.to, request.call, request.payload, PING_TIMEOUT_S))
        except Unreachable:
            return RelayReply(failed="unreachable")
        except Silent:
            return RelayReply(failed="silent")
        except Rejected:
            return RelayReply(failed="refused")

    async def drain(self, timeout_s: float) -> None:
        """Wait for what is on its way."""
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=timeout_s)

    async def close(self) -> None:
        """Cancel what is on its way."""
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _deliver(self, peer: str, raw: bytes) -> None:
        try:
            answer = parse(Ack, await self.call(peer, DELIVER, raw, DELIVER_TIMEOUT_S), peer)
        except Unreachable as error:
            log.debug("peer_unreachable", peer=peer, error=str(error))
            self.on_lost(peer)
            return
        except Silent:
            log.debug("peer_silent", peer=peer)
            return
        except Rejected as error:
            self.on_refused(peer, error.reason)
            return
        if answer.rejected:
            self.on_refused(peer, answer.rejected)

    def _finished(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            log.error("task_failed", exc_info=task.exception())
