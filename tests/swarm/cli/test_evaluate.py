"""`swarm evaluate`: the real harness on a small model, with a task whose data lie here."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from peer.corpus import byte_level_tokenizer
from swarm.cli.main import run
from tests.checkpoints import save_checkpoint
from tests.world import LLAMA

QUESTIONS = 12
CARD = """---
license: other
tags:
- swarm
---

# A model

## Contributors

- nobody
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama in bytes."""
    config = {**LLAMA, "vocab_size": 257, "max_position_embeddings": 64}
    return save_checkpoint(tmp_path_factory.mktemp("exported") / "model", config, byte_level_tokenizer())


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one task, `longer`: of each two answers the first is right and much shorter, hence likelier in sum."""
    folder = tmp_path_factory.mktemp("tasks")
    lines = [{"question": f"{n}?", "choices": ["a", "b" * 30], "gold": int(n % 4 == 3)} for n in range(QUESTIONS)]
    (folder / "questions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "longer.yaml").write_text(
        f"""task: longer
dataset_path: json
dataset_kwargs:
  data_files:
    test: {folder / "questions.jsonl"}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{gold}}}}"
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
metadata:
  version: 2.0
"""
    )
    return folder


@pytest.fixture(autouse=True)
def no_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What the harness reads of data sets is kept in the test's folder."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def evaluate(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> dict[str, object]:
    """What it prints as JSON."""
    assert run(["evaluate", *map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_scores_are_the_tasks(model: Path, tasks: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A model that knows nothing prefers the short answer: right in three of four, and in the first three."""
    (score,) = evaluate(capsys, model, "--tasks", "longer", "--include", tasks)["scores"]
    assert score["value"] == pytest.approx(9 / 12)
    assert (score["task"], score["metric"], score["samples"], score["of"]) == ("longer", "acc", 12, 12)
    assert score["version"] == "2.0"
    assert 0 < score["stderr"] < 0.2
    (first,) = evaluate(capsys, model, "--tasks", "longer", "--include", tasks, "--limit", "3")["scores"]
    assert (first["value"], first["samples"], first["of"]) == (1.0, 3, 12)


def test_the_card_gets_them_once(model: Path, tasks: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In words and in the metadata that hubs read; measured again, the new ones replace the old; the rest stays as it was."""
    arguments = (model, "--tasks", "longer", "--include", tasks, "--card")
    (model / "README.md").unlink(missing_ok=True)
    assert run(["evaluate", *map(str, arguments)]) == 2
    assert "no model card" in capsys.readouterr().err
    (model / "README.md").write_text(CARD)
    evaluate(capsys, *arguments, "--limit", "3")
    evaluate(capsys, *arguments)
    card = ModelCard.load(model / "README.md")
    (result,) = card.data.eval_results
    assert (result.dataset_name, result.metric_type, result.metric_value) == ("longer", "acc", 0.75)
    assert (card.data.license, card.data.tags) == ("other", ["swarm"])
    assert card.text.count("## Benchmarks") == 1
    assert "| longer | acc | 0.7500 |" in card.text
    assert "12 of 12" in card.text
    assert "- nobody" in card.text


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--tasks", "longest"), "near: longer"),
        ((), "no task named"),
        (("--tasks", "longer", "--chat"), "no chat template"),
        (("--tasks", "elsewhere"), "can't be run"),
    ],
)
def test_what_cant_be_asked(
    model: Path, tasks: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], told: str
) -> None:
    """Unknown tasks, none, a chat without a template, data that aren't there: each says so."""
    (tasks / "elsewhere.yaml").write_text(
        (tasks / "longer.yaml").read_text().replace("longer", "elsewhere").replace("jsonl", "gone")
    )
    assert run(["evaluate", str(model), "--include", str(tasks), *arguments]) != 0
    assert told in capsys.readouterr().err


def test_what_is_no_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Named before the harness is loaded."""
    assert run(["evaluate", str(tmp_path), "--tasks", "longer"]) == 2
    assert "holds no model" in capsys.readouterr().err


def test_names_are_listed(tasks: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The harness's own, and those of a folder."""
    assert run(["evaluate", "--list", "--include", str(tasks)]) == 0
    names = capsys.readouterr().out.split()
    assert {"longer", "hellaswag", "arc_easy"} <= set(names)


def test_without_the_harness(model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """What to install."""
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert run(["evaluate", str(model), "--tasks", "longer"]) == 2
    assert "swarm-train[evaluation]" in capsys.readouterr().err
