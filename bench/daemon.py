"""What a volunteer notices: how soon a peer takes part, what the daemon costs beside bare PyTorch, what a pause leaves behind."""

from __future__ import annotations

import asyncio
import statistics
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from torch import nn
from torch.nn import functional

from bench import report, swarms
from bench.report import Report
from bench.single import one_thread, open_shards
from peer.model import build_model
from peer.optimizer import lr_factor, make_inner
from peer.recipes import demo_manifest
from swarm.local import LocalPeer, LocalSwarm
from swarm.manifest import DiLoCo, Manifest

POLL_S = 0.1
JOIN_S, ROUND_S, PAUSE_S = 180.0, 120.0, 120.0
LONG_ROUND_STEPS = 240  # a minute or so on two cores, as rounds between homes last
RESTING_CORE_FRACTION = 0.5
OVER_BARE = (
    f"tokens/s of the daemon's rounds ({LONG_ROUND_STEPS} inner steps each, all included) / tokens/s of a bare transformers loop "
    "with the same optimizer and batches, one thread each"
)
SETTLE_S = 6.0


@dataclass
class Daemons:
    """The sections; all use the demo's model."""

    folder: Path

    def manifest(self, inner_steps: int) -> Manifest:
        """The demo's run, for one peer and more, without an end."""
        made = demo_manifest(self.folder / "files", peers=1, rounds=1000, inner_steps=inner_steps, name="bench-daemon")
        return made.model_copy(update={"rounds": made.rounds.model_copy(update={"total": 0})})

    @asynccontextmanager
    async def run(self, name: str, inner_steps: int) -> AsyncIterator[tuple[LocalSwarm, LocalPeer, Manifest]]:
        """A coordinator and one peer that has finished a round."""
        manifest = self.manifest(inner_steps)
        async with swarms.coordinated(self.folder / name, manifest) as (swarm, _):
            peer = await swarm.join("first", "--files", str(self.folder / "files"))
            await until(lambda: counted(peer) > 0, peer, JOIN_S)
            yield swarm, peer, manifest

    async def join(self, out: Report) -> None:
        """From an empty folder to a receipt, several times: with the run's files at hand, and fetching them from another peer."""
        times = []
        manifest = self.manifest(20)
        for index in range(out.choose(3, 1)):
            async with swarms.coordinated(self.folder / f"alone-{index}", manifest) as (swarm, _):
                started = time.monotonic()
                peer = await swarm.join("volunteer", "--files", str(self.folder / "files"))
                await until(lambda peer=peer: counted(peer) > 0, peer, JOIN_S)
                times.append(time.monotonic() - started)
                out.row("joining", files="at hand", seconds=times[-1])
        how = f"`swarm join LINK --cpu` in an empty folder until its first round has a receipt; median of {len(times)}"
        out.figure("join_to_first_round_s", statistics.median(times), how, "<= 15")
        async with self.run("beside", 20) as (swarm, _, _):
            started = time.monotonic()
            peer = await swarm.join("newcomer")
            await until(lambda: counted(peer) > 0, peer, JOIN_S)
            beside_s = time.monotonic() - started
            out.row("joining", files="fetched from a peer", seconds=beside_s)
            out.figure(
                "join_beside_a_training_peer_s", beside_s, "the same, weights and data fetched from a peer that trains here"
            )

    async def overhead(self, out: Report) -> None:
        """The daemon and a bare loop by turns, so that both see the same machine."""
        ratios = [1 - ratio for ratio in await self.over_bare(out)]
        out.figure("overhead_fraction", statistics.median(ratios), f"1 - {OVER_BARE}; median of {len(ratios)} turns", "<= 0.02")

    async def over_bare(self, out: Report) -> list[float]:
        """Tokens per second of the daemon over those of a bare loop, turn by turn."""
        ratios = []
        async with self.run("overhead", LONG_ROUND_STEPS) as (_, peer, manifest):
            for _ in range(out.choose(5, 2)):
                lines = await rounds_more(peer, 3)
                await pause(peer)
                bare = await asyncio.to_thread(bare_tokens_per_s, manifest, self.folder / "files", LONG_ROUND_STEPS)
                await peer.ask("resume")
                ours = sum(line["tokens"] for line in lines) / sum(line["wall_s"] for line in lines)
                ratios.append(ours / bare)
                out.row("tokens/s", daemon=ours, bare=bare, ratio=ratios[-1])
        return ratios

    async def paused(self, out: Report) -> None:
        """Pause a peer in the middle of training beside another one, and see what is left of it."""
        async with self.run("paused", 20) as (swarm, _, _):
            peer = await swarm.join("guest")
            await until(lambda: counted(peer) > 1, peer, JOIN_S)
            releases = []
            for _ in range(out.choose(3, 1)):
                await until_state(peer, "training")
                releases.append(await release_s(peer))
                await until_state(peer, "paused")
                await asyncio.sleep(SETTLE_S)
                resting = psutil.Process(peer.process.pid)
                tree = [resting, *resting.children(recursive=True)]
                fraction, rss = await at_rest(tree, out.choose(30, 10))
                out.row("paused", release_s=releases[-1], cpu_fraction=fraction, rss_bytes=sum(rss), daemon_rss_bytes=rss[0])
                before = counted(peer)
                await peer.ask("resume")
                await until(lambda before=before: counted(peer) > before, peer, JOIN_S)
        rows = [row for row in out.rows if row["table"] == "paused"]
        how = "from asking for the pause to a free device and a process that takes less than half a core; the slowest"
        out.figure("pause_release_s", max(releases), how, "<= 2")
        how = "processor time of the paused peer and its network daemon, as a share of one core; median"
        out.figure("paused_cpu_fraction", statistics.median(row["cpu_fraction"] for row in rows), how, "<= 0.005")
        how = "resident memory of the paused peer and its network daemon together; the most"
        out.figure("paused_rss_bytes", max(row["rss_bytes"] for row in rows), how, "<= 4e8")


