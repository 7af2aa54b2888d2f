"""Building models by value and mapping them to one vector."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from peer.model import FlatParameters, build_model, count_parameters, flops_per_token, initial_theta
from swarm.errors import DataInvalid
from swarm.manifest import Model

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 257,
    "hidden_size": 32,
    "intermediate_size": 88,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "tie_word_embeddings": False,
}
TIED = {**LLAMA, "tie_word_embeddings": True}
GPT2 = {"model_type": "gpt2", "vocab_size": 257, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 32}
MIXTRAL = {**LLAMA, "model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}
BLOCK = 4 * 32 * 32 + 3 * 32 * 88
HEAD = 257 * 32
ATTENTION = 12 * 2 * 32 * 32  # 12 x layers x hidden x sequence length


def model(config: dict[str, Any], seed: int = 0) -> Model:
    return Model(config=config, seed=seed, parameters=count_parameters(config))


def test_parameters_are_counted_without_being_allocated() -> None:
    """A model far larger than this machine's memory is counted."""
    huge = {**LLAMA, "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64}
    assert count_parameters(huge) > 60e9


@pytest.mark.parametrize(("config", "expected"), [(LLAMA, 2 * BLOCK + 2 * HEAD + 5 * 32), (TIED, 2 * BLOCK + HEAD + 5 * 32)])
def test_tied_parameters_count_once(config: dict[str, Any], expected: int) -> None:
    """A tied output head adds no parameters."""
    assert count_parameters(config) == expected
    assert sum(parameter.numel() for parameter in build_model(model(config)).parameters()) == expected


@pytest.mark.parametrize("config", [LLAMA, TIED])
def test_flops_count_matrices_head_and_attention(config: dict[str, Any]) -> None:
    """6 FLOPs per matrix parameter, the head included even if tied and the look-up left out, plus attention."""
    assert flops_per_token(config, 32) == 6 * (2 * BLOCK + HEAD) + ATTENTION


def test_flops_count_only_the_experts_that_a_token_visits() -> None:
    """Two of four experts cost as much as half of the experts' parameters."""
    router, experts = 4 * 32, 4 * 3 * 32 * 88
    assert flops_per_token(MIXTRAL, 32) == 6 * (2 * (4 * 32 * 32 + router + experts // 2) + HEAD) + ATTENTION


def test_flops_of_a_gpt2_leave_out_position_embeddings() -> None:
    """Looking up a position is free."""
    block = 4 * 32 * 32 + 2 * 4 * 32 * 32
    assert flops_per_token(GPT2, 32) == 6 * (2 * block + HEAD) + ATTENTION


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        ({**LLAMA, "model_type": "no-such-model"}, "no-such-model"),
        ({**LLAMA, "hidden_act": "no-such-function"}, "no-such-function"),
        ({"model_type": "vit"}, "vit"),
        ({**LLAMA, "hidden_size": "wide"}, "hidden_size"),
        ({**LLAMA, "num_hidden_layers": 10**9}, "num_hidden_layers"),
    ],
)
def test_a_configuration_that_transformers_refuses_is_invalid_data(config: dict[str, Any], problem: str) -> None:
    """Unknown architectures and nonsense values end in one clear error."""
    with pytest.raises(DataInvalid, match=problem):
        count_parameters(config)


@pytest.mark.parametrize(
    "extra",
    [
        {"attn_implementation": "somebody/kernel"},
        {"_attn_implementation": "somebody/kernel"},
        {"quantization_config": {"quant_method": "awq"}},
        {"text_config": {"auto_map": {"AutoModel": "evil.Model"}}},
        {"list": [{"trust_remote_code": True}]},
    ],
)
def test_keys_that_could_load_code_are_refused_at_any_depth(extra: dict[str, Any]) -> None:
    """A manifest can never make a peer run code."""
    with pytest.raises(DataInvalid, match="can't make a peer run code"):
        count_parameters({**LLAMA, **extra})


def test_another_number_of_parameters_than_the_manifests_is_refused() -> None:
    """The manifest's count is checked before memory is taken."""
    with pytest.raises(DataInvalid, match="the manifest says 5"):
        build_model(Model(config=LLAMA, parameters=5))


def test_initial_weights_depend_on_the_seed_only() -> None:
    """The same seed gives the same bits, whatever torch's generator did before; another seed gives others."""
    first = initial_theta(model(LLAMA, seed=3))
    torch.randn(10)
    assert np.array_equal(first, initial_theta(model(LLAMA, seed=3)))
    assert not np.array_equal(first, initial_theta(model(LLAMA, seed=4)))


def test_building_leaves_torchs_generator_alone() -> None:
    """A caller's random numbers are not disturbed."""
    torch.manual_seed(5)
    expected = torch.randn(3)
    torch.manual_seed(5)
    build_model(model(LLAMA))
    assert torch.equal(torch.randn(3), expected)


def test_initial_weights_are_golden() -> None:
    """The first round's weights must be the same bits on every processor and with every version."""
    digest = hashlib.blake2b(initial_theta(model(TIED, seed=1)).tobytes(), digest_size=32).hexdigest()
    assert digest == "51a56dcd311113eea6d3f5d196aa957ddc54583aa3a8301f8d16625199b05919"


def test_initial_weights_have_transformers_spread_and_keep_its_constants() -> None:
    """Matrices have the configuration's deviation, norms stay one, and padding rows stay zero."""
    network: Any = build_model(model({**LLAMA, "pad_token_id": 9, "initializer_range": 0.05}))
    weight = network.model.layers[0].mlp.up_proj.weight
    assert abs(weight.std().item() / 0.05 - 1) < 0.05
    assert abs(weight.mean().item()) < 0.005
    assert torch.equal(network.model.norm.weight, torch.ones(32))
    assert torch.equal(network.model.embed_tokens.weight[9], torch.zeros(32))


@pytest.mark.parametrize("config", [LLAMA, TIED, GPT2, MIXTRAL])
def test_a_vector_survives_being_written_and_read(config: dict[str, Any]) -> None:
    """What is written into a model is what is read from it, also from a read-only vector."""
    network = build_model(model(config))
    flat = FlatParameters(network)
    vector = np.random.default_rng(0).standard_normal(flat.size).astype(np.float32)
    vector.setflags(write=False)
    flat.write(network, vector)
    assert np.array_equal(flat.read(network), vector)


def test_a_difference_is_that_of_the_vectors() -> None:
    """To the bit, wherever the model is; a vector of another model is refused."""
    network = build_model(model(LLAMA))
    flat = FlatParameters(network)
    theta = np.random.default_rng(1).standard_normal(flat.size).astype(np.float32)
    assert np.array_equal(flat.read_difference(theta, network), theta - flat.read(network))
    with pytest.raises(DataInvalid, match="doesn't fit"):
        flat.read_difference(theta[1:], network)


def test_the_table_is_sorted_by_name_without_gaps() -> None:
    """The order of parameters is fixed: by name, one after the other, tied ones once."""
    flat = FlatParameters(build_model(model(TIED)))
    assert [entry.name for entry in flat.table] == sorted(entry.name for entry in flat.table)
    ends = np.cumsum([entry.size for entry in flat.table]).tolist()
    assert [entry.offset for entry in flat.table] == [0, *ends[:-1]]
    assert ends[-1] == flat.size == count_parameters(TIED)
    assert flat.table[0].name == "model.embed_tokens.weight"
    assert "lm_head.weight" not in {entry.name for entry in flat.table}


def test_gradients_use_the_same_places_as_parameters() -> None:
    """A gradient vector has its value where the parameter has its own, and zero where there is no gradient."""
    network = nn.ModuleDict({"b": nn.Linear(2, 1, bias=False), "a": nn.Linear(1, 1, bias=False)})
    flat = FlatParameters(network)
    network["b"].weight.grad = torch.tensor([[3.0, 4.0]])  # type: ignore[union-attr]
    assert flat.read_gradients(network).tolist() == [0.0, 3.0, 4.0]


def test_frozen_parameters_dont_travel() -> None:
    """Only what is trained is in the vector."""
    network = nn.Linear(2, 2)
    network.bias.requires_grad_(False)
    assert [entry.name for entry in FlatParameters(network).table] == ["weight"]


@pytest.mark.parametrize("wrong", [np.zeros(3, np.float32), np.zeros(4, np.float64)])
def test_a_vector_of_the_wrong_shape_is_refused(wrong: Any) -> None:
    """A vector for another model doesn't get in."""
    network = nn.Linear(2, 2, bias=False)
    with pytest.raises(DataInvalid, match="doesn't fit"):
        FlatParameters(network).write(network, wrong)


def test_a_model_with_running_statistics_is_refused() -> None:
    """Training changes such buffers and no update carries them."""
    with pytest.raises(DataInvalid, match="running_mean"):
        FlatParameters(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)))


def test_buffers_that_arent_saved_are_no_obstacle() -> None:
    """Rotary tables and the like follow from the configuration."""
    network = build_model(model(LLAMA))
    assert "model.rotary_emb.inv_freq" in dict(network.named_buffers())
    assert FlatParameters(network).size == count_parameters(LLAMA)
