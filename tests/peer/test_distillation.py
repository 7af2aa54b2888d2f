"""Learning from a teacher's logits."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from peer.corpus import byte_level_tokenizer
from peer.data import ShardReader, tree_of_file, tree_path
from peer.dataset import Dataset, Plan, build
from peer.distillation import Taught, TeacherReader, bucketed, divergence, row_type
from peer.documents import Counts, Shuffled
from peer.marks import MAX_ID, STARTS
from peer.model import count_parameters, flops_per_token, initial_theta
from peer.recipes import llama_config
from peer.sketch import Sketcher, sketch_seed
from peer.teaching import teach
from peer.trainer import Trainer
from swarm.errors import DataInvalid
from swarm.manifest import Data, Manifest, Teacher
from tests.peer.conftest import DILOCO, SYNC

CPU = torch.device("cpu")
PEER = "12D3KooWpeer"
SEQUENCE_LENGTH, VOCABULARY_SIZE, TOP_K = 32, 257, 5
FRESH = {**DILOCO, "inner_state": "fresh"}


def softmax(values: np.ndarray) -> np.ndarray:
    powers = np.exp(values - values.max(-1, keepdims=True))
    return np.asarray(powers / powers.sum(-1, keepdims=True))


def plain_divergence(student: np.ndarray, teacher: np.ndarray, ids: np.ndarray, temperature: float) -> float:
    """The definition, for one token: two distributions over the vocabulary, [vocabulary] each."""
    buckets = []
    for probabilities in (teacher, student):
        top = probabilities[ids]
        softened = np.append(top, np.delete(probabilities, ids).sum()) ** (1 / temperature)
        buckets.append(softened / softened.sum())
    p, q = buckets
    return float(temperature**2 * np.sum(p * np.log(p / q)))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("top_k", [1, 4, 19])
def test_the_divergence_is_that_of_the_definition(temperature: float, top_k: int) -> None:
    """Token by token, computed with numpy in double precision."""
    random = np.random.default_rng(top_k)
    logits, expected = random.normal(0, 2, (2, 3, 20)), softmax(random.normal(0, 2, (2, 3, 20)))
    ids = np.sort(np.argsort(expected, -1)[..., -top_k:], -1)
    top = np.take_along_axis(expected, ids, -1)
    kept = np.log(np.concatenate([top, 1 - top.sum(-1, keepdims=True)], -1)).astype(np.float16)
    taught = Taught(torch.from_numpy(ids), torch.from_numpy(kept))
    found = divergence(torch.from_numpy(logits).float(), taught, temperature)
    for place in np.ndindex(2, 3):
        plain = plain_divergence(softmax(logits[place]), expected[place], ids[place], temperature)
        assert float(found[place]) == pytest.approx(plain, rel=0.01, abs=1e-3)


def test_a_student_that_expects_the_same_is_not_apart() -> None:
    """The divergence and its gradient vanish, and stay finite where the teacher is sure."""
    logits = torch.randn(1, 2, 20, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    ids = logits.detach().topk(4).indices
    found = divergence(logits, Taught(ids, bucketed(logits.detach(), ids).log_softmax(-1)), 2.0).sum()
    torch.autograd.backward(found)
    assert logits.grad is not None
    assert found.item() == pytest.approx(0, abs=1e-6)
    assert float(logits.grad.abs().max()) < 1e-6
    sure = Taught(torch.tensor([[[0, 1]] * 2]), torch.tensor([[[0.0, -1e4, -1e4]] * 2], dtype=torch.float16))
    assert torch.isfinite(divergence(logits * 1000, sure, 1.0)).all()


@dataclass(frozen=True)
class School:
    """Data, a teacher's directory, and what it has written."""

    plain: Path
    directory: Path
    taught: Path
    made: Dataset

    def trainer(self, run: Manifest, micro_batch: int = 4) -> Trainer:
        return Trainer.open(run, CPU, self.taught, micro_batch=micro_batch)

    def manifest(self, strategy: dict[str, Any] = SYNC, **distillation: float) -> Manifest:
        size = self.made.vocabulary_size
        config = llama_config(size, SEQUENCE_LENGTH, hidden_size=32, layers=1, end_of_text=256)
        values = {
            "name": "school",
            "model": {"config": config, "seed": 3, "parameters": count_parameters(config)},
            "tokenizer": self.made.tokenizer,
            "data": self.made.data,
            "distillation": distillation,
            "strategy": strategy,
            "credit": {"flops_per_token": flops_per_token(config, SEQUENCE_LENGTH)},
        }
        return Manifest.model_validate(values)


