"""A laptop that sleeps, or a process that is frozen, costs the others a moment; awake again, it finds its way back."""

from __future__ import annotations

import signal
from typing import Any

import pytest

from swarm.scenario import last_contribution, last_round

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


async def test_a_frozen_peer_is_left_behind_and_comes_back(scenario: Any) -> None:
    """Frozen after its commit of round 4: the others go on; when it wakes up it contributes again, bit-identical."""
    async with scenario(4) as swarm:
        await swarm.start(4, faults={"p3": "at round 4 after commit: stop"})
        others = [swarm.peers[name] for name in ("p0", "p1", "p2")]
        await swarm.until_round(10, others)
        frozen = swarm.peers["p3"]
        assert last_round(frozen) < 6
        frozen.signal(signal.SIGCONT)
        await swarm.until(lambda: last_contribution(frozen) > 10, "the peer contributes again", 90)
        assert swarm.missing_rounds() == []
        assert swarm.differing_roots() == []
