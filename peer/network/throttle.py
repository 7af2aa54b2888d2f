"""Bandwidth: token buckets that hold at the one place where blobs move, and the passive measure of each link."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from swarm.clock import Clock, SystemClock

BURST_S = 0.25


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
        if not self.rate_bytes_per_s:
            return
        now = self.clock.monotonic_s()
        refill = (now - self._updated_s) * self.rate_bytes_per_s
        self._available = min(self.rate_bytes_per_s * BURST_S, self._available + refill) - size_bytes
        self._updated_s = now
        if self._available < 0:
            await self.sleep(-self._available / self.rate_bytes_per_s)


@dataclass
class LinkMeter:
    """The largest transfer rate seen lately: a moving maximum that forgets a tenth per transfer."""

    bytes_per_s: float = 0.0

    def observe(self, size_bytes: int, seconds: float) -> None:
        """Take a finished transfer into account; short ones say nothing about the link."""
        if size_bytes < 1 << 16 or seconds <= 0:
            return
        rate = size_bytes / seconds
        self.bytes_per_s = max(rate, 0.9 * self.bytes_per_s + 0.1 * rate)
