"""A forked `swarm` is to a test what a fresh one is."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path
from typing import Any

import psutil
import pytest

from swarm import local
from tests.forked import SERVER, START_FRESH, ForkedProcess
from tests.runs import clean_environment
from tests.waiting import eventually


async def start(log: Path, *arguments: str, **environment: str) -> Any:
    """Start `swarm` with its output in a file."""
    with log.open("wb") as sink:
        return await local.spawn([*local.swarm_command(), *arguments], clean_environment(environment), sink, sink)


def waits_for_a_link(log: Path) -> tuple[str, ...]:
    """The arguments of a peer that waits for a link which nobody writes."""
    return ("join", "--cpu", "--dir", str(log.parent / "peer"), "--link-file", str(log.parent / "link"))


@pytest.mark.parametrize("spawn", [SERVER.spawn, START_FRESH])
async def test_it_is_a_child_with_a_session_of_its_own_that_a_signal_ends(
    spawn: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed, its exit code is the signal's, and nothing of it is left."""
    monkeypatch.setattr(local, "spawn", spawn)
    log = tmp_path / "log"
    process = await start(log, *waits_for_a_link(log))
    await eventually(lambda: (tmp_path / "peer").exists(), "a start")
    assert psutil.Process(process.pid).ppid() == os.getpid()
    assert os.getsid(process.pid) == process.pid
    assert (process.returncode, os.getcwd()) == (None, psutil.Process(process.pid).cwd())
    process.send_signal(signal.SIGKILL)
    assert await asyncio.wait_for(process.wait(), 30) == process.returncode == -signal.SIGKILL
    assert not psutil.pid_exists(process.pid)
    with pytest.raises(ProcessLookupError):
        process.kill()


@pytest.mark.parametrize("spawn", [SERVER.spawn, START_FRESH])
async def test_it_has_its_own_environment_folder_output_and_exit_code(
    spawn: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it is told by its environment it does, in the folder in which it was started; nothing stays for the next one."""
    monkeypatch.setattr(local, "spawn", spawn)
    monkeypatch.chdir(tmp_path)
    broken = tmp_path / "broken.toml"
    broken.write_text("=")
    assert await (await start(tmp_path / "first", "config", "show", SWARM_CONFIG=broken.name)).wait() != 0
    assert broken.name in (tmp_path / "first").read_text()
    assert await (await start(tmp_path / "second", "config", "show", SWARM_CONFIG="none.toml")).wait() == 0
    assert broken.name not in (tmp_path / "second").read_text()


async def test_what_is_read_while_loading_makes_a_fresh_process(tmp_path: Path) -> None:
    """As does a prefix: only what is the same after the fork is forked."""
    forked = await start(tmp_path / "forked", "--version")
    fresh = await start(tmp_path / "fresh", "--version", PYTHONHASHSEED="1")
    assert [isinstance(process, ForkedProcess) for process in (forked, fresh)] == [True, False]
    assert [await process.wait() for process in (forked, fresh)] == [0, 0]
    assert (tmp_path / "forked").read_text() == (tmp_path / "fresh").read_text()
