"""When all peers are gone at once, the run resumes from the newest state that a quorum holds."""

from __future__ import annotations

import signal
from collections import defaultdict
from typing import Any

import pytest

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
