"""A volunteer's verbs on a real peer: snooze, a pause that costs no credit, freezing, and rules from the configuration."""

from __future__ import annotations

import json
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from swarm.control import ask
from swarm.local import LocalPeer, LocalSwarm, swarm_command
from tests.runs import LiveRun, clean_environment, run_command
from tests.terminal import CTRL_C, CTRL_Q, CTRL_S, terminal
from tests.waiting import eventually

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

PAUSED_BYTES = 200_000_000


@pytest.fixture
async def outside(two_peer_run: LiveRun, tmp_path: Path) -> AsyncIterator[LocalSwarm]:
    """Starts peers that join the running swarm by its link."""
    async with LocalSwarm(tmp_path / "outside", link=two_peer_run.link) as swarm:
        yield swarm


async def tell(peer: LocalPeer, *verb: str) -> dict[str, Any]:
    """A verb's answer."""
    done = await run_command(*verb, "--dir", str(peer.directory), "--json")
    assert (done.code, done.err) == (0, "")
    answer: dict[str, Any] = json.loads(done.out)
    return answer


async def contributed(peer: LocalPeer, rounds: int) -> bool:
    """Whether the peer has contributed to that many rounds."""
    assert peer.running, peer.log()[-3000:]
    return int((await peer.status()).get("rounds", 0)) >= rounds


async def has_rounds(folder: Path, rounds: int) -> bool:
    """Whether the peer that runs in this folder has contributed to that many rounds."""
    return int((await ask(folder, "status"))["rounds"]) >= rounds


def receipts(peer: LocalPeer) -> set[int]:
    """The rounds for which there is a receipt."""
    return {int(path.stem) for path in (peer.directory / "receipts").glob("*.receipt")}


def worked(peer: LocalPeer) -> set[int]:
    """The rounds in which the peer's work counted."""
    return {line["round"] for line in peer.history() if line["weight"]}


async def is_(peer: LocalPeer, state: str) -> bool:
    """Whether the peer's reason code is this one, and nothing is waited for."""
    answer = await peer.status()
    return answer.get("state") == state and not answer["waits_for"]


def is_small(process: psutil.Process) -> bool:
    """Whether a paused peer has given everything back: no torch, no network daemon, little memory."""
    maps = {Path(item.path).name for item in process.memory_maps()}
    loaded = [name for name in maps if name.startswith("libtorch")]
    return not loaded and not process.children() and process.memory_info().rss < PAUSED_BYTES


async def test_a_snooze_frees_everything_and_ends_by_itself(two_peer_run: LiveRun, outside: LocalSwarm) -> None:
    """Snoozed, it keeps its process id but neither torch nor network; rounds that it worked for have receipts; it comes back."""
    peer = await outside.join("guest", "--files", str(two_peer_run.run.files))
    await eventually(lambda: contributed(peer, 3), "contributing", 180)
    process = psutil.Process(peer.process.pid)
    answer = await tell(peer, "snooze", "20s")
    assert answer["accepted"] == "snooze"
    await eventually(lambda: is_small(process), "giving everything back", 90)
    assert receipts(peer) == worked(peer)
    before = (await peer.status())["rounds"]
    assert before >= 3
    await eventually(lambda: contributed(peer, before + 2), "contributing again after the snooze", 180)
    assert (await peer.status())["pid"] == peer.process.pid
    assert (await tell(peer, "finish"))["accepted"] == "finish"
    assert await peer.wait(90) == 0, peer.log()[-3000:]
    assert receipts(peer) == worked(peer)


async def test_a_paused_peer_says_why_and_finishes_at_once(two_peer_run: LiveRun, outside: LocalSwarm) -> None:
    """Status, metric and log name the same reason; Ctrl-C ends a paused peer, which has no round to complete."""
    peer = await outside.join("idler", "--files", str(two_peer_run.run.files), "--no-inbound")
    await eventually(lambda: contributed(peer, 1), "contributing", 180)
    await tell(peer, "pause", "--gpu", "cpu")
    await eventually(lambda: is_small(psutil.Process(peer.process.pid)), "giving everything back", 90)
    answer = await tell(peer, "status")
    assert (answer["state"], answer["earning"], answer["device_free"], answer["hint"]) == ("paused", False, True, "swarm resume")
    assert '"reason": "paused"' in peer.log()
    peer.signal(signal.SIGINT)
    assert await peer.wait(20) == 0, peer.log()[-2000:]
    assert not (peer.directory / "control.sock").exists()
    assert not (peer.directory / "held.json").exists()


async def test_rules_from_the_configuration_hold_a_peer(two_peer_run: LiveRun, outside: LocalSwarm, tmp_path: Path) -> None:
    """A machine whose rules forbid training now starts no training, says why, and names the rules that it can't keep."""
    config = tmp_path / "config.toml"
    config.write_text(
        "[governor]\nhours = ['mon 00:00-00:01']\n[governor.in_use]\nfan_ratio = 0.5\n[governor.idle]\nrun = false\n"
    )
    peer = await outside.join("forbidden", environment={"SWARM_CONFIG": str(config)})
    await eventually(lambda: is_(peer, "off_hours"), "the reason", 90)
    assert worked(peer) == set()
    answer = await tell(peer, "status")
    assert "mon 00:00-00:01" in answer["detail"]
    assert any("fan_ratio" in rule for rule in answer["governor"]["not_enforced"])
    assert "rule_not_enforced" in peer.log()
    assert (await tell(peer, "stop"))["accepted"] == "stop"
    assert await peer.wait(20) == 0


async def test_a_frozen_peer_wakes_up(two_peer_run: LiveRun, outside: LocalSwarm) -> None:
    """Frozen (SIGSTOP) in the middle of everything and woken later, it contributes again with the same process."""
    peer = await outside.join("sleeper", "--files", str(two_peer_run.run.files))
    await eventually(lambda: contributed(peer, 1), "contributing", 180)
    peer.signal(signal.SIGSTOP)
    frozen = max(line["round"] for line in two_peer_run.histories[0])
    await eventually(lambda: max(line["round"] for line in two_peer_run.histories[0]) > frozen + 3, "rounds without it", 90)
    peer.signal(signal.SIGCONT)
    await eventually(lambda: max(worked(peer), default=-1) > frozen + 3, "contributing after waking up", 180)


async def test_the_first_ctrl_c_finishes_in_a_terminal(two_peer_run: LiveRun, tmp_path: Path) -> None:
    """In a pseudo-terminal: the key and how to stop are shown; the first Ctrl-C completes the round and ends with 0.

    While the terminal is stopped (Ctrl-S), rounds go on.
    """
    folder = tmp_path / "terminal"
    command = [*swarm_command(), "join", two_peer_run.link, "--cpu", "--dir", str(folder), "--listen", "127.0.0.1:0"]
    with terminal(command, clean_environment({"SWARM_GOVERNOR_NICE": "0", "SWARM_THREADS": "1"})) as seen:
        for text in ("swarm identity backup", "Ctrl-C completes the round", "round_committed"):
            await seen.until(text, 180)
        seen.type(CTRL_S)
        stopped = int((await ask(folder, "status"))["rounds"])
        await eventually(lambda: has_rounds(folder, stopped + 3), "rounds behind a stopped terminal", 90)
        seen.type(CTRL_Q)
        seen.type(CTRL_C)
        await seen.until("left", 90)
        assert await seen.end() == 0
