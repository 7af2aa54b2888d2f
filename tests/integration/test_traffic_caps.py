"""A volunteer's caps and monthly quota on a peer that joins a running swarm."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from peer.usage import FILE_NAME
from swarm.control import history
from swarm.local import LocalPeer, LocalSwarm
from tests.runs import LiveRun, run_command
from tests.waiting import eventually

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

QUOTA_BYTES = 4_000_000


@pytest.fixture
async def outside(two_peer_run: LiveRun, tmp_path: Path) -> AsyncIterator[LocalSwarm]:
    """Starts peers that join the running swarm by its link."""
    async with LocalSwarm(tmp_path / "outside", link=two_peer_run.link) as swarm:
        yield swarm


async def in_state(peer: LocalPeer, *reasons: str) -> bool:
    """Whether the peer is in one of these states."""
    assert peer.running, peer.log()[-3000:]
    return (await peer.status()).get("state") in reasons


async def shown(peer: LocalPeer) -> dict[str, Any]:
    """What `swarm status --json` says."""
    outcome = await run_command("status", "--dir", str(peer.directory), "--json")
    assert (outcome.code, outcome.err) == (0, "")
    answer: dict[str, Any] = json.loads(outcome.out)
    return answer


async def test_a_used_up_quota_pauses_a_peer(two_peer_run: LiveRun, outside: LocalSwarm) -> None:
    """It trains while the quota lasts, pauses between rounds with the reason, stays so after a restart, and goes on with more."""
    files = ("--files", str(two_peer_run.run.files))
    peer = await outside.join("volunteer", *files, "--monthly-quota", f"{QUOTA_BYTES}B", "--max-upload", "80Mbit/s")
    await eventually(lambda: in_state(peer, "quota_used"), "the end of the quota", 200)
    answer = await shown(peer)
    traffic = answer["traffic"]
    assert answer["rounds"] > 0
    assert traffic["counted_at"] == "socket"
    assert traffic["max_upload_bytes_per_s"] == 10_000_000
    used = traffic["month"]["sent_bytes"] + traffic["month"]["received_bytes"]
    assert traffic["quota_left_bytes"] == max(0, QUOTA_BYTES - used)
    assert 0.8 * QUOTA_BYTES < used < 1.1 * QUOTA_BYTES
    assert sum(traffic["sent_bytes"].values()) == answer["bytes_sent"]
    lines = history(peer.directory)
    assert min(min(line["bytes_sent"], line["bytes_received"]) for line in lines[1:]) > 0
    text = (await run_command("status", "--dir", str(peer.directory))).out
    for part in ("quota_used: the month's traffic quota is used up", "traffic, last round", "traffic, today", "of 4 MB left"):
        assert part in text
    assert await peer.end() == 0
    kept = json.loads((peer.directory / FILE_NAME).read_text())
    assert sum(volume["sent_bytes"] + volume["received_bytes"] for volume in kept["months"].values()) >= used

    tight = await outside.join("volunteer", *files, "--monthly-quota", f"{used // 2}B")
    await eventually(lambda: in_state(tight, "quota_used"), "the pause", 60)
    assert (await shown(tight))["addresses"] == []
    assert await tight.end() == 0

    more = await outside.join("volunteer", *files, "--monthly-quota", "1GB")
    await eventually(lambda: in_state(more, "training", "exchanging"), "training", 120)
    assert (await shown(more))["traffic"]["month"]["sent_bytes"] > 0


@pytest.mark.parametrize(
    ("option", "value", "problem"),
    [("--max-upload", "10Mb/s", "is Mbit/s or MB/s meant"), ("--max-download", "10", "unit is missing"),
     ("--monthly-quota", "200 Gbit/s", "a volume is a number"), ("--max-upload", "1kbit/s", "too slow")],
)  # fmt: skip
async def test_a_cap_that_can_not_be_read_says_why(tmp_path: Path, option: str, value: str, problem: str) -> None:
    """A wrong unit is a usage error in one line, before anything starts."""
    outcome = await run_command("join", "--cpu", "--dir", str(tmp_path), option, value)
    assert outcome.code == 2
    assert problem in outcome.err
    assert "Traceback" not in outcome.err
