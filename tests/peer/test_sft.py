"""Supervised fine-tuning: from chats to a model that has learned the answers, and nothing else."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from peer.data import ShardReader, tree_of_file
from peer.dataset import Dataset, Plan, build
from peer.documents import Counts, Shuffled
from peer.leaves import MOST_GRADIENT_LEAVES
from peer.marks import IGNORED, NO_LOSS, lesson, token_ids
from peer.model import count_parameters, flops_per_token, initial_theta
from peer.recipes import llama_config
from peer.sketch import Sketcher, sketch_seed
from peer.trainer import Trainer
from swarm.manifest import Manifest, Shard
from tests.peer.conftest import DILOCO, SYNC

CPU = torch.device("cpu")
PEER = "12D3KooWpeer"
SEQUENCE_LENGTH = 96
FRESH = {**DILOCO, "inner_state": "fresh"}


@dataclass(frozen=True)
class Chats:
    """A run on chats with its files."""

    folder: Path
    manifest: Manifest

    def reader(self, side: str = "train") -> ShardReader:
        data = self.manifest.data
        return ShardReader.open(getattr(data, side), self.folder, data.sequence_length, 259, "marked")

    def trainer(self, micro_batch: int = 4) -> Trainer:
        return Trainer.open(self.manifest, CPU, self.folder, micro_batch=micro_batch)


def chat(number: int) -> str:
    """Questions differ, and their length; the answer is always the same."""
    question = f"what is {number} times {number}" + "?" * (number % 7)
    return json.dumps([{"role": "user", "content": question}, {"role": "assistant", "content": "I don't know."}])


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Dataset]:
    folder = tmp_path_factory.mktemp("chats") / "data"
    with Shuffled(map(chat, range(120)), 0, folder.parent) as documents:
        return folder, build(documents, folder, Plan(sequence_length=SEQUENCE_LENGTH, held_out=0.2, kind="chat"), Counts())


@pytest.fixture
def run(made: tuple[Path, Dataset]) -> Callable[..., Chats]:
    """Makes a run of this strategy, on these chats or on changed data."""

    def make(strategy: dict[str, Any] = SYNC, folder: Path | None = None, **data: Any) -> Chats:
        config = llama_config(259, SEQUENCE_LENGTH, hidden_size=32, layers=2, end_of_text=256)
        values = {
            "name": "chats",
            "model": {"config": config, "seed": 7, "parameters": count_parameters(config)},
            "tokenizer": made[1].tokenizer,
            "data": made[1].data.model_dump(mode="json") | data,
            "strategy": strategy,
            "credit": {"flops_per_token": flops_per_token(config, SEQUENCE_LENGTH)},
        }
        return Chats(folder or made[0], Manifest.model_validate(values))

    return make


def reference(chats: Chats, theta: np.ndarray, samples: np.ndarray) -> np.ndarray:
    """The gradient by the definition: each document alone, the losses that count summed and divided by the constant."""
    one = chats.trainer()
    flat, network = one.parameters, one._network
    flat.write(network, theta)
    total = torch.zeros(())
    for row in chats.reader().batch(samples):
        for values in _documents(row):
            ids = torch.from_numpy(token_ids(values.numpy()))
            counts = values[1:] & NO_LOSS == 0
            if counts.any():
                log_probabilities = network(input_ids=ids[None, :-1]).logits[0].log_softmax(-1)
                total = total - log_probabilities.gather(1, ids[1:, None])[counts].sum()
    data = chats.manifest.data
    torch.autograd.backward(total / len(samples) / (data.counted_tokens / data.train_samples))
    return flat.read_gradients(network)


def _documents(row: torch.Tensor) -> list[torch.Tensor]:
    starts = [index for index, value in enumerate(row.tolist()) if value >> 30 & 1]
    return list(torch.tensor_split(row, starts[1:]))


@pytest.mark.parametrize("micro_batch", [1, 3, 8])
def test_the_gradient_is_that_of_each_answer_alone(run: Callable[..., Chats], micro_batch: int) -> None:
    """However rows are packed and cut into micro-batches: each token that counts weighs the same."""
    chats = run()
    theta, one = initial_theta(chats.manifest.model), chats.trainer(micro_batch)
    result = one.train_round(theta, 0, PEER, 8, 0)
    samples = one.samples_of(0, PEER, 8)
    assert max(len(_documents(row)) for row in chats.reader().batch(samples)) > 1
    assert np.allclose(result.update, reference(chats, theta, samples), atol=1e-6)
    assert result.tokens == 8 * SEQUENCE_LENGTH


def test_prompts_give_no_gradient(run: Callable[..., Chats]) -> None:
    """What is learned are the answers' characters; those that only questions have are no label anywhere."""
    chats = run()
    rows = chats.reader().batch(range(len(chats.reader())))
    labels = lesson(rows).labels
    assert ord("?") in token_ids(rows.numpy())
    assert ord("?") not in labels
    assert {chr(token) for token in labels[labels != IGNORED].tolist() if token < 256} == set("I don't know.")


