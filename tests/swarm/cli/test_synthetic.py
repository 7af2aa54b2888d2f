"""`swarm data generate`: from questions to data that a model has written, checked, and ready for a run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from peer import generating, synthetic
from peer.corpus import byte_level_tokenizer
from peer.data import ShardReader
from peer.dataset import read
from peer.marks import IGNORED, lesson
from peer.model import flops_per_token
from peer.recipes import llama_config
from swarm.cli.main import run
from swarm.cli.run import sign_manifest
from swarm.identity import Identity
from swarm.manifest import Generate, Manifest
from swarm.rpc.v1.coordinator_pb2 import GetRunResponse
from tests.checkpoints import save_checkpoint

GENERATE = ("data", "generate", "--base", "base", "--prompts", "prompts", "--max-tokens", "12", "--json")
TOKENS = ("--tokenizer", "base/tokenizer.json", "--sequence-length", "31")
PROMPTS = 24
Swarm = Callable[..., dict[str, Any]]


@pytest.fixture
def swarm(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Swarm:
    """Runs a command in a folder with a base and prompts; what it prints as JSON, or with `fails` what it says of its failure."""
    monkeypatch.chdir(tmp_path)
    torch.set_num_threads(1)
    torch.manual_seed(3)
    config = llama_config(259, 64, hidden_size=32, layers=2, end_of_text=256) | {"initializer_range": 0.3}
    tokenizer = byte_level_tokenizer()
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    save_checkpoint(tmp_path / "tiny", config, tokenizer)
    questions = [f"number {number}" for number in range(PROMPTS)] + ["x" * 100, " ", "number 7"]
    (tmp_path / "prompts.jsonl").write_text("\n".join(json.dumps({"prompt": text}) for text in questions))

    def command(*arguments: str, fails: int = 0) -> dict[str, Any]:
        capsys.readouterr()
        assert run(list(arguments)) == fails, capsys.readouterr().err
        told = capsys.readouterr()
        return {"error": told.err} if fails else json.loads(told.out)

    command("run", "base", "tiny", "--to", "base", "--json")
    command("data", "build", "prompts.jsonl", "--kind", "prompts", *TOKENS, "--to", "prompts", "--json")
    return command


def test_from_prompts_to_a_valid_run(swarm: Swarm, tmp_path: Path) -> None:
    """The card counts; samples are learned where the model wrote them, and checked to be its own."""
    assert read(tmp_path / "prompts").data.train_samples == PROMPTS
    made = swarm(*GENERATE, "--samples-per-prompt", "3", "--to", "out", "--held-out", "0.2", "--license", "CC0-1.0")
    assert (made["asked_for"], made["generated"], made["missing"]) == (72, 72, 0)
    lines = [json.loads(line) for line in (tmp_path / "out" / "samples.jsonl").read_text().splitlines()]
    assert len(lines) == made["kept"] > 50
    assert {line["prompt"] for line in lines} == {f"number {number}" for number in range(PROMPTS)}
    data = read(tmp_path / "out").data
    shown = lesson(ShardReader.open(data.train, tmp_path / "out", data.sequence_length, 259, "marked").batch([0]))
    learned = shown.labels[0] != IGNORED
    assert 0 < int(learned.sum()) <= 3 * 12
    assert "CC0-1.0" in (tmp_path / "out" / "README.md").read_text()
    found = swarm("data", "verify-generated", "out", "--base", "base", "--samples", "20", "--json")
    assert (found["checked"], found["failed"]) == (20, 0)
    assert run(["run", "init", "--data", "out", "--hidden-size", "64", "--layers", "2", "--tokens", "100000"]) == 0
    assert run(["run", "validate", "run.yaml", "--files", "out"]) == 0
    assert Manifest.model_validate(yaml.safe_load((tmp_path / "run.yaml").read_text())).data.layout == "marked"


def test_an_interrupted_call_goes_on(swarm: Swarm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was written is kept, and the outcome is that of a call that wasn't interrupted; another seed gives another."""
    monkeypatch.setattr(synthetic, "PIECE_SAMPLES", 8)
    options = ("--micro-batch", "4", "--held-out", "0.2")
    whole = swarm(*GENERATE, *options, "--to", "whole")
    written, real = list[int](), generating.Writer.write

    def write(writer: generating.Writer, prompts: Any, first: int, *more: Any) -> Any:
        if first == 12 and 12 not in written:
            written.append(first)
            raise KeyboardInterrupt
        written.append(first)
        return real(writer, prompts, first, *more)

    monkeypatch.setattr(generating.Writer, "write", write)
    assert run([*GENERATE, *options, "--to", "out"]) == 130
    assert not (tmp_path / "out").exists()
    resumed = swarm(*GENERATE, *options, "--to", "out")
    assert written == [0, 4, 8, 12, 8, 12, 16, 20]
    assert resumed | {"directory": ""} == whole | {"directory": ""}
    assert read(tmp_path / "out") == read(tmp_path / "whole")
    swarm(*GENERATE, *options, "--to", "other", "--seed", "1")
    assert read(tmp_path / "other") != read(tmp_path / "whole")


