"""The control socket: a Unix socket in the peer's own directory, one JSON line in, one JSON line out, owner only."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from swarm.control import short_name, socket_path
from swarm.errors import AlreadyRunning, SwarmError

MAX_LINE_BYTES = 1 << 16
TIMEOUT_S = 60.0

Handler = Callable[[str, dict[str, Any]], Awaitable[dict[str, Any]]]


class ControlServer:
    """Answers verbs for as long as the daemon runs."""

    def __init__(self, directory: Path, handler: Handler) -> None:
        self._path = socket_path(directory)
        self._handler = handler
        self._server: asyncio.Server | None = None
        self._kept = False

    async def start(self, inherited: int | None = None) -> None:
        """Listen, on a socket that was open already if there is one. Raises `AlreadyRunning` if another daemon answers there."""
        leave: Any = {"cleanup_socket": False} if sys.version_info >= (3, 13) else {}
        if inherited is not None:
            listening = socket.socket(fileno=inherited)
            self._server = await asyncio.start_unix_server(self._serve, sock=listening, limit=MAX_LINE_BYTES, **leave)
            return
        if self._path.exists() and await _answers(self._path):
            raise AlreadyRunning(f"a peer is running already in {self._path.parent}", "see it with: swarm status")
        self._path.unlink(missing_ok=True)
        previous = os.umask(0o177)
        try:
            with short_name(self._path) as name:
                self._server = await asyncio.start_unix_server(self._serve, path=name, limit=MAX_LINE_BYTES, **leave)
        finally:
            os.umask(previous)

    def keep(self) -> int:
        """A descriptor of the socket for the program that takes our place; questions wait there meanwhile."""
        if self._server is None:
            raise RuntimeError("not listening")
        self._kept = True
        descriptor = os.dup(self._server.sockets[0].fileno())
        os.set_inheritable(descriptor, True)
        return descriptor

    async def close(self) -> None:
        """Stop listening and remove the socket, unless it was kept."""
        if self._server is not None:
            self._server.close()
            if not self._kept:
                self._path.unlink(missing_ok=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            request = json.loads(await asyncio.wait_for(reader.readline(), TIMEOUT_S))
            answer = await self._handler(str(request["verb"]), dict(request.get("arguments", {})))
        except SwarmError as error:
            answer = {"error": error.message}
        except (ValueError, KeyError, TypeError, TimeoutError) as error:
            answer = {"error": f"bad request: {error}"}
        try:
            writer.write(json.dumps(answer).encode() + b"\n")
            await writer.drain()
        except OSError:
            return
        finally:
            writer.close()


async def _answers(path: Path) -> bool:
    try:
        with short_name(path) as name:
            _, writer = await asyncio.open_unix_connection(name)
    except OSError:
        return False
    writer.close()
    return True
