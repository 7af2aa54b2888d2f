"""Mixtures of experts are trained with the loss that keeps their load even."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from peer.codec import Codec, decode, encode, make_codec
from peer.codec.feedback import ErrorFeedback
from peer.codec.sparse import CHUNK_VALUES, Sparse
from peer.experts import routes_of
from peer.model import count_parameters, initial_theta
from peer.routing import ExpertLoad
from peer.sketch import Sketcher
from peer.trainer import Trainer
from swarm.manifest import Codec as CodecSettings
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
    found, visits = routes_of(layers, 3, CHOSEN)
    assert visits.sum(dim=1).tolist() == [3 * 10 * CHOSEN] * 2
    for sample in range(3):
        alone = tuple(layer[sample * 10 : (sample + 1) * 10] for layer in layers)
        assert found[sample] == pytest.approx(float(load_balancing_loss_func(alone, EXPERTS, CHOSEN)), rel=1e-5)


def test_an_even_load_costs_least() -> None:
    """As much as a token visits; all tokens at the same experts cost more."""
    even = torch.eye(EXPERTS).repeat(8, 1) * 20
    same = torch.tensor([[20.0, 0, 0, 0]]).repeat(32, 1)
    assert float(routes_of([even], 1, 1)[0]) == pytest.approx(1.0, rel=1e-4)
    assert float(routes_of([same], 1, 1)[0]) == pytest.approx(EXPERTS, rel=1e-4)


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


def visits_of(load: ExpertLoad | None) -> tuple[int, int]:
    """How many experts were unused, and of how many."""
    assert load is not None
    assert load.busiest >= 1 >= load.idlest >= 0
    return load.unused, load.experts


@pytest.mark.parametrize("coefficient", [0.0, 0.5])
def test_a_round_tells_how_experts_were_used(small_run: Any, coefficient: float) -> None:
    """With and without the balance loss; a model without experts has nothing to tell."""
    run = run_of(small_run, "mixtral", coefficient)
    done = trainer_of(run).train_round(initial_theta(run.manifest.model), 1, "peer", 8, 0)
    assert visits_of(done.experts) == (0, 2 * EXPERTS)
    plain = small_run()
    trained = Trainer.open(plain.manifest, torch.device("cpu"), plain.directory, micro_batch=4)
    assert trained.train_round(initial_theta(plain.manifest.model), 1, "peer", 8, 0).experts is None


FRUGAL = {"inner": {"kind": "adamw", "lr": 1e-2, "weight_decay": 0.0}, "inner_state": "fresh"}


@pytest.mark.parametrize(("strategy", "changes"), [("sync", {}), ("diloco", FRUGAL)])
def test_unused_experts_cost_no_traffic(small_run: Any, strategy: str, changes: dict[str, Any]) -> None:
    """A router that sends all tokens to two experts of four: of the others a round's update has a bit per chunk.

    What is left is all that the same model would send without those two.
    """
    run = run_of(small_run, "mixtral", 0.0, strategy=strategy, **changes)
    wide = {**run.manifest.model.config, "num_experts_per_tok": 1, "hidden_size": 64, "intermediate_size": 64}
    model = run.manifest.model.model_copy(update={"config": wide, "parameters": count_parameters(wide)})
    run = type(run)(run.directory, run.manifest.model_copy(update={"model": model}))
    flat = trainer_of(run).parameters
    theta = initial_theta(model)
    for entry in flat.table:
        if entry.name.endswith(".gate.weight"):  # [experts, inputs]: opposite rows, of which one always is above zero
            rows = theta[entry.offset : entry.offset + entry.size].reshape(entry.shape)
            rows[1:] = [-rows[0] * 100, np.zeros_like(rows[0]), np.zeros_like(rows[0])]
            rows[0] *= 100
    done = trainer_of(run).train_round(theta, 1, "peer", 8 if strategy == "sync" else 2, 0)
    assert visits_of(done.experts)[0] in range(4, 7)
    experts = [entry for entry in flat.table if ".experts." in entry.name]
    pieces = [done.update[entry.offset : entry.offset + entry.size].reshape(EXPERTS, -1) for entry in experts]
    assert all(not piece[2:].any() for piece in pieces)
    plain, sparing = (_sparse(theta.size, leave_out) for leave_out in (False, True))
    sent, all_of_it = ErrorFeedback(sparing).encode(done.update), encode(plain, done.update)
    assert np.array_equal(decode(sparing, sent), decode(plain, all_of_it))
    empty = sum(not done.update[start : start + CHUNK_VALUES].any() for start in range(0, theta.size, CHUNK_VALUES))
    idle = sum(piece[2:].size for piece in pieces)
    assert empty >= idle / CHUNK_VALUES - len(pieces) >= theta.size / CHUNK_VALUES / 6  # a chunk at each end of them isn't theirs
    per_chunk = (Sparse(1 << 14, 1 << 14).part_size_limit(0) - 4) / 4
    saved = sum(map(len, all_of_it)) - sum(map(len, sent))
    assert saved == pytest.approx(empty * per_chunk, abs=4 * sparing.part_count)


def _sparse(size: int, leave_out_zeros: bool) -> Codec:
    return make_codec(CodecSettings(kind="sparse", part_values=1 << 14, leave_out_zeros=leave_out_zeros), size)


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
