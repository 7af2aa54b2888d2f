"""Whatever breaks, in whatever order: what must hold, holds."""

from __future__ import annotations

from typing import Any

import pytest

from swarm.mishaps import Processes, break_things

pytestmark = [pytest.mark.slow, pytest.mark.timeout(420)]

ROUNDS, SEED = 60, 1


async def test_random_faults_cost_nothing(scenario: Any) -> None:
    """Five peers; kills, freezes, dead network daemons and a dead coordinator, drawn by seed.

    All live peers agree after every round, no round is lost, everybody's credit is what its reports say, nothing is left over.
    """
    processes = Processes()
    async with scenario(5) as swarm:
        await swarm.start(5)
        await swarm.until_round(3)
        seen = [mishap async for mishap in break_things(swarm, ROUNDS, SEED, processes)]
        await swarm.finish_all()
        assert len(seen) > 1
        assert swarm.missing_rounds() == []
        assert swarm.differing_roots() == []
        assert await swarm.wrong_credits() == {}
    assert processes.left() == []


async def test_a_coordinator_that_is_killed_again_and_again_forgets_nothing(scenario: Any) -> None:
    """Killed at arbitrary instructions and restarted from its database while reports come in: every credit is there, once."""
    async with scenario(3) as swarm:
        await swarm.start(3)
        await swarm.until_round(2)
        seen = [mishap async for mishap in break_things(swarm, ROUNDS, SEED, Processes(), kinds=("coordinator",))]
        await swarm.finish_all()
        assert len(seen) > 1
        assert swarm.missing_rounds() == []
        assert swarm.differing_roots() == []
        assert await swarm.credit() == await swarm.worked()
