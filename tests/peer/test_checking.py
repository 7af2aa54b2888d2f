"""What `swarm run validate --files` says about files that don't belong to their run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from peer.checking import problems_of
from peer.corpus import build_marked_shards, byte_level_tokenizer, save_tokenizer, train_bpe_tokenizer
from peer.data import tree_of_file
from peer.dataset import Plan, build
from peer.distillation import row_type
from peer.documents import Counts, Shuffled
from peer.marks import marked
from peer.model import count_parameters, flops_per_token
from peer.recipes import llama_config
from swarm.manifest import Manifest, Shard, Tree

LENGTH, END, TOP_K = 16, 256, 2

MakeRun = Callable[..., Manifest]


def keep(folder: Path, content: bytes) -> Tree:
    """Put a file beside the others, under its root as name."""
    (folder / "new").write_bytes(content)
    tree = tree_of_file(folder / "new")
    (folder / "new").rename(folder / tree.root)
    return tree


def keep_rows(folder: Path, rows: np.ndarray, kind: str = "<u2") -> Shard:
    tree = keep(folder, rows.astype(kind).tobytes())
    return Shard(**tree.model_dump(), samples=len(rows), token_bytes=int(kind[-1]))  # type: ignore[arg-type]


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    """A valid run whose files are in the test's folder, with some sections changed."""
    texts = [f"{number}: " + " ".join(str(number * factor) for factor in range(30)) for number in range(30)]
    with Shuffled(texts, 0, tmp_path) as documents:
        made = build(documents, tmp_path / "files", Plan(sequence_length=LENGTH, held_out=0.3), Counts())
    config = llama_config(made.vocabulary_size, LENGTH, hidden_size=32, layers=1, end_of_text=END)

    def changed(data: dict[str, Any] | None = None, config_changes: dict[str, Any] | None = None, **changes: Any) -> Manifest:
        values = {
            "name": "checked",
            "model": {"config": {**config, **(config_changes or {})}, "parameters": count_parameters(config)},
            "tokenizer": made.tokenizer,
            "data": {**made.data.model_dump(mode="json"), **(data or {})},
            "strategy": {"kind": "sync", "batch_samples": 4, "schedule": {"total_tokens": 1000}},
            "credit": {"flops_per_token": flops_per_token(config, LENGTH)},
            "audit": {"rate": 0.0, "first": 0},
        }
        return Manifest.model_validate(values | changes)

    return changed


def problem(run: Manifest, folder: Path) -> str:
    """The only one."""
    (found,) = problems_of(run, folder)
    return found


def test_a_run_with_its_files_has_no_problem(make_run: MakeRun, tmp_path: Path) -> None:
    """As `swarm data build` leaves them."""
    assert problems_of(make_run(), tmp_path / "files") == []


def test_other_bytes_and_unknown_tokens(make_run: MakeRun, tmp_path: Path) -> None:
    """A file that isn't what its root says, and a token beyond the vocabulary."""
    files = tmp_path / "files"
    rows = np.full((3, LENGTH + 1), 7)
    rows[1, 3] = 300
    shard = keep_rows(files, rows)
    run = make_run({"train": [shard]})
    assert problem(run, files) == f"shard {shard.root[:12]}: token 300 in the data is outside the vocabulary of 257"
    (files / shard.root).write_bytes(bytes(shard.size_bytes))
    assert "is damaged: its root is" in problem(run, files)


def test_an_empty_document(make_run: MakeRun, tmp_path: Path) -> None:
    """Two ends of a text with nothing between, told with the sample."""
    rows = np.full((3, LENGTH + 1), 7)
    rows[2, 4:6] = END
    shard = keep_rows(tmp_path / "files", rows)
    assert problem(make_run({"train": [shard]}), tmp_path / "files").endswith("sample 2 has an empty document")


