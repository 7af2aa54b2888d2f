"""The run's files from a web folder that the volunteer names: each by its root, as `swarm data build` leaves it.

What comes is only believed once its root is right. It is held to the volunteer's caps and counted like what comes from peers, and
goes on where it broke off, if the server can (RFC 9110, section 14).
"""

from __future__ import annotations

import asyncio
import re
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import structlog

from peer.data import verify_tree_file
from peer.network.transfer import Transfer
from swarm import __version__
from swarm.errors import DataInvalid
from swarm.manifest import Tree

PIECE_BYTES = 1 << 17
PATIENCE = httpx.Timeout(30.0, connect=10.0)
MAX_REDIRECTS = 5
RANGE = re.compile(r"^bytes (\d+)-\d+/(\d+)$")

log = structlog.get_logger(__name__)


class MirrorFailed(Exception):
    """The file couldn't be had from there; `for_good` where asking again won't help."""

    def __init__(self, reason: str, *, for_good: bool = False) -> None:
        super().__init__(reason)
        self.for_good = for_good


@dataclass
class Mirror:
    """A web folder. Files that turned out to be wrong there aren't asked for again."""

    address: str
    _wrong: set[str] = field(default_factory=set)

    async def fetch(self, tree: Tree, partial: Path, transfer: Transfer) -> bool:
        """Whether `partial` is now the file of `tree`; what came of it before is gone on with."""
        if tree.root in self._wrong or not transfer.may_move():
            return False
        try:
            here = await asyncio.to_thread(lambda: partial.stat().st_size if partial.exists() else 0)
            if here < tree.size_bytes:
                await self._download(tree, partial, here, transfer)
            await asyncio.to_thread(verify_tree_file, partial, tree)
        except DataInvalid as error:
            self._give_up(tree, partial, error.message)
            return False
        except (MirrorFailed, httpx.HTTPError) as error:
            if isinstance(error, MirrorFailed) and error.for_good:
                self._give_up(tree, partial, str(error))
            else:
                log.info("mirror_away", file=tree.root[:12], reason=str(error) or type(error).__name__)
            return False
        return True

    def _give_up(self, tree: Tree, partial: Path, reason: str) -> None:
        log.warning("mirror_has_another_file", address=self.address, file=tree.root[:12], reason=reason)
        self._wrong.add(tree.root)
        partial.unlink(missing_ok=True)

    async def _download(self, tree: Tree, partial: Path, here: int, transfer: Transfer) -> None:
        headers = {"User-Agent": f"swarm/{__version__}", "Accept-Encoding": "identity"}
        if here:
            headers["Range"] = f"bytes={here}-"
        async with (
            httpx.AsyncClient(timeout=PATIENCE, follow_redirects=True, max_redirects=MAX_REDIRECTS) as client,
            client.stream("GET", f"{self.address}/{tree.root}", headers=headers) as answer,
        ):
            start = _start_of(answer, here, tree)
            log.info("file_from_mirror", file=tree.root[:12], here=start, size_bytes=tree.size_bytes)
            with partial.open("r+b" if start else "wb") as file:
                file.truncate(start)
                file.seek(start)
                size = start
                async for piece in answer.aiter_raw(PIECE_BYTES):
                    size += len(piece)
                    if size > tree.size_bytes:
                        raise MirrorFailed(f"more than {tree.size_bytes} bytes", for_good=True)
                    file.write(piece)
                    await transfer.take_in(len(piece), "web")
        if size < tree.size_bytes:
            raise MirrorFailed(f"broke off after {size} of {tree.size_bytes} bytes")


def _start_of(answer: httpx.Response, here: int, tree: Tree) -> int:
    """From which byte on the answer has the file: where we left off, or the beginning for a server that can't go on."""
    if answer.status_code == httpx.codes.OK:
        return 0
    if answer.status_code == httpx.codes.PARTIAL_CONTENT:
        found = RANGE.match(answer.headers.get("Content-Range", ""))
        if found is not None and (int(found[1]), int(found[2])) == (here, tree.size_bytes):
            return here
        raise MirrorFailed("its file has another size", for_good=True)
    if answer.status_code == httpx.codes.REQUESTED_RANGE_NOT_SATISFIABLE:
        raise MirrorFailed("its file is shorter", for_good=True)
    raise MirrorFailed(f"status {answer.status_code}", for_good=answer.status_code == httpx.codes.NOT_FOUND)
