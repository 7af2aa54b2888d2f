"""Short runs whose updates travel in few bits, while training goes on: all peers stay on one state root."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from swarm.local import LocalSwarm
from swarm.manifest import Manifest
from tests.runs import Run, agreed_roots, make_run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

ROUNDS = 8
PHASES = [
    {"from_round": 3, "inner_steps": 3, "codec": {"kind": "int4", "part_values": 4096}},
    {"from_round": 5, "inner_steps": 2, "codec": {"kind": "int2", "part_values": 8192}},
]
CASES: dict[str, dict[str, Any]] = {
    "phases": {"codec": {"kind": "int8", "part_values": 4096}, "strategy": {"phases": PHASES}},
    "overlap": {"codec": {"kind": "int4", "part_values": 4096}, "strategy": {"overlap": "on"}},
    "sparse": {"codec": {"kind": "sparse", "part_values": 4096}, "strategy": {"overlap": "auto"}},
}


def changed(run: Run, changes: dict[str, Any]) -> Run:
    """The run with another codec and strategy, written down."""
    values = run.manifest.model_dump(mode="json")
    values |= {"codec": changes["codec"], "strategy": values["strategy"] | changes["strategy"]}
    run.path.write_text(yaml.safe_dump(values, sort_keys=False))
    return Run(run.directory, Manifest.model_validate(values))


@pytest.mark.parametrize("case", CASES)
async def test_peers_agree_whatever_an_update_loses(tmp_path: Path, case: str) -> None:
    """With lossy codecs, changing phases and overlap, both peers contribute, agree after each round, and the loss falls."""
    run = changed(make_run(tmp_path / "run", total=ROUNDS), CASES[case])
    async with LocalSwarm(tmp_path / "swarm") as swarm:
        await swarm.start_coordinator(run.path, run.owner_key)
        peers = [await swarm.join(name, "--files", str(run.files)) for name in ("peer-0", "peer-1")]
        for peer in peers:
            assert await peer.wait(200) == 0, peer.log()[-3000:]
        histories = [peer.history() for peer in peers]
        roots = agreed_roots(histories)
        assert set(roots) == set(range(ROUNDS + 1))
        assert len(set(roots.values())) == len(roots)
        for lines in histories:
            assert all(line["weight"] > 0 for line in lines[2:])
            assert lines[-1]["loss"] < lines[1]["loss"]
