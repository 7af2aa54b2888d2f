"""An adapter on a base in 4 bits: the weights are bitsandbytes' own, memory falls, and a run trains, agrees and is exported."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from transformers import AutoModelForCausalLM

from peer.checking import problems_of
from peer.corpus import byte_level_tokenizer
from peer.data import tree_of_file, tree_path
from peer.export import Provenance, export_model
from peer.importing import import_pretrained, in_four_bits
from peer.model import FlatParameters, build_model, count_parameters, frozen_bytes, initial_theta
from peer.nf4 import CODE, Nf4Linear, packed_layers, packed_weights, unpacked
from peer.outcome import sample
from peer.pretrained import Pretrained
from peer.sketch import Sketcher
from peer.trainer import Trainer
from swarm.errors import DataInvalid, ManifestInvalid
from swarm.manifest import Base, Lora, Manifest, Model
from tests.checkpoints import save_checkpoint
from tests.peer.conftest import CONFIGS

ADAPTER = Lora(rank=4, alpha=8, targets=("q_proj", "v_proj", "down_proj"))
BIASED = {**CONFIGS["llama"], "model_type": "qwen2", "tie_word_embeddings": True}  # biases, and a head that is the embedding
PROMPT = torch.tensor([[116, 104, 101, 32, 113, 117]])
MADE_BY_BITSANDBYTES = {
    torch.float32: ("b45dd97a2ae5735889f6096bbd657183", "8931ce0fbcb88f88945f5ffa11803527", "3461dce0d303a265b9e804b4c3f495f9"),
    torch.float16: ("e2067184091067514f6d75a2c8511dad", "7fff37cdc62aa8329d0b827e57980b65", "f1896d3eb74e1a278614c46c29ea64d3"),
    torch.bfloat16: ("71eaf40303d8c0932cbcc17e2572c3a2", "1ae3f970b488f50a689b082512cadaf1", "06e59d7a422854fb30f960ad78059009"),
}
"""BLAKE2b-128 of what bitsandbytes 0.50.2 makes of `weights()` without double quantisation: packed, absmax, and read back."""


def weights() -> torch.Tensor:
    """A bell of exact values, [64, 512], with a block of zeros."""
    raw = np.random.Philox(key=7).random_raw(64 * 512)
    quarters = np.asarray(raw, dtype="<u8").view("<u2").reshape(-1, 4).sum(axis=1, dtype=np.int64) - 2 * 65535
    made = torch.from_numpy((quarters / 65536).astype(np.float32)).view(64, 512)
    made[3, :64] = 0
    return made


def digest(tensor: torch.Tensor) -> str:
    return hashlib.blake2b(tensor.contiguous().view(torch.uint8).numpy().tobytes(), digest_size=16).hexdigest()


@pytest.fixture(scope="module", params=["llama", "qwen2"])
def based(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Pretrained]:
    """A folder with a base in full, and in 4 bits; what is given describes the full one."""
    folder = tmp_path_factory.mktemp("based")
    torch.manual_seed(5)
    config = BIASED if request.param == "qwen2" else CONFIGS["llama"]
    source = save_checkpoint(folder / "tiny", config, byte_level_tokenizer())
    return folder / "base", import_pretrained(str(source), folder / "base", "bfloat16")


def model_of(based: tuple[Path, Pretrained], base: Base, adapter: Lora = ADAPTER) -> Model:
    config = based[1].config
    return Model(config=config, parameters=count_parameters(config, adapter), base=base, adapter=adapter)


@pytest.fixture(scope="module")
def packed(based: tuple[Path, Pretrained]) -> Model:
    """A model with an adapter on the base in 4 bits."""
    folder, made = based
    return model_of(based, in_four_bits(made, folder, folder))


def run_of(small_run: Any, based: tuple[Path, Pretrained], model: Model, **changes: Any) -> Any:
    run, base = small_run(**changes), model.base
    assert base is not None
    place = tree_path(run.directory, base)
    if not place.exists():
        place.write_bytes(tree_path(based[0], base).read_bytes())
    values = run.manifest.model_dump(mode="json") | {"model": model.model_dump(mode="json")}
    return type(run)(run.directory, Manifest.model_validate(values))


def trainer_of(run: Any, micro_batch: int = 4) -> Trainer:
    return Trainer.open(run.manifest, torch.device("cpu"), run.directory, micro_batch=micro_batch)


@pytest.mark.parametrize("dtype", list(MADE_BY_BITSANDBYTES), ids=str)
def test_weights_are_those_of_bitsandbytes(dtype: torch.dtype) -> None:
    """Bit by bit, there and back."""
    values, largest = packed_weights(weights().to(dtype))
    assert (digest(values), digest(largest), digest(unpacked(values, largest, dtype))) == MADE_BY_BITSANDBYTES[dtype]


def test_every_weight_becomes_the_nearest_value() -> None:
    """Of the 16, times its block's largest magnitude."""
    given = weights()
    back = unpacked(*packed_weights(given), torch.float32).view_as(given)
    blocks = given.view(-1, 64)
    choices = torch.tensor(CODE) * blocks.abs().amax(dim=1)[:, None, None]  # [blocks, 1, 16]
    nearest = (blocks[..., None] - choices).abs().amin(dim=-1)
    assert torch.allclose((back.view(-1, 64) - blocks).abs(), nearest, atol=1e-7)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_layer_computes_as_a_plain_one_with_its_weights(dtype: torch.dtype, bias: bool) -> None:
    """The product, and the gradient of what comes in; under autocast in its precision."""
    torch.manual_seed(0)
    layer = Nf4Linear(nn.Linear(512, 64, bias=bias).requires_grad_(False))
    layer.packed, layer.largest = packed_weights(weights())
    plain = layer.plain()
    values = [torch.randn(2, 5, 512).requires_grad_() for _ in range(2)]
    values[1].data.copy_(values[0].data)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        ours, theirs = layer(values[0]), plain(values[1])
    assert ours.dtype == theirs.dtype == dtype
    assert torch.allclose(ours, theirs, rtol=1e-2 if dtype == torch.bfloat16 else 1e-6, atol=1e-5)
    (ours.float().square().sum() + theirs.float().square().sum()).backward()
    assert values[0].grad is not None
    assert values[1].grad is not None
    tolerance = 3e-2 if dtype == torch.bfloat16 else 1e-6
    assert (values[0].grad - values[1].grad).norm() <= tolerance * values[1].grad.norm()


