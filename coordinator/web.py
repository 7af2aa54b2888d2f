"""A small page for people (progress, leaderboard, ledger), `/metrics` for Prometheus and `/healthz` for supervisors.

Everything on the page comes from strangers or the ledger: templates escape, and the content security policy allows no script.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import uvicorn
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import HTMLResponse, PlainTextResponse, Response
from starlette.routing import Route

from coordinator.explain import explain
from coordinator.journal import Journal
from swarm.credits import FLOPS_PER_CREDIT, Balance
from swarm.errors import Rejected
from swarm.identity import Identity, public_key_of
from swarm.ledger import Checkpoint, origin_of, sign_checkpoint

if TYPE_CHECKING:
    import socket
    from collections.abc import Iterator

TEMPLATES = Path(__file__).parent / "templates"
LEADERBOARD_ROWS = 50
POLICY = "default-src 'none'; style-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}


class Pages:
    """The handlers, over what the journal knows."""

    def __init__(self, journal: Journal, identity: Identity, registry: CollectorRegistry, link: str) -> None:
        self._journal = journal
        self._identity = identity
        self._registry = registry
        self._link = link
        self._templates = Environment(
            loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined, auto_reload=False
        )
        self._templates.filters["credits"] = credits_text

    def application(self) -> Starlette:
        """The ASGI application."""
        return Starlette(
            routes=[
                Route("/", self.index),
                Route("/account/{peer_id}", self.account),
                Route("/style.css", self.style),
                Route("/checkpoint", self.checkpoint),
                Route("/metrics", self.metrics),
                Route("/healthz", self.healthz),
            ]
        )

    async def index(self, request: Request) -> Response:
        """Progress, leaderboard and ledger."""
        journal = self._journal
        page = self._templates.get_template("index.html").render(
            manifest=journal.manifest,
            run_id=journal.run_id.hex(),
            link=self._link,
            progress=journal.credits.progress(journal.run_id),
            peers_alive=len(journal.presence),
            leaderboard=journal.credits.leaderboard(journal.run_id, LEADERBOARD_ROWS),
            note=self._note(),
            coordinator=self._identity.peer_id,
        )
        return HTMLResponse(page, headers=HEADERS)

    async def account(self, request: Request) -> Response:
        """One account: what it has, and why it isn't earning."""
        journal, peer_id = self._journal, request.path_params["peer_id"]
        try:
            public_key_of(peer_id)
        except Rejected:
            return PlainTextResponse("not a peer id\n", 404, HEADERS)
        page = self._templates.get_template("account.html").render(
            manifest=journal.manifest, peer_id=peer_id, account=explain(journal.state, peer_id)
        )
        return HTMLResponse(page, headers=HEADERS)

    async def style(self, request: Request) -> Response:
        """The style sheet."""
        return Response((TEMPLATES / "style.css").read_bytes(), media_type="text/css", headers=HEADERS)

    async def checkpoint(self, request: Request) -> Response:
        """The newest signed checkpoint, for monitors and witnesses."""
        return PlainTextResponse(self._note(), headers=HEADERS)

    async def metrics(self, request: Request) -> Response:
        """Prometheus exposition."""
        return Response(generate_latest(self._registry), headers={"Content-Type": CONTENT_TYPE_LATEST, **HEADERS})

    async def healthz(self, request: Request) -> Response:
        """200 while the ledger can be written, else 503."""
        healthy = self._journal.is_healthy
        return PlainTextResponse("ok\n" if healthy else "the ledger can't be written\n", 200 if healthy else 503, HEADERS)

    def _note(self) -> str:
        tree = self._journal.tree
        return sign_checkpoint(self._identity, Checkpoint(origin_of(self._journal.run_id), len(tree), tree.root()))


def credits_text(balance: Balance) -> str:
    """Verified and final credits, to three digits after the point."""
    thousandths = balance.earned_flops * 1000 // FLOPS_PER_CREDIT
    return f"{thousandths // 1000}.{thousandths % 1000:03d}"


class _Server(uvicorn.Server):
    """uvicorn that leaves signals to the process."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@asynccontextmanager
async def serve(pages: Pages, listener: socket.socket) -> AsyncIterator[None]:
    """Serve the pages on a bound socket until the context is left."""
    config = uvicorn.Config(
        pages.application(), log_config=None, access_log=False, lifespan="off", server_header=False, limit_concurrency=256
    )
    server = _Server(config)
    task = asyncio.create_task(server.serve(sockets=[listener]))
    try:
        yield
    finally:
        server.should_exit = True
        with suppress(asyncio.CancelledError):
            await task
