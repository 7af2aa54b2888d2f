"""A small run for scenarios: rounds of a fraction of a second, on a machine of two cores."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path

import pytest
import yaml

from peer.recipes import demo_manifest
from swarm.identity import Identity
from swarm.local import LocalSwarm
from swarm.manifest import Manifest
from swarm.scenario import Scenario

pytestmark = pytest.mark.slow


def write_run(directory: Path, peers: int, **rounds: object) -> Manifest:
    """A run of a tiny model in `directory`."""
    manifest = demo_manifest(
        directory / "files", peers=peers, inner_steps=4, hidden_size=32, layers=2, sequence_length=32, data_bytes=400_000
    )
    values = {**manifest.rounds.model_dump(), "total": 0, "min_peers": peers, **rounds}
    codec = {"kind": "fp16", "part_values": 4096}
    manifest = Manifest.model_validate({**manifest.model_dump(mode="json"), "rounds": values, "codec": codec})
    (directory / "run.yaml").write_text(yaml.safe_dump(manifest.model_dump(mode="json")))
    Identity.generate().save(directory / "owner.key")
    return manifest


@pytest.fixture(scope="session")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """The folder of a run for so many peers, made once."""
    made: dict[int, Path] = {}

    def source(peers: int) -> Path:
        if peers not in made:
            made[peers] = tmp_path_factory.mktemp(f"run-{peers}")
            write_run(made[peers], peers)
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
