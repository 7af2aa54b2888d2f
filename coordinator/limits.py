"""Bounds on what strangers can ask for: rates, ages and sizes."""

from __future__ import annotations

import ipaddress
from collections import Counter, OrderedDict
from dataclasses import dataclass

from swarm.errors import Rejected

MAX_MESSAGE_BYTES = 4 << 20
MAX_REPORT_BYTES = 24 << 10  # so that a receipt, which holds the report, stays within its own limit of 32 KiB
MAX_CLOCK_ERROR_S = 900.0
CALL_DEADLINE_S = 30.0
STREAM_DEADLINE_S = 600.0
ENTRIES_PER_CALL = 100_000
ENTRIES_PER_MESSAGE_BYTES = 1 << 20
MAX_LEADERBOARD = 1000
PEERS_PER_ANSWER = 128
MAX_TRACKED_KEYS = 100_000
HOUR_S = 3600
IPV4_NETWORK, IPV6_NETWORK = 24, 48


@dataclass(frozen=True)
class Ceilings:
    """How many calls are in progress at a time, and how long a caller may take to send or to take a message."""

    calls: int = 2048
    calls_per_address: int = 256
    slow_call_s: float = 30.0


class CallsInProgress:
    """Counts calls, all together and by address."""

    def __init__(self, ceilings: Ceilings) -> None:
        self._ceilings = ceilings
        self._by_address: Counter[str] = Counter()
        self._total = 0

    def __len__(self) -> int:
        return self._total

    def enter(self, address: str) -> None:
        """Count one more. Raises `Rejected` where that is too many."""
        if self._by_address[address] >= self._ceilings.calls_per_address:
            raise Rejected("overloaded", f"at most {self._ceilings.calls_per_address} calls of one address at a time")
        if self._total >= self._ceilings.calls:
            raise Rejected("overloaded", f"at most {self._ceilings.calls} calls at a time")
        self._by_address[address] += 1
        self._total += 1

    def leave(self, address: str) -> None:
        """One has ended."""
        self._total -= 1
        self._by_address[address] -= 1
        if not self._by_address[address]:
            del self._by_address[address]


@dataclass(frozen=True)
class Rate:
    """A token bucket: `per_s` on average, `burst` at once."""

    per_s: float
    burst: float


class RateLimiter:
    """One token bucket per key; the keys unused for longest are forgotten."""

    def __init__(self, rate: Rate, max_keys: int = MAX_TRACKED_KEYS) -> None:
        self._rate = rate
        self._max_keys = max_keys
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def take(self, key: str, now_s: float, tokens_taken: int = 1) -> None:
        """Take tokens, more than there are if need be: then it is waited longer. Raises `Rejected` when the key has none left."""
        tokens, since_s = self._buckets.get(key, (self._rate.burst, now_s))
        tokens = min(self._rate.burst, tokens + (now_s - since_s) * self._rate.per_s)
        if tokens < 1:
            raise Rejected("rate_limited", f"at most {self._rate.per_s:g} per second", key)
        self._buckets[key] = (tokens - tokens_taken, now_s)
        self._buckets.move_to_end(key)
        if len(self._buckets) > self._max_keys:
            self._buckets.popitem(last=False)


class NewKeys:
    """How many keys one network or one account brings anew in an hour: identities are cheap, addresses less so."""

    def __init__(self, per_hour: int) -> None:
        self._per_hour = per_hour
        self._rate = RateLimiter(Rate(per_hour / HOUR_S, per_hour))

    def take(self, origin: str, now_s: float) -> None:
        """Count a key. Raises `Rejected` when its network or account has brought too many."""
        try:
            self._rate.take(origin, now_s)
        except Rejected as error:
            raise Rejected("too_many_new_keys", f"at most {self._per_hour} an hour from {origin}") from error


def network_of(address: str) -> str:
    """The /24 of an IPv4 address, the /48 of an IPv6 one: what one customer of a provider has at most. Others are as they are."""
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return address
    if isinstance(parsed, ipaddress.IPv6Address) and parsed.ipv4_mapped is not None:
        parsed = parsed.ipv4_mapped
    prefix = IPV4_NETWORK if parsed.version == 4 else IPV6_NETWORK
    return str(ipaddress.ip_network((parsed, prefix), strict=False))


def check_fresh(issued_at: int, now_s: float, sender: str) -> None:
    """Whether a message was signed within 15 minutes of now. Raises `Rejected` that says by how much a clock is wrong."""
    error_s = now_s - issued_at
    if abs(error_s) > MAX_CLOCK_ERROR_S:
        direction = "behind" if error_s > 0 else "ahead of"
        raise Rejected("stale", f"{abs(error_s):.0f} s {direction} the coordinator", sender)
