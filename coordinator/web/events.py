"""Server-sent events: what changes on the page while somebody looks at it.

One task looks once a second whether a figure has changed, as long as anybody listens; listeners wait for it and send the newest
figures, so that who reads slowly misses some and holds no memory. Listeners are bounded, each is sent off after a while (browsers
come back), one that takes nothing is dropped, and all end when the server stops.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from typing import Any

from starlette.responses import PlainTextResponse, Response
from starlette.types import Receive, Scope, Send

from coordinator.web.rendering import HEADERS

MOST_LISTENERS = 128
EVERY_S = 1.0
HEARTBEAT_S = 15.0
SEND_TIMEOUT_S = 20.0
LONGEST_S = 1800.0
RETRY_MS = 3000
HEARTBEAT = b": still here\n\n"

Figures = Callable[[], Mapping[str, str]]


class Events:
    """The newest figures, and whoever waits for newer ones."""

    def __init__(
        self, figures: Figures, most: int = MOST_LISTENERS, every_s: float = EVERY_S, heartbeat_s: float = HEARTBEAT_S
    ) -> None:
        self._figures = figures
        self._most = most
        self._every_s = every_s
        self._heartbeat_s = heartbeat_s
        self._version = 0
        self._message = b""
        self._shown: Mapping[str, str] = {}
        self._changed = asyncio.Event()
        self._wanted = asyncio.Event()
        self._is_over = False
        self.listeners = 0

    @asynccontextmanager
    async def looking(self) -> AsyncIterator[None]:
        """Look for changes until the context is left, and then let all listeners go."""
        task = asyncio.create_task(self._look())
        try:
            yield
        finally:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
            self.close()

    def close(self) -> None:
        """Let all listeners go."""
        self._is_over = True
        self._changed.set()

    def response(self) -> Response:
        """The answer to one more listener."""
        if self._is_over or self.listeners >= self._most:
            return PlainTextResponse("too many listeners\n", 503, {**HEADERS, "Retry-After": "30"})
        return _Stream(self)

    async def messages(self) -> AsyncGenerator[bytes, None]:
        """What one listener is sent: the figures as they are, then at every change, and a sign of life in between."""
        self.listeners += 1
        self._wanted.set()
        try:
            if self.listeners == 1:
                self._refresh()
            seen, until = self._version, asyncio.get_running_loop().time() + LONGEST_S
            yield f"retry: {RETRY_MS}\n\n".encode() + self._message
            while not self._is_over and asyncio.get_running_loop().time() < until:
                if seen == self._version:
                    with suppress(TimeoutError):
                        async with asyncio.timeout(self._heartbeat_s):
                            await self._changed.wait()
                if self._is_over:
                    return
                message, seen = self._message if seen != self._version else HEARTBEAT, self._version
                yield message
        finally:
            self.listeners -= 1
            if not self.listeners:
                self._wanted.clear()

    async def _look(self) -> None:
        while True:
            await self._wanted.wait()
            self._refresh()
            await asyncio.sleep(self._every_s)

    def _refresh(self) -> None:
        """Wake all who wait, if anything is new; who waits from now on waits for the next change."""
        figures = self._figures()
        if figures == self._shown:
            return
        self._shown, self._version = figures, self._version + 1
        self._message = f"event: figures\ndata: {json.dumps(dict(figures))}\n\n".encode()
        self._changed.set()
        self._changed = asyncio.Event()


class _Stream(Response):
    """Messages for as long as somebody takes them."""

    def __init__(self, events: Events) -> None:
        super().__init__(headers=HEADERS, media_type="text/event-stream")
        del self.headers["content-length"]
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send until the listener is gone, takes nothing, or is let go."""
        sending = asyncio.ensure_future(self._send_all(send))
        gone = asyncio.ensure_future(_gone(receive))
        try:
            await asyncio.wait((sending, gone), return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (sending, gone):
                task.cancel()
            await asyncio.gather(sending, gone, return_exceptions=True)

    async def _send_all(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        messages = self._events.messages()
        try:
            async for message in messages:
                async with asyncio.timeout(SEND_TIMEOUT_S):
                    await send(_body(message, more=True))
            await send(_body(b"", more=False))
        finally:
            await messages.aclose()


def _body(message: bytes, more: bool) -> dict[str, Any]:
    return {"type": "http.response.body", "body": message, "more_body": more}


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
