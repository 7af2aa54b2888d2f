"""Helper processes of benchmarks: a module of this package that speaks JSON lines on stdout and ends when its stdin does."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
import threading
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
LINE_LIMIT_BYTES = 1 << 24
STOP_S = 3.0


@dataclass
class Child:
    """A running helper, first of a process group of its own."""

    process: asyncio.subprocess.Process
    log: Path

    async def receive(self, timeout_s: float) -> dict[str, Any]:
        """The next line that it says. Raises `RuntimeError` with the end of its log if it has ended."""
        stream = self.process.stdout
        line = await asyncio.wait_for(stream.readline(), timeout_s) if stream else b""
        if not line:
            raise RuntimeError(f"the helper ended: {self.log.read_text(errors='replace')[-2000:]}")
        message: dict[str, Any] = json.loads(line)
        return message

    async def tell(self, text: str) -> None:
        """Write a line to its stdin."""
        if self.process.stdin is not None:
            self.process.stdin.write(text.encode() + b"\n")
            await self.process.stdin.drain()

    async def end(self) -> None:
        """End its whole group: politely, then hard, so that what it has forked goes too."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, number)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.process.wait(), STOP_S)
        await self.process.wait()


@contextlib.asynccontextmanager
async def child(module: str, log: Path, *, prefix: Sequence[str] = (), **arguments: Any) -> AsyncIterator[Child]:
    """Run `python -m bench.MODULE` with `arguments` as one JSON argument, until the block is left.

    `prefix` stands before the command, for example to run it on another host.
    """
    with log.open("ab") as sink:
        process = await asyncio.create_subprocess_exec(
            *prefix,
            *(sys.executable, "-m", f"bench.{module}", json.dumps(arguments)),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=sink,
            cwd=ROOT,
            env=os.environ | {"TMPDIR": str(log.parent)},
            start_new_session=True,
            limit=LINE_LIMIT_BYTES,
        )
    started = Child(process, log)
    try:
        yield started
    finally:
        await started.end()


# --- in the helper ------------------------------------------------------------------------------------------------------


def arguments() -> dict[str, Any]:
    """What `child` was given."""
    given: dict[str, Any] = json.loads(sys.argv[1])
    return given


def say(**message: Any) -> None:
    """Tell the benchmark something."""
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


def wait_for_go() -> None:
    """Wait for a line on stdin; from then on the end of stdin, which is the benchmark's own, ends the whole group."""
    sys.stdin.readline()
    end_with_parent()


def end_with_parent() -> None:
    """End the whole group when stdin ends."""

    def watch() -> None:
        sys.stdin.read()
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()
