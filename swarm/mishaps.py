"""Misfortune for a swarm of real processes, drawn by seed: one thing breaks at a time, and comes back.

The scenario tests and the fault benchmark break things in the same way; what must hold afterwards is asked of `Scenario`.
"""

from __future__ import annotations

import asyncio
import random
import signal
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field

import psutil

from swarm.local import LocalPeer
from swarm.scenario import Scenario, last_round

KINDS = ("kill", "kill", "freeze", "network", "coordinator")
ROUNDS_WITHOUT = 6
FROZEN_S = 3.0
LONGEST_CALM_S = 0.5
PATIENCE_S = 120.0


@dataclass(frozen=True)
class Mishap:
    """What broke, after which round, and the seconds in which the others did the next rounds without it."""

    kind: str
    victim: str
    after_round: int
    rounds: int
    seconds: float


@dataclass
class Processes:
    """Every process that a swarm has had, so that one can see that none is left."""

    seen: dict[int, psutil.Process] = field(default_factory=dict)

    def note(self, swarm: Scenario) -> None:
        """Take those of now, network daemons included."""
        for peer in swarm.live():
            process = psutil.Process(peer.process.pid)
            for each in (process, *process.children(recursive=True)):
                self.seen[each.pid] = each

    def left(self) -> list[psutil.Process]:
        """Those that still run."""
        return [process for process in self.seen.values() if _runs(process)]


async def break_things(
    swarm: Scenario, rounds: int, seed: int, processes: Processes, kinds: Sequence[str] = KINDS
) -> AsyncIterator[Mishap]:
    """Break one thing after another until so many rounds are over. A quorum is always alive. Raises `Timeout`."""
    draw = random.Random(seed)  # noqa: S311 - to be repeatable, not to be secret
    while len(swarm.roots()) < rounds:
        processes.note(swarm)
        victim = swarm.peers[draw.choice(sorted(swarm.peers))]
        kind = draw.choice(kinds)
        await asyncio.sleep(draw.random() * LONGEST_CALM_S)
        others = [peer for peer in swarm.live() if peer is not victim]
        started, before = time.monotonic(), max(map(last_round, swarm.live()))
        await _harm(swarm, victim, kind)
        await swarm.until_round(before + ROUNDS_WITHOUT, others, PATIENCE_S)
        yield Mishap(kind, victim.name, before, ROUNDS_WITHOUT, time.monotonic() - started)
        await _return(swarm, victim, kind, others)
    processes.note(swarm)


async def _harm(swarm: Scenario, victim: LocalPeer, kind: str) -> None:
    match kind:
        case "kill":
            await swarm.kill(victim.name)
        case "freeze":
            victim.signal(signal.SIGSTOP)
            await asyncio.sleep(FROZEN_S)
            victim.signal(signal.SIGCONT)
        case "network":
            for process in psutil.Process(victim.process.pid).children():
                process.kill()
        case "coordinator":
            await swarm.swarm.stop_coordinator(signal.SIGKILL)
            await asyncio.sleep(FROZEN_S)
            await swarm.restart_coordinator()


async def _return(swarm: Scenario, victim: LocalPeer, kind: str, others: Sequence[LocalPeer]) -> None:
    """Start what was killed, and see the victim finish a round that began after its mishap."""
    if kind == "kill":
        await swarm.join(victim.name)
    returned, newest = swarm.peers[victim.name], max(map(last_round, others))
    await swarm.until(lambda: last_round(returned) > newest, f"{victim.name} is back after {kind}", PATIENCE_S)


def _runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
