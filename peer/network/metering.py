"""Reading the counters while peers exchange: caps that hold at the socket, and the passive measure of our own uplink."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field

from peer.network.sockets import Reading
from peer.network.traffic import Traffic, Volume
from peer.network.transfer import Transfer
from swarm.clock import Clock, SystemClock

IDLE_S = 1.0
BUSY_S = 0.25
SHORTEST_S = 0.2


@dataclass
class Metering:
    """Measures once a second, and four times as often while we send blobs. `on_moved` hears of every difference."""

    traffic: Traffic
    transfer: Transfer
    on_moved: Callable[[Volume], None] = lambda volume: None
    clock: Clock = SystemClock()
    _counted: Volume = field(default_factory=Volume)
    _bulk: Volume = field(default_factory=Volume)
    _uplink: tuple[float, Reading] | None = None

    async def watch(self) -> None:
        """Measure for ever."""
        while True:
            self.measure()
            sending = self.transfer.sending > 0 or self.traffic.reading.queued_bytes > 0
            if sending:
                await asyncio.sleep(BUSY_S)
                continue
            self.transfer.busy.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(IDLE_S):
                    await self.transfer.busy.wait()

    def measure(self) -> None:
        """Read everything once."""
        reading = self.traffic.measure()
        now, bulk = self.traffic.total, Volume(self.traffic.sent["bulk"], self.traffic.received["bulk"])
        moved, asked = now - self._counted, bulk - self._bulk
        self._counted, self._bulk = now, bulk
        self.transfer.upload.charge(max(0, moved.sent_bytes - asked.sent_bytes))
        self.transfer.download.charge(max(0, moved.received_bytes - asked.received_bytes))
        self._observe_uplink(reading)
        self.on_moved(moved)

    def _observe_uplink(self, reading: Reading) -> None:
        """Between two readings: what has arrived by the time that was spent on sending it.

        That time is at most the time between the readings, and at most what the sockets say together, so that a short
        transfer isn't taken for a slow link and several at once aren't taken for a fast one. The kernel counts it in steps of
        some milliseconds, and confirmations come in bursts, so readings are put together until it is long enough.
        """
        now_s = self.clock.monotonic_s()
        if self._uplink is None:
            self._uplink = (now_s, reading)
        since_s, before = self._uplink
        busy_s = min(now_s - since_s, reading.busy_s - before.busy_s)
        if busy_s >= SHORTEST_S:
            self.transfer.upload_meter.observe(reading.acknowledged_bytes - before.acknowledged_bytes, busy_s)
            self._uplink = (now_s, reading)
