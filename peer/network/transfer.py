"""Fetching blobs by hash from any holder, and serving them: the one place where bulk bytes move.

Every byte is verified before it is used; sizes are known beforehand; a source that stalls or lies is given up and named.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import structlog

from peer.network.blobs import BlobStore
from peer.network.node import Node, PeerFailure, Silent, Unreachable
from peer.network.throttle import LinkMeter, TokenBucket
from peer.network.traffic import Kind
from swarm.clock import Clock, SystemClock
from swarm.errors import Rejected
from swarm.merkle import HASH_BYTES, blob_hash
from swarm.messages import parse
from swarm.rpc.v1.peer_pb2 import FetchRequest
from swarm.rpc.v1.signed_pb2 import Signed

FETCH_STREAM = "swarm/1/fetch"
MAX_REQUEST_BYTES = 1 << 19
MAX_HASHES = 4096
FRAME_BYTES = 1 << 17
FOUND, MISSING = 0, 1
BATCH_BYTES = 4 << 20
SMALLEST_BATCH_BYTES = 1 << 18
BATCH_S = 2.0
PULLED_BLOB_BYTES = 8 << 20
PULLED_BYTES = 64 << 20
MAX_SOURCES = 1024
TELLING_REQUEST_BYTES = 2 << 20

log = structlog.get_logger(__name__)


class MissingBlob(PeerFailure):
    """The source doesn't have (all of) what was asked for."""

    reason = "missing"


