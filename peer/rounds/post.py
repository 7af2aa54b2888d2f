"""Sending protocol messages to peers: bounded in time, retried once, with the outcome told to whoever needs to know."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Coroutine, Iterable
from dataclasses import dataclass, field
from typing import Any

import structlog

from peer.network.node import Node, Silent, Unreachable
from swarm.errors import Rejected
from swarm.messages import parse
from swarm.rpc.v1.peer_pb2 import Ack, Delivery, SyncReply, SyncRequest

DELIVER = "swarm/1/deliver"
SYNC = "swarm/1/sync"
PING = "swarm/1/ping"
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
    _tasks: set[asyncio.Task[Any]] = field(default_factory=set)

    def send(self, peers: Iterable[str], delivery: Delivery) -> None:
        """Deliver to each peer, without waiting."""
        raw = delivery.SerializeToString()
        for peer in peers:
            if peer != self.node.peer_id:
                self.spawn(self._deliver(peer, raw))

    def spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[Any]:
        """Run a task that ends with this post."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._finished)
        return task

    async def ping(self, peer: str, timeout_s: float = PING_TIMEOUT_S) -> bool:
        """Whether the peer answers in time. Raises `Unreachable`."""
        try:
            await self.node.call(peer, PING, b"", timeout_s)
        except Silent:
            return False
        except Rejected:
            return True
        return True

    async def sync(self, peer: str, request: SyncRequest, timeout_s: float = DELIVER_TIMEOUT_S) -> SyncReply:
        """Ask where the run stands. Raises `Unreachable`, `Silent` or `Rejected`."""
        await self._reach(peer)
        return parse(SyncReply, await self.node.call(peer, SYNC, request.SerializeToString(), timeout_s), peer)

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
            answer = await self._call_twice(peer, raw)
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

    async def _call_twice(self, peer: str, raw: bytes) -> Ack:
        try:
            return parse(Ack, await self.node.call(peer, DELIVER, raw, DELIVER_TIMEOUT_S), peer)
        except Unreachable:
            await self._reach(peer)
            return parse(Ack, await self.node.call(peer, DELIVER, raw, DELIVER_TIMEOUT_S), peer)

    async def _reach(self, peer: str) -> None:
        if self.node.known_addresses(peer):
            with contextlib.suppress(Unreachable, Silent):
                await self.node.connect(peer)

    def _finished(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            log.error("task_failed", exc_info=task.exception())
