"""A download goes on where it was broken off."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from peer.recipes import demo_manifest
from swarm.local import LocalSwarm
from swarm.scenario import Scenario, last_contribution, write_run
from tests.disturbed import program

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

DATA_BYTES = 8_000_000


async def test_a_download_that_was_killed_half_way_goes_on(tmp_path: Path) -> None:
    """A newcomer without the run's data is killed when half of it is there; started again it fetches the other half only."""
    folder = tmp_path / "run"
    manifest = demo_manifest(
        folder / "files", sequence_length=32, data_bytes=DATA_BYTES, peers=2, inner_steps=4, hidden_size=32, layers=2
    )
    endless = manifest.model_copy(update={"rounds": manifest.rounds.model_copy(update={"total": 0})})
    write_run(folder, endless)
    largest = max(shard.size_bytes for shard in manifest.data.train)
    assert largest > DATA_BYTES // 2
    async with LocalSwarm(tmp_path / "swarm") as local:
        swarm = Scenario(local, folder)
        await swarm.start(2)
        await swarm.until_round(1)
        unlucky = await swarm.join("p2", program=program("die_half_way"), with_files=False)
        assert await unlucky.wait(90) == -signal.SIGKILL
        partial = list((unlucky.directory / "files").glob("*.part"))
        assert len(partial) == 1
        lucky = await swarm.join("p2", with_files=False)
        await swarm.until(lambda: last_contribution(lucky) >= 0, "the newcomer contributes", 120)
        received = int((await lucky.status())["bytes_received"])
        assert received < largest
        assert swarm.differing_roots() == []
