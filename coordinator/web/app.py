"""Routes, and the server that answers them until its context is left."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

import uvicorn
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import BaseRoute, Mount, Route

from coordinator.journal import Journal
from coordinator.store.interface import Store
from coordinator.web.events import Events
from coordinator.web.explorer import Explorer
from coordinator.web.figures import live
from coordinator.web.pages import Pages
from coordinator.web.rendering import HEADERS, Renderer, Static, load_static, static_response
from swarm.identity import Identity

if TYPE_CHECKING:
    import socket
    from collections.abc import Iterator

MOST_CONNECTIONS = 512
GRACE_S = 2


@dataclass(frozen=True)
class Site:
    """A run's pages, below the path `base`."""

    journal: Journal
    store: Store
    identity: Identity
    link: str
    base: str = ""

    def events(self) -> Events:
        """What tells readers new figures."""
        return Events(lambda: live(self.journal))

    def renderer(self) -> Renderer:
        """Fills in templates about the run."""
        journal = self.journal
        return Renderer(self.base, manifest=journal.manifest, coordinator=self.identity.peer_id, run_id=journal.run_id.hex())

    def routes(self, events: Events, static: Route) -> list[Route]:
        """Where each page is, below the base."""
        renderer = self.renderer()
        pages = Pages(self.journal, self.store, renderer, self.link)
        explorer = Explorer(self.journal, self.store, self.identity, renderer)

        async def listen(_: Request) -> Response:
            return events.response()

        return [
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
            Route("/api/evaluations", pages.evaluations),
            Route("/checkpoint", explorer.checkpoint),
            Route("/events", listen),
            static,
        ]


def application(sites: Sequence[Site], registry: CollectorRegistry, events: Sequence[Events]) -> Starlette:
    """The ASGI application: one run's pages at the root, or a list of the runs there and each below its own path."""
    first, listing = sites[0].renderer(), Renderer()
    static = Route("/static/{name}", _asset(load_static()))

    async def runs(_: Request) -> Response:
        rows = [(site.base, site.journal.manifest, live(site.journal)) for site in sites]
        return listing.page("runs.html", rows=rows)

    async def metrics(_: Request) -> Response:
        return Response(generate_latest(registry), headers={"Content-Type": CONTENT_TYPE_LATEST, **HEADERS})

    async def healthz(_: Request) -> Response:
        healthy = all(site.journal.is_healthy for site in sites)
        return PlainTextResponse("ok\n" if healthy else "the ledger can't be written\n", 200 if healthy else 503, HEADERS)

    async def unknown(_: Request, __: Exception) -> Response:
        return first.sorry(404, "Not found", "There is no such page.")

    routes: list[BaseRoute] = [Route("/metrics", metrics), Route("/healthz", healthz)]
    if len(sites) == 1:
        routes += sites[0].routes(events[0], static)
    else:
        routes += [Route("/", runs), static]
        routes += [Mount(site.base, routes=site.routes(told, static)) for site, told in zip(sites, events, strict=True)]
    return Starlette(routes=routes, exception_handlers={404: unknown})


def _asset(static: Mapping[str, Static]) -> Callable[[Request], Awaitable[Response]]:
    async def asset(request: Request) -> Response:
        file = static.get(request.path_params["name"])
        return PlainTextResponse("no such file\n", 404, HEADERS) if file is None else static_response(file, request)

    return asset


class _Server(uvicorn.Server):
    """uvicorn that leaves signals to the process."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@asynccontextmanager
async def serve(sites: Sequence[Site], registry: CollectorRegistry, listener: socket.socket) -> AsyncIterator[None]:
    """Serve the pages on a bound socket until the context is left."""
    events = [site.events() for site in sites]
    config = uvicorn.Config(
        application(sites, registry, events),
        log_config=None,
        access_log=False,
        lifespan="off",
        server_header=False,
        limit_concurrency=MOST_CONNECTIONS,
        timeout_graceful_shutdown=GRACE_S,
    )
    server = _Server(config)
    async with AsyncExitStack() as stack:
        for each in events:
            await stack.enter_async_context(each.looking())
        task = asyncio.create_task(server.serve(sockets=[listener]))
        try:
            yield
        finally:
            for each in events:
                each.close()
            server.should_exit = True
            with suppress(asyncio.CancelledError):
                await task
