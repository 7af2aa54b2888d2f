"""Bandwidth: token buckets that hold at the one place where blobs move, and the passive measure of each link."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from swarm.clock import Clock, SystemClock

BURST_S = 0.25
PIECE_S = 0.05
SMALLEST_PIECE_BYTES = 1 << 12
TELLING_BYTES = 1 << 16
FORGET_PER_S = 0.05


@dataclass
class TokenBucket:
    """At most `rate_bytes_per_s` on average, with bursts of a quarter of a second. A rate of 0 means no limit."""

    rate_bytes_per_s: float = 0.0
    clock: Clock = SystemClock()
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep
    _available: float = 0.0
    _updated_s: float = 0.0

    async def take(self, size_bytes: int) -> None:
        """Wait until `size_bytes` may pass."""
        self.charge(size_bytes)
        if self._available < 0:
            await self.sleep(-self._available / self.rate_bytes_per_s)

    def charge(self, size_bytes: int) -> None:
        """Count bytes that have passed without asking: whoever asks next waits for them, too."""
        if not self.rate_bytes_per_s:
            return
        now = self.clock.monotonic_s()
        refill = (now - self._updated_s) * self.rate_bytes_per_s
        self._available = min(self.rate_bytes_per_s * BURST_S, self._available + refill) - size_bytes
        self._updated_s = now

    def piece_bytes(self, most: int) -> int:
        """How much to move at once, so that on a slow link nobody waits long for the next piece."""
        if not self.rate_bytes_per_s:
            return most
        return min(most, max(SMALLEST_PIECE_BYTES, int(self.rate_bytes_per_s * PIECE_S)))


@dataclass
class LinkMeter:
    """The largest transfer rate seen lately: a moving maximum that forgets a twentieth per second of slower transfers.

    A slower transfer may be the other side's fault; many are ours.

    `limit_bytes_per_s` is the volunteer's cap: it stands for what isn't known yet, and nothing is said to be faster. 0 = none.
    """

    limit_bytes_per_s: float = 0.0
    measured_bytes_per_s: float = 0.0

    @property
    def bytes_per_s(self) -> float:
        """What the link is good for; 0 = not known."""
        limit, measured = self.limit_bytes_per_s, self.measured_bytes_per_s
        return min(measured, limit) if measured and limit else measured or limit

    def observe(self, size_bytes: int, seconds: float) -> None:
        """Take a finished transfer into account; short ones say nothing about the link."""
        if size_bytes < TELLING_BYTES or seconds <= 0:
            return
        rate, kept = size_bytes / seconds, (1 - FORGET_PER_S) ** seconds
        self.measured_bytes_per_s = max(rate, kept * self.measured_bytes_per_s + (1 - kept) * rate)
