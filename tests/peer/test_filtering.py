"""Filters take out what they name, keep the first of what is alike, and say how many of each."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from peer.filtering import HASHES, REASONS, Sieve, n_grams, repeated, signature
from swarm.manifest import Filters

PROMPT = np.array([1, 2, 3])
RANDOM = np.random.default_rng(5)


def text(length: int = 60) -> np.ndarray:
    return RANDOM.integers(0, 5000, length)


@pytest.mark.parametrize(
    ("filters", "tokens", "loss", "finished", "reason"),
    [
        (Filters(min_tokens=10), text(9), 2.0, True, "too_short"),
        (Filters(max_tokens=10), text(11), 2.0, True, "too_long"),
        (Filters(only_finished=True), text(), 2.0, False, "unfinished"),
        (Filters(min_perplexity=3), text(), 1.0, True, "dull"),
        (Filters(max_perplexity=20), text(), 3.1, True, "noisy"),
        (Filters(), text(), float("nan"), True, "noisy"),
        (Filters(max_repeated=0.3), np.tile(text(10), 5), 2.0, True, "repetitive"),
        (Filters(), text(), 2.0, False, ""),
    ],
)
def test_each_filter(filters: Filters, tokens: np.ndarray, loss: float, finished: bool, reason: str) -> None:
    """One sample for each reason, and one that has none."""
    sieve = Sieve(filters)
    assert sieve.reason(PROMPT, tokens, loss, finished=finished) == reason
    assert sieve.counts == {reason or "kept": 1}
    assert not reason or reason in REASONS


def test_copies_and_near_copies() -> None:
    """The same answer to another prompt is a near copy where it is long, and none where it is short."""
    sieve, long, short = Sieve(Filters(max_overlap=0.8, n_gram=5)), text(200), text(3)
    changed, other = long.copy(), long.copy()
    changed[100] += 1
    other[::4] += 1
    given = [(PROMPT, long), (PROMPT, long), (PROMPT + 1, long), (PROMPT, changed), (PROMPT, other), (PROMPT, short)]
    found = [
        sieve.reason(prompt, tokens, 1.0, finished=True) for prompt, tokens in [*given, (PROMPT + 1, short), (PROMPT, short)]
    ]
    assert found == ["", "copy", "near_copy", "near_copy", "", "", "", "copy"]


def test_overlap_of_one_keeps_all_but_copies() -> None:
    """Then nothing is compared but whole samples."""
    sieve, long = Sieve(Filters(max_overlap=1)), text(200)
    assert [sieve.reason(PROMPT + place, long, 1.0, finished=True) for place in range(3)] == ["", "", ""]


@given(st.integers(0, 100))
def test_signatures_estimate_what_is_shared(shared: int) -> None:
    """Within five standard errors of the Jaccard index."""
    random = np.random.default_rng(shared)
    common, ours, theirs = (random.integers(0, 1 << 63, size, dtype=np.uint64) for size in (shared, 100 - shared, 100 - shared))
    first, second = signature(np.concatenate([common, ours])), signature(np.concatenate([common, theirs]))
    index = shared / (200 - shared)
    assert abs(float(np.mean(first == second)) - index) <= 5 * np.sqrt(index * (1 - index) / HASHES) + 1e-9


def test_n_grams_are_told_apart_by_their_order() -> None:
    """Equal ones have equal hashes, others don't; too short a text has none."""
    assert n_grams(np.array([1, 2, 3, 1, 2, 3]), 3)[0] == n_grams(np.array([1, 2, 3]), 3)[0]
    assert np.unique(n_grams(np.array([1, 2, 2, 1, 1, 2]), 2)).size == 4
    assert n_grams(np.array([1, 2]), 3).size == 0
    assert repeated(np.array([7] * 11), 2) == 0.9
