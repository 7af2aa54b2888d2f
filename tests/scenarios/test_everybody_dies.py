"""When all peers are gone at once, the run resumes from the newest state that a quorum holds."""

from __future__ import annotations

import shutil
import signal
from collections import defaultdict
from typing import Any

import pytest

from peer.daemon import REFUSALS_IN_A_ROW
from peer.outcome import CHECKPOINTS
from swarm.local import LocalPeer
from swarm.scenario import last_round

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


async def test_the_run_resumes_after_all_peers_were_killed(scenario: Any) -> None:
    """Three peers are killed in the same moment and started again: they go on together from one state, without a gap."""
    async with scenario(3) as swarm:
        await swarm.start(3)
        await swarm.until_round(6)
        for peer in swarm.live():
            peer.signal(signal.SIGKILL)
        for peer in list(swarm.peers.values()):
            await peer.wait(10)
        reached = max(map(last_round, swarm.peers.values()))
        seen = {name: len(peer.history()) for name, peer in swarm.peers.items()}
        for name in list(swarm.peers):
            await swarm.join(name)
        await swarm.until_round(reached + 4)
        resumed = {name: peer.history()[seen[name] :] for name, peer in swarm.peers.items()}
        roots = defaultdict(set)
        for line in (line for lines in resumed.values() for line in lines):
            roots[line["round"]].add(line["root"])
        assert 0 < min(roots) <= reached + 1
        assert sorted(roots) == list(range(min(roots), max(roots) + 1))
        assert all(len(found) == 1 for found in roots.values())


async def test_rounds_played_again_after_a_loss_of_newer_checkpoints_pause_nobody(scenario: Any) -> None:
    """Everybody comes back from an early state: rounds that the ledger knows are played again, refused there, and passed."""
    async with scenario(3) as swarm:
        await swarm.start(3)
        folders = {name: peer.directory / CHECKPOINTS for name, peer in swarm.peers.items()}
        early = {name: folder.with_name("early") for name, folder in folders.items()}
        await swarm.until(lambda: all(any(folder.glob("*")) for folder in folders.values()), "checkpoints", 60.0)
        await swarm.until_round(3)
        for peer in swarm.live():
            peer.signal(signal.SIGSTOP)
        for name, folder in folders.items():
            shutil.copytree(folder, early[name])
        for peer in swarm.live():
            peer.signal(signal.SIGCONT)
        await swarm.until_rounds_more(20)
        for name in folders:
            await swarm.kill(name)
        reached = max(map(last_round, swarm.peers.values()))
        for name, folder in folders.items():
            shutil.rmtree(folder)
            early[name].rename(folder)
            await swarm.join(name)
        await swarm.until_round(reached + 4)
        assert len(swarm.live()) == 3
        await swarm.finish_all()
        assert max(map(played_again, swarm.peers.values())) > REFUSALS_IN_A_ROW


def played_again(peer: LocalPeer) -> int:
    """How many reports were refused because the ledger has the round already."""
    return sum(path.read_text() == "already_reported" for path in (peer.directory / "refused").glob("*.reason"))
