"""A volunteer's peer from `swarm join` to `swarm finish`, beside two peers that train on."""

from __future__ import annotations

import json
import shutil
import signal
import stat
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from swarm.control import ask
from swarm.local import LocalPeer, LocalSwarm
from tests.runs import LiveRun, agreed_roots, run_command
from tests.waiting import eventually

pytestmark = pytest.mark.timeout(400)


@pytest.fixture
async def outside(two_peer_run: LiveRun, tmp_path: Path) -> AsyncIterator[LocalSwarm]:
    """Starts peers that join the running swarm by its link."""
    async with LocalSwarm(tmp_path / "outside", link=two_peer_run.link) as swarm:
        yield swarm


async def command(verb: str, peer: LocalPeer) -> Any:
    """A verb's answer."""
    outcome = await run_command(verb, "--dir", str(peer.directory), "--json")
    assert (outcome.code, outcome.err) == (0, "")
    return json.loads(outcome.out)


async def contributed(peer: LocalPeer, rounds: int) -> bool:
    """Whether the peer has contributed to that many rounds."""
    assert peer.running, peer.log()[-3000:]
    return int((await peer.status()).get("rounds", 0)) >= rounds


async def warned(peer: LocalPeer, text: str) -> bool:
    """Whether the peer's warning says so."""
    return text in str((await peer.status()).get("warning", ""))


async def rounds_of(folder: Path) -> int:
    """A peer's present round."""
    return int((await ask(folder, "status"))["round"])


async def test_a_peer_joins_pauses_resumes_and_finishes(two_peer_run: LiveRun, outside: LocalSwarm) -> None:
    """It fetches data and weights from the others, trains bit-identically, pauses, comes back, and leaves with its receipts."""
    others = two_peer_run.peer_folders
    peer = await outside.join("volunteer")
    await eventually(lambda: contributed(peer, 3), "contributing", 180)
    answer = await command("status", peer)
    assert answer["roster_size"] == 3
    assert answer["coordinator_reachable"]
    assert answer["run_id"] == two_peer_run.run.manifest.run_id
    assert answer["tokens"] > 0

    assert (await command("pause", peer))["accepted"] == "pause"
    await eventually(lambda: _is(peer, "paused"), "the pause", 60)
    alone = await rounds_of(others[0])
    await eventually(lambda: _past(others[0], alone + 2), "rounds without the paused peer", 60)
    assert (await command("resume", peer))["accepted"] == "resume"
    rounds = (await peer.status())["rounds"]
    await eventually(lambda: contributed(peer, rounds + 2), "contributing again", 120)

    assert (await command("finish", peer))["accepted"] == "finish"
    assert await peer.wait(90) == 0, peer.log()[-3000:]
    assert list((peer.directory / "outbox").glob("*.pb")) == []
    receipts = list((peer.directory / "receipts").glob("*.receipt"))
    assert len(receipts) == sum(line["weight"] > 0 for line in peer.history())
    assert (await peer.status())["reports_waiting"] == 0
    assert not (peer.directory / "control.sock").exists()

    ended = await rounds_of(others[0])
    await eventually(lambda: _past(others[0], ended + 2), "rounds without the finished peer", 60)
    mine = {line["round"]: line["root"] for line in peer.history()}
    roots = agreed_roots([peer.history(), *two_peer_run.histories])
    common = set(mine) & {line["round"] for line in two_peer_run.histories[0]}
    assert len(common) >= 5
    assert {number: roots[number] for number in mine} == mine
    for name in ("identity.key", "control.sock"):
        path = others[0] / name
        assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0


@pytest.mark.slow
async def test_a_peer_comes_back_and_is_stopped(two_peer_run: LiveRun, outside: LocalSwarm) -> None:
    """A peer that was killed hard joins again from its folder, bit-identical; `stop` ends it at once, and the others go on."""
    peer = await outside.join("holder", "--files", str(two_peer_run.run.files))
    await eventually(lambda: contributed(peer, 2), "contributing", 180)
    peer.signal(signal.SIGKILL)
    assert await peer.wait(30) == -signal.SIGKILL
    identity = (await peer.status()).get("peer_id", "")

    again = await outside.join("holder", "--files", str(two_peer_run.run.files))
    await eventually(lambda: contributed(again, 2), "contributing after the kill", 180)
    assert identity in ("", (await again.status())["peer_id"])
    assert (await command("stop", again))["accepted"] == "stop"
    assert await again.wait(30) == 0, again.log()[-3000:]
    assert (await run_command("status", "--dir", str(again.directory))).code == 50
    stopped = await rounds_of(two_peer_run.peer_folders[0])
    await eventually(lambda: _past(two_peer_run.peer_folders[0], stopped + 2), "rounds without the stopped peer", 60)
    agreed_roots([again.history(), *two_peer_run.histories])


@pytest.mark.slow
async def test_of_two_machines_with_one_key_the_later_counts(two_peer_run: LiveRun, outside: LocalSwarm) -> None:
    """The earlier pauses and says why, the later trains and warns; nobody is accused; resumed, the earlier counts."""
    files = ("--files", str(two_peer_run.run.files))
    first = await outside.join("first", *files)
    await eventually(lambda: contributed(first, 1), "contributing", 180)
    copy = outside.directory / "second"
    copy.mkdir(mode=0o700)
    shutil.copy(first.directory / "identity.key", copy)
    second = await outside.join("second", *files)
    await eventually(lambda: _is(first, "key_used_elsewhere"), "the earlier pauses", 120)
    await eventually(lambda: contributed(second, 1), "the later contributes", 180)
    await eventually(lambda: warned(second, "this one counts"), "the warning", 60)
    assert (await command("resume", first))["accepted"] == "resume"
    await eventually(lambda: _is(second, "key_used_elsewhere"), "the later pauses", 120)
    rounds = (await first.status()).get("rounds", 0)
    await eventually(lambda: contributed(first, rounds + 1), "contributing again", 120)
    evidence = [list((folder / "evidence").glob("*")) for folder in two_peer_run.peer_folders]
    assert evidence == [[], []]
    agreed_roots([first.history(), second.history(), *two_peer_run.histories])


async def _is(peer: LocalPeer, state: str) -> bool:
    return (await peer.status()).get("state") == state


async def _past(folder: Path, number: int) -> bool:
    return await rounds_of(folder) >= number
