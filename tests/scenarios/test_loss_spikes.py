"""A round whose loss jumps changes nobody's weights, who joins afterwards decides like all others, and so does a rebuild."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from swarm.scenario import last_contribution
from tests.runs import run_command

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

SPOILT = 12


async def test_a_spoilt_round_is_skipped_by_everybody(scenario: Any, tmp_path: Path) -> None:
    """In one round all train on labels that make no sense: it's skipped with equal roots, the next counts, a joiner follows.

    Afterwards the weights of a round past it are rebuilt from what a peer has kept.
    """
    async with scenario(2) as swarm:
        swarm.source = shutil.copytree(swarm.source, tmp_path / "run")
        manifest = swarm.source / "run.yaml"
        values = yaml.safe_load(manifest.read_text())
        values["strategy"] |= {"skip_spikes": {"window": 8, "deviations": 3}}
        values["codec"] |= {"kind": "int4"}
        manifest.write_text(yaml.safe_dump(values, sort_keys=False))
        spoilt = f"at round {SPOILT - 1} after merge: spoil; at round {SPOILT} after merge: spoil"
        await swarm.start(2, dict.fromkeys(("p0", "p1"), spoilt), {"p1": ("--keep-history", "1GB")})
        await swarm.until_round(SPOILT + 1)
        late = await swarm.join("late")
        await swarm.until(lambda: last_contribution(late) > SPOILT, "a contribution of the joiner", 120)
        lines = {name: {line["round"]: line for line in peer.history()} for name, peer in swarm.peers.items()}
        for name in ("p0", "p1"):
            assert [number for number, line in lines[name].items() if line.get("skipped")] == [SPOILT]
            told = [line["round"] for line in swarm.peers[name].events("round_skipped")]
            assert told == [SPOILT]
            losses = {number: line["loss"] for number, line in lines[name].items()}
            assert losses[SPOILT] > 1.3 * losses[SPOILT - 1] > losses[SPOILT + 1]
            assert lines[name][SPOILT]["tokens_total"] > lines[name][SPOILT - 1]["tokens_total"]
            assert (await swarm.peers[name].status())["rounds_skipped"] == 1
            assert "residual_from_elsewhere" not in swarm.peers[name].log()
            assert swarm.peers[name].events("merge_checked")
        assert swarm.differing_roots() == []
        assert all(line["weight"] for line in lines["p0"].values() if line["round"])
        assert (await swarm.peers["p1"].status())["history"]["rounds"].startswith("rounds 0-")
        past, folder = SPOILT + 1, swarm.peers["p1"].directory
        told = await run_command("export", "--round", str(past), "--to", str(tmp_path / "model"), "--dir", str(folder), "--json")
        assert told.code == 0, told.err
        found = json.loads(told.out)
        assert (found["state_root"], found["after_round"]) == (lines["p1"][past]["root"], past)
        assert (found["rounds_skipped"], found["confirmed_by"]) == ([SPOILT], "next proposal")
