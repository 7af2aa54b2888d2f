"""A coordinator and peers as processes of this machine: what the demo, the benchmarks and the tests start and end.

Every process is a child that the kernel ends with us, and is ended here by its own id. Ports are chosen by the system.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from swarm.control import ask, history, last_status
from swarm.errors import NotRunning, SwarmError
from swarm.processes import die_with

COORDINATOR_START_S = 30.0
STOP_S = 15.0
NO_COURTESY = {"SWARM_GOVERNOR_NICE": "0"}  # several peers on one machine shall not yield to each other
POLL_S = 0.1


@dataclass
class LocalPeer:
    """One `swarm join` process and its folder."""

    name: str
    directory: Path
    process: asyncio.subprocess.Process
    _seen: dict[str, Any] = field(default_factory=dict)

    @property
    def running(self) -> bool:
        """Whether the process is alive."""
        return self.process.returncode is None

    async def status(self) -> dict[str, Any]:
        """The daemon's status; while it doesn't answer the last one, at its end what it left behind; empty before it answers."""
        with contextlib.suppress(NotRunning):
            self._seen = await ask(self.directory, "status", timeout_s=5.0)
            return self._seen
        return self._seen if self.running else last_status(self.directory) or self._seen

    async def ask(self, verb: str) -> dict[str, Any]:
        """Give the daemon a verb. Raises `NotRunning`."""
        return await ask(self.directory, verb)

    def history(self) -> list[dict[str, Any]]:
        """The rounds that it has finished."""
        return history(self.directory)

    def log(self) -> str:
        """What it has printed."""
        return (self.directory / "log").read_text(errors="replace")

    def events(self, name: str) -> list[dict[str, Any]]:
        """What it has logged under this name."""
        lines = [json.loads(line) for line in self.log().splitlines() if line.startswith("{") and line.endswith("}")]
        return [line for line in lines if line.get("event") == name]

    def signal(self, number: int) -> None:
        """Send a signal."""
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(number)

    async def wait(self, timeout_s: float | None = None) -> int:
        """Wait for its end; its exit code."""
        return await asyncio.wait_for(self.process.wait(), timeout_s)

    async def end(self, timeout_s: float = STOP_S) -> int:
        """End it: twice the polite way, then hard."""
        for number, patience_s in ((signal.SIGTERM, 0.2), (signal.SIGTERM, timeout_s), (signal.SIGKILL, None)):
            self.signal(number)
            with contextlib.suppress(TimeoutError):
                return await self.wait(patience_s)
        return await self.process.wait()


@dataclass
class LocalSwarm:
    """Use as `async with LocalSwarm(directory) as swarm`. `environment` is added to every process's own."""

    directory: Path
    environment: Mapping[str, str] = field(default_factory=dict)
    link: str = ""
    metrics: str = ""
    admin: str = ""
    coordinator: asyncio.subprocess.Process | None = None
    peers: list[LocalPeer] = field(default_factory=list)

    async def __aenter__(self) -> LocalSwarm:
        self.directory.mkdir(parents=True, exist_ok=True)
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self.close()

    async def start_coordinator(
        self, run: Path, owner_key: Path, *options: str, listen: str = "127.0.0.1:0", prefix: Sequence[str] = ()
    ) -> str:
        """Start it and wait for its join link; `prefix` stands before the command, for example to run it on another host.

        Raises `SwarmError` with what it said if it ends instead.
        """
        log = self.directory / "coordinator.log"
        command = [*prefix, *swarm_command(), "coordinator", "--run", str(run), "--owner-key", str(owner_key), "--json"]
        command += ["--listen", listen, "--metrics", "127.0.0.1:0", "--state-dir", str(self.directory / "coordinator"), *options]
        with log.open("ab") as sink:
            process = await spawn(command, {**os.environ, **self.environment}, asyncio.subprocess.PIPE, sink)
        self.coordinator = process
        if process.stdout is None:
            raise SwarmError("no output from the coordinator")
        line = await asyncio.wait_for(process.stdout.readline(), COORDINATOR_START_S)
        if not line:
            await process.wait()
            raise SwarmError(f"the coordinator did not start: {log.read_text()[-500:]}")
        answer = json.loads(line)
        self.link, self.metrics, self.admin = answer["link"], answer["metrics"] or "", answer["admin"] or ""
        return self.link

    async def stop_coordinator(self, number: int = signal.SIGTERM) -> None:
        """End the coordinator."""
        process, self.coordinator = self.coordinator, None
        if process is not None:
            await _end(process, number)

    async def join(
        self,
        name: str,
        *options: str,
        device: Sequence[str] = ("--cpu",),
        threads: int = 1,
        environment: Mapping[str, str] | None = None,
        program: Sequence[str] = (),
        prefix: Sequence[str] = (),
        address: str = "127.0.0.1",
    ) -> LocalPeer:
        """Start a peer in the folder `name`. `program` is run instead of `swarm`, `prefix` stands before the command."""
        directory = self.directory / name
        directory.mkdir(mode=0o700, exist_ok=True)
        command = [*prefix, *(program or swarm_command()), "join", self.link, *device, "--dir", str(directory)]
        command += ["--threads", str(threads), "--listen", f"{address}:0", "--metrics", "127.0.0.1:0", *options]
        with (directory / "log").open("ab") as sink:
            process = await spawn(command, {**os.environ, **NO_COURTESY, **self.environment, **(environment or {})}, sink, sink)
        peer = LocalPeer(name, directory, process)
        self.peers.append(peer)
        return peer

    async def close(self) -> None:
        """End every process that was started here."""
        await asyncio.gather(*(peer.end() for peer in self.peers if peer.running))
        await self.stop_coordinator()


def swarm_command() -> list[str]:
    """How this installation's `swarm` is started."""
    return [sys.executable, "-m", "swarm.cli.main"]


async def spawn(
    command: Sequence[str], environment: Mapping[str, str], stdout: int | IO[Any], stderr: int | IO[Any]
) -> asyncio.subprocess.Process:
    """Start a program with nothing but this environment, in a session of its own; the kernel ends it with us."""
    parent = os.getpid()
    return await asyncio.create_subprocess_exec(
        *command,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=stdout,
        stderr=stderr,
        env=environment,
        start_new_session=True,
        preexec_fn=lambda: die_with(parent),
    )


async def _end(process: asyncio.subprocess.Process, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        process.send_signal(number)
    try:
        await asyncio.wait_for(process.wait(), STOP_S)
    except TimeoutError:
        process.kill()
        await process.wait()
