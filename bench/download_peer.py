"""A peer that downloads blobs from several others at once, in a process of its own, and says how long it took."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from bench.children import arguments, end_with_parent, say
from bench.transfer_peer import transfer_on_loopback


async def download(address: str, sources: list[dict[str, Any]], blob_bytes: int, source_counts: list[int]) -> None:
    """Download everything once from each number of sources; says `seconds` after each."""
    async with transfer_on_loopback(address) as transfer:
        for source in sources:
            transfer.node.learn(source["peer"], source["addresses"])
            await transfer.node.connect(source["peer"])
        names = [bytes.fromhex(name) for name in sources[0]["hashes"]]
        for count in source_counts:
            found: dict[bytes, bytes] = {}
            peers = [source["peer"] for source in sources[:count]]
            started = time.monotonic()
            failed = await transfer.download_all(peers, dict.fromkeys(names, blob_bytes), found.__setitem__)
            say(sources=count, seconds=time.monotonic() - started, blobs=len(found), failed=failed)


if __name__ == "__main__":
    end_with_parent()
    asyncio.run(download(**arguments()))
