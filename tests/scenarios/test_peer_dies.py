"""A peer that is killed at any point of a round costs the others neither the round nor its work."""

from __future__ import annotations

from typing import Any

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.mark.parametrize("point", ["training", "commit", "proposal", "reduce", "merge", "apply"])
async def test_the_others_go_on_when_a_peer_is_killed_at_any_point(scenario: Any, point: str) -> None:
    """Killed after `point` of round 3: the three others finish every round, with equal roots."""
    async with scenario(4) as swarm:
        await swarm.start(4, faults={"p3": f"at round 3 after {point}: kill"})
        await swarm.until(lambda: not swarm.peers["p3"].running, "p3 dies", 120)
        await swarm.until_round(8)
        assert swarm.missing_rounds() == []
        assert swarm.differing_roots() == []
        assert swarm.peers["p3"].process.returncode == -9
