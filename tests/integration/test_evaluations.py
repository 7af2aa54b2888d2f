"""The held-out loss of a run, measured by its peers, end to end: agreed, checked by anybody, and the best state exported."""

from __future__ import annotations

import json
import math
from pathlib import Path

import httpx
import pytest
import yaml
from transformers import AutoModelForCausalLM

from swarm.local import LocalSwarm
from tests.runs import agreed_roots, make_run, run_command

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

ROUNDS, PEERS, TOLERANCE = 5, 2, 0.01
SETTINGS = {"every": 2, "evaluators": 2, "quorum": 2, "samples": 16, "prompts": ["def "], "text_tokens": 12}


async def test_peers_agree_on_the_held_out_loss_and_keep_the_best(tmp_path: Path) -> None:
    """Every other round and the last are evaluated; the ledger, the page and each peer's folder tell the same losses."""
    run = make_run(tmp_path / "run", total=ROUNDS, peers=PEERS)
    values = run.manifest.model_dump(mode="json") | {"evaluation": SETTINGS}
    run.path.write_text(yaml.safe_dump(values, sort_keys=False))
    model = tmp_path / "model"
    async with LocalSwarm(tmp_path / "swarm") as swarm:
        await swarm.start_coordinator(run.path, run.owner_key)
        peers = [await swarm.join(f"peer-{number}", "--files", str(run.files)) for number in range(PEERS)]
        for peer in peers:
            assert await peer.wait(200) == 0, peer.log()[-3000:]
        roots = agreed_roots([peer.history() for peer in peers])
        async with httpx.AsyncClient() as client:
            page = (await client.get(f"http://{swarm.metrics}/api/evaluations")).json()
        verified = await run_command("ledger", "verify", swarm.link, "--json")
        exported = await run_command("export", "--best", "--to", str(model), "--dir", str(peers[0].directory), "--json")
    assert verified.code == 0, verified
    found = json.loads(verified.out)
    agreed = {each["round"]: each["loss"] for each in found["evaluations"]}
    assert set(agreed) == {2, 4, 5}
    assert found["disputed_evaluations"] == 0
    assert math.isclose(page["best"]["loss"], min(agreed.values()))
    ((prompt, text),) = page["written"]["texts"]
    assert (prompt, bool(text)) == ("def ", True)
    assert {each["round"]: each["loss"] for each in page["agreed"]} == agreed
    measured = [line for peer in peers for line in peer.events("evaluated")]
    assert sorted({line["round"] for line in measured}) == [2, 4, 5]
    assert exported.code == 0, exported
    best = json.loads(exported.out)
    kept = best["round"] - 1
    assert kept == min(agreed, key=lambda number: agreed[number])
    assert best["state_root"] == roots[kept]
    assert math.isclose(best["held_out_loss"], agreed[kept], rel_tol=TOLERANCE)
    card = (model / "README.md").read_text()
    assert f"| {kept} | {agreed[kept]:.4f} |" in card
    assert AutoModelForCausalLM.from_pretrained(model).num_parameters() == run.manifest.model.parameters
