"""Time as a dependency: the system's clock, or one that tests move by hand."""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    """Where decisions get their time from."""

    def wall_s(self) -> float:
        """Unix time in seconds; may jump."""

    def monotonic_s(self) -> float:
        """Seconds since an arbitrary moment; never goes back."""


class SystemClock:
    """The machine's own clocks."""

    def wall_s(self) -> float:
        """Unix time in seconds."""
        return time.time()

    def monotonic_s(self) -> float:
        """Seconds of the monotonic clock."""
        return time.monotonic()


def boot_s() -> float:
    """Seconds since the machine started, also those in which it slept, where the system counts them (Linux)."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic()


class ManualClock:
    """A clock that stands still until a test moves it."""

    def __init__(self, wall_s: float = 1_000_000.0) -> None:
        self._wall_s = wall_s
        self._monotonic_s = 0.0

    def wall_s(self) -> float:
        """The time that the test has set."""
        return self._wall_s

    def monotonic_s(self) -> float:
        """The seconds that the test has let pass."""
        return self._monotonic_s

    def advance(self, seconds: float) -> None:
        """Let `seconds` pass on both clocks."""
        self._wall_s += seconds
        self._monotonic_s += seconds