@one_thread()
def bare_tokens_per_s(manifest: Manifest, files: Path, steps: int) -> float:
    """Tokens per second of a training loop that knows nothing of a swarm."""
    strategy = manifest.strategy
    if not isinstance(strategy, DiLoCo):
        raise TypeError("the loop is that of diloco")
    reader = open_shards(manifest, files, manifest.data.train)
    network: Any = build_model(manifest.model, files).train()
    inner = make_inner(strategy.inner, network)
    generator = np.random.default_rng(0)
    started = time.perf_counter()
    for step in range(steps + 1):
        if step == 1:
            started = time.perf_counter()
        batch = reader.batch(generator.integers(0, len(reader), strategy.batch_samples))
        inner.zero_grad()
        logits = network(input_ids=batch[:, :-1], use_cache=False).logits
        loss = functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(network.parameters(), strategy.clip_norm)
        inner.set_factor(lr_factor(strategy.schedule, 0))
        for part in inner.parts:
            part.step()
        loss.item()
    return steps * strategy.batch_samples * manifest.data.sequence_length / (time.perf_counter() - started)


async def release_s(peer: LocalPeer) -> float:
    """Seconds from asking for a pause until the device is free and the process rests."""
    process = psutil.Process(peer.process.pid)
    started = time.monotonic()
    await peer.ask("pause")
    window = 5
    used = [processor_s(process)]
    while True:
        await asyncio.sleep(POLL_S)
        used.append(processor_s(process))
        resting = len(used) > window and used[-1] - used[-1 - window] < RESTING_CORE_FRACTION * window * POLL_S
        if resting and (await peer.status())["device_free"]:
            return time.monotonic() - started
        if time.monotonic() - started > PAUSE_S:
            raise RuntimeError("the pause didn't free the device")


async def at_rest(processes: list[psutil.Process], seconds: int) -> tuple[float, list[int]]:
    """Share of a core that processes take in that time, and the resident bytes of each."""
    before = sum(map(processor_s, processes))
    started = time.monotonic()
    await asyncio.sleep(seconds)
    used = sum(map(processor_s, processes)) - before
    return used / (time.monotonic() - started), [process.memory_info().rss for process in processes]


def processor_s(process: psutil.Process) -> float:
    """Processor time of a process so far."""
    times = process.cpu_times()
    return float(times.user + times.system)


def counted(peer: LocalPeer) -> int:
    """How many contributions have a receipt."""
    return len(list((peer.directory / "receipts").glob("*.receipt")))


async def rounds_more(peer: LocalPeer, count: int) -> list[dict[str, Any]]:
    """The next rounds that a peer contributes to, after one that warms it up."""
    start = len(contributions(peer)) + 1
    await until(lambda: len(contributions(peer)) >= start + count, peer, ROUND_S * count)
    return contributions(peer)[start : start + count]


def contributions(peer: LocalPeer) -> list[dict[str, Any]]:
    """Rounds in which the peer's work counted."""
    return [line for line in peer.history() if line["weight"]]


async def pause(peer: LocalPeer) -> None:
    """Pause and wait until it has taken effect."""
    await peer.ask("pause")
    await until_state(peer, "paused")


async def until_state(peer: LocalPeer, state: str) -> None:
    """Wait for a state that stays or begins. Raises `RuntimeError`."""
    deadline = time.monotonic() + PAUSE_S
    while True:
        status = await peer.status()
        if status.get("state") == state and not (state == "paused" and status["waits_for"]):
            return
        if time.monotonic() > deadline:
            raise RuntimeError(f"not {state} in time: {status.get('state')}")
        await asyncio.sleep(POLL_S / 2)


async def until(condition: Any, peer: LocalPeer, timeout_s: float) -> None:
    """Wait for a condition on a running peer. Raises `RuntimeError` with the end of its log."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if not peer.running or time.monotonic() > deadline:
            raise RuntimeError(f"{peer.name}: {peer.log()[-2000:]}")
        await asyncio.sleep(POLL_S)


def main() -> int:
    """Measure in a folder of its own."""
    with report.workspace() as folder:
        sections = Daemons(folder)
        return report.run("daemon", __doc__, {"join": sections.join, "paused": sections.paused, "overhead": sections.overhead})


if __name__ == "__main__":
    sys.exit(main())
