"""`swarm` commands in processes that share one import of torch: forked from a server that has loaded everything once."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from tests.runs import Outcome

LIMIT_S = 90.0
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["peer.daemon", "peer.outcome", "swarm.cli.join", "swarm.cli.export", "swarm.cli.main"])


async def run_forked(*arguments: str, environment: Mapping[str, str] | None = None, timeout_s: float = LIMIT_S) -> Outcome:
    """Run a command to its end; one that doesn't end in time is killed and has the code -9."""
    with tempfile.TemporaryDirectory() as folder:
        process = CONTEXT.Process(target=_child, args=(arguments, {**os.environ, **(environment or {})}, folder))
        process.start()
        try:
            await asyncio.to_thread(process.join, timeout_s)
        finally:
            process.kill()
            process.join()
        out, err = _read(folder, "out"), _read(folder, "err")
        code = process.exitcode
        process.close()
        return Outcome(-1 if code is None else code, out, err)


def _read(folder: str, name: str) -> str:
    return Path(folder, name).read_text(errors="replace")


def _child(arguments: tuple[str, ...], environment: dict[str, str], folder: str) -> None:
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(Path(folder, name), os.O_WRONLY | os.O_CREAT, 0o600), number)
    os.environ.clear()
    os.environ.update(environment)
    from swarm.cli.main import run

    code = run(arguments)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