def test_chats_that_are_too_long_or_teach_nothing(make_run: MakeRun, tmp_path: Path) -> None:
    """A sample that goes on with the one before, and one in which nothing is learned."""
    files = tmp_path / "files"

    def run(rows: np.ndarray) -> Manifest:
        shard = keep_rows(files, rows, "<u4")
        return make_run({"train": [shard], "validation": [shard], "layout": "marked", "counted_tokens": 5})

    chat = marked(np.full(LENGTH + 1, 7), np.ones(LENGTH + 1, dtype=bool))
    (fine,), _ = build_marked_shards([chat, chat], files, sequence_length=LENGTH, end_of_text=END)
    assert problems_of(make_run({"train": [fine], "validation": [fine], "layout": "marked", "counted_tokens": 5}), files) == []
    cut = np.stack([chat, chat])
    cut[1, 0] = 7
    assert {line.partition(": ")[2] for line in problems_of(run(cut), files)} == {
        "sample 1 doesn't begin with a document: one is longer than a sample"
    }
    dull = np.stack([chat, marked(np.full(LENGTH + 1, 7), np.zeros(LENGTH + 1, dtype=bool))])
    assert {line.partition(": ")[2] for line in problems_of(run(dull), files)} == {
        "sample 1 has no token with a loss: its documents are empty"
    }


def test_a_tokenizer_of_another_model(make_run: MakeRun, tmp_path: Path) -> None:
    """It has more tokens than the model, or what the model ends a text with is a word of it."""
    files = tmp_path / "files"
    larger = byte_level_tokenizer()
    larger.add_special_tokens(["<|im_start|>"])
    assert "has 258 tokens" in problem(make_run(tokenizer=save_tokenizer(larger, files)), files)
    other = train_bpe_tokenizer(["some text of its own"], 257)
    tokenizer = save_tokenizer(other, files)
    assert problems_of(make_run(tokenizer=tokenizer), files) == []
    assert problems_of(make_run(config_changes={"bos_token_id": 65}), files) == []
    words = "bos_token_id 65, eos_token_id 66, its ordinary tokens"
    assert words in problem(make_run(config_changes={"bos_token_id": 65, "eos_token_id": 66}), files)


def test_samples_that_are_longer_than_the_model_reads(make_run: MakeRun, tmp_path: Path) -> None:
    """Told without any files."""
    run = make_run(config_changes={"max_position_embeddings": LENGTH - 1})
    assert problem(run, None) == "samples have 16 tokens, the model has positions for 15 (max_position_embeddings)"  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("ids", "probability", "words"),
    [((3, 400), 0.25, "ascending within the vocabulary"), ((5, 3), 0.25, "ascending"), ((3, 5), 0.9, "don't sum to 1")],
)
def test_what_no_teacher_expects(make_run: MakeRun, tmp_path: Path, ids: tuple[int, int], probability: float, words: str) -> None:
    """Unknown tokens, or none in order, and probabilities that are none: in the shard that is named."""
    files = tmp_path / "files"
    shard = keep_rows(files, np.full((3, LENGTH + 1), 7))
    lessons = np.empty(3, dtype=row_type(LENGTH, TOP_K, 2))
    lessons["ids"], lessons["log_probabilities"] = (3, 5), np.log([0.25, 0.25, 0.5])
    teacher = {"top_k": TOP_K, "shards": [keep(files, lessons.tobytes())]}
    assert problems_of(make_run({"train": [shard], "teacher": teacher}, distillation={}), files) == []
    lessons["ids"][2, 4], lessons["log_probabilities"][2, 4] = ids, np.log([probability, 0.25, 0.5])
    tree = keep(files, lessons.tobytes())
    run = make_run({"train": [shard], "teacher": {**teacher, "shards": [tree]}}, distillation={})
    found = problem(run, files)
    assert found.startswith(f"teacher's shard {tree.root[:12]}: ")
    assert words in found


def test_private_shards_are_read_where_they_are(make_run: MakeRun, tmp_path: Path) -> None:
    """Their holder finds what is wrong in them; for the owner, who hasn't got them, they are no problem."""
    files = tmp_path / "files"
    run = make_run()
    rows = np.full((3, LENGTH + 1), 7)
    rows[1, 3] = 300
    shard = keep_rows(files, rows).model_copy(update={"private": True})
    train = [*run.data.train, shard]
    changed = make_run({"train": train}, admission={"kind": "invitation"})
    assert "token 300" in problem(changed, files)
    (files / shard.root).unlink()
    assert problems_of(changed, files) == []
