"""A download goes on where it was broken off."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from peer.recipes import demo_manifest
from swarm.local import LocalSwarm
from swarm.scenario import Scenario, last_contribution, write_run
from tests.disturbed import program

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

DATA_BYTES = 4_000_000


async def test_a_download_that_was_killed_half_way_goes_on(tmp_path: Path) -> None:
    """A newcomer without the run's data is killed when half of it is there; started again it fetches the other half only."""
    folder = tmp_path / "run"
    manifest = demo_manifest(
        folder / "files", sequence_length=32, data_bytes=DATA_BYTES, peers=2, inner_steps=4, hidden_size=32, layers=2
    )
    endless = manifest.model_copy(update={"rounds": manifest.rounds.model_copy(update={"total": 0})})
    write_run(folder, endless)
    async with LocalSwarm(tmp_path / "swarm") as local:
        swarm = Scenario(local, folder)
        await swarm.start(2)
        await swarm.until_round(1)
        unlucky = await swarm.join("p2", program=program("die_half_way"), with_files=False)
        assert await unlucky.wait(90) == -signal.SIGKILL
        (partial,) = (unlucky.directory / "files").glob("*.part")
        lucky = await swarm.join("p2", with_files=False)
        await swarm.until(lambda: last_contribution(lucky) >= 0, "the newcomer contributes", 120)
        fetches = [json.loads(line) for line in lucky.log().splitlines() if '"event": "file_fetch"' in line]
        (begun, resumed) = [line for line in fetches if partial.stem.startswith(line["file"])]
        assert (begun["here"], begun["chunks"]) == (0, resumed["chunks"])
        assert 0 < resumed["here"] < resumed["chunks"]
        assert swarm.differing_roots() == []
