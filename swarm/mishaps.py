"""Misfortune for a swarm of real processes, drawn by seed: one thing breaks after the other, and comes back.

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
MOST_AWAY = 2
ROUNDS_WITHOUT = 6
FROZEN_S = 3.0
LONGEST_CALM_S = 0.5
PATIENCE_S = 120.0


@dataclass(frozen=True)
class Mishap:
    """What broke, after which round, the seconds in which the others did the next rounds, and how many were away already."""

    kind: str
    victim: str
    after_round: int
    rounds: int
    seconds: float
    away: int


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
    """Break one thing after another until so many rounds are over, and see everybody back. Raises `Timeout`.

    At most `MOST_AWAY` peers are broken or on their way back at the same time, so that a quorum of five is always there.
    """
    draw = random.Random(seed)  # noqa: S311 - to be repeatable, not to be secret
    away: dict[str, int] = {}
    while len(swarm.roots()) < rounds:
        processes.note(swarm)
        await _until_back(swarm, away, MOST_AWAY - 1)
        healthy = [name for name in sorted(swarm.peers) if name not in away]
        victim, kind = swarm.peers[draw.choice(healthy)], draw.choice(kinds)
        others = [swarm.peers[name] for name in healthy if kind == "coordinator" or name != victim.name]
        await asyncio.sleep(draw.random() * LONGEST_CALM_S)
        started, before = time.monotonic(), max(map(last_round, swarm.live()))
        await _harm(swarm, victim, kind)
        await swarm.until_round(before + ROUNDS_WITHOUT, others, PATIENCE_S)
        yield Mishap(kind, victim.name, before, ROUNDS_WITHOUT, time.monotonic() - started, len(away))
        if kind == "kill":
            await swarm.join(victim.name)
        if kind != "coordinator":
            away[victim.name] = max(map(last_round, others))
    await _until_back(swarm, away, 0)
    processes.note(swarm)


async def _until_back(swarm: Scenario, away: dict[str, int], most: int) -> None:
    """Wait until at most so many of `away` have yet to finish a round that began after their mishap; forget the others."""

    def few() -> bool:
        for name in [name for name, newest in away.items() if last_round(swarm.peers[name]) > newest]:
            del away[name]
        return len(away) <= most

    await swarm.until(few, f"{sorted(away)} are back", PATIENCE_S)


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


def _runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
