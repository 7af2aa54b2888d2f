"""A swarm of real processes with faults: for scenario tests and the fault benchmark.

Peers' keys are made beforehand, so that a script can name the leader of a round. Invariants are read from what the peers and the
ledger wrote, never from what a test assumes.
"""

from __future__ import annotations

import asyncio
import signal
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from swarm.identity import Identity
from swarm.ledger import open_manifest
from swarm.local import LocalPeer, LocalSwarm
from swarm.manifest import Manifest
from swarm.messages import JoinLink, parse
from swarm.rpc.client import CoordinatorClient
from swarm.rpc.v1.coordinator_pb2 import SubmitReportRequest
from swarm.rpc.v1.ledger_pb2 import Report
from swarm.rpc.v1.signed_pb2 import Commit

POLL_S = 0.05
FINISH_S = 120.0
LAST_WORDS = 1500
REPORT_FOLDERS = ("posted", "outbox", "refused")


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
        self,
        count: int,
        faults: Mapping[str, str] | None = None,
        options: Mapping[str, tuple[str, ...]] | None = None,
        prefix: Sequence[str] = (),
    ) -> None:
        """Start the coordinator and peers `p0`, `p1`, ..., some with a fault script or options of their own.

        `prefix` stands before each peer's command.
        """
        await self.swarm.start_coordinator(self.source / "run.yaml", self.source / "owner.key")
        for index in range(count):
            name = f"p{index}"
            await self.join(name, *(options or {}).get(name, ()), faults=(faults or {}).get(name, ""), prefix=prefix)

    async def join(
        self,
        name: str,
        *options: str,
        faults: str = "",
        program: Sequence[str] = (),
        prefix: Sequence[str] = (),
        address: str = "127.0.0.1",
        with_files: bool = True,
    ) -> LocalPeer:
        """Start a peer, or start it again in the folder that it had; without files it fetches the run's data from the others."""
        if name in self.peers:
            self.retired.append(self.peers[name])
        files = ("--files", str(self.source / "files")) if with_files else ()
        extra = {"SWARM_FAULTS": faults}
        self.peers[name] = await self.swarm.join(
            name, *files, *options, environment=extra, program=program, prefix=prefix, address=address
        )
        return self.peers[name]

    async def restart_coordinator(self) -> None:
        """Start it again, at the same address and from what it has on disk."""
        listen = f"{self.link.host}:{self.link.port}"
        await self.swarm.start_coordinator(self.source / "run.yaml", self.source / "owner.key", listen=listen)

    async def kill(self, name: str) -> LocalPeer:
        """End a peer as a power cut would, and see it gone."""
        peer = self.peers[name]
        peer.signal(signal.SIGKILL)
        await peer.wait(FINISH_S)
        return peer

    async def finish_all(self) -> None:
        """Everybody completes a round and posts what is left."""
        for peer in self.live():
            await peer.ask("finish")
        for peer in self.peers.values():
            await peer.wait(FINISH_S)

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

    async def earned(self) -> dict[str, int]:
        """FLOPs of the reports that each peer has signed, whatever has become of them."""
        manifest = await self.manifest()
        per_sample = manifest.tokens_per_weight * manifest.credit.flops_per_token
        return {self.identity(name).peer_id: reported_weight(peer) * per_sample for name, peer in self.peers.items()}

    async def worked(self) -> dict[str, int]:
        """FLOPs of the rounds that each peer has finished, by its own history."""
        manifest = await self.manifest()
        per_sample = manifest.tokens_per_weight * manifest.credit.flops_per_token
        return {
            self.identity(name).peer_id: sum(int(line["weight"]) for line in peer.history()) * per_sample
            for name, peer in self.peers.items()
        }

    async def wrong_credits(self) -> dict[str, tuple[int, int]]:
        """Peers whose credit isn't what they have earned: both, in FLOPs."""
        credit, earned = await self.credit(), await self.earned()
        return {peer: (credit.get(peer, 0), flops) for peer, flops in earned.items() if credit.get(peer, 0) != flops}

    async def manifest(self) -> Manifest:
        """The run's manifest, from the coordinator."""
        async with await CoordinatorClient.connect(self.link) as client:
            run = await client.get_run()
        return open_manifest(run.signed_manifest, run.run_id)

    def summary(self) -> str:
        """Where everybody is, for messages; of those that ended, their last words."""
        return ", ".join(f"{peer.name} {_whereabouts(peer)}" for peer in self.peers.values())


def _whereabouts(peer: LocalPeer) -> str:
    if peer.running:
        return f"round {last_round(peer)}"
    return f"ended with {peer.process.returncode}: {peer.log()[-LAST_WORDS:]}"


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


@dataclass(frozen=True)
class Footprint:
    """What a peer's process takes of its machine after a round, its network daemon aside."""

    round_index: int
    memory_bytes: int
    descriptors: int
    threads: int


def footprint(peer: LocalPeer) -> Footprint:
    """What it takes now."""
    process = psutil.Process(peer.process.pid)
    return Footprint(last_round(peer), process.memory_info().rss, process.num_fds(), process.num_threads())


async def soak(swarm: Scenario, rounds: int, samples: int) -> dict[str, list[Footprint]]:
    """Let rounds pass and look at every live peer so many times."""
    seen: dict[str, list[Footprint]] = defaultdict(list)
    for _ in range(samples):
        await swarm.until_rounds_more(max(1, rounds // samples))
        for peer in swarm.live():
            seen[peer.name].append(footprint(peer))
    return dict(seen)


def growth(values: Sequence[int]) -> float:
    """What the last third of samples has more than the first: medians, so that a passing peak doesn't count."""
    third = max(1, len(values) // 3)
    return statistics.median(values[-third:]) - statistics.median(values[:third])


def last_contribution(peer: LocalPeer) -> int:
    """The newest round in which a peer's update counted; -1 before the first."""
    return max((int(line["round"]) for line in peer.history() if line["weight"]), default=-1)


def reported_weight(peer: LocalPeer) -> int:
    """Samples behind all reports that a peer has signed."""
    reports = {path.name: path for folder in REPORT_FOLDERS for path in (peer.directory / folder).glob("*.pb")}
    return sum(_weight_of(path.read_bytes()) for path in reports.values())


def _weight_of(request: bytes) -> int:
    claim = parse(Report, parse(SubmitReportRequest, request).report.payload)
    return parse(Commit, claim.commit.payload).weight
