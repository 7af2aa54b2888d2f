"""Runs that begin with a pretrained model, or train an adapter on it: a checkpoint of transformers, loaded, trained, exported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from peer.checking import problems_of
from peer.corpus import byte_level_tokenizer, load_tokenizer
from peer.data import tree_of_file, tree_path
from peer.export import Provenance, export_model
from peer.importing import import_pretrained
from peer.model import FlatParameters, build_model, check_parameters, count_parameters, flops_per_token, initial_theta
from peer.pretrained import Pretrained, read_pretrained
from peer.sketch import Sketcher
from peer.trainer import Trainer
from swarm.errors import DataInvalid, ManifestInvalid
from swarm.manifest import Base, Lora, Manifest, Model
from tests.checkpoints import save_checkpoint
from tests.peer.conftest import CONFIGS

ADAPTER = Lora(rank=4, alpha=8, targets=("q_proj", "v_proj"))
PROVENANCE = Provenance(round=3, tokens=100, state_root="ab" * 32)
PROMPT = torch.tensor([[116, 104, 101, 32, 113, 117]])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama with weights of its own and a byte tokenizer, as transformers saves them."""
    torch.manual_seed(5)
    return save_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny-llama", CONFIGS["llama"], byte_level_tokenizer())


@pytest.fixture(scope="module")
def imported(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Pretrained]:
    """What `swarm run base` makes of it."""
    folder = tmp_path_factory.mktemp("imported") / "base"
    return folder, import_pretrained(str(checkpoint), folder)


def model_of(made: Pretrained, adapter: Lora | None = None, seed: int = 0) -> Model:
    parameters = count_parameters(made.config, adapter)
    return Model(config=made.config, seed=seed, parameters=parameters, base=made.base, adapter=adapter)


def run_of(small_run: Any, imported: tuple[Path, Pretrained], adapter: Lora | None = None, **changes: Any) -> Any:
    """A run on the small data that begins with the base."""
    folder, made = imported
    run = small_run(**changes)
    place = tree_path(run.directory, made.base)
    if not place.exists():
        place.write_bytes(tree_path(folder, made.base).read_bytes())
    model = model_of(made, adapter).model_dump(mode="json")
    return type(run)(run.directory, Manifest.model_validate(run.manifest.model_dump(mode="json") | {"model": model}))


def trainer_of(run: Any) -> Trainer:
    return Trainer.open(run.manifest, torch.device("cpu"), run.directory, micro_batch=4)


def test_an_imported_model_is_the_one_that_transformers_loads(checkpoint: Path, imported: tuple[Path, Pretrained]) -> None:
    """The initial weights of a run that begins with it are the checkpoint's, in the order of the flat vector."""
    folder, made = imported
    network = AutoModelForCausalLM.from_pretrained(checkpoint)
    assert np.array_equal(initial_theta(model_of(made), folder), FlatParameters(network).read(network))
    assert read_pretrained(folder) == made
    assert made.base.name == "tiny-llama"
    assert load_tokenizer(tree_path(folder, made.tokenizer))("abc")["input_ids"] == [97, 98, 99]


def test_weights_can_be_stored_in_half_precision(checkpoint: Path, tmp_path: Path) -> None:
    """Half the bytes, and the values rounded."""
    made = import_pretrained(str(checkpoint), tmp_path / "half", "bfloat16")
    theta = initial_theta(model_of(made), tmp_path / "half")
    whole = FlatParameters(network := AutoModelForCausalLM.from_pretrained(checkpoint)).read(network)
    assert made.base.size_bytes < 0.6 * whole.nbytes
    assert np.allclose(theta, whole, rtol=2**-8)


def test_without_its_file_a_run_has_no_first_weights(imported: tuple[Path, Pretrained]) -> None:
    """Nobody begins with other weights by mistake."""
    with pytest.raises(DataInvalid, match="pretrained model"):
        initial_theta(model_of(imported[1]))


def test_an_adapted_model_begins_as_its_base(checkpoint: Path, imported: tuple[Path, Pretrained]) -> None:
    """Second matrices are zero: the logits are the base's, and only the adapter is trained."""
    folder, made = imported
    network = build_model(model_of(made, ADAPTER), folder)
    before = AutoModelForCausalLM.from_pretrained(checkpoint)
    with torch.no_grad():
        assert torch.equal(network(input_ids=PROMPT).logits, before(input_ids=PROMPT).logits)
    flat = FlatParameters(network)
    assert flat.size == count_parameters(made.config, ADAPTER)
    assert all(".lora_" in entry.name for entry in flat.table)


