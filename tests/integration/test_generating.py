"""A model that two peers let write data together, end to end, by the commands of docs/recipes/synthetic.md."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest
import torch
import yaml

from peer.attacks import ATTACK_VARIABLE, REPEAT
from peer.corpus import byte_level_tokenizer
from peer.recipes import llama_config
from swarm.identity import Identity
from swarm.local import LocalSwarm
from swarm.messages import JoinLink
from swarm.rpc.client import CoordinatorClient
from tests.checkpoints import save_checkpoint
from tests.runs import agreed_roots, printed_by

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

PROMPTS_A_ROUND, EACH, ROUNDS, LONGER = 8, 2, 3, 12
SAMPLES = PROMPTS_A_ROUND * EACH  # of a round
CONFIG = llama_config(257, 64, hidden_size=32, layers=2, end_of_text=256) | {"initializer_range": 0.3}


def shorten(path: Path, rounds: int, patience: int) -> None:
    """So many rounds of short samples, all of which are audited within `patience` rounds."""
    values = yaml.safe_load(path.read_text())
    values["rounds"] |= {"total": rounds, "min_peers": 2}
    values["strategy"]["batch_samples"] = SAMPLES
    values["strategy"]["sampling"] |= {"max_tokens": 12, "top_p": 0.95}
    values["audit"] = {"rate": 1.0, "first": 0, "within_rounds": patience}
    values["credit"]["hold_rounds"] = patience + 1
    path.write_text(yaml.safe_dump(values))


async def make_run(folder: Path, rounds: int, patience: int) -> tuple[str, str, Path]:
    """A base, prompts for so many rounds, and the manifest of a run by the commands of the page."""
    torch.manual_seed(3)
    save_checkpoint(folder / "tiny", CONFIG, byte_level_tokenizer())
    lines = (json.dumps({"prompt": f"number {number}"}) for number in range(rounds * PROMPTS_A_ROUND))
    (folder / "prompts.jsonl").write_text("\n".join(lines))
    base, prompts, path = (str(folder / name) for name in ("base", "prompts", "run.yaml"))
    await printed_by("run", "base", str(folder / "tiny"), "--to", base)
    tokens = ("--tokenizer", f"{base}/tokenizer.json", "--sequence-length", "31")
    await printed_by("data", "build", str(folder / "prompts.jsonl"), "--kind", "prompts", *tokens, "--to", prompts)
    await printed_by("run", "init", path, "--base", base, "--data", prompts, "--samples-per-prompt", str(EACH))
    shorten(Path(path), rounds, patience)
    await printed_by("run", "validate", path, "--files", prompts)
    Identity.generate().save(folder / "owner.key")
    return base, prompts, Path(path)


async def test_two_peers_write_data_for_another_run(tmp_path: Path) -> None:
    """Each writes samples of its own and audits the other's; one peer's folder holds all of them."""
    base, prompts, path = await make_run(tmp_path, ROUNDS, 2)
    out = str(tmp_path / "out")
    async with LocalSwarm(tmp_path / "swarm") as live:
        await live.start_coordinator(path, tmp_path / "owner.key")
        peers = [await live.join("bringing", "--files", prompts), await live.join("fetching")]
        for peer in peers:
            assert await peer.wait(200) == 0, peer.log()[-3000:]
        assert set(agreed_roots([peer.history() for peer in peers])) == set(range(ROUNDS + 1))
        findings = [line["finding"] for peer in peers for line in peer.events("audited")]
        assert "passed" in findings
        assert "failed" not in findings
        options = ("--dir", str(peers[1].directory), "--held-out", "0.2", "--to", out, "--json")
        made = json.loads(await printed_by("data", "collect", *options))
    assert (made["asked_for"], made["generated"], made["missing"]) == (ROUNDS * SAMPLES, ROUNDS * SAMPLES, 0)
    assert made["generated_tokens"] == sum(line["tokens"] for line in peers[0].history())
    pieces = yaml.safe_load((tmp_path / "out" / "provenance.yaml").read_text())["pieces"]
    assert len({piece["peer"] for piece in pieces}) == 2
    assert {piece["round"] for piece in pieces} == {1, 2, 3}
    found = json.loads(await printed_by("data", "verify-generated", out, "--base", base, "--samples", "0", "--json"))
    assert (found["checked"], found["failed"]) == (ROUNDS * SAMPLES, 0)


async def test_who_gives_out_one_sample_for_all_is_suspended(tmp_path: Path) -> None:
    """Two audits find it, its credit is gone, nobody honest is accused, and its pieces are in nobody's data."""
    _, prompts, path = await make_run(tmp_path, LONGER, LONGER)
    async with LocalSwarm(tmp_path / "swarm") as live:
        link = await live.start_coordinator(path, tmp_path / "owner.key")
        honest = [await live.join(name, "--files", prompts) for name in ("first", "second")]
        cheat = await live.join("cheat", "--files", prompts, environment={ATTACK_VARIABLE: REPEAT})
        for peer in honest:
            assert await peer.wait(300) == 0, peer.log()[-3000:]
        key = (await asyncio.to_thread(Identity.load, cheat.directory / "identity.key")).peer_id
        async with await CoordinatorClient.connect(JoinLink.parse(link)) as client:
            audits = await client.list_audits("")
            credit = {
                each.peer_id: int(each.verified_flops) + int(each.final_flops) for each in (await client.credits()).balances
            }
        assert list(audits.suspended) == [key]
        assert credit.pop(key) == 0
        assert min(credit.values()) > 0
        findings = [line["finding"] for peer in honest for line in peer.events("audited")]
        assert findings.count("failed") >= 2
        options = ("--dir", str(honest[0].directory), "--to", str(tmp_path / "out"), "--json")
        made = json.loads(await printed_by("data", "collect", *options))
    provenance = yaml.safe_load((tmp_path / "out" / "provenance.yaml").read_text())
    assert provenance["about"]["suspended"] == [key]
    assert key not in {piece["peer"] for piece in provenance["pieces"]}
    assert made["missing"] > 0
