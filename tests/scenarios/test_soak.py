"""What a peer takes of its machine doesn't grow with the rounds that it has done."""

from __future__ import annotations

from typing import Any

import pytest

from swarm.scenario import growth, soak

pytestmark = [pytest.mark.slow, pytest.mark.timeout(420)]

WARM_UP, ROUNDS, SAMPLES = 20, 120, 12
MEMORY_BYTES, DESCRIPTORS, THREADS = 24_000_000, 8, 2


async def test_memory_descriptors_and_threads_stay_flat(scenario: Any) -> None:
    """Over a hundred rounds after a warm-up, no peer has noticeably more memory, open files or threads than before."""
    async with scenario(3) as swarm:
        await swarm.start(3)
        await swarm.until_round(WARM_UP)
        seen = await soak(swarm, ROUNDS, SAMPLES)
        for footprints in seen.values():
            assert growth([taken.memory_bytes for taken in footprints]) < MEMORY_BYTES, footprints
            assert growth([taken.descriptors for taken in footprints]) < DESCRIPTORS, footprints
            assert growth([taken.threads for taken in footprints]) < THREADS, footprints
