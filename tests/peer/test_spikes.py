"""Rounds whose loss jumps change nothing, and no peer alone can make or unmake one."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peer.outer import OuterState, advance, apply, initial_state
from peer.spikes import Recent, bound, is_spike, weighted_median
from swarm.manifest import DiLoCo, Outer, Schedule, SkipSpikes, Sync

RULE = SkipSpikes(window=8)
FLAT = Schedule(total_tokens=1 << 40, final_fraction=1.0)
DILOCO = DiLoCo(inner_steps=1, batch_samples=1, schedule=FLAT, outer=Outer(momentum=0.9), skip_spikes=RULE)
SYNC = Sync(batch_samples=8, schedule=FLAT, skip_spikes=RULE)
QUIET = Recent((2.5, 2.4, 2.45, 2.4, 2.35, 2.4, 2.3, 2.35), (1.0, 1.1, 0.9, 1.0, 1.05, 1.0, 0.95, 1.0))
LOSSES = st.floats(0, 20)


def vector(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(1000).astype(np.float32)


@given(st.lists(st.tuples(LOSSES, st.integers(1, 100)), min_size=1), st.floats(allow_nan=False, allow_infinity=False), st.data())
def test_a_minority_of_the_weight_moves_a_rounds_loss_only_within_the_others(
    honest: list[tuple[float, int]], lie: float, data: st.DataObject
) -> None:
    """Whatever a liar with less than half of the weight says, the loss is between those of the honest."""
    total = sum(weight for _, weight in honest)
    weight = data.draw(st.integers(0, total - 1))
    found = weighted_median([*honest, (lie, weight)])
    assert min(honest)[0] <= found <= max(honest)[0]


@given(st.lists(st.tuples(LOSSES, st.integers(1, 5)), min_size=1), st.randoms())
def test_the_weighted_median_is_that_of_as_many_equal_values(values: list[tuple[float, int]], random: object) -> None:
    """A weight counts like so many contributors of one; the order of the commits doesn't matter."""
    spread = sorted(value for value, weight in values for _ in range(weight))
    random.shuffle(values)  # type: ignore[attr-defined]
    assert weighted_median(values) == spread[(len(spread) - 1) // 2]


@pytest.mark.parametrize("values", [[], [(2.0, 0)]])
def test_nobodys_loss_is_no_loss(values: list[tuple[float, int]]) -> None:
    """Without any weight there is no median."""
    with pytest.raises(ValueError, match="weight"):
        weighted_median(values)


@given(st.lists(LOSSES, min_size=3, max_size=64), st.floats(1, 10), st.floats(0.1, 10))
def test_the_bound_is_above_the_median_and_follows_the_scale(values: list[float], deviations: float, scale: float) -> None:
    """In other units the bound is the same, and it is never below the median."""
    limit = bound(values, deviations)
    assert limit >= sorted(values)[(len(values) - 1) // 2]
    assert bound([scale * value for value in values], deviations) == pytest.approx(scale * limit, rel=1e-9, abs=1e-9)


def test_spikes_among_the_rounds_before_hide_none() -> None:
    """Three spikes in a window of eight widen the bound by little."""
    disturbed = Recent((*QUIET.losses[:5], 9.0, 9.0, 9.0), QUIET.norms, 3)
    assert is_spike(RULE, disturbed, 9.0, 1.0)
    assert not is_spike(RULE, disturbed, 2.5, 1.0)


@pytest.mark.parametrize(
    ("loss", "norm", "expected"),
    [
        (2.5, 1.0, False),
        (2.6, 1.0, False),
        (4.0, 1.0, True),
        (4.0, 0.1, True),
        (2.4, 100.0, False),
        (2.7, 1.0, False),
        (2.7, 100.0, True),
        (2.4, math.inf, True),
        (2.4, math.nan, True),
    ],
)
def test_the_loss_decides_and_the_norm_sharpens(loss: float, norm: float, expected: bool) -> None:
    """A high loss is a spike; a large update makes one of half as high a loss, and none of a usual one."""
    assert is_spike(RULE, QUIET, loss, norm) is expected


def test_nothing_is_skipped_before_there_is_anything_to_compare_with() -> None:
    """Half of the window must be there: the first rounds of a run jump about."""
    assert not is_spike(RULE, Recent((2.0,) * 3, (1.0,) * 3), 100.0, 1.0)
    assert is_spike(RULE, Recent((2.0,) * 4, (1.0,) * 4), 100.0, 1.0)


@settings(max_examples=50)
@given(st.integers(4, 40), st.floats(1.0, 3.0), st.floats(3.5, 1e6), st.integers(8, 64))
def test_a_level_that_stays_is_usual_after_half_a_window(before: int, usual: float, level: float, window: int) -> None:
    """Skipped rounds enter the window too, so that a run whose data have changed isn't stopped for ever."""
    rule, recent = SkipSpikes(window=window), Recent()
    for _ in range(max(before, window // 2)):
        recent = recent.after(rule, usual, 1.0)
    assert recent.skipped == 0
    half = -(-window // 2)
    for _ in range(half + 1):
        recent = recent.after(rule, level, 1.0)
    assert 0 < recent.skipped <= half
    assert not is_spike(rule, recent, level, 1.0)


@given(st.lists(st.tuples(LOSSES, st.floats(0, 1e6) | st.just(math.inf)), max_size=40))
def test_what_is_agreed_stays_finite_and_within_the_window(rounds: list[tuple[float, float]]) -> None:
    """Both figures are kept of the same rounds, at most of the window's; the count never falls."""
    recent = Recent()
    for loss, norm in rounds:
        after = recent.after(RULE, loss, norm)
        assert len(after.losses) == len(after.norms) <= RULE.window
        assert all(map(math.isfinite, (*after.losses, *after.norms)))
        assert after.skipped - recent.skipped == is_spike(RULE, recent, loss, norm)
        recent = after


@pytest.mark.parametrize("strategy", [DILOCO, SYNC])
def test_a_skipped_round_leaves_weights_and_buffers_and_counts(strategy: DiLoCo | Sync) -> None:
    """Round and tokens go on, as the data are used up; the next ordinary round steps from the weights before."""
    state = replace(initial_state(strategy, vector(0)), recent=QUIET)
    after = advance(strategy, state, vector(1), 64, 9.0)
    assert after.theta is state.theta
    assert all(after.buffers[name] is array for name, array in state.buffers.items())
    assert (after.round, after.tokens, after.step, after.recent.skipped) == (1, 64, 0, 1)
    following = advance(strategy, after, vector(2), 64, 2.4)
    expected = apply(strategy, after, vector(2), 64)
    assert np.array_equal(following.theta, expected.theta)
    assert (following.round, following.step, following.recent.skipped) == (2, 1, 1)


def test_a_run_that_skips_nothing_keeps_no_figures() -> None:
    """Without the setting a state is what it always was, and a round without contributors only counts."""
    plain = DILOCO.model_copy(update={"skip_spikes": None})
    state = initial_state(plain, vector(0))
    after = advance(plain, state, vector(1), 64, 1e9)
    assert (after.recent, after.step) == (Recent(), 1)
    nobody = advance(DILOCO, OuterState(vector(0), recent=QUIET), None, 0, 0.0)
    assert (nobody.recent, nobody.round, nobody.step) == (QUIET, 1, 0)