def test_a_round_without_any_token_that_counts_changes_nothing(run: Callable[..., Chats], tmp_path: Path) -> None:
    """No loss is no gradient, not a division by zero, in training as in evaluation."""
    chats = run()
    rows = chats.reader().batch(range(4)).numpy() | NO_LOSS
    path = tmp_path / "rows"
    path.write_bytes(rows.astype("<u4").tobytes())
    tree = tree_of_file(path)
    path.rename(tmp_path / tree.root)
    shard = Shard(**tree.model_dump(), samples=4, token_bytes=4).model_dump()
    silent = run(folder=tmp_path, train=[shard], validation=[shard], counted_tokens=10)
    theta, one = initial_theta(chats.manifest.model), silent.trainer()
    result = one.train_round(theta, 0, PEER, 8, 0)
    assert (result.error, result.samples, result.loss_mean) == (None, 8, 0.0)
    assert not result.update.any()
    assert np.isnan(one.evaluate(theta))
    losses = one.losses(theta, np.arange(4))
    assert losses is not None
    assert not losses.any()


@pytest.mark.parametrize("strategy", [SYNC, FRESH], ids=["sync", "diloco"])
def test_a_replayed_leaf_is_the_trained_one(run: Callable[..., Chats], strategy: dict[str, Any]) -> None:
    """With micro-batches of another size as well, as an auditor's device has."""
    chats = run(strategy)
    theta = initial_theta(chats.manifest.model)
    sketcher = Sketcher(sketch_seed(bytes(32), 3, bytes(32)), theta.size)
    trained = chats.trainer(4).train_round(theta, 3, PEER, 8, 0, sketcher=sketcher).leaves
    assert len(trained) >= MOST_GRADIENT_LEAVES
    replayed = chats.trainer(1).replay(theta, 3, PEER, 0, [leaf.samples for leaf in trained], 2, sketcher)
    assert replayed is not None
    for leaf, again in zip(trained[2:3] if strategy is SYNC else trained[:3], replayed, strict=True):
        assert again.loss == pytest.approx(leaf.loss, rel=1e-4)
        assert np.linalg.norm(again.sketch - leaf.sketch) < 1e-3 * np.linalg.norm(leaf.sketch)


def test_the_answers_are_learned(run: Callable[..., Chats]) -> None:
    """Rounds bring the held-out answers' loss near zero, and the model then writes them."""
    chats = run(FRESH | {"inner_state": "kept"})
    one, theta = chats.trainer(), initial_theta(chats.manifest.model)
    before = one.evaluate(theta)
    for number in range(25):
        theta = theta - one.train_round(theta, number, PEER, 6, 0).update
    assert before > 5
    assert one.evaluate(theta) < 0.1
    rows = chats.reader("validation").batch([0])
    shown = lesson(rows)
    logits = one._network(input_ids=shown.ids, position_ids=shown.positions).logits
    counts = shown.labels != IGNORED
    assert torch.equal(logits.argmax(-1)[counts], shown.labels[counts])


def test_the_largest_batch_is_one_of_many_documents(run: Callable[..., Chats]) -> None:
    """What is tried to find out how much fits is packed too."""
    blank = run().trainer()._blank(3).rows
    assert blank.shape == (3, SEQUENCE_LENGTH + 1)
    assert int(lesson(blank).positions.max()) == 1
    assert (lesson(blank).labels != IGNORED).any()


def test_labels_that_a_hostile_peer_turns_stay_within_the_answers(run: Callable[..., Chats]) -> None:
    """`swarm attack` works on chats as on texts."""
    chats = run()
    theta, honest, hostile = initial_theta(chats.manifest.model), chats.trainer(), chats.trainer()
    hostile.relabel = lambda labels: 258 - labels
    updates = [one.train_round(theta, 0, PEER, 4, 0) for one in (honest, hostile)]
    assert updates[1].error is None
    assert not np.allclose(updates[0].update, updates[1].update)
