"""Deadlines learnt from recent rounds."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from peer.rounds.pacing import (
    EXCHANGE_FLOOR_S,
    FIRST_PATIENCE_S,
    HISTORY,
    LONGEST_FIRST_EXCHANGE_S,
    PATIENCE_FLOOR_S,
    SHORTEST_FIRST_EXCHANGE_S,
    Pacing,
    first_exchange_s,
)

times = st.floats(0, 1e5)


def paced(rounds: int, lateness_s: float = 0.0, proposing_s: float = 0.1, exchanging_s: float = 1.0) -> Pacing:
    """After some rounds of four peers, the last of whom is late."""
    pacing = Pacing(1.0, 6.0)
    for _ in range(rounds):
        committed = [10.0, 10.0, 10.0, 10.0 + lateness_s]
        proposed = 10.0 + lateness_s + proposing_s
        pacing.observe(committed, proposed, proposed + exchanging_s)
    return pacing


def test_the_first_deadlines_are_generous() -> None:
    """Before anything has been learnt, nobody is given up quickly."""
    pacing = Pacing(1.0, 6.0, first_exchange_s=45.0)
    assert (pacing.grace_s, pacing.patience_s, pacing.exchange_s) == (10.0, FIRST_PATIENCE_S, 45.0)
    assert paced(2).exchange_s == SHORTEST_FIRST_EXCHANGE_S
    assert paced(2).patience_s == FIRST_PATIENCE_S


def test_deadlines_follow_what_rounds_take() -> None:
    """After three rounds the deadlines are those of the rounds, not below their floors."""
    fast = paced(3)
    assert (fast.grace_s, fast.patience_s, fast.exchange_s) == (10.0, PATIENCE_FLOOR_S, EXCHANGE_FLOOR_S)
    slow = paced(3, lateness_s=20.0, proposing_s=7.0, exchanging_s=50.0)
    assert (slow.grace_s, round(slow.patience_s), round(slow.exchange_s)) == (20.0, 7, 50)


def test_the_first_exchange_may_take_what_the_model_needs_on_a_slow_link() -> None:
    """124 million parameters in 16 bits over 5 Mbit/s are some 400 seconds; a small model isn't waited for that long."""
    assert round(first_exchange_s(124_000_000)) == 397
    assert first_exchange_s(1_000_000) == SHORTEST_FIRST_EXCHANGE_S
    assert first_exchange_s(10**10) == LONGEST_FIRST_EXCHANGE_S


def test_old_rounds_are_forgotten() -> None:
    """After enough fast rounds a slow past no longer counts."""
    pacing = paced(HISTORY, exchanging_s=500.0)
    assert pacing.exchange_s >= 500.0
    for _ in range(HISTORY):
        pacing.observe([1.0], 1.0, 2.0)
    assert pacing.exchange_s == EXCHANGE_FLOOR_S


@given(st.lists(st.tuples(st.lists(times, max_size=6), times, times), max_size=20), st.floats(0.1, 60), st.floats(0.1, 100))
@settings(deadline=None)
def test_deadlines_are_sane_whatever_was_observed(
    rounds: list[tuple[list[float], float, float]], floor_s: float, mads: float
) -> None:
    """Even clocks that make no sense never give a deadline below its floor."""
    pacing = Pacing(floor_s, mads)
    for committed, proposed, completed in rounds:
        pacing.observe(committed, proposed, completed)
    assert pacing.grace_s >= floor_s
    assert pacing.patience_s >= PATIENCE_FLOOR_S
    assert pacing.exchange_s >= EXCHANGE_FLOOR_S


def test_a_round_without_commits_teaches_nothing() -> None:
    """Where nobody committed there is nothing to learn."""
    pacing = paced(3, lateness_s=20.0)
    before = (pacing.grace_s, pacing.patience_s, pacing.exchange_s)
    pacing.observe([], 5.0, 1000.0)
    assert (pacing.grace_s, pacing.patience_s, pacing.exchange_s) == before
