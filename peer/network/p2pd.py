"""The libp2p daemon as a child that can't outlive us.

hivemind starts `p2pd` itself, but a process that is killed hard leaves it behind, still advertising, and its control socket
stands in /tmp for everybody. Here the kernel ends it with us (`PR_SET_PDEATHSIG`), and its sockets are in a directory of our own.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.resources
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import structlog
from hivemind.p2p import P2P
from hivemind.utils.multiaddr import Multiaddr

from swarm.control import LONGEST_NAME_BYTES
from swarm.errors import NetworkBroken, PortBusy
from swarm.processes import die_with

STARTUP_TIMEOUT_S = 20.0
SOCKET_FOLDER = "swarm-p2p-"
RANDOM_NAME = "x" * 8  # what tempfile adds
LONGEST_SOCKET = "p2pclient-xxxxxxxxxxx.sock"
SHORT_PLACES = ("/tmp", "/dev/shm")  # noqa: S108 - the folder itself is made by mkdtemp, for its owner only
CONFIGURATION = '{"Relay": {"Enabled": false}}'  # no flag says this: `-relay=0` alone leaves p2pd's default, which is to relay

log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class P2pdOptions:
    """How the daemon listens. Addresses are libp2p multiaddresses."""

    identity_path: Path
    listen: tuple[str, ...] = ("/ip4/0.0.0.0/tcp/0",)
    announce: tuple[str, ...] = ()
    accept_inbound: bool = True
    map_port: bool = True

    def arguments(self, binary: Path, control: str) -> list[str]:
        """The command line. Relaying for strangers is off: a volunteer's traffic caps must cover everything."""
        options = {
            "listen": control,
            "id": str(self.identity_path),
            "dhtServer": "1",
            "tls": "1",
            "b": "0",
            "connManager": "1",
            "idleTimeout": "30s",
            "autonat": "1",
            "natPortMap": str(int(self.map_port and self.accept_inbound)),
            "relay": "0",
            "autoRelay": "0",
            "persistentConnMaxMsgSize": str(4 << 20),
        }
        if self.accept_inbound:
            options["hostAddrs"] = ",".join(self.listen)
        else:
            options["noListenAddrs"] = "1"
        if self.announce:
            options["announceAddrs"] = ",".join(self.announce)
        return [str(binary), *(f"-{name}={value}" for name, value in options.items())]


def _detach(parent: int) -> None:
    os.setpgid(0, 0)  # a terminal's Ctrl-C is for the daemon, which then ends its child in order
    die_with(parent)


class PendingCalls(dict[Any, asyncio.Future[Any]]):
    """hivemind's open calls, without those that are settled.

    An answer that arrives in the moment in which its call is given up would otherwise end hivemind's reader, and with it
    every later call.
    """

    def __contains__(self, call: object) -> bool:
        future = self.get(call)
        return future is not None and not future.done()


class HandlerTasks(dict[Any, asyncio.Task[Any]]):
    """hivemind's calls being answered; those that their caller cancels are forgotten, too."""

    def __setitem__(self, call: object, task: asyncio.Task[Any]) -> None:
        super().__setitem__(call, task)
        task.add_done_callback(lambda done: self.pop(call, None))