def write_teacher(directory: Path, tokenizer_file: Path, **changes: Any) -> Path:
    config = llama_config(VOCABULARY_SIZE, SEQUENCE_LENGTH, hidden_size=64, layers=2, end_of_text=256)
    values = {**config, "initializer_range": 0.3, **changes}
    settings = AutoConfig.for_model(values.pop("model_type"), **values)
    torch.manual_seed(5)
    AutoModelForCausalLM.from_config(settings).save_pretrained(directory)
    (directory / "tokenizer.json").write_bytes(tokenizer_file.read_bytes())
    return directory


def opened(folder: Path, kind: str) -> School:
    """A school for texts or for chats."""
    texts = (f"text {number}: the quick brown fox jumps over {number % 7} lazy dogs. " * 3 for number in range(60))
    chats = (
        json.dumps([{"role": "user", "content": f"{number}"}, {"role": "assistant", "content": "yes"}]) for number in range(60)
    )
    plan = Plan(sequence_length=SEQUENCE_LENGTH, held_out=0.2)
    if kind == "chat":
        template = folder / "template"
        template.write_text("{% for m in messages %}{{ m.content }}\n{% endfor %}")
        plan = Plan(sequence_length=SEQUENCE_LENGTH, held_out=0.2, kind="chat", chat_template=template)
    with Shuffled(texts if kind == "text" else chats, 0, folder) as documents:
        data = build(documents, folder / "plain", plan, Counts())
    directory = write_teacher(folder / "teacher", tree_path(folder / "plain", data.tokenizer))
    made = teach(folder / "plain", folder / "taught", directory, TOP_K, CPU)
    return School(folder / "plain", directory, folder / "taught", made)


