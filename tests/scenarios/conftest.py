"""A small run for scenarios: rounds of a fraction of a second, on a machine of two cores."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path

import pytest

from peer.recipes import tiny_manifest
from swarm.local import LocalSwarm
from swarm.scenario import Scenario, write_run

pytestmark = pytest.mark.slow


@pytest.fixture(scope="session")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """The folder of a run for so many peers, made once."""
    made: dict[int, Path] = {}

    def source(peers: int) -> Path:
        if peers not in made:
            made[peers] = tmp_path_factory.mktemp(f"run-{peers}")
            write_run(made[peers], tiny_manifest(made[peers] / "files", peers))
        return made[peers]

    return source


@pytest.fixture
def scenario(tmp_path: Path, sources: Callable[[int], Path]) -> Callable[[int], AbstractAsyncContextManager[Scenario]]:
    """`async with scenario(4) as swarm`: everything that was started is ended with it."""

    @asynccontextmanager
    async def run(peers: int) -> AsyncIterator[Scenario]:
        async with LocalSwarm(tmp_path) as swarm:
            yield Scenario(swarm, sources(peers))

    return run
