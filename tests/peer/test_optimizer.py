"""Inner optimizers and the schedule."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from peer.model import build_model, count_parameters
from peer.optimizer import MuonOnProcessor, hidden_matrices, lr_factor, make_inner
from swarm.manifest import AdamW, Model, Muon, Schedule

SCHEDULE = Schedule(warmup_tokens=100, total_tokens=1100, final_fraction=0.1)


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [(0, 0.0), (50, 0.5), (100, 1.0), (350, 0.868198), (600, 0.55), (1100, 0.1), (5000, 0.1)],
)
def test_the_rate_warms_up_and_follows_a_cosine(tokens: int, expected: float) -> None:
    """Linear to 1, then down to the final fraction, and it stays there."""
    assert lr_factor(SCHEDULE, tokens) == expected


def test_without_warm_up_the_rate_starts_full() -> None:
    """No warm-up means no step at rate zero."""
    assert lr_factor(Schedule(total_tokens=10), 0) == 1.0


@given(st.integers(0, 10_000), st.integers(0, 2000), st.integers(1, 5000), st.floats(0, 1))
@settings(max_examples=100, deadline=None)
def test_the_factor_is_in_range_with_six_digits(tokens: int, warmup: int, total: int, final: float) -> None:
    """Machines whose cosines differ in the last bit agree on the factor."""
    factor = lr_factor(Schedule(warmup_tokens=warmup, total_tokens=total, final_fraction=final), tokens)
    assert 0 <= factor <= 1
    assert float(f"{factor:.6g}") == factor


@pytest.fixture(scope="module")
def network() -> Any:
    config = {
        "model_type": "llama",
        "vocab_size": 257,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "tie_word_embeddings": False,
    }
    return build_model(Model(config=config, parameters=count_parameters(config)))


def test_muon_gets_the_hidden_matrices_only(network: Any) -> None:
    """Embeddings, the output head and norms stay with AdamW, and every parameter has exactly one optimizer."""
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    chosen = {names[id(parameter)] for parameter in hidden_matrices(network)}
    assert len(chosen) == 2 * 7
    assert not any("embed" in name or "lm_head" in name or "norm" in name for name in chosen)
    inner = make_inner(Muon(), network)
    covered = [id(parameter) for part in inner.parts for group in part.param_groups for parameter in group["params"]]
    assert sorted(covered) == sorted(names)
    assert [type(part).__name__ for part in inner.parts] == ["MuonOnProcessor", "AdamW"]


def test_adamw_takes_everything(network: Any) -> None:
    """With AdamW there is one optimizer with the manifest's settings."""
    (part,) = make_inner(AdamW(lr=0.5, beta1=0.8, beta2=0.7, epsilon=1e-3, weight_decay=0.25), network).parts
    group = part.param_groups[0]
    assert len(group["params"]) == len(list(network.parameters()))
    assert (group["lr"], group["betas"], group["eps"], group["weight_decay"]) == (0.5, (0.8, 0.7), 1e-3, 0.25)


class Head(nn.Module):
    """Two linear layers, the second being the output head."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Linear(64, 16, bias=False)
        self.head = nn.Linear(16, 4, bias=False)

    def get_output_embeddings(self) -> nn.Module:
        return self.head


def test_a_muon_update_has_adamws_size() -> None:
    """An orthogonal update x 0.2 sqrt(larger side) has a root mean square near 0.2 x the rate (2502.16982)."""
    torch.manual_seed(0)
    network = Head()
    inner = make_inner(Muon(lr=0.1, weight_decay=0.0), network)
    before = network.hidden.weight.detach().clone()
    network.hidden.weight.grad = torch.randn(16, 64)
    network.head.weight.grad = torch.randn(4, 16)
    inner.set_factor(0.5)
    inner.parts[0].step()
    change = (network.hidden.weight.detach() - before).square().mean().sqrt().item()
    assert change == pytest.approx(0.2 * 0.1 * 0.5, rel=0.25)


def test_the_factor_scales_each_rate_from_the_manifests(network: Any) -> None:
    """Setting a factor twice doesn't compound."""
    inner = make_inner(Muon(lr=0.1, adamw=AdamW(lr=0.01)), network)
    inner.set_factor(0.5)
    inner.set_factor(0.25)
    assert [part.param_groups[0]["lr"] for part in inner.parts] == pytest.approx([0.025, 0.0025])


def test_a_state_moves_to_the_host_and_back() -> None:
    """A copied state gives the same next step as the original."""
    torch.manual_seed(0)
    first, second = Head(), Head()
    second.load_state_dict(first.state_dict())
    gradient = torch.randn(16, 64)
    one, two = make_inner(AdamW(), first), make_inner(AdamW(), second)
    for network, inner in ((first, one), (second, two)):
        network.hidden.weight.grad = gradient.clone()
        for part in inner.parts:
            part.step()
    replacement = make_inner(AdamW(), second)
    replacement.load_state(two.state())
    for part in (*one.parts, *replacement.parts):
        part.step()
    assert torch.equal(first.hidden.weight, second.hidden.weight)


@pytest.mark.parametrize("shape", [(24, 24), (64, 24), (24, 64)])
def test_on_a_processor_muon_is_torchs_in_fp32(shape: tuple[int, int]) -> None:
    """Step after step, but for what bf16 rounds: momentum, weight decay and the size of an update are the same."""
    torch.manual_seed(0)
    start = torch.randn(shape)
    ours, torchs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    settings = {"lr": 0.02, "momentum": 0.9, "weight_decay": 0.1, "adjust_lr_fn": "match_rms_adamw"}
    mine, reference = MuonOnProcessor([ours], **settings), torch.optim.Muon([torchs], **settings)
    for _ in range(5):
        gradient = torch.randn(shape)
        for parameter, optimizer in ((ours, mine), (torchs, reference)):
            parameter.grad = gradient.clone()
            optimizer.step()
    moved = torch.linalg.norm(torchs.detach() - start)
    assert torch.linalg.norm(ours.detach() - torchs.detach()) < 0.02 * moved
    assert mine.state[ours].keys() == reference.state[torchs].keys()