@pytest.fixture(scope="module", params=["text", "chat"])
def school(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> School:
    return opened(tmp_path_factory.mktemp(request.param), request.param)


def rows_of(school: School, samples: list[int]) -> torch.Tensor:
    data = school.made.data
    return ShardReader.open(data.train, school.taught, SEQUENCE_LENGTH, VOCABULARY_SIZE, data.layout).batch(samples)


def expectations(network: Any, row: torch.Tensor) -> torch.Tensor:
    """The logits after each token but a row's last, [sequence_length, vocabulary], of each document alone."""
    starts = [index for index, value in enumerate(row.tolist()) if index and value & STARTS]
    documents = torch.tensor_split(row & MAX_ID, starts)
    return torch.cat([network(input_ids=document[None]).logits[0] for document in documents])[:-1]


def test_what_is_written_is_what_the_teacher_expects(school: School) -> None:
    """The likeliest tokens of each position, in the order of their ids, as the model in its directory gives them."""
    data = school.made.data
    assert data.teacher is not None
    assert (data.teacher.top_k, data.teacher.name, data.train_samples > 8) == (TOP_K, "teacher", True)
    taught = TeacherReader(data.teacher, data, school.taught, VOCABULARY_SIZE).batch(np.array([7, 0]))
    network = AutoModelForCausalLM.from_pretrained(school.directory).eval()
    with torch.no_grad():
        expected = torch.cat([expectations(network, row) for row in rows_of(school, [7, 0])]).log_softmax(-1)
    assert torch.equal(taught.ids.flatten(0, 1), expected.topk(TOP_K).indices.sort(-1).values)
    found = taught.log_probabilities.float().flatten(0, 1)
    assert torch.allclose(found[:, :-1], expected.gather(-1, taught.ids.flatten(0, 1)), atol=0.01)
    assert torch.allclose(found.exp().sum(-1), torch.ones(len(found)), atol=0.005)
    assert "teacher, its 5 likeliest tokens" in (school.taught / "README.md").read_text()


@pytest.mark.parametrize("micro_batch", [1, 3, 8])
def test_the_loss_is_a_mixture(school: School, micro_batch: int) -> None:
    """The gradient is that of both parts by their shares, for micro-batches of any size; evaluation is of labels alone."""
    mixed, alone = school.manifest(share=0.25, temperature=2.0), school.manifest(share=1.0, temperature=2.0)
    plain = mixed.model_copy(update={"distillation": None})
    theta = initial_theta(mixed.model)
    updates = []
    for run in (mixed, alone, plain):
        run = run.model_copy(update={"data": run.data.model_copy(update={"order": "same"})})
        one = school.trainer(run, micro_batch)
        updates.append(one.train_round(theta, 0, PEER, 8, 0).update)
    assert np.allclose(updates[0], 0.25 * updates[1] + 0.75 * updates[2], atol=2e-6)
    assert not np.allclose(updates[0], updates[2], atol=1e-4)
    assert school.trainer(mixed).evaluate(theta) == school.trainer(plain).evaluate(theta)


@pytest.mark.parametrize("strategy", [SYNC, FRESH], ids=["sync", "diloco"])
def test_a_replayed_leaf_is_the_trained_one(school: School, strategy: dict[str, Any]) -> None:
    """Others can check what has been learned from the teacher."""
    run = school.manifest(strategy, temperature=2.0)
    theta = initial_theta(run.model)
    sketcher = Sketcher(sketch_seed(bytes(32), 3, bytes(32)), theta.size)
    trained = school.trainer(run).train_round(theta, 3, PEER, 8, 0, sketcher=sketcher).leaves
    replayed = school.trainer(run, 2).replay(theta, 3, PEER, 0, [leaf.samples for leaf in trained], 2, sketcher)
    assert replayed is not None
    for leaf, again in zip(trained[2:3] if strategy is SYNC else trained[:3], replayed, strict=True):
        assert again.loss == pytest.approx(leaf.loss, rel=1e-4)
        assert np.linalg.norm(again.sketch - leaf.sketch) < 1e-3 * np.linalg.norm(leaf.sketch)


def test_a_student_comes_nearer_to_its_teacher(school: School) -> None:
    """Rounds lower the divergence on training samples."""
    run = school.manifest(FRESH, share=1.0)
    one, theta = school.trainer(run), initial_theta(run.model)
    samples = np.arange(8)
    before = one.losses(theta, samples)
    for number in range(4):
        theta = theta - one.train_round(theta, number, PEER, 5, 0).update
    after = one.losses(theta, samples)
    assert before is not None
    assert after is not None
    assert after.mean() < 0.7 * before.mean()


def test_the_largest_batch_has_a_teacher_too(school: School) -> None:
    """What is tried to find out how much fits is as large as the real thing, and its loss finite."""
    one = school.trainer(school.manifest())
    one.evaluate(initial_theta(one._manifest.model), 1)
    blank, real = one._blank(2), one._taught(np.array([0, 1]))
    assert blank.taught is not None
    assert real.taught is not None
    assert [blank.rows.shape, blank.taught.ids.shape] == [real.rows.shape, real.taught.ids.shape]
    assert blank.taught.log_probabilities.dtype == real.taught.log_probabilities.dtype
    assert torch.isfinite(one._losses(blank)).all()


def test_without_the_teachers_shards_there_is_no_training(school: School) -> None:
    """Only evaluation does without them."""
    run = school.manifest()
    readers = [ShardReader.open(side, school.taught, SEQUENCE_LENGTH, 259, run.data.layout) for side in (run.data.train,) * 2]
    one = Trainer(run, CPU, *readers, micro_batch=4)
    assert np.isfinite(one.evaluate(initial_theta(run.model), 2))
    with pytest.raises(DataInvalid, match="teacher"):
        one.train_round(initial_theta(run.model), 0, PEER, 4, 0)


def hostile(tmp_path: Path, change: Callable[[np.ndarray], None]) -> TeacherReader:
    """A reader of two samples that would be right if they weren't changed."""
    rows = np.zeros(2, dtype=row_type(8, 3, 2))
    rows["ids"], rows["log_probabilities"] = [4, 7, 9], np.log(0.25)
    change(rows)
    path = tmp_path / "file"
    path.write_bytes(rows.tobytes())
    tree = tree_of_file(path)
    path.rename(tree_path(tmp_path, tree))
    shard = {"root": "00" * 32, "size_bytes": 36, "samples": 2}
    teacher = Teacher(shards=(tree,), top_k=3)
    data = Data.model_validate({"sequence_length": 8, "train": [shard], "validation": [shard], "teacher": teacher})
    return TeacherReader(teacher, data, tmp_path, 10)


def set_to(name: str, value: Any) -> Callable[[np.ndarray], None]:
    def change(rows: np.ndarray) -> None:
        rows[name][1, 5] = value

    return change


@pytest.mark.parametrize(
    "change",
    [
        set_to("ids", [4, 7, 10]),
        set_to("ids", [4, 4, 9]),
        set_to("ids", [9, 7, 4]),
        set_to("log_probabilities", np.nan),
        set_to("log_probabilities", -np.inf),
        set_to("log_probabilities", 60000),
        set_to("log_probabilities", np.log(0.26)),
        set_to("log_probabilities", np.log(0.24)),
    ],
)
def test_hostile_shards_are_refused(tmp_path: Path, change: Callable[[np.ndarray], None]) -> None:
    """Unknown tokens, repeated ones, and what are no probabilities; other samples are fine."""
    reader = hostile(tmp_path, change)
    assert reader.batch([0]).ids.shape == (1, 8, 3)
    with pytest.raises(DataInvalid, match="teacher"):
        reader.batch([0, 1])


def test_samples_outside_and_missing_files(tmp_path: Path) -> None:
    """As with the training shards."""
    reader = hostile(tmp_path, lambda rows: None)
    for index in (-1, 2):
        with pytest.raises(IndexError):
            reader.batch([index])
    for path in tmp_path.iterdir():
        path.write_bytes(b"short")
    with pytest.raises(DataInvalid, match="bytes"):
        hostile_again(tmp_path)
    for path in tmp_path.iterdir():
        path.unlink()
    with pytest.raises(DataInvalid, match="can't be read"):
        hostile_again(tmp_path)


def hostile_again(tmp_path: Path) -> TeacherReader:
    teacher = Teacher.model_validate({"shards": [{"root": "11" * 32, "size_bytes": 2 * 8 * (3 * 4 + 2)}], "top_k": 3})
    for path in tmp_path.iterdir():
        path.rename(tmp_path / ("11" * 32))
    shard = {"root": "00" * 32, "size_bytes": 36, "samples": 2}
    data = Data.model_validate({"sequence_length": 8, "train": [shard], "validation": [shard], "teacher": teacher})
    return TeacherReader(teacher, data, tmp_path, 10)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"vocab_size": 200}, "200 tokens"),
        ({"max_position_embeddings": 16}, "16 tokens at once"),
    ],
)
def test_a_teacher_that_doesnt_fit(school: School, tmp_path: Path, changes: dict[str, Any], problem: str) -> None:
    """Each reason in plain words, and nothing is left behind."""
    directory = write_teacher(tmp_path / "teacher", school.directory / "tokenizer.json", **changes)
    with pytest.raises(DataInvalid, match=problem):
        teach(school.plain, tmp_path / "taught", directory, TOP_K, CPU)
    assert [path.name for path in tmp_path.iterdir()] == ["teacher"]


