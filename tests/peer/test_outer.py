"""The outer step: the same bits on every machine."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peer.outer import OuterState, apply, buffer_names, initial_state
from swarm.errors import SwarmError
from swarm.manifest import AdamW, DiLoCo, Generate, Outer, Schedule, Sync

FLAT = Schedule(total_tokens=1 << 40, final_fraction=1.0)
SYNC = Sync(batch_samples=8, schedule=FLAT, optimizer=AdamW(lr=0.01, weight_decay=0.1))
SIZE = 1000


def diloco(lr: float = 1.0, momentum: float = 0.0) -> DiLoCo:
    return DiLoCo(inner_steps=1, batch_samples=1, schedule=FLAT, outer=Outer(lr=lr, momentum=momentum))


def vector(seed: int, size: int = SIZE, scale: float = 1.0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(size) * scale).astype(np.float32)


def test_plain_averaging_subtracts_the_update() -> None:
    """With rate 1 and no momentum peers average their parameters, and keep no buffer."""
    state = initial_state(diloco(), vector(0))
    after = apply(diloco(), state, vector(1), tokens=64)
    assert np.array_equal(after.theta, vector(0) - vector(1))
    assert (after.round, after.step, after.tokens, dict(after.buffers)) == (1, 1, 64, {})


def test_outer_momentum_is_nesterov() -> None:
    """Three steps equal torch's SGD with Nesterov momentum."""
    strategy = diloco(lr=0.7, momentum=0.9)
    state = initial_state(strategy, vector(0))
    parameter = torch.nn.Parameter(torch.from_numpy(vector(0)))
    optimizer = torch.optim.SGD([parameter], lr=0.7, momentum=0.9, nesterov=True)
    for seed in (1, 2, 3):
        state = apply(strategy, state, vector(seed), tokens=1)
        parameter.grad = torch.from_numpy(vector(seed))
        optimizer.step()
    assert np.allclose(state.theta, parameter.detach().numpy(), rtol=1e-5, atol=1e-6)


def test_sync_is_adamw_on_the_clipped_gradient() -> None:
    """Five steps equal torch's AdamW with clipping by the global norm."""
    state = initial_state(SYNC, vector(0))
    parameter = torch.nn.Parameter(torch.from_numpy(vector(0)))
    optimizer = torch.optim.AdamW([parameter], lr=0.01, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    for seed in range(1, 6):
        gradient = vector(seed, scale=10.0 ** (seed - 4))
        state = apply(SYNC, state, gradient, tokens=256)
        parameter.grad = torch.from_numpy(gradient.copy())
        torch.nn.utils.clip_grad_norm_([parameter], 1.0)
        optimizer.step()
    assert np.allclose(state.theta, parameter.detach().numpy(), rtol=1e-5, atol=1e-6)
    assert (state.round, state.step, state.tokens) == (5, 5, 5 * 256)
    assert math.isclose(state.beta1_power, 0.9**5)


def test_sync_follows_the_schedule_of_tokens() -> None:
    """Half-way through the warm-up the step is half as long, weight decay included."""
    slow = SYNC.model_copy(update={"schedule": Schedule(warmup_tokens=200, total_tokens=1 << 40, final_fraction=1.0)})
    theta = vector(0)
    full = apply(SYNC, initial_state(SYNC, theta), vector(1), tokens=100).theta - theta
    half = apply(slow, initial_state(slow, theta), vector(1), tokens=100).theta - theta
    assert np.allclose(half, full / 2, atol=1e-6)


@pytest.mark.parametrize("strategy", [SYNC, diloco(), diloco(0.7, 0.9)], ids=["sync", "averaging", "nesterov"])
@given(block=st.integers(1, 1500), threads=st.integers(1, 4))
@settings(max_examples=15, deadline=None)
def test_the_outcome_depends_neither_on_blocks_nor_on_threads(strategy: Sync | DiLoCo, block: int, threads: int) -> None:
    """The same bits come out however the work is cut."""
    state = apply(strategy, initial_state(strategy, vector(0)), vector(1), tokens=1)
    expected = apply(strategy, state, vector(2), tokens=1)
    found = apply(strategy, state, vector(2), tokens=1, threads=threads, block_values=block)
    assert all(np.array_equal(left, right) for (_, left), (_, right) in zip(expected.arrays(), found.arrays(), strict=True))


def test_sync_is_the_documented_order_of_float32_operations() -> None:
    """One AdamW step in plain float32 scalars gives the same bits."""
    f = np.float32
    theta, gradient = vector(0, 50), vector(1, 50, scale=0.01)
    state = apply(SYNC, initial_state(SYNC, theta), gradient, tokens=1)
    for position in range(50):
        first = f(0) * f(0.9) + gradient[position] * f(1 - 0.9)
        second = f(0) * f(0.95) + gradient[position] * gradient[position] * f(1 - 0.95)
        direction = first / f(1 - 0.9) / (np.sqrt(second / f(1 - 0.95)) + f(1e-8))
        expected = (theta[position] - theta[position] * f(0.01 * 0.1)) - direction * f(0.01)
        assert state.theta[position] == expected


def test_the_old_state_is_left_alone() -> None:
    """A snapshot of the round before goes on being served."""
    state = initial_state(SYNC, vector(0))
    merged = vector(1)
    apply(SYNC, state, merged, tokens=1)
    assert np.array_equal(state.theta, vector(0))
    assert np.array_equal(merged, vector(1))
    with pytest.raises(ValueError, match="read-only"):
        state.theta[0] = 1


def test_arrays_have_a_fixed_order() -> None:
    """Theta first, then the buffers by name, as the strategy lists them."""
    names = [name for name, _ in initial_state(SYNC, vector(0)).arrays()]
    assert names == ["theta", *buffer_names(SYNC)] == ["theta", "first_moment", "second_moment"]
    assert buffer_names(diloco(momentum=0.5)) == ("momentum",)
    assert buffer_names(diloco()) == ()


def test_a_state_of_uneven_arrays_cant_be_made() -> None:
    """Buffers are as long as theta."""
    with pytest.raises(ValueError, match="one length"):
        OuterState(vector(0), {"momentum": vector(0, 5)})


@pytest.mark.parametrize("wrong", [np.zeros(3, np.float32), np.zeros(SIZE)])
def test_an_update_of_another_shape_isnt_applied(wrong: np.ndarray) -> None:
    """A programming error shows at once."""
    with pytest.raises(ValueError, match="update of"):
        apply(diloco(), initial_state(diloco(), vector(0)), wrong, tokens=1)


def test_a_process_that_flushes_subnormal_numbers_is_stopped() -> None:
    """Such a process would drift away from all others, so it says so instead."""
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor can't flush subnormal numbers")
    try:
        with pytest.raises(SwarmError, match="flushes subnormal"):
            apply(diloco(), initial_state(diloco(), vector(0)), vector(1), tokens=1)
    finally:
        torch.set_flush_denormal(False)


def test_where_nothing_is_trained_the_state_stays() -> None:
    """Only rounds and tokens are counted, whatever was sent."""
    strategy = Generate(batch_samples=8)
    after = apply(strategy, initial_state(strategy, np.zeros(1, np.float32)), np.array([7], np.float32), 40)
    assert (after.theta.tolist(), after.round, after.tokens, after.buffers) == ([0.0], 1, 40, {})
