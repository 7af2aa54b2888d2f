"""Mixtures of experts are trained with the loss that keeps their load even."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from peer.experts import balance_losses
from peer.model import count_parameters, initial_theta
from peer.sketch import Sketcher
from peer.trainer import Trainer
from swarm.manifest import Manifest
from tests.peer.conftest import CONFIGS

EXPERTS, CHOSEN = 4, 2
MIXTURES = {
    "mixtral": {"num_local_experts": EXPERTS},
    "qwen3_moe": {"num_experts": EXPERTS, "moe_intermediate_size": 16, "head_dim": 16},
    "olmoe": {"num_experts": EXPERTS, "pad_token_id": 0, "eos_token_id": 256},
}


def run_of(small_run: Any, kind: str, coefficient: float, **changes: Any) -> Any:
    run = small_run(**changes)
    config = {**CONFIGS["llama"], "model_type": kind, "num_experts_per_tok": CHOSEN, **MIXTURES[kind]}
    config["router_aux_loss_coef"] = coefficient
    model = {"config": config, "parameters": count_parameters(config)}
    return type(run)(run.directory, Manifest.model_validate(run.manifest.model_dump(mode="json") | {"model": model}))


def trainer_of(run: Any, micro_batch: int = 4) -> Trainer:
    return Trainer.open(run.manifest, torch.device("cpu"), run.directory, micro_batch=micro_batch)


def test_a_samples_balance_is_that_of_transformers() -> None:
    """Of a micro-batch of this sample alone; all layers together."""
    torch.manual_seed(0)
    layers = [torch.randn(3 * 10, EXPERTS) for _ in range(2)]
    found = balance_losses(layers, 3, CHOSEN)
    for sample in range(3):
        alone = tuple(layer[sample * 10 : (sample + 1) * 10] for layer in layers)
        assert found[sample] == pytest.approx(float(load_balancing_loss_func(alone, EXPERTS, CHOSEN)), rel=1e-5)


def test_an_even_load_costs_least() -> None:
    """As much as a token visits; all tokens at the same experts cost more."""
    even = torch.eye(EXPERTS).repeat(8, 1) * 20
    same = torch.tensor([[20.0, 0, 0, 0]]).repeat(32, 1)
    assert float(balance_losses([even], 1, 1)) == pytest.approx(1.0, rel=1e-4)
    assert float(balance_losses([same], 1, 1)) == pytest.approx(EXPERTS, rel=1e-4)


@pytest.mark.parametrize("kind", list(MIXTURES))
def test_the_balance_is_trained_and_not_evaluated(small_run: Any, kind: str) -> None:
    """With a coefficient the gradient is another one and the loss higher by coefficient x visits; the held-out loss isn't."""
    plain, kept = (run_of(small_run, kind, coefficient) for coefficient in (0.0, 0.5))
    theta = initial_theta(plain.manifest.model)
    assert np.array_equal(theta, initial_theta(kept.manifest.model))
    updates = [trainer_of(run).train_round(theta, 1, "peer", 4, 0) for run in (plain, kept)]
    assert updates[1].loss_mean - updates[0].loss_mean == pytest.approx(0.5 * CHOSEN, rel=0.2)
    assert not np.allclose(updates[0].update, updates[1].update, atol=1e-6)
    assert trainer_of(plain).evaluate(theta) == trainer_of(kept).evaluate(theta)


def test_micro_batches_of_any_size_give_the_same_gradient(small_run: Any) -> None:
    """As the balance is that of each sample; so others can compute it again."""
    run = run_of(small_run, "mixtral", 0.5, strategy="sync")
    theta = initial_theta(run.manifest.model)
    one, four = (trainer_of(run, size).train_round(theta, 1, "peer", 8, 0).update for size in (1, 4))
    assert np.allclose(one, four, atol=1e-6)
    sketcher = Sketcher(b"\x01" * 32, theta.size)
    done = trainer_of(run, 4).train_round(theta, 1, "peer", 8, 0, sketcher=sketcher)
    again = trainer_of(run, 1).replay(theta, 1, "peer", 0, [leaf.samples for leaf in done.leaves], 0, sketcher)
    assert again is not None
    assert np.allclose(again[0].sketch, done.leaves[0].sketch, atol=1e-5)
