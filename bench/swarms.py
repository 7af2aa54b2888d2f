"""Training with a coordinator and real peers on this machine, for benchmarks: from a manifest to what every peer has noted."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from swarm.identity import Identity
from swarm.local import LocalPeer, LocalSwarm
from swarm.manifest import Manifest
from swarm.messages import JoinLink
from swarm.rpc.client import CoordinatorClient
from swarm.scenario import write_run

FIRST_MEASURED_ROUND = 2


@dataclass(frozen=True)
class Outcome:
    """A run that is over: `histories` and `statuses` by peer, as `history.jsonl` and `status.json` have them."""

    directory: Path
    manifest: Manifest
    histories: Sequence[Sequence[dict[str, Any]]]
    statuses: Sequence[dict[str, Any]]
    coordinator_start_s: float
    coordinator_rss_bytes: int

    def measured(self) -> Iterator[dict[str, Any]]:
        """Every peer's rounds, without the first, which includes warming up."""
        for lines in self.histories:
            yield from (line for line in lines if line["tokens"] and line["round"] >= FIRST_MEASURED_ROUND)

    @property
    def overheads_s(self) -> list[float]:
        """Wall time of a round minus the longest training time in it, for every peer and round after the first."""
        return [line["overhead_s"] for line in self.measured()]

    @property
    def differing(self) -> dict[int, list[str]]:
        """The rounds after which not all peers held the same state root, and what each of them had."""
        found: dict[int, list[str]] = {}
        for lines in self.histories:
            for line in lines:
                found.setdefault(line["round"], []).append(line["root"][:8])
        return {round_index: roots for round_index, roots in found.items() if len(set(roots)) > 1}

    @property
    def roots_differing(self) -> int:
        """After how many rounds not all peers held the same state root."""
        return len(self.differing)

    @property
    def rounds(self) -> int:
        """How many rounds somebody contributed to."""
        return len({line["round"] for lines in self.histories for line in lines if line["tokens"]})

    @property
    def round_p50_s(self) -> float:
        """The median wall time of a round."""
        return float(statistics.median(line["wall_s"] for line in self.measured()))


@asynccontextmanager
async def coordinated(directory: Path, manifest: Manifest) -> AsyncIterator[tuple[LocalSwarm, float]]:
    """A coordinator that answers, and how many seconds it took from starting its process to its first answer."""
    run, key = write_run(directory, manifest)
    async with LocalSwarm(directory) as swarm:
        started = time.monotonic()
        link = await swarm.start_coordinator(run, key)
        async with await CoordinatorClient.connect(JoinLink.parse(link)) as client:
            await client.progress()
        yield swarm, time.monotonic() - started


async def train(
    directory: Path, manifest: Manifest, files: Path, peers: int, timeout_s: float, keys: Sequence[Identity] = ()
) -> Outcome:
    """Train `manifest` to its last round with `peers` peers of one thread each, with new keys or the first of `keys`.

    Raises `RuntimeError` if one of them fails.
    """
    async with coordinated(directory, manifest) as (swarm, start_s):
        for index in range(peers):
            if index < len(keys):
                keys[index].save(directory / f"peer-{index}" / "identity.key")
            await swarm.join(f"peer-{index}", "--files", str(files))
        await asyncio.wait_for(asyncio.gather(*(peer.wait() for peer in swarm.peers)), timeout_s)
        _check(swarm.peers)
        rss_bytes = peak_rss_bytes(swarm.coordinator.pid) if swarm.coordinator is not None else 0
        statuses = [await peer.status() for peer in swarm.peers]
        return Outcome(directory, manifest, [peer.history() for peer in swarm.peers], statuses, start_s, rss_bytes)


def peak_rss_bytes(pid: int) -> int:
    """The most memory that a running process has had resident so far."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"no VmHWM for process {pid}")


def processor_s(pid: int) -> float:
    """The processor time that a running process has used so far."""
    used = psutil.Process(pid).cpu_times()
    return float(used.user + used.system)


def _check(peers: Sequence[LocalPeer]) -> None:
    for peer in peers:
        if peer.process.returncode:
            raise RuntimeError(f"{peer.name} ended with {peer.process.returncode}: {peer.log()[-2000:]}")
