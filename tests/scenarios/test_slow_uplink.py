"""A peer whose uplink has all but died holds nobody up."""

from __future__ import annotations

from typing import Any

import pytest

from bench import hosts
from bench.hosts import Link
from swarm.scenario import last_round

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(300),
    pytest.mark.skipif(bool(hosts.unavailable()), reason=hosts.unavailable()),
]

ONE_KILOBYTE_PER_S = 8_000


async def test_rounds_complete_without_a_peer_that_sends_a_kilobyte_a_second(scenario: Any) -> None:
    """p3's uplink falls to 1 kB/s after round 4: its update would take minutes, the others finish round after round."""
    with hosts.hosts([Link(), Link()]) as (here, there):
        async with scenario(4) as swarm:
            source = swarm.source
            await swarm.swarm.start_coordinator(
                source / "run.yaml", source / "owner.key", listen=f"{here.address}:0", prefix=here.prefix
            )
            for name in ("p0", "p1", "p2"):
                await swarm.join(name, prefix=here.prefix, address=here.address)
            await swarm.join("p3", prefix=there.prefix, address=there.address)
            await swarm.until_round(4)
            hosts.slow_down(there, ONE_KILOBYTE_PER_S)
            others = [swarm.peers[name] for name in ("p0", "p1", "p2")]
            slowed_in = max(map(last_round, others))
            await swarm.until_round(slowed_in + 8, others, timeout_s=90)
            for peer in others:  # a busy machine may cost one of them a round
                assert sum(bool(line["weight"]) for line in peer.history()[-4:]) >= 3
            assert swarm.missing_rounds() == []
            assert swarm.differing_roots() == []
