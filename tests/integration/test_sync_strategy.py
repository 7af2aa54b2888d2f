"""A short run of the strategy `sync`, from the first round to the last."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from swarm.local import LocalSwarm
from tests.runs import agreed_roots, make_run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

ROUNDS = 100  # long enough for the first audits, which are asked for twice a second


async def test_a_sync_run_ends_with_equal_roots(tmp_path: Path) -> None:
    """Two peers accumulate gradients, share the target batch, agree after every round, and end when the run is over."""
    run = make_run(tmp_path / "run", total=ROUNDS, strategy="sync")
    async with LocalSwarm(tmp_path / "swarm") as swarm:
        await swarm.start_coordinator(run.path, run.owner_key)
        peers = [await swarm.join(name, "--files", str(run.files)) for name in ("peer-0", "peer-1")]
        for peer in peers:
            assert await peer.wait(200) == 0, peer.log()[-3000:]
        roots = agreed_roots([peer.history() for peer in peers])
        assert set(roots) == set(range(ROUNDS + 1))
        assert len(set(roots.values())) == len(roots)
        last = [peer.history()[-1] for peer in peers]
        assert [line["weight"] > 0 for line in last] == [True, True]
        assert sum(line["weight"] for line in last) == run.manifest.strategy.batch_samples
        assert [(await peer.status())["state"] for peer in peers] == ["run_complete"] * 2
        assert [(await peer.status())["reports_waiting"] for peer in peers] == [0, 0]
        lines = [json.loads(line) for peer in peers for line in peer.log().splitlines() if line.startswith("{")]
        audits = [line["finding"] for line in lines if line["event"] == "audited"]
        assert "passed" in audits
        assert "failed" not in audits
