"""Rates, under a clock that only moves when somebody sleeps."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

import pytest

from peer.network.throttle import BURST_S, LinkMeter, TokenBucket


@dataclass
class Time:
    """A virtual clock; sleeping moves it."""

    now_s: float = 100.0

    def monotonic_s(self) -> float:
        return self.now_s

    def wall_s(self) -> float:
        return self.now_s

    async def sleep(self, seconds: float) -> None:
        self.now_s += seconds


def bucket(time: Time, rate: float) -> TokenBucket:
    return TokenBucket(rate, time, time.sleep)


async def test_the_rate_holds_on_average() -> None:
    """Ten seconds' worth of bytes takes ten seconds, less one burst."""
    time = Time()
    tokens = bucket(time, 1000.0)
    for _ in range(100):
        await tokens.take(100)
    assert time.now_s - 100.0 == pytest.approx(10.0 - BURST_S, abs=0.2)


async def test_idle_time_saves_up_one_burst_only() -> None:
    """After an hour of silence no more than a quarter of a second's bytes pass at once."""
    time = Time()
    tokens = bucket(time, 1000.0)
    await tokens.take(250)
    await time.sleep(3600)
    before = time.now_s
    await tokens.take(250)
    assert time.now_s == before
    await tokens.take(250)
    assert time.now_s - before == pytest.approx(0.25)


async def test_a_piece_larger_than_the_burst_passes_late() -> None:
    """A large piece waits as long as its bytes take, and delays the next one."""
    time = Time()
    tokens = bucket(time, 1000.0)
    await tokens.take(5000)
    assert time.now_s - 100.0 == pytest.approx(5.0 - BURST_S)


async def test_several_streams_share_the_rate() -> None:
    """Two streams that take turns get together what one would get alone."""
    time = Time()
    tokens = bucket(time, 1000.0)

    async def stream() -> None:
        for _ in range(50):
            await tokens.take(100)

    await asyncio.gather(stream(), stream())
    assert time.now_s - 100.0 >= 10.0 - BURST_S - 0.2


async def test_no_limit_never_waits() -> None:
    """A rate of zero means that nothing is held back."""
    time = Time()
    tokens = bucket(time, 0.0)
    await tokens.take(1 << 40)
    assert time.now_s == 100.0


async def test_what_has_passed_already_is_waited_for() -> None:
    """Bytes that are only counted delay nobody by themselves, but whoever asks next waits for them, too."""
    time = Time()
    tokens = bucket(time, 1000.0)
    tokens.charge(1250)
    assert time.now_s == 100.0
    await tokens.take(500)
    assert time.now_s - 100.0 == pytest.approx(1.5)


@pytest.mark.parametrize(("rate", "piece"), [(0.0, 131072), (1e9, 131072), (1e6, 50_000), (8000.0, 4096)])
def test_slow_links_move_small_pieces(rate: float, piece: int) -> None:
    """A piece takes a twentieth of a second, so that nobody takes a shared slow link for silent."""
    assert TokenBucket(rate).piece_bytes(1 << 17) == piece


def test_the_meter_keeps_the_best_of_late() -> None:
    """Short transfers say nothing; a faster one counts at once; slower ones pull the figure down slowly."""
    meter = LinkMeter()
    meter.observe(1000, 0.001)
    meter.observe(1 << 20, 0.0)
    assert meter.bytes_per_s == 0.0
    meter.observe(1 << 20, 1.0)
    assert meter.bytes_per_s == 1 << 20
    meter.observe(1 << 20, 2.0)
    assert (1 << 19) < meter.bytes_per_s < (1 << 20)
    for _ in range(100):
        meter.observe(1 << 20, 2.0)
    assert meter.bytes_per_s == pytest.approx(1 << 19, rel=0.01)