def held_bytes(network: nn.Module) -> int:
    """What the weights take, and whatever lies beside them."""
    return sum(tensor.nbytes for tensor in (*network.parameters(), *network.buffers()))


def test_memory_and_download_fall(based: tuple[Path, Pretrained], packed: Model) -> None:
    """Linear layers take 4.5 bits a weight, in memory and in the file; nothing is kept in full for the way back."""
    folder, made = based
    plain_network, network = build_model(model_of(based, made.base), folder), build_model(packed, folder)
    linear = sum(layer.in_features * layer.out_features for _, layer in packed_layers(network))
    assert linear == 2 * (4 * 32 * 32 + 3 * 32 * 88)
    assert held_bytes(plain_network) - held_bytes(network) == linear * (32 - 4.5) / 8
    for model, built in ((model_of(based, made.base), plain_network), (packed, network)):
        buffers = sum(tensor.nbytes for name, tensor in built.named_buffers() if ".rotary_emb." in name or "rotary_emb." in name)
        assert frozen_bytes(model) == held_bytes(built) - 4 * model.parameters - buffers
    assert packed.base is not None
    assert made.base.size_bytes - packed.base.size_bytes == pytest.approx(linear * (16 - 4.5) / 8, abs=4096)
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    whole = next(layer.in_features * layer.out_features for name, layer in packed_layers(network) if "gate_proj" in name)
    with saved_tensors_hooks(keep, lambda tensor: tensor):
        network(input_ids=PROMPT).logits.sum().backward()
    heads = {tensor.untyped_storage().data_ptr() for tensor in network.parameters()}
    assert max(size for place, size in kept.items() if place not in heads) < 4 * whole


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_gpu_reads_the_same_weights(dtype: torch.dtype) -> None:
    """Bit by bit, as each is one product and one rounding."""
    values, largest = packed_weights(weights())
    assert torch.equal(unpacked(values.cuda(), largest.cuda(), dtype).cpu(), unpacked(values, largest, dtype))


def test_only_the_adapter_is_trained(based: tuple[Path, Pretrained], packed: Model) -> None:
    """It begins as the base in 4 bits, whose weights are the file's."""
    network = build_model(packed, based[0])
    assert all(".lora_" in entry.name for entry in FlatParameters(network).table)
    assert packed.base is not None
    stored = load_file(tree_path(based[0], packed.base))
    for name, layer in packed_layers(network):
        plain_name = name.removeprefix("base_model.model.").removesuffix(".base_layer")
        assert torch.equal(layer.packed, stored[f"{plain_name}.weight"])
        assert torch.equal(layer.largest, stored[f"{plain_name}.weight.absmax"])
    whole = build_model(model_of(based, based[1].base), based[0])
    with torch.no_grad():
        ours, theirs = network(input_ids=PROMPT).logits, whole(input_ids=PROMPT).logits
    assert 0 < (ours - theirs).norm() < 0.5 * theirs.norm()