def test_the_adapter_is_drawn_alike_everywhere(imported: tuple[Path, Pretrained]) -> None:
    """By the manifest's seed alone, with peft's deviation."""
    folder, made = imported
    theta = initial_theta(model_of(made, ADAPTER, seed=1), folder)
    torch.manual_seed(99)
    assert np.array_equal(theta, initial_theta(model_of(made, ADAPTER, seed=1), folder))
    assert not np.array_equal(theta, initial_theta(model_of(made, ADAPTER, seed=2), folder))
    first = theta[theta != 0]
    inputs = CONFIGS["llama"]["hidden_size"]
    assert first.std() == pytest.approx((3 * inputs) ** -0.5, rel=0.1)


def test_frozen_parameters_cost_four_flops(imported: tuple[Path, Pretrained]) -> None:
    """Forward, and back to the activations; those of the adapter cost six, as trained ones do."""
    config = imported[1].config
    attention = flops_per_token(config, 32) - flops_per_token(config, 0)
    matrices = (flops_per_token(config, 32) - attention) // 6
    assert flops_per_token(config, 32, ADAPTER) == 4 * matrices + 6 * count_parameters(config, ADAPTER) + attention


@pytest.mark.parametrize("strategy", ["sync", "diloco"])
def test_an_adapter_learns(small_run: Any, imported: tuple[Path, Pretrained], strategy: str) -> None:
    """A round changes the adapter and nothing else, and makes the loss smaller."""
    run = run_of(small_run, imported, ADAPTER, strategy=strategy)
    trainer, theta = trainer_of(run), initial_theta(run.manifest.model, run.directory)
    before = trainer.evaluate(theta)
    update = trainer.train_round(theta, 1, "peer", 8 if strategy == "sync" else 4, 0)
    assert update.update.shape == theta.shape
    rate = 1.0 if strategy == "diloco" else 0.05 / float(np.linalg.norm(update.update))
    assert trainer.evaluate(theta - np.float32(rate) * update.update) < before
    assert trainer.evaluate(theta) == before


def test_others_compute_an_adapters_round_again(small_run: Any, imported: tuple[Path, Pretrained]) -> None:
    """A replayed leaf is the trained one."""
    run = run_of(small_run, imported, ADAPTER, strategy="sync")
    theta = initial_theta(run.manifest.model, run.directory)
    sketcher = Sketcher(b"\x07" * 32, run.manifest.model.parameters)
    done = trainer_of(run).train_round(theta, 1, "peer", 8, 0, sketcher=sketcher)
    lengths = [leaf.samples for leaf in done.leaves]
    again = trainer_of(run).replay(theta, 1, "peer", 0, lengths, 0, sketcher)
    assert again is not None
    assert np.array_equal(again[0].sketch, done.leaves[0].sketch)
    assert again[0].loss == done.leaves[0].loss


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_an_exported_adapter_loads_in_plain_peft(
    small_run: Any, imported: tuple[Path, Pretrained], checkpoint: Path, tmp_path: Path
) -> None:
    """On the checkpoint as it was, with peft's own loader; merged, with transformers alone. Both are what was trained."""
    run = run_of(small_run, imported, ADAPTER)
    theta = np.random.default_rng(0).standard_normal(run.manifest.model.parameters).astype(np.float32) * np.float32(0.1)
    network = build_model(run.manifest.model, run.directory)
    FlatParameters(network).write(network, theta)
    folder = export_model(run.manifest, theta, run.directory, tmp_path / "adapter", PROVENANCE)
    merged = export_model(run.manifest, theta, run.directory, tmp_path / "merged", PROVENANCE, merged=True)
    loaded = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(checkpoint), folder)
    whole = AutoModelForCausalLM.from_pretrained(merged)
    with torch.no_grad():
        wanted = network(input_ids=PROMPT).logits
        assert torch.equal(loaded(input_ids=PROMPT).logits, wanted)
        assert torch.allclose(whole(input_ids=PROMPT).logits, wanted, atol=1e-4)
    assert sum(path.stat().st_size for path in folder.glob("*.safetensors")) < 4 * theta.size + 4096
    assert "base_model: tiny-llama" in (folder / "README.md").read_text()
    assert {path.suffix for path in folder.iterdir()} <= {".json", ".safetensors", ".md", ".jinja"}
    assert AutoTokenizer.from_pretrained(folder).eos_token == "<|endoftext|>"


