"""Routes, and the server that answers them until its context is left."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

import uvicorn
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from coordinator.journal import Journal
from coordinator.store.interface import Store
from coordinator.web.events import Events
from coordinator.web.explorer import Explorer
from coordinator.web.figures import live
from coordinator.web.pages import Pages
from coordinator.web.rendering import HEADERS, Renderer, load_static, static_response
from swarm.identity import Identity

if TYPE_CHECKING:
    import socket
    from collections.abc import Iterator

MOST_CONNECTIONS = 512
GRACE_S = 2


@dataclass(frozen=True)
class Site:
    """What the pages are about."""

    journal: Journal
    store: Store
    identity: Identity
    registry: CollectorRegistry
    link: str

    def application(self, events: Events) -> Starlette:
        """The ASGI application."""
        journal = self.journal
        renderer = Renderer(manifest=journal.manifest, coordinator=self.identity.peer_id, run_id=journal.run_id.hex())
        pages = Pages(journal, self.store, renderer, self.link)
        explorer = Explorer(journal, self.store, self.identity, renderer)
        static = load_static()

        async def asset(request: Request) -> Response:
            file = static.get(request.path_params["name"])
            return PlainTextResponse("no such file\n", 404, HEADERS) if file is None else static_response(file, request)

        async def listen(_: Request) -> Response:
            return events.response()

        async def unknown(_: Request, __: Exception) -> Response:
            return renderer.sorry(404, "Not found", "There is no such page.")

        return Starlette(
            routes=[
                Route("/", pages.index),
                Route("/leaderboard", pages.leaderboard),
                Route("/account", pages.find),
                Route("/account/{peer_id}", pages.account),
                Route("/audits", pages.audits),
                Route("/badges", pages.badges),
                Route("/ledger", explorer.entries),
                Route("/ledger/{index:int}", explorer.entry),
                Route("/api/ledger/{index:int}", explorer.proof),
                Route("/api/consistency", explorer.consistency),
                Route("/checkpoint", explorer.checkpoint),
                Route("/events", listen),
                Route("/static/{name}", asset),
                Route("/metrics", self._metrics),
                Route("/healthz", self._healthz),
            ],
            exception_handlers={404: unknown},
        )

    async def _metrics(self, _: Request) -> Response:
        """Prometheus exposition."""
        return Response(generate_latest(self.registry), headers={"Content-Type": CONTENT_TYPE_LATEST, **HEADERS})

    async def _healthz(self, _: Request) -> Response:
        """200 while the ledger can be written, else 503."""
        healthy = self.journal.is_healthy
        return PlainTextResponse("ok\n" if healthy else "the ledger can't be written\n", 200 if healthy else 503, HEADERS)


class _Server(uvicorn.Server):
    """uvicorn that leaves signals to the process."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@asynccontextmanager
async def serve(site: Site, listener: socket.socket) -> AsyncIterator[None]:
    """Serve the pages on a bound socket until the context is left."""
    events = Events(lambda: live(site.journal))
    config = uvicorn.Config(
        site.application(events),
        log_config=None,
        access_log=False,
        lifespan="off",
        server_header=False,
        limit_concurrency=MOST_CONNECTIONS,
        timeout_graceful_shutdown=GRACE_S,
    )
    server = _Server(config)
    async with events.looking():
        task = asyncio.create_task(server.serve(sockets=[listener]))
        try:
            yield
        finally:
            events.close()
            server.should_exit = True
            with suppress(asyncio.CancelledError):
                await task
