"""Starting `swarm` in tests: forked from a server that has loaded everything once, or as a fresh process where that differs."""

from __future__ import annotations

import asyncio
import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import IO, Any

from swarm import local
from tests import disturbed
from tests.fork_server import MOST_BYTES, READY
from tests.runs import REPOSITORY, clean_environment

PR_SET_CHILD_SUBREAPER = 36
LIBC = ctypes.CDLL(None, use_errno=True)
START_FRESH = local.spawn
EARLY = ("PYTHON", "LD_", "OMP_", "MKL_", "OPENBLAS_", "TORCH", "PYTORCH", "HF_", "TRANSFORMERS_", "GRPC_")


class ForkedProcess:
    """A child of this process, with what `asyncio.subprocess.Process` has."""

    def __init__(
        self, pid: int, stdout: asyncio.StreamReader | None = None, transport: asyncio.BaseTransport | None = None
    ) -> None:
        self.pid = pid
        self.stdout = stdout
        self.returncode: int | None = None
        self._transport = transport
        self._ended = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._descriptor = os.pidfd_open(pid)
        self._loop.add_reader(self._descriptor, self._collect)

    async def wait(self) -> int:
        """Its exit code, or less than 0: the signal that ended it."""
        await self._ended.wait()
        assert self.returncode is not None
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Send a signal. Raises `ProcessLookupError` after its end."""
        if self.returncode is not None:
            raise ProcessLookupError
        os.kill(self.pid, number)

    def kill(self) -> None:
        """End it hard."""
        self.send_signal(signal.SIGKILL)

    def _collect(self) -> None:
        self._loop.remove_reader(self._descriptor)
        os.close(self._descriptor)
        self.returncode = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        if self._transport is not None:
            self._transport.close()
        self._ended.set()


@dataclass
class ForkServer:
    """The server of this test process, started when it is needed first; it ends with us."""

    link: socket.socket | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def take_over(self) -> None:
        """From now on, what `swarm.local` starts is forked where that makes no difference."""
        local.spawn = self.spawn

    async def spawn(self, command: Sequence[str], environment: Mapping[str, str], stdout: int | IO[Any], stderr: IO[Any]) -> Any:
        """Like `swarm.local.spawn`."""
        if _early(environment) != _early(os.environ) or not _is_the_same_when_forked(command):
            return await START_FRESH(command, environment, stdout, stderr)
        await asyncio.to_thread(self._start)
        if stdout != asyncio.subprocess.PIPE:
            return ForkedProcess(self._fork(command, environment, stdout, stderr))
        ours, its = os.pipe()
        reader = asyncio.StreamReader()
        transport, _ = await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(ours, "rb", buffering=0)
        )
        try:
            return ForkedProcess(self._fork(command, environment, its, stderr), reader, transport)
        finally:
            os.close(its)

    def _fork(self, command: Sequence[str], environment: Mapping[str, str], stdout: int | IO[Any], stderr: IO[Any]) -> int:
        """Start a program; its process id."""
        request = {"command": list(command), "environment": dict(environment), "folder": os.getcwd()}
        streams = [stream if isinstance(stream, int) else stream.fileno() for stream in (stdout, stderr)]
        with self._lock:
            assert self.link is not None
            LIBC.prctl(PR_SET_CHILD_SUBREAPER, 1)
            try:
                socket.send_fds(self.link, [json.dumps(request).encode()], streams)
                answer = self.link.recv(MOST_BYTES)
            finally:
                LIBC.prctl(PR_SET_CHILD_SUBREAPER, 0)
        assert answer, "the fork server has ended"
        return int(answer)

    def _start(self) -> None:
        with self._lock:
            if self.link is not None:
                return
            self.link, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            command = [sys.executable, "-m", "tests.fork_server", str(its.fileno()), str(os.getpid())]
            with its:
                streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL}
                self._process = subprocess.Popen(
                    command, **streams, pass_fds=[its.fileno()], env=clean_environment(), cwd=REPOSITORY
                )
            assert self.link.recv(MOST_BYTES) == READY, "the fork server does not start"

    def close(self) -> None:
        """End it."""
        if self.link is not None:
            self.link.close()
            self._process.wait()


def _is_the_same_when_forked(command: Sequence[str]) -> bool:
    """Whether it is a program that changes nothing before it is loaded."""
    if list(command[:3]) == local.swarm_command():
        return True
    return any(tuple(command[:4]) == disturbed.program(misdeed) for misdeed in disturbed.MISDEEDS)


def _early(environment: Mapping[str, str]) -> dict[str, str]:
    """What of an environment may have an effect on what a process loads first."""
    found = {name: value for name, value in environment.items() if name.startswith(EARLY)}
    paths = found.pop("PYTHONPATH", "").split(os.pathsep)
    return found | {"PYTHONPATH": os.pathsep.join(path for path in paths if path and path != str(REPOSITORY))}


SERVER = ForkServer()
