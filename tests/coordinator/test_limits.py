"""Rates and ages."""

from __future__ import annotations

import pytest

from coordinator.limits import MAX_CLOCK_ERROR_S, Rate, RateLimiter, check_fresh
from swarm.errors import Rejected


def test_bucket_refills() -> None:
    """A key may burst, is then slowed down, and recovers with time; other keys don't notice."""
    limiter = RateLimiter(Rate(per_s=2, burst=3))
    for _ in range(3):
        limiter.take("a", 0.0)
    with pytest.raises(Rejected, match="rate_limited"):
        limiter.take("a", 0.0)
    limiter.take("b", 0.0)
    limiter.take("a", 0.5)
    with pytest.raises(Rejected, match="rate_limited"):
        limiter.take("a", 0.5)


def test_tracked_keys_are_bounded() -> None:
    """The key that was unused for longest is forgotten."""
    limiter = RateLimiter(Rate(per_s=1, burst=1), max_keys=2)
    for key in ("a", "b", "c"):
        limiter.take(key, 0.0)
    limiter.take("a", 0.0)
    assert len(limiter._buckets) == 2


@pytest.mark.parametrize(("issued_at", "words"), [(1000, "behind"), (3000, "ahead of")])
def test_wrong_clocks_are_told_how_wrong(issued_at: int, words: str) -> None:
    """A message from more than 15 minutes away is refused with the difference."""
    with pytest.raises(Rejected, match=f"1000 s {words}"):
        check_fresh(issued_at, 2000.0, "peer")
    check_fresh(int(2000 - MAX_CLOCK_ERROR_S), 2000.0, "peer")