def test_what_was_changed_is_found(swarm: Swarm, tmp_path: Path) -> None:
    """A shard, a piece, a list of pieces, another base: each is named; a sample that the model didn't write fails."""
    swarm(*GENERATE, "--to", "out", "--held-out", "0.2")
    verify = ("data", "verify-generated", "--base", "base", "--json")

    def changed(change: Callable[[Path], None]) -> Path:
        shutil.rmtree(tmp_path / "copy", ignore_errors=True)
        shutil.copytree(tmp_path / "out", tmp_path / "copy")
        change(tmp_path / "copy")
        return tmp_path / "copy"

    def spoil(path: Path) -> None:
        path.write_bytes(path.read_bytes()[:-1] + b"\1")

    def recount(folder: Path) -> None:
        values = yaml.safe_load((folder / "provenance.yaml").read_text())
        values["counts"]["kept"] += 1
        (folder / "provenance.yaml").write_text(yaml.safe_dump(values))

    shard = read(tmp_path / "out").data.train[0].root
    cases: dict[str, Callable[[Path], None]] = {
        "is damaged: its root": lambda folder: spoil(folder / shard),
        "piece": lambda folder: spoil(next((folder / "pieces").iterdir())),
        "not those that its pieces give": recount,
    }
    for words, change in cases.items():
        assert words in swarm(*verify, str(changed(change)), fails=22)["error"]
    torch.manual_seed(9)
    config = llama_config(259, 64, hidden_size=32, layers=2, end_of_text=256) | {"initializer_range": 0.3}
    tokenizer = byte_level_tokenizer()
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    save_checkpoint(tmp_path / "tiny2", config, tokenizer)
    swarm("run", "base", "tiny2", "--to", "base2", "--json")
    assert "another" in swarm(*verify[:2], "out", "--base", "base2", fails=22)["error"]
    swarm("data", "generate", "--base", "base2", *GENERATE[4:], "--to", "forged", "--held-out", "0.2")
    values = yaml.safe_load((tmp_path / "forged" / "provenance.yaml").read_text())
    values["settings"]["base"] = yaml.safe_load((tmp_path / "base" / "base.yaml").read_text())["base"]
    (tmp_path / "forged" / "provenance.yaml").write_text(yaml.safe_dump(values))
    assert "can't have written" in swarm(*verify, "forged", "--samples", "5", fails=22)["error"]


