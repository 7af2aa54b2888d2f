"""What is measured in the background while rounds go on: traffic, the GPU, the outbox, credits."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from peer.device import read_gpu
from peer.metrics import PeerMetrics
from peer.network.node import Node
from peer.reports import Outbox
from peer.usage import Usage
from swarm.credits import FLOPS_PER_CREDIT
from swarm.errors import Rejected, SwarmError
from swarm.rpc.client import CoordinatorClient

EVERY_S = 2.0
CREDITS_EVERY_S = 10.0
STATES = ("pending", "verified", "final")


@dataclass
class Vitals:
    """Keeps the gauges up to date. `balances` are credits by state, as the coordinator last said."""

    metrics: PeerMetrics
    node: Node
    outbox: Outbox
    device: torch.device
    peer_id: str
    client: Callable[[], CoordinatorClient | None]
    usage: Usage
    upload_bytes_per_s: Callable[[], float]
    balances: dict[str, float] = field(default_factory=dict)
    _counted: dict[tuple[str, str], int] = field(default_factory=dict)

    async def watch(self) -> None:
        """Measure for ever."""
        asked_s = 0.0
        while True:
            self.measure()
            if time.monotonic() - asked_s > CREDITS_EVERY_S:
                asked_s = time.monotonic()
                await self.ask_credits()
            await asyncio.sleep(EVERY_S)

    def measure(self) -> None:
        """Read everything once."""
        self._measure_traffic()
        self.metrics.outbox.set(len(self.outbox.waiting()))
        reading = read_gpu(self.device)
        if reading is not None:
            self.metrics.temperature.set(reading.temperature_c)
            self.metrics.power.set(reading.power_w)
            self.metrics.memory.labels(kind="used").set(reading.memory_used_bytes)
            self.metrics.memory.labels(kind="total").set(reading.memory_total_bytes)

    def _measure_traffic(self) -> None:
        traffic = self.node.traffic
        for direction, counter, counts in (
            ("sent", self.metrics.sent, traffic.sent),
            ("received", self.metrics.received, traffic.received),
        ):
            for kind, total in counts.items():
                counter.labels(kind=kind).inc(total - self._counted.get((direction, kind), 0))
                self._counted[direction, kind] = total
        self.metrics.upload_rate.set(self.upload_bytes_per_s())
        self.metrics.month.labels(direction="sent").set(self.usage.this_month.sent_bytes)
        self.metrics.month.labels(direction="received").set(self.usage.this_month.received_bytes)
        left = self.usage.left_bytes
        self.metrics.quota_left.set(math.inf if left is None else left)

    async def ask_credits(self) -> None:
        """Ask the coordinator for our balance; what fails is asked again later."""
        client = self.client()
        if client is None:
            return
        try:
            answer = await client.credits(self.peer_id)
        except (SwarmError, Rejected):
            return
        for balance in answer.balances:
            if balance.peer_id == self.peer_id:
                flops = (balance.pending_flops, balance.verified_flops, balance.final_flops)
                self.balances = {state: int(value or 0) / FLOPS_PER_CREDIT for state, value in zip(STATES, flops, strict=True)}
        for state, value in self.balances.items():
            self.metrics.credits.labels(state=state).set(value)
