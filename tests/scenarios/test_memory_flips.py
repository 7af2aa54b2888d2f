"""A bit that flips in one peer's memory never reaches the others, and is repaired."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.mark.parametrize("codec", ["fp16", "sparse"])
async def test_a_flipped_bit_is_noticed_and_repaired_by_chunks(scenario: Any, tmp_path: Path, codec: str) -> None:
    """One bit of p2's weights flips after round 4: its root differs once, it repairs itself, and the roots are equal again.

    It merges its parts once more for that: those of its reducers, or, where everybody merges everything, those of all peers.
    """
    async with scenario(3) as swarm:
        swarm.source = shutil.copytree(swarm.source, tmp_path / "run")
        manifest = swarm.source / "run.yaml"
        values = yaml.safe_load(manifest.read_text())
        values["codec"] |= {"kind": codec}
        manifest.write_text(yaml.safe_dump(values, sort_keys=False))
        await swarm.start(3, faults={"p2": "at round 4 after apply: flip_bit"})
        await swarm.until_round(10)
        status = await swarm.peers["p2"].status()
        assert status["repairs"] >= 1
        assert [index for index in swarm.differing_roots() if index != 5] == []
        assert swarm.missing_rounds() == []
        healthy = [await swarm.peers[name].status() for name in ("p0", "p1")]
        assert [status["repairs"] for status in healthy] == [0, 0]
