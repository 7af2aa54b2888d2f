"""Exported models load with transformers alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from peer.export import Contributor, Provenance, export_model, generate_sample, model_card
from peer.model import FlatParameters, initial_theta
from swarm.errors import DataInvalid, UsageError
from swarm.manifest import Teacher, Tree

PROVENANCE = Provenance(
    round=12,
    tokens=3456,
    state_root="ab" * 32,
    ledger_root="cd" * 32,
    ledger_size=184,
    contributors=(Contributor("alice", 25 * 10**14, 12, 2000), Contributor("bob", 10**12, 11, 1456)),
    validation_loss=1.25,
)


def export(run: Any, directory: Path, theta: np.ndarray | None = None) -> Path:
    theta = initial_theta(run.manifest.model) if theta is None else theta
    return export_model(run.manifest, theta, run.directory, directory, PROVENANCE)


@pytest.mark.parametrize("model", ["llama", "gpt2"])
def test_an_export_loads_with_no_extra_code(small_run: Callable[..., Any], tmp_path: Path, model: str) -> None:
    """transformers reads back the very weights and a tokenizer that round-trips."""
    run = small_run(model=model)
    theta = np.random.default_rng(0).standard_normal(run.manifest.model.parameters).astype(np.float32)
    directory = export(run, tmp_path / "model", theta)
    network = AutoModelForCausalLM.from_pretrained(directory)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    assert np.array_equal(FlatParameters(network).read(network), theta)
    assert tokenizer.decode(tokenizer("héllo")["input_ids"]) == "héllo"
    assert tokenizer.eos_token == "<|endoftext|>"
    assert network.generation_config.eos_token_id == tokenizer.eos_token_id == 256
    assert network.dtype == torch.float32


def test_an_export_is_plain_files(small_run: Callable[..., Any], tmp_path: Path) -> None:
    """Safetensors, JSON and Markdown: nothing that could run."""
    directory = export(small_run(), tmp_path / "model")
    assert {path.suffix for path in directory.iterdir()} <= {".json", ".safetensors", ".md", ".jinja"}
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert directory.stat().st_mode & 0o777 == 0o755


def test_an_exported_model_generates(small_run: Callable[..., Any], tmp_path: Path) -> None:
    """A sample is text of at most the asked length, and the same each time."""
    directory = export(small_run(), tmp_path / "model")
    network, tokenizer = AutoModelForCausalLM.from_pretrained(directory), AutoTokenizer.from_pretrained(directory)
    text = generate_sample(network, tokenizer, "the quick", max_new_tokens=8)
    assert text == generate_sample(network, tokenizer, "the quick", max_new_tokens=8)
    assert isinstance(text, str)
    assert len(text) <= 8


def test_nothing_is_overwritten(small_run: Callable[..., Any], tmp_path: Path) -> None:
    """A directory with something in it is left as it is."""
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(UsageError, match="isn't empty"):
        export(small_run(), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_failed_export_leaves_nothing(small_run: Callable[..., Any], tmp_path: Path) -> None:
    """A wrong vector gives an error and no half directory."""
    with pytest.raises(DataInvalid):
        export(small_run(), tmp_path / "model", np.zeros(3, np.float32))
    assert list(tmp_path.iterdir()) == []


def test_the_card_names_run_ledger_and_contributors(small_run: Callable[..., Any]) -> None:
    """Whoever finds the model can check where it comes from."""
    run = small_run()
    card = model_card(run.manifest, PROVENANCE)
    for expected in (run.manifest.run_id, "cd" * 32, "184 entries", "ab" * 32, "1.2500", "3456"):
        assert expected in card
    assert "- alice: 2.5 credits, 12 rounds, 2000 tokens\n- bob: 0.001 credits, 11 rounds, 1456 tokens" in card


def test_the_card_says_what_was_trained_on(small_run: Callable[..., Any]) -> None:
    """Licence and counts; of private shards that they stayed, of a teacher who it was."""
    run = small_run().manifest
    card = model_card(run, PROVENANCE)
    assert "| licence | CC0-1.0 |" in card
    assert f"| training samples | {run.data.train_samples} of 32 tokens |" in card
    assert "private" not in card
    first, *others = run.data.train
    train = (first.model_copy(update={"private": True}), *others)
    teacher = Teacher(shards=tuple(Tree(root="0a" * 32, size_bytes=1) for _ in train), top_k=4, name="large|<b>")
    changed = run.model_copy(update={"data": run.data.model_copy(update={"train": train, "teacher": teacher})})
    card = model_card(changed, PROVENANCE)
    assert f"| private training samples | {first.samples}, which stayed" in card
    assert "| teacher | largeb, 4 tokens |" in card


def test_strangers_names_cant_shape_the_card(small_run: Callable[..., Any]) -> None:
    """Markup in a contributor's name ends up as plain characters."""
    names = ("<script>x</script>\n# owned", "[click](javascript:1) | `x`", "a" * 500)
    hostile = Provenance(1, 1, "00", contributors=[Contributor(name, 1, 1, 1) for name in names])
    card = model_card(run_manifest := small_run().manifest, hostile)
    assert run_manifest.name in card
    listed = card.split("## Contributors")[1]
    assert not set("<>[]|`#") & set(listed)
    assert max(len(line) for line in listed.splitlines()) < 140
