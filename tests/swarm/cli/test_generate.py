"""`swarm generate`: a quick try of a model."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from peer.corpus import byte_level_tokenizer
from swarm.cli.main import run
from tests.checkpoints import save_checkpoint
from tests.world import LLAMA

TEMPLATE = "{% for message in messages %}<{{ message.content }}>{% endfor %}"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A small Llama in bytes."""
    config = {**LLAMA, "vocab_size": 257, "max_position_embeddings": 64}
    return save_checkpoint(tmp_path / "model", config, byte_level_tokenizer())


def test_the_same_prompt_and_seed_give_the_same_text(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Another seed gives another."""
    texts = []
    for seed in ("0", "0", "1"):
        assert run(["generate", str(model), "the quick", "--tokens", "12", "--seed", seed, "--json"]) == 0
        texts.append(json.loads(capsys.readouterr().out)["text"])
    assert texts[0] == texts[1] != texts[2]


def test_a_prompt_from_standard_input(model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """As a chat only where the tokenizer has a template; nothing is refused."""
    monkeypatch.setattr("sys.stdin", io.StringIO("hello"))
    assert run(["generate", str(model), "--chat"]) == 2
    assert "no chat template" in capsys.readouterr().err
    (model / "chat_template.jinja").write_text(TEMPLATE)
    monkeypatch.setattr("sys.stdin", io.StringIO("hello"))
    assert run(["generate", str(model), "--chat", "--tokens", "2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["prompt"] == "hello"
    monkeypatch.setattr("sys.stdin", io.StringIO(" \n"))
    assert run(["generate", str(model)]) == 2


def test_what_is_no_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Says how to write one; an adapter asks for its base."""
    assert run(["generate", str(tmp_path), "x"]) == 2
    assert "swarm export" in capsys.readouterr().err
    (tmp_path / "adapter_config.json").write_text("{}")
    assert run(["generate", str(tmp_path), "x"]) == 2
    assert "--base" in capsys.readouterr().err
