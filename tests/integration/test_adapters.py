"""What people train, end to end with real peers, by the commands of docs/recipes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from peer.corpus import byte_level_tokenizer
from swarm.identity import Identity
from swarm.local import LocalSwarm
from tests.checkpoints import save_checkpoint
from tests.runs import agreed_roots, printed_by

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

ROUNDS = 4
CONFIG = {
    "model_type": "llama",
    "vocab_size": 259,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 96,
    "bos_token_id": 256,
    "eos_token_id": 256,
}


def checkpoint(folder: Path) -> Path:
    """A small Llama in bytes with the markers of ChatML, as transformers saves it."""
    torch.manual_seed(3)
    tokenizer = byte_level_tokenizer()
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    return save_checkpoint(folder, CONFIG, tokenizer)


def shortened(path: Path) -> dict[str, Any]:
    """The manifest with rounds of a fraction of a second, all of which are audited."""
    values: dict[str, Any] = yaml.safe_load(path.read_text())
    values["rounds"] |= {"total": ROUNDS, "min_peers": 2}
    values["strategy"] |= {"inner_steps": 2, "batch_samples": 2, "inner_state": "fresh"}
    values["audit"] = {"rate": 1.0, "first": 0, "within_rounds": 2}
    path.write_text(yaml.safe_dump(values))
    return values


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
async def test_two_peers_teach_an_adapter_to_answer(tmp_path: Path) -> None:
    """A pretrained model and chats become a run with an adapter; one peer brings the files, the other fetches them."""
    source = checkpoint(tmp_path / "tiny")
    chats = [{"question": f"{a} plus {b}?", "answer": f"That is {a + b}."} for a in range(12) for b in range(12)]
    (tmp_path / "chats.jsonl").write_text("\n".join(map(json.dumps, chats)))
    base, data, path = tmp_path / "base", tmp_path / "data", tmp_path / "run.yaml"
    await printed_by("run", "base", str(source), "--to", str(base))
    kind = ("--kind", "chat", "--sequence-length", "96", "--held-out", "0.1")
    await printed_by(
        "data", "build", str(tmp_path / "chats.jsonl"), "--tokenizer", str(base / "tokenizer.json"), *kind, "--to", str(data)
    )
    adapter = ("--lora", "4", "--strategy", "diloco", "--codec", "int8")
    await printed_by("run", "init", str(path), "--base", str(base), "--data", str(data), *adapter)
    values = shortened(path)
    await printed_by("run", "validate", str(path), "--files", str(data))
    key = tmp_path / "owner.key"
    Identity.generate().save(key)
    async with LocalSwarm(tmp_path / "swarm") as live:
        await live.start_coordinator(path, key)
        peers = [await live.join("bringing", "--files", str(data)), await live.join("fetching")]
        for peer in peers:
            assert await peer.wait(200) == 0, peer.log()[-3000:]
        assert set(agreed_roots([peer.history() for peer in peers])) == set(range(ROUNDS + 1))
        findings = [line["finding"] for peer in peers for line in peer.events("audited")]
        assert "failed" not in findings
        assert all(line["tokens"] for peer in peers for line in peer.history() if line["round"])
        sent = min(line["bytes_sent"] for line in peers[1].history() if line["round"])
        assert sent < values["model"]["base"]["size_bytes"] / 2
        await printed_by("export", "--to", str(tmp_path / "adapter"), "--dir", str(peers[1].directory))
        await printed_by("export", "--merged", "--to", str(tmp_path / "merged"), "--dir", str(peers[1].directory))
    card = (tmp_path / "adapter" / "README.md").read_text()
    assert card.count(" credits, ") == 2
    assert "not recorded" not in card
    loaded = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(source), tmp_path / "adapter")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    ids = torch.tensor([[51, 32, 112, 108, 117, 115]])
    with torch.no_grad():
        assert torch.allclose(loaded(input_ids=ids).logits, merged(input_ids=ids).logits, atol=1e-4)
