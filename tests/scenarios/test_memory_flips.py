"""A bit that flips in one peer's memory never reaches the others, and is repaired."""

from __future__ import annotations

from typing import Any

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


async def test_a_flipped_bit_is_noticed_and_repaired_by_chunks(scenario: Any) -> None:
    """One bit of p2's weights flips after round 4: its root differs once, it repairs itself, and the roots are equal again."""
    async with scenario(3) as swarm:
        await swarm.start(3, faults={"p2": "at round 4 after apply: flip_bit"})
        await swarm.until_round(10)
        status = await swarm.peers["p2"].status()
        assert status["repairs"] >= 1
        assert [index for index in swarm.differing_roots() if index != 5] == []
        assert swarm.missing_rounds() == []
        healthy = [await swarm.peers[name].status() for name in ("p0", "p1")]
        assert [status["repairs"] for status in healthy] == [0, 0]
