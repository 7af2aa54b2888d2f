"""A process that has loaded everything once and forks for each `swarm` that tests start: `python -m tests.fork_server FD PARENT`.

From the fork on such a process is what `python -m swarm.cli.main` would be: a child of the one that asked (which adopts it), with
its own session, environment, folder, streams and exit code. The server itself has one thread, no event loop and no connections.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import runpy
import socket
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from swarm.processes import die_with

MOST_BYTES, STREAMS = 1 << 18, (1, 2)
READY = b"ready"
STARTS_PEERS = "attack"
COMMAND = "swarm.cli.main"  # is never loaded before the fork: it is what runs after it
LOADED = (
    "coordinator.backup",
    "coordinator.server",
    "peer.daemon",
    "peer.export",
    "peer.held",
    "peer.trials",
    "swarm.cli.coordinator",
    "swarm.cli.export",
    "swarm.cli.join",
    "swarm.cli.status",
    "transformers.models.llama.modeling_llama",
)


def serve(link: socket.socket, parent: int) -> dict[str, Any]:
    """Fork for each request; returns in every child, with the request. Ends with the last holder of the other end."""
    while True:
        raw, descriptors, *_ = socket.recv_fds(link, MOST_BYTES, len(STREAMS))
        if not raw:
            os._exit(0)
        wait_for, adopted = os.pipe()
        between = os.fork()
        if between == 0:
            if os.fork():
                os._exit(0)
            os.read(wait_for, 1)
            die_with(parent)
            _take_over(descriptors)
            link.send(str(os.getpid()).encode())
            for descriptor in (wait_for, adopted, link.detach()):
                os.close(descriptor)
            return dict(json.loads(raw))
        os.waitpid(between, 0)
        os.write(adopted, b"\0")
        for descriptor in (wait_for, adopted, *descriptors):
            os.close(descriptor)


def _take_over(descriptors: Sequence[int]) -> None:
    for number, descriptor in zip(STREAMS, descriptors, strict=True):
        os.dup2(descriptor, number)
        os.close(descriptor)


def become(request: Mapping[str, Any]) -> None:
    """Be the program that was asked for: `python -m MODULE ...` or `python -P FILE ...`."""
    command = list(request["command"])
    os.chdir(request["folder"])
    os.setsid()
    os.environ.clear()
    os.environ.update(request["environment"])
    sys.modules["numpy"].random.seed()
    if STARTS_PEERS in command:
        _keep_a_server()
    sys.orig_argv = command
    sys.argv = command[2:]
    if command[1] == "-m":
        runpy.run_module(command[2], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(command[2], run_name="__main__")


def _keep_a_server() -> None:
    """Leave a copy of this process behind, that forks the peers which this one is going to start."""
    ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    parent = os.getpid()
    if os.fork() == 0:
        ours.close()
        become(serve(its, parent))
        sys.exit()
    its.close()
    from tests.forked import SERVER

    SERVER.link = ours
    SERVER.take_over()


def load() -> None:
    """Load everything. Raises `RuntimeError` if that leaves a thread behind that a fork would cut off.

    BLAS libraries end theirs before a fork.
    """
    for name in LOADED:
        importlib.import_module(name)
    if COMMAND in sys.modules:
        raise RuntimeError(f"{COMMAND} is loaded already")
    gc.collect()
    gc.freeze()
    probe = os.fork()
    if probe == 0:
        os._exit(0)
    os.waitpid(probe, 0)
    if (threads := len(os.listdir("/proc/self/task"))) != 1:
        raise RuntimeError(f"{threads} threads")


def main() -> None:
    """Load, say so, serve; in a child, be what was asked for."""
    link, parent = socket.socket(fileno=int(sys.argv[1])), int(sys.argv[2])
    load()
    link.send(READY)
    become(serve(link, parent))


if __name__ == "__main__":
    main()
