"""Merging updates, bit by bit the same everywhere."""

from __future__ import annotations

import importlib
import math
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from peer.merge import (
    BLOCK_VALUES,
    arithmetic_is_ieee,
    centered_clip,
    check_weight,
    clip_scales,
    coordinate_median,
    distance,
    merge_part,
    norm,
    tree_sum,
    weighted_mean,
)
from swarm.errors import Rejected
from swarm.manifest import CenteredClip, Mean

ORACLES = Path(sys.prefix) / "oracles"  # byzfl without what it plots and loads data with, so without its __init__, too

value = st.floats(width=32, allow_nan=False, allow_infinity=False, min_value=-1e6, max_value=1e6)
any_finite = st.floats(width=32, allow_nan=False, allow_infinity=False, max_value=65504 * 2.0**112, min_value=-65504 * 2.0**112)


def group(elements: st.SearchStrategy[float]) -> st.SearchStrategy[tuple[list[np.ndarray], list[int]]]:
    """One to six vectors of one length with weights."""
    return st.tuples(st.integers(1, 6), st.integers(1, 9)).flatmap(
        lambda shape: st.tuples(
            st.lists(arrays(np.float32, shape[1], elements=elements), min_size=shape[0], max_size=shape[0]),
            st.lists(st.integers(0, 1 << 20), min_size=shape[0], max_size=shape[0]),
        )
    )


@given(group(value))
@settings(max_examples=100, deadline=None)
def test_the_mean_is_the_documented_order_of_operations(updates: tuple[list[np.ndarray], list[int]]) -> None:
    """Plain float32 scalars, multiplied and added one after the other, give the same bits."""
    vectors, weights = updates
    total = sum(weights)
    expected = []
    for position in range(vectors[0].size):
        sum_ = np.float32(0)
        for vector, weight in zip(vectors, weights, strict=True):
            product = vector[position] * np.float32(weight / total if total else 0)
            sum_ = sum_ + product
        expected.append(sum_)
    assert weighted_mean(vectors, weights).tolist() == [float(item) for item in expected]


@given(group(any_finite))
@settings(max_examples=100, deadline=None)
def test_finite_updates_give_a_finite_mean(updates: tuple[list[np.ndarray], list[int]]) -> None:
    """No decodable values and weights, however large, make the weights of the model infinite."""
    assert np.isfinite(weighted_mean(*updates)).all()


def test_the_mean_is_near_the_exact_one() -> None:
    """Many values with different weights average to what float64 gives, to float32's accuracy."""
    random = np.random.default_rng(0)
    vectors = [random.standard_normal(3 * BLOCK_VALUES + 7).astype(np.float32) for _ in range(5)]
    weights = [1, 5, 17, 100, 3]
    exact = np.average(np.stack(vectors).astype(np.float64), axis=0, weights=weights)
    assert np.abs(weighted_mean(vectors, weights) - exact).max() < 1e-6


def test_a_span_merges_like_the_whole() -> None:
    """A reducer of one span gets the bits that a peer gets who merges everything."""
    random = np.random.default_rng(1)
    vectors = [random.standard_normal(2 * BLOCK_VALUES).astype(np.float32) for _ in range(3)]
    whole = weighted_mean(vectors, [3, 1, 2])
    span = slice(BLOCK_VALUES - 100, BLOCK_VALUES + 1000)
    assert np.array_equal(weighted_mean([vector[span] for vector in vectors], [3, 1, 2]), whole[span])


def test_an_empty_update_with_weight_zero_changes_nothing() -> None:
    """A joiner takes part without an influence on the mean."""
    vector = np.array([1.5, -2.0], np.float32)
    assert weighted_mean([vector, np.zeros(2, np.float32)], [8, 0]).tolist() == [1.5, -2.0]
    assert weighted_mean([vector, vector], [0, 0]).tolist() == [0.0, 0.0]


def test_scales_multiply_updates() -> None:
    """A clipped update counts with its full weight but a part of its length."""
    vectors = [np.array([8.0], np.float32), np.array([100.0], np.float32)]
    assert weighted_mean(vectors, [1, 1], [1.0, 0.25]).tolist() == [16.5]


