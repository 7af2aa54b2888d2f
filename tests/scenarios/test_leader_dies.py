"""The leader of a round is as expendable as anybody else."""

from __future__ import annotations

from typing import Any

import pytest

from peer.rounds.planning import leader_of

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.mark.parametrize("point", ["commit", "proposal", "merge"])
async def test_the_round_goes_on_when_its_leader_is_killed(scenario: Any, point: str) -> None:
    """The peer that leads round 4 is killed in that very round: the others finish it and all later ones, with equal roots."""
    async with scenario(4) as swarm:
        names = {swarm.identity(f"p{index}").peer_id: f"p{index}" for index in range(4)}
        await swarm.swarm.start_coordinator(swarm.source / "run.yaml", swarm.source / "owner.key")
        leader = names[leader_of(swarm.link.run_id, 4, sorted(names), 0)]
        for name in names.values():
            await swarm.join(name, faults=f"at round 4 after {point}: kill" if name == leader else "")
        await swarm.until(lambda: not swarm.peers[leader].running, "the leader dies", 120)
        await swarm.until_round(8)
        assert swarm.missing_rounds() == []
        assert swarm.differing_roots() == []
