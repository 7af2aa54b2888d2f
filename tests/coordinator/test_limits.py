"""Rates and ages."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from coordinator.guard import CALLER_KEY, address_of
from coordinator.limits import MAX_CLOCK_ERROR_S, Rate, RateLimiter, check_fresh, network_of
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


@pytest.mark.parametrize(
    ("address", "network"),
    [
        ("192.0.2.77", "192.0.2.0/24"),
        ("::ffff:192.0.2.77", "192.0.2.0/24"),
        ("2001:db8:1:2:3::9", "2001:db8:1::/48"),
        ("unix:/run/swarm", "unix:/run/swarm"),
    ],
)
def test_networks(address: str, network: str) -> None:
    """However many addresses somebody has in one."""
    assert network_of(address) == network


@pytest.mark.parametrize(
    ("peer", "address"),
    [("ipv4:192.0.2.7:5001", "192.0.2.7"), ("ipv6:%5B2001:db8::7%5D:5001", "2001:db8::7"), ("ipv6:[::1]:9", "::1")],
)
def test_addresses_of_callers(peer: str, address: str) -> None:
    """As gRPC names them; what another replica says of a caller is believed of a replica alone."""
    context: Any = SimpleNamespace(peer=lambda: peer, invocation_metadata=lambda: ((CALLER_KEY, "198.51.100.1"),))
    assert address_of(context) == address
    assert address_of(context, trusted=True) == "198.51.100.1"


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
