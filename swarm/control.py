"""Talking to a daemon of this machine: a Unix socket in the peer's own folder, one JSON line in, one JSON line out."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from swarm.errors import NotRunning

SOCKET_NAME = "control.sock"
STATUS_NAME = "status.json"
HISTORY_NAME = "history.jsonl"
RUN_NAME = "run.pb"
MAX_LINE_BYTES = 1 << 20
TIMEOUT_S = 60.0
LONGEST_NAME_BYTES = 107


@contextlib.contextmanager
def short_name(path: Path) -> Iterator[str]:
    """A name of a socket that fits into an address, which holds 107 bytes: where its path doesn't, by way of its open folder."""
    if len(os.fsencode(path)) <= LONGEST_NAME_BYTES:
        yield str(path)
        return
    folder = os.open(path.parent, os.O_PATH | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{folder}/{path.name}"
    finally:
        os.close(folder)


def socket_path(directory: Path) -> Path:
    """Where the daemon of a folder listens."""
    return directory / SOCKET_NAME


async def ask(directory: Path, verb: str, timeout_s: float = TIMEOUT_S, **arguments: Any) -> dict[str, Any]:
    """Ask the daemon of a folder. Raises `NotRunning`."""
    try:
        with short_name(socket_path(directory)) as name:
            reader, writer = await asyncio.open_unix_connection(name, limit=MAX_LINE_BYTES)
    except OSError as error:
        raise NotRunning(f"no peer is running in {directory}", "start one with: swarm join LINK") from error
    try:
        writer.write(json.dumps({"verb": verb, "arguments": arguments}).encode() + b"\n")
        await writer.drain()
        line = await asyncio.wait_for(reader.readline(), timeout_s)
    except (OSError, TimeoutError) as error:
        raise NotRunning(f"the peer in {directory} doesn't answer", "it may be starting or overloaded; try again") from error
    finally:
        writer.close()
    if not line:
        raise NotRunning(f"the peer in {directory} is ending", "")
    answer: dict[str, Any] = json.loads(line)
    return answer


def last_status(directory: Path) -> dict[str, Any]:
    """The status that a daemon left behind when it ended; empty if there is none."""
    try:
        content: dict[str, Any] = json.loads((directory / STATUS_NAME).read_text())
    except (OSError, ValueError):
        return {}
    return content


def history(directory: Path) -> list[dict[str, Any]]:
    """The rounds that a daemon has taken part in, oldest first; a torn last line is left out."""
    rounds = []
    try:
        lines = (directory / HISTORY_NAME).read_text().splitlines()
    except OSError:
        return []
    for line in lines:
        try:
            rounds.append(json.loads(line))
        except ValueError:
            continue
    return rounds
