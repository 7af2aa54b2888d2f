"""The ledger entry by entry, and what proves an entry: for people, and as JSON for programs and the page's own script."""

from __future__ import annotations

import asyncio
import base64
import re

from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response

from coordinator.journal import Journal
from coordinator.store.interface import Store
from coordinator.web.decoding import MEANINGS, lines, summary
from coordinator.web.pages import whole
from coordinator.web.rendering import HEADERS, Renderer
from swarm.entry_proof import ProvenEntry
from swarm.errors import SwarmError
from swarm.identity import Identity
from swarm.merkle import leaf_hash

ENTRY_ROWS = 25
HOST = re.compile(r"[A-Za-z0-9.\-]{1,253}(:[0-9]{1,5})?|\[[0-9a-fA-F:]{2,39}\](:[0-9]{1,5})?")
READERS = 2  # of the database at a time: what waits for the ledger's writer shares the threads


class Explorer:
    """The handlers. At most `READERS` requests have entries in memory at a time."""

    def __init__(self, journal: Journal, store: Store, identity: Identity, renderer: Renderer) -> None:
        self._journal = journal
        self._store = store
        self._identity = identity
        self._renderer = renderer
        self._reading = asyncio.Semaphore(READERS)

    async def entries(self, request: Request) -> Response:
        """A page of entries, the newest first."""
        size = len(self._journal.tree)
        asked = whole(request.query_params.get("entry"), 0, max(0, size - 1))
        end = whole(request.query_params.get("before"), 1, size)
        end = size if end is None and asked is None else min(size, asked + 1) if asked is not None else end or size
        first = max(0, end - ENTRY_ROWS)
        try:
            async with self._reading:
                raw = await asyncio.to_thread(self._store.entries, first, end - first)
                rows = [summary(first + place, entry) for place, entry in enumerate(raw)]
        except SwarmError:
            return self._unreadable()
        return self._renderer.page(
            "ledger.html", rows=rows[::-1], size=size, first=first, end=end, note=self._note(), page_rows=ENTRY_ROWS
        )

    async def entry(self, request: Request) -> Response:
        """One entry, decoded, with its proof."""
        index = request.path_params["index"]
        try:
            async with self._reading:
                proven = await self._proven(index)
                shown = None if proven is None else (summary(index, proven.entry), lines(proven.entry))
        except SwarmError:
            return self._unreadable()
        if proven is None or shown is None:
            return self._renderer.sorry(404, "No such entry", f"The ledger has {len(self._journal.tree):,} entries.")
        return self._renderer.page(
            "entry.html",
            proven=proven,
            leaf=leaf_hash(proven.entry).hex(),
            siblings=[sibling.hex() for sibling in proven.proof],
            size=len(self._journal.tree),
            summary=shown[0],
            lines=shown[1],
            meaning=MEANINGS.get(shown[0].kind, ""),
            address=address_of(request),
        )

    async def proof(self, request: Request) -> Response:
        """The raw entry, its inclusion proof and the newest signed checkpoint, as JSON."""
        try:
            async with self._reading:
                proven = await self._proven(request.path_params["index"])
        except SwarmError:
            return JSONResponse({"error": "the ledger can't be read"}, 503, HEADERS)
        if proven is None:
            return JSONResponse({"error": "no such entry"}, 404, HEADERS)
        return JSONResponse(proven.values(), headers=HEADERS)

    async def consistency(self, request: Request) -> Response:
        """Proof that the first `old` entries are the beginning of the first `size`, as JSON."""
        tree = self._journal.tree
        old, size = (whole(request.query_params.get(name), 0, len(tree) + 1) for name in ("old", "size"))
        if old is None or size is None or not 0 < old <= size <= len(tree):
            return JSONResponse({"error": "old and size are numbers of entries, old not more than size"}, 400, HEADERS)
        proof = [base64.b64encode(node).decode() for node in tree.consistency_proof(old, size)]
        return JSONResponse({"old": old, "size": size, "proof": proof}, headers=HEADERS)

    async def checkpoint(self, _: Request) -> Response:
        """The newest signed checkpoint, for monitors and witnesses."""
        return PlainTextResponse(self._note(), headers=HEADERS)

    async def _proven(self, index: int) -> ProvenEntry | None:
        if index >= len(self._journal.tree):
            return None
        found = await asyncio.to_thread(self._store.entries, index, 1)
        tree, run_id = self._journal.tree, self._journal.run_id
        proof = tuple(tree.inclusion_proof(index))
        return ProvenEntry(run_id, self._identity.peer_id, index, found[0], proof, self._note()) if found else None

    def _note(self) -> str:
        return self._journal.signed_checkpoint()[0]

    def _unreadable(self) -> Response:
        return self._renderer.sorry(503, "The ledger can't be read", "The database doesn't answer. Try again in a moment.")


def address_of(request: Request) -> str:
    """Where the reader has found this page, as far as that can be an address."""
    host = request.headers.get("host", "")
    return f"{request.url.scheme}://{host}" if HOST.fullmatch(host) else "http://ADDRESS"
