"""Any causal language model of transformers is trained from scratch by its configuration, made to fit the data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from peer.architectures import check_positions, fitted, read_config
from peer.checking import problems_of
from peer.model import build_model, check_parameters, count_parameters, experts_of, flops_per_token, initial_theta, skeleton
from peer.trainer import Trainer
from swarm.errors import DataInvalid
from swarm.manifest import Manifest, Model

VOCABULARY, END, LENGTH = 257, 256, 32
SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 64,
}
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64}
LATENT = {"kv_lora_rank": 8, "q_lora_rank": None, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 16}
DEEPSEEK = {**SMALL, **LATENT, "num_key_value_heads": 2, "moe_intermediate_size": 16, "first_k_dense_replace": 1, "head_dim": 8}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": SMALL,
    "mistral": SMALL,
    "qwen2": SMALL,
    "qwen3": SMALL,
    "gemma": SMALL,
    "gemma2": SMALL,
    "gemma3_text": SMALL,
    "phi3": SMALL,
    "olmo2": SMALL,
    "smollm3": SMALL,
    "gpt2": GPT,
    "gpt_neox": SMALL,
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 2},
    "opt": {**SMALL, "ffn_dim": 48, "word_embed_proj_dim": 32},
    "mixtral": {**SMALL, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {**SMALL, "moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2},
    "olmoe": {**SMALL, "num_experts": 4, "num_experts_per_tok": 2},
    "granitemoe": {**SMALL, "num_local_experts": 4, "num_experts_per_tok": 2},
    "deepseek_v2": {**DEEPSEEK, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1},
    "mamba": {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
}
MIXTURES = [kind for kind, config in CONFIGS.items() if "num_experts_per_tok" in config]
PUBLISHED = {
    "architectures": ["SomethingForCausalLM"],
    "auto_map": {"AutoConfig": "configuration.Something"},
    "quantization_config": {"quant_method": "fp8"},
    "torch_dtype": "bfloat16",
    "transformers_version": "4.40.0",
    "_name_or_path": "somebody/something",
    "use_cache": True,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008],
    "pad_token_id": 128004,
}
"""What configurations on a hub say besides."""


def fitting(kind: str) -> dict[str, Any]:
    return fitted({"model_type": kind, **CONFIGS[kind]}, VOCABULARY, END)[0]


def run_of(small_run: Any, kind: str) -> Any:
    run, config = small_run("sync"), fitting(kind)
    model = {"config": config, "parameters": count_parameters(config)}
    return type(run)(run.directory, Manifest.model_validate(run.manifest.model_dump(mode="json") | {"model": model}))


@pytest.mark.parametrize("kind", list(CONFIGS))
def test_an_architecture_is_built_counted_and_trained(small_run: Any, kind: str) -> None:
    """By configuration alone: it has the data's tokens, sees only what is before, and a round's step makes its loss smaller."""
    run = run_of(small_run, kind)
    assert problems_of(run.manifest, run.directory) == []
    assert flops_per_token(run.manifest.model.config, LENGTH) > 0
    network: Any = build_model(run.manifest.model).eval()
    ids = torch.arange(8)[None]
    with torch.no_grad():
        before, after = (network(input_ids=torch.cat((ids, last), dim=1)).logits for last in (ids[:, :1], ids[:, 5:6]))
    assert before.shape[-1] == VOCABULARY
    assert torch.allclose(before[:, :-1], after[:, :-1], atol=1e-5)
    trainer, theta = (
        Trainer.open(run.manifest, torch.device("cpu"), run.directory, micro_batch=4),
        initial_theta(run.manifest.model),
    )
    made = trainer.train_round(theta, 1, "peer", 8, 0)
    assert made.error is None
    step = np.float32(0.1 / np.linalg.norm(made.update))
    assert trainer.evaluate(theta - step * made.update, 20) < trainer.evaluate(theta, 20)


@pytest.mark.parametrize("kind", MIXTURES)
def test_only_visited_experts_count(kind: str) -> None:
    """Where a token visits all four instead of two the FLOPs grow by 6 for each weight of two experts; parameters stay."""
    config = fitting(kind)
    assert experts_of(skeleton(config).config) == (4, 2)
    everything = {**config, "num_experts_per_tok": 4}
    assert count_parameters(everything) == count_parameters(config)
    expert, layers = {"deepseek_v2": (3 * 32 * 16, 1), "qwen3_moe": (3 * 32 * 16, 2)}.get(kind, (3 * 32 * 48, 2))
    assert flops_per_token(everything, LENGTH) - flops_per_token(config, LENGTH) == 6 * 2 * expert * layers


def test_a_published_configuration_is_made_to_fit(tmp_path: Path) -> None:
    """What describes a checkpoint is left out, code of others first of all; ids are the tokenizer's, and what changed is told."""
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"model_type": "llama", "vocab_size": 300, **SMALL, **PUBLISHED}))
    config, told = fitted(read_config(path), VOCABULARY, END)
    assert set(config) == {"model_type", "vocab_size", "bos_token_id", "eos_token_id", *SMALL}
    assert (config["vocab_size"], config["bos_token_id"], config["eos_token_id"]) == (300, END, END)
    assert [line.split()[0] for line in told] == ["bos_token_id", "eos_token_id", "pad_token_id"]
    check_parameters(Model(config=config, parameters=count_parameters(config)))