@pytest.mark.parametrize(
    ("targets", "problem"), [(("q_proj", "nothing"), "no layer is called nothing"), (("embed_tokens",), "no linear layer")]
)
def test_a_target_that_matches_no_layer_is_named(
    imported: tuple[Path, Pretrained], targets: tuple[str, ...], problem: str
) -> None:
    """Before anything is trained."""
    with pytest.raises(DataInvalid, match=problem):
        count_parameters(imported[1].config, Lora(targets=targets))


def test_an_adapter_needs_a_base() -> None:
    """And a base's targets are names, not patterns."""
    model = {"config": CONFIGS["llama"], "parameters": 1, "adapter": {"rank": 4}}
    with pytest.raises(ValueError, match="an adapter needs a base"):
        Model.model_validate(model)
    with pytest.raises(ValueError, match="pattern"):
        Lora(targets=("q.*",))


def test_the_number_of_trained_parameters_is_checked(imported: tuple[Path, Pretrained]) -> None:
    """For an adapter, the adapter's."""
    made = imported[1]
    with pytest.raises(DataInvalid, match="trains 1024 parameters"):
        check_parameters(Model(config=made.config, parameters=5, base=made.base, adapter=ADAPTER))


def broken(imported: tuple[Path, Pretrained], folder: Path, change: Any) -> tuple[Path, Pretrained]:
    """The base with some of its tensors changed, under its own new name."""
    source, made = imported
    values = load_file(tree_path(source, made.base))
    change(values)
    save_file(values, folder / "weights")
    tree = tree_of_file(folder / "weights")
    (folder / "weights").rename(tree_path(folder, tree))
    return folder, made.model_copy(update={"base": Base(**tree.model_dump())})


NORM = "model.norm.weight"


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda values: values.pop(NORM), f"lacks {NORM}"),
        (lambda values: values.update(extra=torch.zeros(3)), "has extra, which the model hasn't"),
        (lambda values: values.update({NORM: torch.zeros(3)}), "not \\(32,\\)"),
        (lambda values: values.update({NORM: torch.zeros(32, dtype=torch.int32)}), "is I32"),
        (lambda values: values.update({NORM: torch.full((32,), float("nan"))}), "not finite"),
    ],
)
def test_a_base_that_does_not_fit_is_refused(
    imported: tuple[Path, Pretrained], tmp_path: Path, change: Any, problem: str
) -> None:
    """The first tensor at fault is named."""
    folder, made = broken(imported, tmp_path, change)
    with pytest.raises(DataInvalid, match=problem):
        initial_theta(model_of(made), folder)


def test_a_file_that_is_no_safetensors_is_refused(imported: tuple[Path, Pretrained], tmp_path: Path) -> None:
    """Its header is not trusted."""
    made = imported[1]
    tree_path(tmp_path, made.base).write_bytes(b"\xff" * 100)
    with pytest.raises(DataInvalid, match="can't be read"):
        initial_theta(model_of(made), tmp_path)


def test_what_is_no_model_is_refused_with_a_hint(tmp_path: Path) -> None:
    """An empty folder, and nothing is left behind."""
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataInvalid, match="can't load") as raised:
        import_pretrained(str(tmp_path / "empty"), tmp_path / "base")
    assert "config.json" in raised.value.hint
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


def test_problems_are_found_before_the_first_round(small_run: Any, imported: tuple[Path, Pretrained], tmp_path: Path) -> None:
    """A sound run has none; a damaged file and a base of another model are named."""
    run = run_of(small_run, imported, ADAPTER)
    assert problems_of(run.manifest, run.directory) == []
    assert any("can't be read" in problem for problem in problems_of(run.manifest, tmp_path))
    folder, made = broken(imported, tmp_path, lambda values: values.pop(NORM))
    other = run.manifest.model_copy(update={"model": model_of(made)})
    for tree in (run.manifest.tokenizer, *run.manifest.data.train, *run.manifest.data.validation):
        tree_path(folder, tree).write_bytes(tree_path(run.directory, tree).read_bytes())
    assert problems_of(other, folder) == [f"the base doesn't fit the model: it lacks {NORM}"]


def test_a_manifest_without_a_base_keeps_its_run_id(small_run: Any) -> None:
    """Fields of later versions leave no trace where they aren't used."""
    values = small_run().manifest.model_dump(mode="json")
    assert "base" not in values["model"]
    assert "adapter" not in values["model"]
    with pytest.raises(ManifestInvalid):
        Manifest.from_values(values | {"model": values["model"] | {"adapter": {"rank": 0}}})