def test_a_teacher_with_another_tokenizer_or_code(school: School, tmp_path: Path) -> None:
    """The ids would mean something else; nor is a stranger's code run, nor a pickle read."""
    directory = write_teacher(tmp_path / "teacher", school.directory / "tokenizer.json")
    other = byte_level_tokenizer()
    other.add_special_tokens(["<|x|>"])
    (directory / "tokenizer.json").write_text(other.to_str())
    teach(school.plain, tmp_path / "more", directory, TOP_K, CPU)
    values = json.loads(other.to_str())
    vocabulary = values["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (directory / "tokenizer.json").write_text(json.dumps(values))
    with pytest.raises(DataInvalid, match="2 of 257 tokens differ"):
        teach(school.plain, tmp_path / "taught", directory, TOP_K, CPU)
    (directory / "tokenizer.json").write_bytes((school.directory / "tokenizer.json").read_bytes())
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
    with pytest.raises(DataInvalid, match="can't be loaded"):
        teach(school.plain, tmp_path / "taught", directory, TOP_K, CPU)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoModelForCausalLM": "evil.Model"}}))
    with pytest.raises(DataInvalid, match="code of its own"):
        teach(school.plain, tmp_path / "taught", directory, TOP_K, CPU)
    (directory / "config.json").unlink()
    with pytest.raises(DataInvalid, match="no config"):
        teach(school.plain, tmp_path / "taught", directory, TOP_K, CPU)


def test_as_many_likeliest_tokens_as_there_are(school: School, tmp_path: Path) -> None:
    """There has to be at least one other."""
    with pytest.raises(DataInvalid, match="no 257 besides"):
        teach(school.plain, tmp_path / "taught", school.directory, 257, CPU)
    teacher = school.made.data.teacher
    assert teacher is not None
    with pytest.raises(DataInvalid, match="leave none"):
        TeacherReader(teacher, school.made.data, school.taught, TOP_K)
