"""Peers that accept no connection take full part."""

from __future__ import annotations

from typing import Any

import pytest

from swarm.local import LocalPeer

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


def contributions(peer: LocalPeer) -> int:
    """In how many rounds its work counted."""
    return sum(1 for line in peer.history() if line["weight"])


async def test_two_peers_behind_nat_exchange_through_a_third(scenario: Any) -> None:
    """p1 and p2 only dial out and never reach each other: both contribute every round, through p0, with equal roots."""
    async with scenario(3) as swarm:
        await swarm.start(3, options={"p1": ("--no-inbound",), "p2": ("--no-inbound",)})
        await swarm.until_round(8)
        for name in ("p0", "p1", "p2"):  # one that dials another too early is kept waiting by libp2p for some seconds
            await swarm.until(lambda name=name: contributions(swarm.peers[name]) >= 5, f"{name} contributes", 60)
        assert swarm.differing_roots() == []
        assert swarm.missing_rounds() == []
        assert (await swarm.peers["p1"].status())["inbound"] is False