def test_a_default_that_no_tokenizer_has_is_left_out() -> None:
    """Phi-3 fills up with token 32,000 unless told otherwise."""
    assert fitting("phi3")["pad_token_id"] is None


def test_a_vocabulary_smaller_than_the_tokenizers_is_refused() -> None:
    """Larger is fine, and left out it is the tokenizer's."""
    with pytest.raises(DataInvalid, match="the tokenizer has 257 tokens, the model's vocab_size is 256"):
        fitted({"model_type": "llama", "vocab_size": 256}, VOCABULARY, END)
    assert fitting("qwen3")["vocab_size"] == VOCABULARY


@pytest.mark.parametrize(
    ("kind", "meant"),
    [("lama", "llama"), ("qwen-3", "qwen3"), ("Mixtral", "mixtral"), ("t5", "model_type"), ("xlnet", "model_type")],
)
def test_an_unknown_architecture_is_named_with_a_hint(kind: str, meant: str) -> None:
    """By those that are called nearly so, or what a name is."""
    with pytest.raises(DataInvalid, match=f"can't build a '{kind}' model") as raised:
        fitted({"model_type": kind}, VOCABULARY, END)
    assert meant in raised.value.message + raised.value.hint
    with pytest.raises(DataInvalid, match="no causal language model"):
        count_parameters({"model_type": kind})


@pytest.mark.parametrize("kind", ["bert", "roberta", "electra"])
def test_a_model_that_looks_ahead_is_refused(kind: str) -> None:
    """Its loss would fall to nothing, as it sees what it is to tell; made a decoder it is welcome."""
    config = fitted({"model_type": kind, **SMALL}, VOCABULARY, END)[0]
    with pytest.raises(DataInvalid, match="sees the tokens that it is to tell") as raised:
        count_parameters(config)
    assert "is_decoder" in raised.value.hint
    assert count_parameters({**config, "is_decoder": True}) > 0


def test_samples_longer_than_the_model_are_refused(small_run: Any) -> None:
    """When a run is made, and by `swarm run validate`."""
    config = {**fitting("gpt2"), "n_positions": 16}
    with pytest.raises(DataInvalid, match="samples have 32 tokens, the model has positions for 16"):
        check_positions(skeleton(config).config, LENGTH)
    run = small_run()
    model = {"config": config, "parameters": count_parameters(config)}
    manifest = Manifest.model_validate(run.manifest.model_dump(mode="json") | {"model": model})
    assert [problem.split(",")[0] for problem in problems_of(manifest, None)] == ["samples have 32 tokens"]


@pytest.mark.parametrize("text", ["", "[]", '{"hidden_size": 4}', '{"model_type": 5}', "[" * 100_000, "\x00"])
def test_what_is_no_configuration_is_refused(tmp_path: Path, text: str) -> None:
    """With what to name instead."""
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(DataInvalid) as raised:
        read_config(path)
    assert "config.json" in raised.value.hint
    with pytest.raises(DataInvalid, match="can't be read"):
        read_config(tmp_path / "missing.json")


def test_a_model_with_statistics_is_refused_before_the_first_round() -> None:
    """DeepSeek-V3 moves its router's bias beside the gradients; `swarm run validate` says so."""
    config = fitted(
        {"model_type": "deepseek_v3", **DEEPSEEK, "n_routed_experts": 4, "n_group": 1, "topk_group": 1}, VOCABULARY, END
    )[0]
    with pytest.raises(DataInvalid, match="outside its parameters"):
        check_parameters(Model(config=config, parameters=count_parameters(config)))