class P2pd:
    """A running `p2pd` and hivemind's client for it."""

    def __init__(self, process: asyncio.subprocess.Process, directory: Path, p2p: P2P, reader: asyncio.Task[None]) -> None:
        self.p2p = p2p
        self._process = process
        self._directory = directory
        self._reader = reader

    @property
    def pid(self) -> int:
        """Process id of the daemon."""
        return self._process.pid

    @classmethod
    async def start(cls, options: P2pdOptions) -> P2pd:
        """Start the daemon and wait until it answers. Must run on the main thread, whose end the kernel watches.

        Raises `PortBusy` or `NetworkBroken`.
        """
        with importlib.resources.as_file(importlib.resources.files("hivemind.hivemind_cli") / "p2pd") as path:
            binary = Path(path)
        _remove_leftovers()
        directory = _socket_folder()
        control = f"/unix{directory}/p2pd.sock"
        configuration = directory / "p2pd.json"
        configuration.write_text(CONFIGURATION)
        parent = os.getpid()
        process = await asyncio.create_subprocess_exec(
            *options.arguments(binary, control),
            f"-f={configuration}",
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            env=os.environ | {"GOLOG_LOG_LEVEL": "error", "GOLOG_LOG_FMT": "json"},
            preexec_fn=lambda: _detach(parent),
        )
        ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        reader = asyncio.create_task(_drain(process, ready), name="p2pd-output")
        try:
            await asyncio.wait_for(ready, STARTUP_TIMEOUT_S)
            client: type[P2P] = type("Client", (P2P,), {"_UNIX_SOCKET_PREFIX": f"/unix{directory}/"})
            p2p = await asyncio.wait_for(client.replicate(Multiaddr(control)), STARTUP_TIMEOUT_S)
            p2p._client.control._pending_calls = PendingCalls()
            p2p._client.control._handler_tasks = HandlerTasks()
        except BaseException as error:
            await _end(process, reader, directory)
            if isinstance(error, TimeoutError):
                raise NetworkBroken("the libp2p daemon did not start in time", "is the machine overloaded?") from error
            raise
        return cls(process, directory, p2p, reader)

    @property
    def _connection(self) -> tuple[asyncio.Task[None], asyncio.Task[None]]:
        return self.p2p._client.control._read_task, self.p2p._client.control._write_task

    async def wait(self) -> int:
        """Wait until the daemon, or the connection over which it takes calls, ends; the exit status, -1 if it still runs."""
        ended = asyncio.create_task(self._process.wait())
        try:
            await asyncio.wait((ended, *self._connection), return_when=asyncio.FIRST_COMPLETED)
        finally:
            ended.cancel()
        return -1 if self._process.returncode is None else self._process.returncode

    async def close(self) -> None:
        """End the daemon and remove its sockets."""
        await self.p2p.shutdown()
        await asyncio.gather(*self._connection, return_exceptions=True)
        await _end(self._process, self._reader, self._directory)


def _socket_folder() -> Path:
    """A new folder for sockets: below the usual temporary one, or where their names fit into an address, which holds 107 bytes.

    With names that are too long the daemon answers but serves no streams. Raises `NetworkBroken` where there is no such place.
    """
    prefix = f"{SOCKET_FOLDER}{os.getpid()}-"
    for place in _places():
        longest = place / f"{prefix}{RANDOM_NAME}" / LONGEST_SOCKET
        if len(os.fsencode(longest)) <= LONGEST_NAME_BYTES:
            with contextlib.suppress(OSError):
                return Path(tempfile.mkdtemp(prefix=prefix, dir=place))
    raise NetworkBroken("no folder for sockets with a path that is short enough", "set TMPDIR to a folder with a short path")


def _places() -> list[Path]:
    named = (tempfile.gettempdir(), os.environ.get("XDG_RUNTIME_DIR", ""), *SHORT_PLACES)
    return [Path(place) for place in dict.fromkeys(named) if place]


def _remove_leftovers() -> None:
    """Remove the socket folders of processes that were killed hard."""
    for folder in (folder for place in _places() for folder in place.glob(f"{SOCKET_FOLDER}*-*")):
        pid = folder.name.removeprefix(SOCKET_FOLDER).partition("-")[0]
        if pid.isdigit() and not Path(f"/proc/{pid}").exists():
            shutil.rmtree(folder, ignore_errors=True)


async def _end(process: asyncio.subprocess.Process, reader: asyncio.Task[None], directory: Path) -> None:
    with contextlib.suppress(ProcessLookupError):
        process.kill()
    await process.wait()
    reader.cancel()
    await asyncio.gather(reader, return_exceptions=True)
    shutil.rmtree(directory, ignore_errors=True)


async def _drain(process: asyncio.subprocess.Process, ready: asyncio.Future[None]) -> None:
    """Read the daemon's output to its end; resolve `ready` when it names its peer id."""
    last = ""
    stream = process.stdout
    while stream is not None and (line := await stream.readline()):
        last = line.decode(errors="replace").strip()
        if last.startswith("Peer ID:") and not ready.done():
            ready.set_result(None)
    if ready.done():
        return
    if "address already in use" in last or "failed to listen" in last:
        ready.set_exception(PortBusy("the peer-to-peer address is taken", "choose another with --listen"))
    else:
        ready.set_exception(NetworkBroken(f"the libp2p daemon did not start: {last[:200]}", "check --listen"))
