"""Caps at the socket and the measure of the uplink, from readings that the test makes up."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, cast

import pytest

from peer.network.metering import Metering
from peer.network.sockets import Reading
from peer.network.throttle import LinkMeter, TokenBucket
from peer.network.traffic import Traffic, Volume
from swarm.clock import ManualClock

MB = 1_000_000


@dataclass
class Sockets:
    """The kernel's counters, set by the test."""

    reading: Reading = field(default_factory=Reading)

    def read(self) -> Reading:
        return self.reading

    def close(self) -> None:
        pass


@dataclass
class Blobs:
    """What metering needs of a transfer."""

    upload: TokenBucket
    download: TokenBucket
    upload_meter: LinkMeter = field(default_factory=LinkMeter)
    sending: int = 0


@dataclass
class Bench:
    """A metering with everything that it reads in the test's hands."""

    clock: ManualClock = field(default_factory=ManualClock)
    sockets: Sockets = field(default_factory=Sockets)
    moved: list[Volume] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.traffic = Traffic(_counters=cast("Any", self.sockets))
        self.blobs = Blobs(TokenBucket(MB, self.clock, self.sleep), TokenBucket(MB, self.clock, self.sleep))
        self.metering = Metering(self.traffic, cast("Any", self.blobs), self.moved.append, self.clock)
        self.clock.advance(100)

    async def sleep(self, seconds: float) -> None:
        self.clock.advance(seconds)

    def after(self, seconds: float, **reading: Any) -> None:
        """Measure so much later with these counters."""
        self.clock.advance(seconds)
        self.sockets.reading = Reading(**reading)
        self.metering.measure()


async def test_framing_counts_against_the_cap() -> None:
    """A cap holds for everything that leaves the machine: bulk waits for what framing and control have used."""
    bench = Bench()
    bench.metering.measure()
    bench.traffic.count("sent", "bulk", MB)
    bench.traffic.count("sent", "control", MB // 10)
    bench.after(0, sent_bytes=13 * MB // 10)
    started = bench.clock.monotonic_s()
    await bench.blobs.upload.take(0)
    waited = bench.clock.monotonic_s() - started
    assert waited == pytest.approx(0.3 - 0.25)  # what wasn't bulk, less one burst
    await bench.blobs.download.take(MB // 10)
    assert bench.clock.monotonic_s() - started == waited


def test_kinds_add_up_to_what_the_sockets_say() -> None:
    """Framing is the rest, never negative, and the totals never fall while bytes wait in the daemon."""
    bench = Bench()
    bench.traffic.count("sent", "bulk", 1000)
    bench.after(1, sent_bytes=400, received_bytes=70)
    assert bench.traffic.total == Volume(1000, 70)
    bench.after(1, sent_bytes=1100, received_bytes=70)
    assert bench.traffic.sent == {"bulk": 1000, "control": 0, "framing": 100, "web": 0}
    assert bench.traffic.total == Volume(1100, 70)
    assert sum(bench.moved, Volume()) == Volume(1100, 70)


def test_the_uplink_is_what_arrives_while_it_is_busy() -> None:
    """A link that is busy all the time is measured by the clock, a short transfer by the time that it took."""
    bench = Bench()
    bench.metering.measure()
    bench.after(1.0, acknowledged_bytes=2 * MB, busy_s=6.5)
    assert bench.blobs.upload_meter.bytes_per_s == 2 * MB
    bench.after(1.0, acknowledged_bytes=5 * MB, busy_s=6.8)
    assert bench.blobs.upload_meter.bytes_per_s == pytest.approx(10 * MB)


def test_the_kernels_coarse_clock_makes_no_fast_link() -> None:
    """Bursts that are shorter than a few of its ticks are looked at together."""
    bench = Bench()
    bench.metering.measure()
    for burst in range(1, 13):
        bench.after(1.0, acknowledged_bytes=burst * MB // 10, busy_s=0.004 * (burst // 2) + 0.2 * (burst // 12))
        if burst < 12:
            assert bench.blobs.upload_meter.bytes_per_s == 0
    assert bench.blobs.upload_meter.bytes_per_s == pytest.approx(1.2 * MB / 0.224)


def test_idle_time_and_small_transfers_say_nothing() -> None:
    """Pings don't make the link look slow."""
    bench = Bench()
    bench.after(1.0, acknowledged_bytes=2 * MB, busy_s=1.0)
    bench.after(1.0, acknowledged_bytes=4 * MB, busy_s=2.0)
    for second in range(50):
        bench.after(1.0, acknowledged_bytes=4 * MB + 100 * second, busy_s=2.0 + second)
    assert bench.blobs.upload_meter.bytes_per_s == 2 * MB


@pytest.mark.parametrize(("measured", "cap", "told"), [(0, 0, 0), (0, 5, 5), (3, 5, 3), (9, 5, 5), (9, 0, 9)])
def test_a_peer_never_promises_more_than_its_cap(measured: float, cap: float, told: float) -> None:
    """What goes into the commit, and so into the spans, is the measured speed within the volunteer's cap."""
    assert LinkMeter(cap, measured).bytes_per_s == told
