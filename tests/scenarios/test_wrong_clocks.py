"""Peers' wall clocks decide nothing."""

from __future__ import annotations

from typing import Any

import pytest

from tests.disturbed import program

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

OFF_S = 600


async def test_clocks_off_by_ten_minutes_cost_a_warning(scenario: Any) -> None:
    """One peer's clock is ten minutes ahead, another's ten behind: all contribute and are credited, and both are warned."""
    async with scenario(3) as swarm:
        await swarm.start(1)
        await swarm.join("p1", program=program(f"clock:{OFF_S}"))
        await swarm.join("p2", program=program(f"clock:-{OFF_S}"))
        await swarm.until_round(6)
        offsets = {name: (await peer.status())["clock_offset_s"] for name, peer in swarm.peers.items()}
        await swarm.finish_all()
        assert {name: round(offset / OFF_S) for name, offset in offsets.items()} == {"p0": 0, "p1": -1, "p2": 1}
        assert {name for name, peer in swarm.peers.items() if "clock_differs" in peer.log()} == {"p1", "p2"}
        assert all(sum(1 for line in peer.history() if line["weight"]) >= 4 for peer in swarm.peers.values())
        assert swarm.missing_rounds() == []
        assert swarm.differing_roots() == []
        assert await swarm.credit() == await swarm.worked()
