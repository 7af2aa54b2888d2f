"""A model that two peers let write data together, end to end, by the commands of docs/recipes/synthetic.md."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml

from peer.corpus import byte_level_tokenizer
from peer.recipes import llama_config
from swarm.identity import Identity
from swarm.local import LocalSwarm
from tests.checkpoints import save_checkpoint
from tests.runs import agreed_roots, printed_by

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

PROMPTS, EACH, ROUNDS = 24, 2, 3
CONFIG = llama_config(257, 64, hidden_size=32, layers=2, end_of_text=256) | {"initializer_range": 0.3}


def shorten(path: Path) -> None:
    """Three rounds of short samples, all of which are audited."""
    values = yaml.safe_load(path.read_text())
    values["rounds"] |= {"total": ROUNDS, "min_peers": 2}
    values["strategy"]["batch_samples"] = PROMPTS * EACH // ROUNDS
    values["strategy"]["sampling"] |= {"max_tokens": 12, "top_p": 0.95}
    values["audit"] = {"rate": 1.0, "first": 0, "within_rounds": 2}
    path.write_text(yaml.safe_dump(values))


async def test_two_peers_write_data_for_another_run(tmp_path: Path) -> None:
    """Each writes samples of its own and audits the other's; one peer's folder holds all of them."""
    torch.manual_seed(3)
    save_checkpoint(tmp_path / "tiny", CONFIG, byte_level_tokenizer())
    lines = (json.dumps({"prompt": f"number {number}"}) for number in range(PROMPTS))
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines))
    base, prompts, path, out = (str(tmp_path / name) for name in ("base", "prompts", "run.yaml", "out"))
    await printed_by("run", "base", str(tmp_path / "tiny"), "--to", base)
    tokens = ("--tokenizer", f"{base}/tokenizer.json", "--sequence-length", "31")
    await printed_by("data", "build", str(tmp_path / "prompts.jsonl"), "--kind", "prompts", *tokens, "--to", prompts)
    await printed_by("run", "init", path, "--base", base, "--data", prompts, "--samples-per-prompt", str(EACH))
    shorten(Path(path))
    await printed_by("run", "validate", path, "--files", prompts)
    Identity.generate().save(tmp_path / "owner.key")
    async with LocalSwarm(tmp_path / "swarm") as live:
        await live.start_coordinator(Path(path), tmp_path / "owner.key")
        peers = [await live.join("bringing", "--files", prompts), await live.join("fetching")]
        for peer in peers:
            assert await peer.wait(200) == 0, peer.log()[-3000:]
        assert set(agreed_roots([peer.history() for peer in peers])) == set(range(ROUNDS + 1))
        findings = [line["finding"] for peer in peers for line in peer.events("audited")]
        assert "passed" in findings
        assert "failed" not in findings
        options = ("--dir", str(peers[1].directory), "--held-out", "0.2", "--to", out, "--json")
        made = json.loads(await printed_by("data", "collect", *options))
    assert (made["asked_for"], made["generated"], made["missing"]) == (PROMPTS * EACH, PROMPTS * EACH, 0)
    assert made["generated_tokens"] == sum(line["tokens"] for line in peers[0].history())
    pieces = yaml.safe_load((tmp_path / "out" / "provenance.yaml").read_text())["pieces"]
    assert len({piece["peer"] for piece in pieces}) == 2
    assert {piece["round"] for piece in pieces} == {1, 2, 3}
    found = json.loads(await printed_by("data", "verify-generated", out, "--base", base, "--samples", "0", "--json"))
    assert (found["checked"], found["failed"]) == (PROMPTS * EACH, 0)
