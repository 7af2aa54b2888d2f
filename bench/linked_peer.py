"""A peer of ours in a process of its own, for hosts with slow links: the daemon as it is, saying what every round took.

With `waiting` training is replaced by waiting, so that a round of any size can be played with little processor; everything
else is what `swarm join` runs. With `record` the weights after every round are kept for later evaluation.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import psutil
import torch

from bench.children import arguments, end_with_parent, say
from bench.swarms import peak_rss_bytes
from peer.buffers import buffers
from peer.checkpoints import Checkpoints
from peer.coordination import Coordination
from peer.daemon import Daemon, DaemonOptions, Parts
from peer.materials import Materials
from peer.model import initial_theta
from peer.network.node import Node
from peer.outer import OuterState, initial_state
from peer.rounds.engine import RoundReport
from peer.rounds.training import TrainingThread
from peer.sketch import Sketcher
from peer.state import Snapshot
from peer.trainer import Early, Progress, ShouldStop, TrainedUpdate, Trainer, Vector, ignore_progress, never_stop
from swarm.cli.output import configure_logging
from swarm.manifest import Manifest
from swarm.messages import JoinLink
from swarm.rpc.client import RunInfo

LOSS = 2.0
ROUND_SHIFT, RANK_SHIFT = 1_000_003, 7_919


@dataclass
class Prepared(Checkpoints):
    """Every peer has the state before the first round already, so that the start isn't spent on fetching it from one of them."""

    initial: Callable[[], OuterState] | None = None
    saves: bool = True

    def newest(self) -> Snapshot | None:
        """The newest state, or the one before the first round."""
        found = super().newest()
        return found if found is not None or self.initial is None else Snapshot.from_state(self.initial())

    def due(self) -> bool:
        """Never where nothing shall be saved."""
        return self.saves and super().due()

    async def save(self) -> None:
        """Save, or leave the disk out of it."""
        if self.saves:
            await super().save()


@dataclass
class Noting(Daemon):
    """The daemon, noting each round; weights go into the folder `record`, `round-N.npy`."""

    record: Path | None = None

    async def _on_round(self, report: RoundReport) -> None:
        await super()._on_round(report)
        if report.round_index == 0:
            return  # it has no training: it only waits until all are there
        snapshot = self.parts.snapshots.newest
        if self.record is not None and snapshot is not None:
            await asyncio.to_thread(np.save, self.record / f"round-{report.round_index}.npy", snapshot.state.theta)
        say(
            at_s=time.time(),
            round=report.round_index,
            root=report.root.hex(),
            roster=report.roster_size,
            weight=report.weight,
            tokens=report.tokens_total,
            wall_s=report.wall_s,
            overhead_s=report.overhead_s,
            computed_s=self.computed_s,
            processor_s=_processor_s(),
            peak_rss_bytes=peak_rss_bytes(os.getpid()),
            rss_bytes=psutil.Process().memory_info().rss,
        )

    def _wire(self, run: RunInfo, node: Node, coordination: Coordination, materials: Materials) -> Parts:
        parts = super()._wire(run, node, coordination, materials)
        plain = parts.checkpoints
        prepared = Prepared(plain.directory, plain.run_id, plain.layout, plain.snapshots, saves=self.saves)
        prepared.initial = lambda: self._first_state(run.manifest)
        return replace(parts, checkpoints=prepared)

    async def _initial(self) -> OuterState:
        return await asyncio.to_thread(self._first_state, self.parts.run.manifest)

    def _first_state(self, manifest: Manifest) -> OuterState:
        return initial_state(manifest.strategy, self.initial_weights(manifest))

    @property
    def saves(self) -> bool:
        """Whether checkpoints are written."""
        return True

    def initial_weights(self, manifest: Manifest) -> Vector:
        """The weights before the first round, [parameters]."""
        return initial_theta(manifest.model)

    @property
    def computed_s(self) -> float:
        """Seconds of emulated training so far; 0 where training is real."""
        return 0.0


