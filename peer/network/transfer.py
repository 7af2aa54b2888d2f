"""Fetching blobs by hash from any holder, and serving them: the one place where bulk bytes move.

Every byte is verified before it is used; sizes are known beforehand; a source that stalls or lies is given up and named.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import structlog

from peer.network.blobs import BlobStore
from peer.network.node import Node, PeerFailure, Silent, Unreachable
from peer.network.throttle import LinkMeter, TokenBucket
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

log = structlog.get_logger(__name__)


class MissingBlob(PeerFailure):
    """The source doesn't have (all of) what was asked for."""

    reason = "missing"


@dataclass
class Transfer:
    """Serves the store to admitted peers and fetches from others. Bytes are counted where they cross."""

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

    async def start(self) -> None:
        """Begin to serve."""
        await self.node.serve_streams(FETCH_STREAM, self._serve)

    async def fetch(
        self, peer: str, sizes: Mapping[bytes, int], *, origin: str = "", keep: Callable[[bytes, bytes], None] | None = None
    ) -> dict[bytes, bytes]:
        """Fetch blobs from one peer; `sizes` gives each hash its size limit in bytes.

        `keep(hash, content)` is called with each blob as soon as it is verified. Raises `Unreachable`, `Silent`, `MissingBlob`
        (after having kept the others), or `Rejected` when the peer sends wrong bytes.
        """
        found: dict[bytes, bytes] = {}
        absent = 0
        try:
            reader, writer = await self.node.open_stream(peer, FETCH_STREAM, self.stall_s)
        except Unreachable:
            relays = [] if origin else list(self.relays(peer))
            if not relays:
                raise
            return await self.fetch(relays[0], sizes, origin=peer, keep=keep)
        try:
            names = list(sizes)
            for start in range(0, len(names), MAX_HASHES):
                batch = names[start : start + MAX_HASHES]
                request = FetchRequest(run_id=self.run_id, hashes=batch, admission=self.admission(), origin=origin)
                await self._send_request(peer, writer, request)
                for name in batch:
                    content = await self._receive(peer, reader, name, sizes[name])
                    if content is None:
                        absent += 1
                        continue
                    found[name] = content
                    if keep is not None:
                        keep(name, content)
        except (OSError, EOFError) as error:
            raise Unreachable(peer, "stream broke off") from error
        finally:
            writer.close()
        if absent:
            raise MissingBlob(peer, f"lacks {absent} of {len(sizes)} blobs")
        return found

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
        job = _Download(self, dict(sizes), keep, batch_bytes)
        return await job.run(sources)

    async def _send_request(self, peer: str, writer: asyncio.StreamWriter, request: FetchRequest) -> None:
        raw = request.SerializeToString()
        writer.write(len(raw).to_bytes(4, "big") + raw)
        self.node.sent_bytes += len(raw) + 4
        with _silence(peer):
            await asyncio.wait_for(writer.drain(), self.stall_s)

    async def _receive(self, peer: str, reader: asyncio.StreamReader, name: bytes, limit: int) -> bytes | None:
        with _silence(peer):
            header = await asyncio.wait_for(reader.readexactly(9), self.stall_s)
        self.node.received_bytes += len(header)
        if header[0] == MISSING:
            return None
        size = int.from_bytes(header[1:], "big")
        if header[0] != FOUND or size > limit:
            raise Rejected("too_large", f"{size} bytes, at most {limit}", peer)
        content = bytearray()
        while len(content) < size:
            with _silence(peer):
                piece = await asyncio.wait_for(reader.read(min(FRAME_BYTES, size - len(content))), self.stall_s)
            if not piece:
                raise Unreachable(peer, "stream broke off")
            content += piece
            self.node.received_bytes += len(piece)
            await self.download.take(len(piece))
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
            self.node.received_bytes += 4 + length
            request = parse(FetchRequest, raw, peer)
            if request.run_id != self.run_id or not self.is_admitted(peer, request.admission):
                raise Rejected("not_admitted", "fetch", peer)
            if len(request.hashes) > MAX_HASHES or any(len(name) != HASH_BYTES for name in request.hashes):
                raise Rejected("malformed", "fetch request", peer)
            if request.origin:
                await self._pull_for(request)
            for position, name in enumerate(request.hashes):
                await self._send_blob(peer, writer, name, request.offset if position == 0 else 0)

    async def _pull_for(self, request: FetchRequest) -> None:
        """Get what we lack from the origin, so that we can serve it to a peer that can't dial it."""
        missing = [name for name in request.hashes if self.store.get(name) is None]
        with contextlib.suppress(PeerFailure, Rejected):
            await self.fetch(
                request.origin,
                dict.fromkeys(missing, 8 << 20),
                keep=lambda name, content: self.store.put_verified(name, content, self.store.newest_round),
            )

    async def _send_blob(self, peer: str, writer: asyncio.StreamWriter, name: bytes, offset: int) -> None:
        content = self.store.get(name)
        if content is None or offset > len(content):
            writer.write(bytes([MISSING]) + bytes(8))
            self.node.sent_bytes += 9
            return
        view = memoryview(content)[offset:]
        writer.write(bytes([FOUND]) + len(view).to_bytes(8, "big"))
        started = self.clock.monotonic_s()
        for start in range(0, len(view), FRAME_BYTES):
            piece = view[start : start + FRAME_BYTES]
            await self.upload.take(len(piece))
            writer.write(piece)
            with _silence(peer):
                await asyncio.wait_for(writer.drain(), self.stall_s)
        self.node.sent_bytes += 9 + len(view)
        self.upload_meter.observe(len(view), self.clock.monotonic_s() - started)


class _Download:
    """One download from many sources: each takes a batch at a time, so that fast ones take more batches."""

    def __init__(
        self, transfer: Transfer, sizes: dict[bytes, int], keep: Callable[[bytes, bytes], None], batch_bytes: int
    ) -> None:
        self.transfer = transfer
        self.wanted = sizes
        self.keep = keep
        self.batch_bytes = batch_bytes
        self.queue = deque(sizes)
        self.failed: dict[str, str] = {}

    async def run(self, sources: Sequence[str]) -> dict[str, str]:
        workers = [asyncio.create_task(self._work(source), name=f"download-{source}") for source in sources]
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
            batch = self._next_batch()
            try:
                await self.transfer.fetch(source, batch, keep=self._received)
            except (PeerFailure, Rejected) as error:
                self.failed[source] = error.reason
                log.info("source_dropped", source=source, reason=error.reason)
                return
            finally:
                self.queue.extend(name for name in batch if name in self.wanted and name not in self.queue)

    def _next_batch(self) -> dict[bytes, int]:
        """The next blobs that nobody works on; once all are taken, those that slower sources still owe."""
        batch: dict[bytes, int] = {}
        size = 0
        while self.queue and size < self.batch_bytes:
            name = self.queue.popleft()
            if name in self.wanted:
                batch[name] = self.wanted[name]
                size += batch[name]
        if not batch:
            for name in list(self.wanted)[::-1]:
                batch[name] = self.wanted[name]
                size += batch[name]
                if size >= self.batch_bytes:
                    break
        return batch

    def _received(self, name: bytes, content: bytes) -> None:
        if self.wanted.pop(name, None) is not None:
            self.keep(name, content)


@contextlib.contextmanager
def _silence(peer: str) -> Iterator[None]:
    try:
        yield
    except TimeoutError as error:
        raise Silent(peer) from error
