"""Peers that accept no connection take full part."""

from __future__ import annotations

from typing import Any

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


async def test_two_peers_behind_nat_exchange_through_a_third(scenario: Any) -> None:
    """p1 and p2 only dial out and never reach each other: both contribute every round, through p0, with equal roots."""
    async with scenario(3) as swarm:
        await swarm.start(3, options={"p1": ("--no-inbound",), "p2": ("--no-inbound",)})
        await swarm.until_round(8)
        for name in ("p0", "p1", "p2"):
            assert sum(1 for line in swarm.peers[name].history() if line["weight"]) >= 5, name
        assert swarm.differing_roots() == []
        assert swarm.missing_rounds() == []
        assert (await swarm.peers["p1"].status())["inbound"] is False