class WaitingTrainer:
    """Waits `step_s` for every inner step; updates are those of the file `updates`, rotated by round and peer.

    So they differ: what was sent before would not be fetched again, as blobs are named by their content. The file is mapped
    and takes its memory once for all peers.
    """

    precision = "fp32"
    is_loaded = True

    def __init__(self, manifest: Manifest, step_s: float, updates: Path, rank: int) -> None:
        self._manifest = manifest
        self._step_s = step_s
        self._updates = np.load(updates, mmap_mode="r")
        self._rank = rank
        self._update: Vector = np.empty(0, dtype=np.float32)
        self.computed_s = 0.0

    def train_round(
        self,
        theta: Vector,
        round_number: int,
        peer_id: str,
        quota: int,
        tokens_so_far: int,
        should_stop: ShouldStop = never_stop,
        progress: Callable[[Progress], None] = ignore_progress,
        sketcher: Sketcher | None = None,
    ) -> TrainedUpdate:
        """Let the time of `quota` inner steps pass."""
        started, steps, stopped = time.monotonic(), 0, None
        self._prepare(round_number)
        while steps < quota and (stopped := should_stop()) is None:
            steps += self._wait(started, steps)
        return self._report(round_number, steps, time.monotonic() - started, stopped)

    def train_ahead(
        self,
        early: Early,
        round_number: int,
        peer_id: str,
        quota: int,
        tokens_so_far: int,
        should_stop: ShouldStop = never_stop,
        progress: Callable[[Progress], None] = ignore_progress,
    ) -> TrainedUpdate:
        """The same while the round before is still being exchanged; at the end of the quota its outcome is waited for."""
        started, steps, stopped, joined = time.monotonic(), 0, None, None
        self._prepare(round_number)
        while (stopped := should_stop()) is None:
            joined = joined or early.look()
            if steps < (joined.quota if joined is not None else quota):
                steps += self._wait(started, steps)
            elif joined is not None or early.wait(should_stop) is None:
                break
        if joined is None:
            steps = 0
        return self._report(round_number, steps, time.monotonic() - started - early.waited_s, stopped)

    def _prepare(self, round_number: int) -> None:
        """Make the update while the first steps are waited for: what a trainer has on its device when it has done them."""
        update, values = buffers.empty(self._updates.size), self._updates
        first = (round_number * ROUND_SHIFT + self._rank * RANK_SHIFT) % values.size
        update[:first], update[first:] = values[values.size - first :], values[: values.size - first]
        self._update = update

    def _wait(self, started_s: float, steps: int) -> int:
        """One inner step: a late awakening of this machine doesn't delay the steps after it."""
        time.sleep(max(0.0, started_s + (steps + 1) * self._step_s - time.monotonic()))
        self.computed_s += self._step_s
        return 1

    def _report(self, round_number: int, steps: int, seconds: float, stopped: str | None) -> TrainedUpdate:
        samples = steps * self._manifest.strategy.batch_samples
        tokens = samples * self._manifest.data.sequence_length
        update, self._update = self._update, np.empty(0, dtype=np.float32)
        return TrainedUpdate(update, samples, tokens, LOSS, LOSS, LOSS, seconds, steps, stopped=stopped)

    def release(self) -> None:
        """Nothing is held."""


@dataclass
class Waiting(Noting):
    """Instead of training it waits."""

    step_s: float = 1.0
    updates: Path = field(default_factory=Path)
    rank: int = 0
    trainer: WaitingTrainer | None = field(default=None)

    @property
    def computed_s(self) -> float:
        """Seconds of emulated training so far."""
        return self.trainer.computed_s if self.trainer is not None else 0.0

    @property
    def saves(self) -> bool:
        """The state is of no use afterwards."""
        return False

    def initial_weights(self, manifest: Manifest) -> Vector:
        """Zeros: there is no model."""
        return np.zeros(manifest.model.parameters, dtype=np.float32)

    def _make_trainer(self, manifest: Manifest, materials: Materials) -> TrainingThread:
        self.trainer = WaitingTrainer(manifest, self.step_s, self.updates, self.rank)
        return TrainingThread(cast("Trainer", self.trainer))


def _processor_s() -> float:
    """Processor time of this process and of its p2pd so far."""
    me = psutil.Process()
    used = [process.cpu_times() for process in (me, *me.children(recursive=True))]
    return float(sum(times.user + times.system for times in used))


async def main(given: dict[str, Any]) -> None:
    """Take part until the run is over."""
    directory = Path(given["directory"])
    options = DaemonOptions(
        link=JoinLink.parse(given["link"]),
        directory=directory,
        identity_path=directory / "identity.key",
        device=torch.device("cpu"),
        listen=f"{given['address']}:0",
        files=Path(given["files"]),
        threads=1,
    )
    torch.set_num_threads(1)
    daemon = cast("Noting", (Waiting if given["waiting"] else Noting).create(options))
    if isinstance(daemon, Waiting):
        waiting = given["waiting"]
        daemon.step_s, daemon.updates, daemon.rank = waiting["step_s"], Path(waiting["updates"]), waiting["rank"]
    if given["record"]:
        daemon.record = Path(given["record"])
        daemon.record.mkdir(parents=True, exist_ok=True)
    await daemon.serve()
    say(ended=True)


if __name__ == "__main__":
    configure_logging("info")
    end_with_parent()
    asyncio.run(main(arguments()))