@dataclass
class Transfer:
    """Serves the store to admitted peers and fetches from others. Bytes are counted, and held to the volunteer's caps, here.

    While `may_move` says no, nothing is served and no download begins; what a round in progress needs is still fetched.
    """

    node: Node
    store: BlobStore
    run_id: bytes
    is_admitted: Callable[[str, Signed | None], bool]
    admission: Callable[[], Signed | None]
    upload: TokenBucket = field(default_factory=TokenBucket)
    download: TokenBucket = field(default_factory=TokenBucket)
    upload_meter: LinkMeter = field(default_factory=LinkMeter)
    clock: Clock = SystemClock()
    stall_s: float = 10.0
    relays: Callable[[str], Sequence[str]] = lambda peer: ()
    may_move: Callable[[], bool] = lambda: True
    sources: dict[str, LinkMeter] = field(default_factory=dict)
    sending: int = 0
    busy: asyncio.Event = field(default_factory=asyncio.Event)
    _coming: dict[bytes, asyncio.Future[None]] = field(default_factory=dict)

    def limit(self, upload_bytes_per_s: float, download_bytes_per_s: float) -> None:
        """Hold bulk bytes to the volunteer's caps; 0 = no limit."""
        self.upload.rate_bytes_per_s, self.download.rate_bytes_per_s = upload_bytes_per_s, download_bytes_per_s
        self.upload_meter.limit_bytes_per_s = upload_bytes_per_s

    async def take_in(self, size_bytes: int, kind: Kind = "bulk") -> None:
        """Count bytes that came, and wait until so many more may."""
        self.node.traffic.count("received", kind, size_bytes)
        await self.download.take(size_bytes)

    async def start(self) -> None:
        """Begin to serve."""
        await self.node.serve_streams(FETCH_STREAM, self._serve)

    async def fetch(
        self,
        peer: str,
        sizes: Mapping[bytes, int],
        *,
        origin: str = "",
        keep: Callable[[bytes, bytes], None] | None = None,
        patience_s: float = 0.0,
    ) -> dict[bytes, bytes]:
        """Fetch blobs from one peer; `sizes` gives each hash its size limit in bytes.

        `patience_s` is for what is in no hurry: how long it may stall, where that is longer than a round's exchange allows.

        `keep(hash, content)` is called with each blob as soon as it is verified. Raises `Unreachable`, `Silent`, `MissingBlob`
        (after having kept the others), or `Rejected` when the peer sends wrong bytes.
        """
        found: dict[bytes, bytes] = {}
        absent = 0
        patience_s = max(patience_s, self.stall_s)
        try:
            reader, writer = await self.node.open_stream(peer, FETCH_STREAM, patience_s)
        except Unreachable:
            relays = [] if origin else list(self.relays(peer))
            if not relays:
                raise
            return await self.fetch(relays[0], sizes, origin=peer, keep=keep, patience_s=patience_s)
        started, received = self.clock.monotonic_s(), 0
        try:
            names = list(sizes)
            for start in range(0, len(names), MAX_HASHES):
                batch = names[start : start + MAX_HASHES]
                request = FetchRequest(run_id=self.run_id, hashes=batch, admission=self.admission(), origin=origin)
                await self._send_request(peer, writer, request, patience_s)
                for name in batch:
                    content = await self._receive(peer, reader, name, sizes[name], patience_s * (2 if origin else 1))
                    if content is None:
                        absent += 1
                        continue
                    received += len(content)
                    found[name] = content
                    if keep is not None:
                        keep(name, content)
        except (OSError, EOFError) as error:
            raise Unreachable(peer, "stream broke off") from error
        finally:
            writer.close()
            self._observe_source(peer, received, self.clock.monotonic_s() - started)
        if absent:
            raise MissingBlob(peer, f"lacks {absent} of {len(sizes)} blobs")
        return found

    async def obtain(
        self, peer: str, sizes: Mapping[bytes, int], keep: Callable[[bytes, bytes], None], *, origin: str = ""
    ) -> None:
        """Fetch blobs into the store by `keep`; those that are on their way already are waited for, not asked for twice.

        Raises what `fetch` raises.
        """
        wanted = dict(sizes)
        while wanted:
            coming = {name: self._coming[name] for name in wanted if name in self._coming}
            mine = {name: size for name, size in wanted.items() if name not in coming}
            if mine:
                await self._fetch_announced(peer, mine, keep, origin)
            if coming:
                await asyncio.wait(coming.values())
            wanted = {name: size for name, size in wanted.items() if name in coming and name not in self.store}

    async def _fetch_announced(
        self, peer: str, sizes: Mapping[bytes, int], keep: Callable[[bytes, bytes], None], origin: str
    ) -> None:
        loop = asyncio.get_running_loop()
        announced = {name: loop.create_future() for name in sizes}
        self._coming |= announced

        def arrived(name: bytes, content: bytes) -> None:
            keep(name, content)
            self._coming.pop(name).set_result(None)

        try:
            await self.fetch(peer, sizes, origin=origin, keep=arrived)
        finally:
            for name, future in announced.items():
                if not future.done():
                    self._coming.pop(name).set_result(None)

    def speed_of(self, source: str) -> float:
        """Bytes per second that a peer has given us lately; 0 = not known."""
        meter = self.sources.get(source)
        return meter.bytes_per_s if meter is not None else 0.0

    async def download_all(
        self,
        sources: Sequence[str],
        sizes: Mapping[bytes, int],
        keep: Callable[[bytes, bytes], None],
        batch_bytes: int = BATCH_BYTES,
    ) -> dict[str, str]:
        """Fetch blobs from many peers at once, faster ones giving more; the failed sources and why.

        Raises `MissingBlob` when no source is left and something is still missing.
        """
        job = _Download(self, sizes, keep, batch_bytes)
        return await job.run(sources)

    async def _send_request(self, peer: str, writer: asyncio.StreamWriter, request: FetchRequest, patience_s: float) -> None:
        raw = request.SerializeToString()
        writer.write(len(raw).to_bytes(4, "big") + raw)
        self.node.traffic.count("sent", "control", len(raw) + 4)
        with _silence(peer):
            await asyncio.wait_for(writer.drain(), patience_s)

    def _observe_source(self, peer: str, size_bytes: int, seconds: float) -> None:
        if size_bytes and peer not in self.sources and len(self.sources) >= MAX_SOURCES:
            self.sources.pop(next(iter(self.sources)))
        if size_bytes:
            self.sources.setdefault(peer, LinkMeter()).observe(size_bytes, seconds)

    async def _receive(self, peer: str, reader: asyncio.StreamReader, name: bytes, limit: int, patience_s: float) -> bytes | None:
        with _silence(peer):
            header = await asyncio.wait_for(reader.readexactly(9), patience_s)
        self.node.traffic.count("received", "bulk", len(header))
        if header[0] == MISSING:
            return None
        size = int.from_bytes(header[1:], "big")
        if header[0] != FOUND or size > limit:
            raise Rejected("too_large", f"{size} bytes, at most {limit}", peer)
        content = bytearray()
        while len(content) < size:
            with _silence(peer):
                most = min(self.download.piece_bytes(FRAME_BYTES), size - len(content))
                piece = await asyncio.wait_for(reader.read(most), patience_s)
            if not piece:
                raise Unreachable(peer, "stream broke off")
            content += piece
            await self.take_in(len(piece))
        if blob_hash(content) != name:
            raise Rejected("wrong_bytes", f"blob {name.hex()[:12]}", peer)
        return bytes(content)

    async def _serve(self, peer: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            try:
                length = int.from_bytes(await asyncio.wait_for(reader.readexactly(4), self.stall_s), "big")
            except asyncio.IncompleteReadError:
                return
            if length > MAX_REQUEST_BYTES:
                raise Rejected("too_large", "fetch request", peer)
            raw = await asyncio.wait_for(reader.readexactly(length), self.stall_s)
            self.node.traffic.count("received", "control", 4 + length)
            request = parse(FetchRequest, raw, peer)
            if request.run_id != self.run_id or not self.is_admitted(peer, request.admission):
                raise Rejected("not_admitted", "fetch", peer)
            if len(request.hashes) > MAX_HASHES or any(len(name) != HASH_BYTES for name in request.hashes):
                raise Rejected("malformed", "fetch request", peer)
            await self._answer(peer, writer, request)

    async def _answer(self, peer: str, writer: asyncio.StreamWriter, request: FetchRequest) -> None:
        pulling = None
        if request.origin and request.origin != self.node.peer_id and self.may_move():
            pulling = asyncio.create_task(self._pull_for(request), name="pull-for")
        started, before = self.clock.monotonic_s(), self.node.traffic.sent["bulk"]
        try:
            for position, name in enumerate(request.hashes):
                if pulling is not None:
                    await self._arrival(name, pulling)
                await self._send_blob(peer, writer, name, request.offset if position == 0 else 0)
        finally:
            if pulling is not None:
                pulling.cancel()
        sent = self.node.traffic.sent["bulk"] - before
        if not self.node.traffic.at_socket and sent >= TELLING_REQUEST_BYTES:
            self.upload_meter.observe(sent, self.clock.monotonic_s() - started)

    async def _pull_for(self, request: FetchRequest) -> None:
        """Get what we lack from the origin, so that we can pass it on: its uplink is slow, or our peer can't dial it."""
        pulled = 0

        def keep(name: bytes, content: bytes) -> None:
            nonlocal pulled
            pulled += len(content)
            if pulled > PULLED_BYTES:
                raise Rejected("too_large", "pulled for another", request.origin)
            self.store.put_verified(name, content, self.store.newest_round)

        missing = [name for name in request.hashes if self.store.get(name) is None]
        with contextlib.suppress(PeerFailure, Rejected):
            await self.obtain(request.origin, dict.fromkeys(missing, PULLED_BLOB_BYTES), keep)

    async def _arrival(self, name: bytes, pulling: asyncio.Task[None]) -> None:
        """Wait until a blob is here, or the attempt to get it is over."""
        while not pulling.done() and self.store.get(name) is None:
            coming = self._coming.get(name)
            await asyncio.wait({pulling} if coming is None else {pulling, coming}, return_when=asyncio.FIRST_COMPLETED)

    async def _send_blob(self, peer: str, writer: asyncio.StreamWriter, name: bytes, offset: int) -> None:
        content = self.store.get(name) if self.may_move() else None
        if content is None or offset > len(content):
            writer.write(bytes([MISSING]) + bytes(8))
            self.node.traffic.count("sent", "bulk", 9)
            return
        view = memoryview(content)[offset:]
        self.sending += 1
        self.busy.set()
        try:
            await self._send_pieces(peer, writer, view)
        finally:
            self.sending -= 1

    async def _send_pieces(self, peer: str, writer: asyncio.StreamWriter, view: memoryview) -> None:
        writer.write(bytes([FOUND]) + len(view).to_bytes(8, "big"))
        self.node.traffic.count("sent", "bulk", 9)
        size = self.upload.piece_bytes(FRAME_BYTES)
        for start in range(0, len(view), size):
            piece = view[start : start + size]
            await self.upload.take(len(piece))
            writer.write(piece)
            self.node.traffic.count("sent", "bulk", len(piece))
            with _silence(peer):
                await asyncio.wait_for(writer.drain(), self.stall_s)


class _Download:
    """One download from many sources: each takes a batch at a time, so that fast ones take more batches.

    Batches shrink with what is left (guided self-scheduling, Polychronopoulos and Kuck 1987), so that all end together; who has
    nothing left to take fetches a blob that others still owe, one at a time.
    """

    def __init__(
        self, transfer: Transfer, sizes: Mapping[bytes, int], keep: Callable[[bytes, bytes], None], batch_bytes: int
    ) -> None:
        self.transfer = transfer
        self.wanted = dict(sizes)
        self.keep = keep
        self.batch_bytes = batch_bytes
        self.queue = deque(sizes)
        self.queued_bytes = sum(sizes.values())
        self.owed = Counter[bytes]()
        self.source_count = 0
        self.failed: dict[str, str] = {}

    async def run(self, sources: Sequence[str]) -> dict[str, str]:
        fastest_first = sorted(sources, key=self.transfer.speed_of, reverse=True)
        self.source_count = len(fastest_first)
        workers = [asyncio.create_task(self._work(source), name=f"download-{source}") for source in fastest_first]
        try:
            while self.wanted and (running := [worker for worker in workers if not worker.done()]):
                await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)
        if self.wanted:
            raise MissingBlob("any source", f"{len(self.wanted)} blobs are nowhere: {self.failed}")
        return self.failed

    async def _work(self, source: str) -> None:
        while self.wanted:
            if not self.transfer.may_move():
                self.failed[source] = "quota_used"
                return
            batch = self._next_batch(self._batch_bytes(source))
            self.owed.update(batch)
            try:
                await self.transfer.fetch(source, batch, keep=self._received)
            except (PeerFailure, Rejected) as error:
                self.failed[source] = error.reason
                log.info("source_dropped", source=source, reason=error.reason)
                return
            finally:
                self._give_back(batch)

    def _batch_bytes(self, source: str) -> int:
        """Half of this source's share of what is left, and at most about two seconds' worth."""
        speed = self.transfer.speed_of(source)
        most = min(self.batch_bytes, max(SMALLEST_BATCH_BYTES, int(speed * BATCH_S))) if speed else self.batch_bytes
        return min(most, self.queued_bytes // (2 * (self.source_count - len(self.failed))))

    def _next_batch(self, most_bytes: int) -> dict[bytes, int]:
        """Blobs that nobody works on, at least one; once all are taken, one that the fewest sources owe."""
        batch: dict[bytes, int] = {}
        size = 0
        while self.queue and (not batch or size < most_bytes):
            name = self.queue.popleft()
            batch[name] = self.wanted[name]
            size += batch[name]
        self.queued_bytes -= size
        if not batch:
            name = min(reversed(self.wanted), key=self.owed.__getitem__)
            batch[name] = self.wanted[name]
        return batch

    def _give_back(self, batch: Mapping[bytes, int]) -> None:
        """Let others take what a source was to give and didn't."""
        self.owed.subtract(batch)
        for name in batch:
            if name in self.wanted and not self.owed[name]:
                self.queue.append(name)
                self.queued_bytes += self.wanted[name]

    def _received(self, name: bytes, content: bytes) -> None:
        if self.wanted.pop(name, None) is not None:
            self.keep(name, content)


@contextlib.contextmanager
def _silence(peer: str) -> Iterator[None]:
    try:
        yield
    except TimeoutError as error:
        raise Silent(peer) from error