def test_mismatched_inputs_are_a_programming_error() -> None:
    """Vectors of different lengths or without weights are never averaged."""
    one, two = np.zeros(1, np.float32), np.zeros(2, np.float32)
    with pytest.raises(ValueError, match="different lengths"):
        weighted_mean([one, two], [1, 1])
    with pytest.raises(ValueError, match="weights"):
        weighted_mean([one], [1, 1])
    with pytest.raises(ValueError, match="weights"):
        weighted_mean([], [])


@pytest.mark.parametrize("weight", [0, 1, 1000])
def test_a_weight_in_range_passes(weight: int) -> None:
    """The limit itself is allowed."""
    assert check_weight(weight, 1000) == weight


@pytest.mark.parametrize("weight", [-1, 1001, 1 << 70, True, 1.0, "1", None])
def test_a_weight_out_of_range_is_rejected(weight: object) -> None:
    """A huge weight would let one peer overrule all others."""
    with pytest.raises(Rejected) as raised:
        check_weight(weight, 1000)  # type: ignore[arg-type]
    assert raised.value.reason == "bad_weight"


def test_an_update_far_longer_than_the_median_is_scaled_down_to_the_limit() -> None:
    """After scaling, no update exceeds ratio x median."""
    assert clip_scales([1.0, 1.2, 0.9, 48.0], ratio=10.0) == [1.0, 1.0, 1.0, 10.0 / 48.0]


def test_of_two_updates_the_larger_doesnt_vouch_for_itself() -> None:
    """The lower median of two is the smaller norm."""
    assert clip_scales([1.0, 1000.0], ratio=10.0) == [1.0, 0.01]


def test_empty_updates_dont_move_the_median() -> None:
    """Many joiners with zero updates don't clip the others to zero."""
    assert clip_scales([0.0, 0.0, 0.0, 5.0], ratio=2.0) == [1.0] * 4
    assert clip_scales([0.0, 0.0], ratio=2.0) == [1.0, 1.0]


@given(st.lists(st.just(0.0) | st.floats(1e-45, 1e43), min_size=1, max_size=9), st.floats(1.5, 100))
@settings(max_examples=100, deadline=None)
def test_clipping_only_ever_shrinks(norms: list[float], ratio: float) -> None:
    """Factors are in (0, 1], and at least half of the updates are left alone."""
    scales = clip_scales(norms, ratio)
    assert all(0 < scale <= 1 for scale in scales)
    assert 2 * scales.count(1.0) >= len(norms)