def test_a_run_that_generates_is_described(swarm: Swarm, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its rounds are as many as its samples take, its credit that of a forward pass; what doesn't go together is refused."""
    describe = ("run", "init", "--data", "prompts")
    assert run([*describe, "--base", "base", "--samples-per-prompt", "4", "--peers", "2", "--batch-samples", "16"]) == 0
    assert run(["run", "validate", "run.yaml", "--files", "prompts"]) == 0
    assert run(["run", "show", "run.yaml"]) == 0
    assert "audited by computing them again" in capsys.readouterr().out
    values = yaml.safe_load((tmp_path / "run.yaml").read_text())
    manifest = Manifest.model_validate(values)
    assert isinstance(manifest.strategy, Generate)
    assert (manifest.strategy.batch_samples, manifest.rounds.total, manifest.model.parameters) == (32, 3, 1)
    assert (manifest.strategy.sampling.stop, manifest.strategy.sampling.max_tokens) == ((256,), 32)
    config = manifest.model.config
    assert manifest.credit.flops_per_token == flops_per_token(config, 31 + 32) // 3
    (tmp_path / "run.yaml").unlink()
    assert "name one with --base" in swarm(*describe, fails=2)["error"]
    assert "--lora" in swarm(*describe, "--base", "base", "--lora", "4", fails=2)["error"]
    values["strategy"]["sampling"]["max_tokens"] = 60
    (tmp_path / "long.yaml").write_text(yaml.safe_dump(values))
    assert "too long for the base" in swarm("run", "validate", "long.yaml", "--files", "prompts", fails=20)["error"]


def test_collecting_needs_a_peer_of_such_a_run(swarm: Swarm, tmp_path: Path) -> None:
    """Not one in which nobody has run, or without pieces or a coordinator to ask; with a base everything is written here."""
    assert "swarm join" in swarm("data", "collect", "--dir", str(tmp_path / "nobody"), "--to", "x", fails=10)["error"]
    assert run(["run", "init", "--base", "base", "--data", "prompts"]) == 0
    manifest = Manifest.read(tmp_path / "run.yaml")
    answer = GetRunResponse(manifest=sign_manifest(manifest, Identity.generate()), run_id=bytes.fromhex(manifest.run_id))
    (tmp_path / "peer").mkdir()
    (tmp_path / "peer" / "run.pb").write_bytes(answer.SerializeToString())
    (tmp_path / "prompts").rename(tmp_path / "peer" / "files")
    assert "no piece" in swarm("data", "collect", "--dir", "peer", "--offline", "--to", "x", fails=22)["error"]
    assert "no run was joined" in swarm("data", "collect", "--dir", "peer", "--to", "x", fails=10)["error"]
    assert "swarm data collect" in swarm("export", "--dir", "peer", "--to", "x", fails=2)["error"]
    written = swarm("data", "collect", "--dir", "peer", "--offline", "--base", "base", "--held-out", "0.2", "--to", "x", "--json")
    assert (written["generated"], written["missing"]) == (PROMPTS, 0)
    (tmp_path / "y").mkdir()
    (tmp_path / "y" / "file").touch()
    assert "exists already" in swarm("data", "collect", "--to", "y", fails=2)["error"]


def test_bad_input_is_named(swarm: Swarm, tmp_path: Path) -> None:
    """Each with a hint."""
    (tmp_path / "bad.jsonl").write_text('{"text": "x"}')
    cases = {
        ("data", "build", "bad.jsonl", "--kind", "prompts", "--to", "x"): "docs/recipes/synthetic.md",
        (*GENERATE, "--temperature", "0", "--to", "x"): "--temperature",
        (*GENERATE, "--stop", "no such", "--to", "x"): "no token",
        (
            "data",
            "generate",
            "--base",
            "base",
            "--prompts",
            "prompts",
            "--max-tokens",
            "60",
            "--to",
            "x",
        ): "at most 32 tokens fit",
        (*GENERATE, "--max-perplexity", "1", "--to", "x"): "--held-out",
    }
    for command, words in cases.items():
        capture = swarm(*command, fails=2 if "--temperature" in command else 22)
        assert words in capture["error"], command
        assert not (tmp_path / "x").exists()
