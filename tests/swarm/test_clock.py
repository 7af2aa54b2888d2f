"""Clocks."""

from __future__ import annotations

from swarm.clock import ManualClock, SystemClock


def test_manual_clock_moves_by_hand() -> None:
    """A manual clock stands still until it is advanced, on both scales."""
    clock = ManualClock(wall_s=100.0)
    assert (clock.wall_s(), clock.monotonic_s()) == (100.0, 0.0)
    clock.advance(2.5)
    assert (clock.wall_s(), clock.monotonic_s()) == (102.5, 2.5)


def test_system_clock_goes_on() -> None:
    """The system's steady clock never goes back."""
    clock = SystemClock()
    assert clock.monotonic_s() <= clock.monotonic_s()
    assert clock.wall_s() > 1.6e9