@given(st.lists(arrays(np.float32, 5, elements=any_finite), min_size=1, max_size=33))
@example([np.full(5, -1e-45, dtype=np.float32)] * 2)
@settings(max_examples=100, deadline=None)
def test_the_median_is_numpys(vectors: list[np.ndarray]) -> None:
    """The sorting network sorts, for every number of rows; zeros come out positive, whichever sign they had."""
    ranked = np.sort(np.stack(vectors).astype(np.float64), axis=0)
    middle = ranked[[(len(vectors) - 1) // 2, len(vectors) // 2]]
    median = coordinate_median(vectors)
    assert np.allclose(median, middle.mean(axis=0), rtol=1e-6, atol=1e-44)
    assert not np.signbit(median[median == 0]).any()


def test_the_median_of_several_blocks() -> None:
    """Each block by itself."""
    vectors = list(np.random.default_rng(0).standard_normal((5, BLOCK_VALUES + 3), dtype=np.float32))
    assert np.array_equal(coordinate_median(vectors), np.median(np.stack(vectors), axis=0))


def updates_like(direction: np.ndarray, count: int, noise: float) -> list[np.ndarray]:
    """What honest peers send: one direction with noise of each its own."""
    drawn = np.random.default_rng(count)
    return [(direction + noise * drawn.standard_normal(direction.size)).astype(np.float32) for _ in range(count)]


DIRECTION = np.random.default_rng(7).standard_normal(3000).astype(np.float32)


def plainly_clipped(vectors: list[np.ndarray], ratio: float, iterations: int) -> np.ndarray:
    """The algorithm as the paper writes it, in float64, from the median on."""
    stacked = np.stack(vectors).astype(np.float64)
    centre = np.median(stacked, axis=0)
    radius = ratio * np.sort(np.linalg.norm(stacked - centre, axis=1))[(len(vectors) - 1) // 2]
    for _ in range(iterations):
        away = stacked - centre
        centre = centre + (away * np.minimum(1, radius / np.linalg.norm(away, axis=1))[:, None]).mean(axis=0)
    return np.asarray(centre)


@pytest.mark.parametrize("iterations", [1, 3])
@pytest.mark.parametrize(
    "attack",
    [-DIRECTION, 1000 * DIRECTION, np.zeros_like(DIRECTION), np.full_like(DIRECTION, 3e38)],
    ids=["sign flip", "scaling", "nothing", "huge"],
)
def test_a_minority_moves_the_outcome_by_little(attack: np.ndarray, iterations: int) -> None:
    """Two of eight; it is what the paper's formula says, and near what the honest six would have got."""
    honest = updates_like(DIRECTION, 6, 0.5)
    vectors = [*honest, attack, attack]
    merged = centered_clip(vectors, [1] * 8, 2.0, iterations)
    with np.errstate(over="ignore"):
        expected = plainly_clipped(vectors, 2.0, iterations)
    assert np.allclose(merged, expected, rtol=1e-3, atol=1e-3)
    far = distance(merged, weighted_mean(honest, [1] * 6))
    assert far < 0.75 * norm(DIRECTION)
    assert float(merged @ DIRECTION) > 0.5 * float(DIRECTION @ DIRECTION)


def test_where_nobody_is_far_it_is_the_mean() -> None:
    """To the bit, with any weights: honest peers lose nothing by it."""
    honest = updates_like(DIRECTION, 8, 0.5)
    weights = [3, 1, 4, 1, 5, 9, 2, 6]
    assert np.array_equal(merge_part(honest, weights, CenteredClip()), weighted_mean(honest, weights))


@pytest.mark.parametrize("rule", [Mean(clip_ratio=2.0), CenteredClip()], ids=["mean", "centered_clip"])
def test_what_is_scaled_down_is_told(rule: Mean | CenteredClip) -> None:
    """Once per merge, with the weights: nothing of the honest is taken away, nearly all of what is far off."""
    told: list[tuple[list[int], list[float]]] = []
    vectors, weights = [*updates_like(DIRECTION, 6, 0.5), 1000 * DIRECTION], [3, 1, 4, 1, 5, 9, 2]
    merge_part(vectors, weights, rule, lambda merged, scales: told.append((list(merged), list(scales))))
    ((told_weights, scales),) = told
    assert told_weights == weights
    assert scales[-1] < 0.05
    assert all(scale > 0.5 for scale in scales[:-1])


def test_one_or_two_updates_are_averaged() -> None:
    """Nobody can say which of two is the liar."""
    one, other = updates_like(DIRECTION, 2, 5.0)
    assert np.array_equal(centered_clip([one], [7], 2.0, 3), weighted_mean([one], [7]))
    assert np.array_equal(centered_clip([one, other], [1, 1], 2.0, 3), weighted_mean([one, other], [1, 1]))


@given(group(any_finite))
@settings(max_examples=100, deadline=None)
def test_centered_clipping_stays_finite(updates: tuple[list[np.ndarray], list[int]]) -> None:
    """Whatever the codecs let through, and for weights of zero."""
    vectors, weights = updates
    merged = centered_clip(vectors, weights, 2.0, 3)
    assert np.isfinite(merged).all()


def test_the_rule_is_the_manifests() -> None:
    """`mean` scales what is too long down; `centered_clip` doesn't let it pull at all far."""
    vectors = [*updates_like(DIRECTION, 6, 0.5), 1000 * DIRECTION, 1000 * DIRECTION]
    mean, robust = (merge_part(vectors, [1] * 8, rule) for rule in (Mean(), CenteredClip()))
    assert norm(mean) > 3 * norm(DIRECTION)
    assert norm(robust) < 1.5 * norm(DIRECTION)


@given(arrays(np.float64, st.integers(0, 70), elements=st.floats(-1e9, 1e9)))
@settings(max_examples=80, deadline=None)
def test_a_tree_sum_is_halving_over_zero_padding(values: np.ndarray) -> None:
    """The order of additions is fixed by the length alone."""
    length = 1 << max(0, (values.size - 1).bit_length())
    padded = [*values.tolist(), *[0.0] * (length - values.size)]
    while len(padded) > 1:
        half = len(padded) // 2
        padded = [left + right for left, right in zip(padded[:half], padded[half:], strict=True)]
    assert tree_sum(values) == padded[0]


def test_a_long_sum_is_exact_where_float64_is() -> None:
    """Several blocks of integers add up to the exact sum, and the input is left alone."""
    values = np.arange(3 * BLOCK_VALUES + 5, dtype=np.float32)
    before = values.copy()
    assert tree_sum(values) == sum(range(values.size))
    assert np.array_equal(values, before)


def test_a_norm_is_euclidean_and_never_overflows() -> None:
    """3, 4, 5; and the largest float32 values have a finite norm."""
    assert norm(np.array([3.0, -4.0], np.float32)) == 5.0
    assert norm(np.zeros(0, np.float32)) == 0.0
    assert math.isfinite(norm(np.full(BLOCK_VALUES + 1, 3.4e38, np.float32)))


def test_the_norm_is_golden() -> None:
    """The same vector has the same norm on every processor."""
    vector = (np.arange(200_000, dtype=np.float32) - np.float32(99_999.5)) / np.float32(7)
    assert norm(vector).hex() == "0x1.c2435c8ac98f7p+21"


def test_this_machine_keeps_subnormal_numbers() -> None:
    """Determinism needs IEEE arithmetic."""
    assert arithmetic_is_ieee()


@pytest.fixture
def byzfl(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The aggregators of byzfl (2505.24802), which others have checked."""
    package = ModuleType("byzfl")
    package.__path__ = [str(ORACLES / "byzfl")]
    monkeypatch.setitem(sys.modules, "byzfl", package)
    return importlib.import_module("byzfl.aggregators")


def honest_and_far(count: int, far: int, seed: int) -> list[np.ndarray]:
    """Vectors around one point, of which the first ones are moved far away, each elsewhere."""
    random = np.random.default_rng(seed)
    vectors = [random.standard_normal(500).astype(np.float32) + 3 for _ in range(count)]
    return [vector * np.float32(10 * (index + 1)) if index < far else vector for index, vector in enumerate(vectors)]


@pytest.mark.parametrize(("count", "far"), [(2, 1), (5, 0), (5, 2), (8, 3), (16, 5)])
@pytest.mark.parametrize("iterations", [1, 3, 10])
def test_centered_clipping_is_byzfls(byzfl: Any, count: int, far: int, iterations: int) -> None:
    """With the radius that ours finds, and its start at the median as the origin, since byzfl's is zero."""
    vectors = honest_and_far(count, far, seed=count)
    start = np.median(vectors, axis=0)
    distances = sorted(float(np.linalg.norm(vector - start)) for vector in vectors)
    radius = 1.5 * distances[(count - 1) // 2]
    oracle = byzfl.CenteredClipping(L=iterations, tau=radius or 1.0)
    expected = start + oracle(np.stack(vectors).astype(np.float64) - start)
    assert centered_clip(vectors, [7] * count, 1.5, iterations) == pytest.approx(expected, rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("count", [1, 2, 3, 8, 9])
def test_the_median_is_byzfls(byzfl: Any, count: int) -> None:
    """Of each value, the mean of two for an even number."""
    vectors = honest_and_far(count, count // 3, seed=count)
    assert coordinate_median(vectors) == pytest.approx(byzfl.Median()(np.stack(vectors)), rel=1e-6)


@pytest.mark.parametrize(("count", "far"), [(3, 1), (8, 3)])
def test_clipping_norms_before_the_mean_is_byzfls(byzfl: Any, count: int, far: int) -> None:
    """Its clipping to a given norm, with the one that ours finds, and then its average."""
    vectors = honest_and_far(count, far, seed=count)
    limit = 2.0 * sorted(norm(vector) for vector in vectors)[(count - 1) // 2]
    expected = byzfl.Average()(byzfl.Clipping(c=limit)(np.stack(vectors).astype(np.float64)))
    assert merge_part(vectors, [3] * count, Mean(clip_ratio=2.0)) == pytest.approx(expected, rel=1e-5, abs=1e-5)