@pytest.mark.parametrize("strategy", ["sync", "diloco"])
def test_two_peers_agree_and_learn(small_run: Any, based: tuple[Path, Pretrained], packed: Model, strategy: str) -> None:
    """What two trainers on the same file make is the same, and the loss falls by it; others can compute it again."""
    run = run_of(small_run, based, packed, strategy=strategy)
    trainers, theta = [trainer_of(run), trainer_of(run)], initial_theta(run.manifest.model, run.directory)
    before = trainers[0].evaluate(theta)
    quota = 8 if strategy == "sync" else 4
    updates = [trainer.train_round(theta, 1, "peer", quota, 0).update for trainer in trainers]
    assert np.array_equal(*updates)
    rate = 1.0 if strategy == "diloco" else 0.05 / float(np.linalg.norm(updates[0]))
    after = [trainer.evaluate(theta - np.float32(rate) * update) for trainer, update in zip(trainers, updates, strict=True)]
    assert after[0] == after[1] < before
    sketcher = Sketcher(b"\x07" * 32, theta.size)
    done = trainer_of(run).train_round(theta, 1, "peer", quota, 0, sketcher=sketcher)
    if strategy == "sync":
        again = trainer_of(run).replay(theta, 1, "peer", 0, [leaf.samples for leaf in done.leaves], 0, sketcher)
        assert again is not None
        assert np.array_equal(again[0].sketch, done.leaves[0].sketch)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_what_comes_out_loads_anywhere(small_run: Any, based: tuple[Path, Pretrained], packed: Model, tmp_path: Path) -> None:
    """The adapter in peft's format; merged, the model that was trained, with the base's 4-bit weights written out."""
    run = run_of(small_run, based, packed)
    theta = np.random.default_rng(0).standard_normal(run.manifest.model.parameters).astype(np.float32) * np.float32(0.1)
    network = build_model(run.manifest.model, run.directory)
    FlatParameters(network).write(network, theta)
    provenance = Provenance(round=3, tokens=100, state_root="ab" * 32)
    folder = export_model(run.manifest, theta, run.directory, tmp_path / "adapter", provenance)
    merged = export_model(run.manifest, theta, run.directory, tmp_path / "merged", provenance, merged=True)
    source = based[0].parent / "tiny"
    loaded = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(source), folder)
    whole = AutoModelForCausalLM.from_pretrained(merged)
    with torch.no_grad():
        wanted = network(input_ids=PROMPT).logits
        assert torch.allclose(whole(input_ids=PROMPT).logits, wanted, atol=1e-4)
        assert (loaded(input_ids=PROMPT).logits - wanted).norm() < 0.5 * wanted.norm()
    assert loaded.peft_config["default"].base_model_name_or_path == "tiny"
    assert sum(path.stat().st_size for path in folder.glob("*.safetensors")) < 4 * theta.size + 8192
    assert "in 4 bits (NF4)" in (merged / "README.md").read_text()
    assert sample(merged, "the", 4) != ""
    assert sample(folder, "the", 4, base=source) != ""


def test_a_base_in_four_bits_needs_an_adapter(based: tuple[Path, Pretrained], packed: Model, small_run: Any) -> None:
    """Its own weights can't be trained; a plain base leaves no trace of the field."""
    values = small_run().manifest.model_dump(mode="json")
    model = packed.model_dump(mode="json")
    with pytest.raises(ManifestInvalid, match="needs an adapter"):
        Manifest.from_values(values | {"model": {**model, "adapter": None}})
    assert model["base"]["stored"] == "nf4"
    assert "stored" not in based[1].base.model_dump(mode="json")


def test_layers_that_do_not_fit_are_named(based: tuple[Path, Pretrained], packed: Model) -> None:
    """Before anything is fetched: by their names, or the architecture where it has no linear layers."""
    narrow = {**packed.config, "intermediate_size": 33}
    model = packed.model_copy(update={"config": narrow})
    with pytest.raises(DataInvalid, match=r"mlp\.gate_proj has 33 x 32 weights"):
        build_model(model)
    values = {"config": CONFIGS["gpt2"], "base": packed.base, "adapter": Lora(targets=("c_attn",)), "parameters": 1}
    with pytest.raises(DataInvalid, match="gpt2 model has no linear layers"):
        build_model(Model.model_validate(values))
    folder, made = based
    with pytest.raises(DataInvalid, match="in 4 bits already"):
        in_four_bits(made.model_copy(update={"base": packed.base}), folder, folder)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda values, name: values.pop(f"{name}.absmax"), "lacks .*absmax"),
        (lambda values, name: values.update({name: values[name][:-1]}), "is U8"),
        (lambda values, name: values.update({name: values[name].to(torch.int8)}), "is I8"),
        (lambda values, name: values[f"{name}.absmax"].fill_(torch.nan), "not finite"),
    ],
)
def test_a_damaged_file_is_refused(
    small_run: Any, based: tuple[Path, Pretrained], packed: Model, tmp_path: Path, change: Any, problem: str
) -> None:
    """The tensor at fault is named when a peer reads it, and before by `swarm run validate`."""
    run = run_of(small_run, based, packed)
    assert packed.base is not None
    values = load_file(tree_path(based[0], packed.base))
    change(values, "model.layers.0.self_attn.q_proj.weight")
    save_file(values, tmp_path / "weights")
    tree = tree_of_file(tmp_path / "weights")
    (tmp_path / "weights").rename(tree_path(run.directory, tree))
    base = Base(**tree.model_dump(), stored="nf4")
    changed = run.manifest.model_copy(update={"model": packed.model_copy(update={"base": base})})
    with pytest.raises(DataInvalid, match=problem):
        initial_theta(changed.model, run.directory)
    assert len(problems_of(changed, run.directory)) == 1
    assert problems_of(run.manifest, run.directory) == []
