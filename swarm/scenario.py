"""A swarm of real processes with faults: for scenario tests and the fault benchmark.

Peers' keys are made beforehand, so that a script can name the leader of a round. Invariants are read from what the peers and the
ledger wrote, never from what a test assumes.
"""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from swarm.identity import Identity
from swarm.ledger import open_manifest
from swarm.local import LocalPeer, LocalSwarm
from swarm.manifest import Manifest
from swarm.messages import JoinLink
from swarm.rpc.client import CoordinatorClient

POLL_S = 0.05


class Timeout(Exception):
    """Something didn't happen in time; the message tells what was seen instead."""


@dataclass
class Scenario:
    """A running swarm in a folder that holds `run.yaml`, `owner.key` and `files/`."""

    swarm: LocalSwarm
    source: Path
    peers: dict[str, LocalPeer] = field(default_factory=dict)
    retired: list[LocalPeer] = field(default_factory=list)

    @property
    def link(self) -> JoinLink:
        """The join link."""
        return JoinLink.parse(self.swarm.link)

    def identity(self, name: str) -> Identity:
        """The key of a peer, made before it starts."""
        return Identity.load_or_create(self.swarm.directory / name / "identity.key")

    async def start(
        self, count: int, faults: Mapping[str, str] | None = None, options: Mapping[str, tuple[str, ...]] | None = None
    ) -> None:
        """Start the coordinator and peers `p0`, `p1`, ..., some with a fault script or options of their own."""
        await self.swarm.start_coordinator(self.source / "run.yaml", self.source / "owner.key")
        for index in range(count):
            name = f"p{index}"
            await self.join(name, *(options or {}).get(name, ()), faults=(faults or {}).get(name, ""))

    async def join(self, name: str, *options: str, faults: str = "", environment: Mapping[str, str] | None = None) -> LocalPeer:
        """Start a peer, or start it again in the folder that it had."""
        if name in self.peers:
            self.retired.append(self.peers[name])
        files = ("--files", str(self.source / "files"))
        extra = {"SWARM_FAULTS": faults, **(environment or {})}
        self.peers[name] = await self.swarm.join(name, *files, *options, environment=extra)
        return self.peers[name]

    def live(self) -> list[LocalPeer]:
        """Peers whose process is alive."""
        return [peer for peer in self.peers.values() if peer.running]

    async def until(self, condition: Callable[[], bool], what: str, timeout_s: float) -> float:
        """Wait for a condition; the seconds that it took. Raises `Timeout`."""
        started = time.monotonic()
        while not condition():
            if time.monotonic() - started > timeout_s:
                raise Timeout(f"not within {timeout_s:.0f} s: {what}; {self.summary()}")
            await asyncio.sleep(POLL_S)
        return time.monotonic() - started

    async def until_round(self, round_index: int, peers: list[LocalPeer] | None = None, timeout_s: float = 120.0) -> float:
        """Wait until all of `peers` (the live ones by default) have finished a round."""
        wanted = self.live() if peers is None else peers
        return await self.until(
            lambda: all(last_round(peer) >= round_index for peer in wanted), f"round {round_index}", timeout_s
        )

    async def until_rounds_more(self, count: int, peers: list[LocalPeer] | None = None, timeout_s: float = 120.0) -> float:
        """Wait until all of `peers` have finished `count` rounds after the newest one of now."""
        wanted = self.live() if peers is None else peers
        return await self.until_round(max(map(last_round, wanted)) + count, wanted, timeout_s)

    def roots(self) -> dict[int, set[str]]:
        """Every root that any peer has had after each round."""
        found: dict[int, set[str]] = defaultdict(set)
        for peer in [*self.peers.values(), *self.retired]:
            for line in peer.history():
                found[line["round"]].add(line["root"])
        return dict(found)

    def differing_roots(self) -> list[int]:
        """Rounds after which two peers had different roots."""
        return sorted(round_index for round_index, roots in self.roots().items() if len(roots) > 1)

    def missing_rounds(self) -> list[int]:
        """Rounds that nobody finished although later ones were."""
        rounds = self.roots()
        return sorted(set(range(min(rounds), max(rounds))) - rounds.keys()) if rounds else []

    async def credit(self) -> dict[str, int]:
        """FLOPs of each peer, all states together, as the coordinator says."""
        async with await CoordinatorClient.connect(self.link) as client:
            balances = (await client.credits(limit=1000)).balances
        return {
            item.peer_id: sum(int(value or 0) for value in (item.pending_flops, item.verified_flops, item.final_flops))
            for item in balances
        }

    async def manifest(self) -> Manifest:
        """The run's manifest, from the coordinator."""
        async with await CoordinatorClient.connect(self.link) as client:
            run = await client.get_run()
        return open_manifest(run.signed_manifest, run.run_id)

    def summary(self) -> str:
        """Where everybody is, for messages."""
        return ", ".join(
            f"{peer.name} {'round ' + str(last_round(peer)) if peer.running else 'ended'}" for peer in self.peers.values()
        )


def write_run(directory: Path, manifest: Manifest) -> tuple[Path, Path]:
    """Write `run.yaml` and a new `owner.key` into a folder, which is made if need be; their paths."""
    directory.mkdir(parents=True, exist_ok=True)
    run, key = directory / "run.yaml", directory / "owner.key"
    run.write_text(manifest.model_dump_json())
    Identity.generate().save(key)
    return run, key


def last_round(peer: LocalPeer) -> int:
    """The newest round that a peer has finished; -1 before the first."""
    lines: list[dict[str, Any]] = peer.history()
    return int(lines[-1]["round"]) if lines else -1
