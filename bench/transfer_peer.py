"""A peer that only serves, in a process of its own: blobs through `Transfer`, and the same bytes bare on hivemind's P2P."""

from __future__ import annotations

import asyncio
import os
import random
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from hivemind.proto.runtime_pb2 import ExpertRequest, ExpertResponse

from bench.children import arguments, end_with_parent, say
from peer.network.blobs import BlobStore
from peer.network.node import Node
from peer.network.p2pd import P2pdOptions
from peer.network.transfer import Transfer
from swarm.identity import Identity
from swarm.rpc.v1.signed_pb2 import Signed

RUN_ID = bytes(32)
STORE_BYTES = 1 << 30
RAW_STREAM, MESSAGE_STREAM = "bench/raw", "bench/messages"
RAW_WRITE_BYTES = 1 << 17
MESSAGE_BYTES = 1 << 19


@asynccontextmanager
async def transfer_on_loopback(address: str = "127.0.0.1") -> AsyncIterator[Transfer]:
    """A node that listens on `address` and admits everybody, serving nothing yet."""
    with tempfile.TemporaryDirectory(prefix="swarm-bench-") as folder:
        key = Path(folder) / "identity.key"
        Identity.generate().save(key)
        node = await Node.start(P2pdOptions(key, listen=(f"/ip4/{address}/tcp/0",), map_port=False))
        try:
            yield Transfer(node, BlobStore(STORE_BYTES), RUN_ID, _everybody, lambda: None)
        finally:
            await node.close()


async def serve(blobs: int, blob_bytes: int, address: str = "127.0.0.1", seed: int | None = None) -> None:
    """Say where we are and what we have; serve until ended from outside. Peers of one `seed` have the same blobs."""
    async with transfer_on_loopback(address) as transfer:
        payload = os.urandom(blobs * blob_bytes) if seed is None else random.Random(seed).randbytes(blobs * blob_bytes)
        names = [transfer.store.put(payload[start : start + blob_bytes], 0) for start in range(0, len(payload), blob_bytes)]
        await transfer.start()
        await _serve_bare(transfer.node, payload)
        say(peer=transfer.node.peer_id, addresses=transfer.node.addresses, hashes=[name.hex() for name in names])
        await asyncio.Event().wait()


async def _serve_bare(node: Node, payload: bytes) -> None:
    view = memoryview(payload)

    async def raw(peer: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for start in range(0, len(view), RAW_WRITE_BYTES):
            writer.write(view[start : start + RAW_WRITE_BYTES])
            await writer.drain()

    async def messages(request: Any, context: Any) -> AsyncIterator[Any]:
        for start in range(0, len(payload), MESSAGE_BYTES):
            yield ExpertResponse(metadata=payload[start : start + MESSAGE_BYTES])

    await node.serve_streams(RAW_STREAM, raw)
    await node.p2p.add_protobuf_handler(MESSAGE_STREAM, messages, ExpertRequest, stream_output=True)


def _everybody(peer: str, admission: Signed | None) -> bool:
    return True


if __name__ == "__main__":
    end_with_parent()
    given = arguments()
    asyncio.run(serve(**given))
