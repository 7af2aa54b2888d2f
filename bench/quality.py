"""Loss at equal tokens: every codec and interval, `auto`, and what people would use instead, beside the bytes that it took.

Four peers take 300 inner steps of 8 x 128 bytes each, a byte-level Llama of 0.87 M parameters on the Python standard library.
Peers are real processes, which send over loopback; other systems' trainers are on hosts of their own, without limits. Peers have
the same keys in every run and draw the same samples in runs of one seed and interval, so that such rows differ by the setting
alone. The rows that figures need come first; their other seeds are taken while there is time. The references have the manifest's
default learning rates, as have the rows of hivemind and torchft; with those of `auto` they are in the table too. Longer budgets:
`bench.simulate`.
"""

from __future__ import annotations

import asyncio
import contextlib
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from bench import hosts, report, swarms
from bench.children import Child, child
from bench.report import Report
from bench.settings import AUTO, FP16, INT8, MUON, PEERS, SYNC, TUNED_MUON, TUNED_SYNC, Setting, made, settings
from bench.single import held_out_loss
from peer.outcome import newest_weights
from swarm.identity import Identity
from swarm.manifest import AdamW, DiLoCo, Manifest, Outer

STEPS, QUICK_STEPS = 300, 40
SEEDS = (0, 1, 2)
VALIDATION_SAMPLES = 1024
RUN_S, OTHER_S, START_S, EPOCH_S = 1200.0, 400.0, 240.0, 300.0
CODECS_WITHIN_S, SEEDS_WITHIN_S = 34 * 60.0, 62 * 60.0
GOAL_ROWS = (SYNC, MUON, AUTO, FP16, INT8)
KEYS = tuple(Identity.from_seed(bytes([index]) * 32) for index in range(PEERS))
FIRST_ROWS = (*GOAL_ROWS, TUNED_MUON)


@dataclass(frozen=True)
class Rival:
    """Another system's trainer, with AdamW inside: averaging every `interval` steps and this outer step on the difference."""

    name: str
    module: str
    interval: int
    outer: Outer = Outer()


RIVALS = (
    Rival("hivemind.Optimizer, AdamW, 10 local steps, fp16", "hivemind_peer", 10),
    Rival("torchft DiLoCo, AdamW, 10 steps, Nesterov 0.9", "torchft_peer", 10, Outer(lr=0.7, momentum=0.9)),
    Rival("torchft DiLoCo, AdamW, 10 steps, plain averaging", "torchft_peer", 10),
)


@dataclass(frozen=True)
class Taken:
    """One run: held-out loss of the final weights in nats per byte, and what all peers sent."""

    loss: float
    sent_bytes: float
    rounds: int
    wall_s: float


@dataclass
class Quality:
    """The sections; what some find, figures are made of."""

    folder: Path
    taken: dict[str, dict[int, Taken]] = field(default_factory=dict)
    started_s: float = field(default_factory=time.monotonic)

    @property
    def files(self) -> Path:
        """Tokenizer and shards, the same for all runs."""
        return self.folder / "files"

    async def goals(self, out: Report) -> None:
        """One run of each row that a figure needs."""
        for name in FIRST_ROWS:
            await self._train(out, name, SEEDS[0])

    async def codecs(self, out: Report) -> None:
        """The other codecs and intervals, one seed each."""
        names = [name for name in settings() if name not in FIRST_ROWS]
        for name in names[: out.choose(len(names), 1)]:
            if self._has_time(FP16, CODECS_WITHIN_S):
                await self._train(out, name, SEEDS[0])
            else:
                out.row("not run", what=name, why="no time left; alone: --only codecs")

    async def others(self, out: Report) -> None:
        """hivemind.Optimizer and torchft's DiLoCo, AdamW inside as they come, the same schedule and number of steps."""
        problem = hosts.unavailable()
        if problem:
            out.row("not run", what="hivemind.Optimizer, torchft DiLoCo", why=problem)
            return
        for rival in RIVALS[: out.choose(len(RIVALS), 1)]:
            await self._other(out, rival)

    async def seeds(self, out: Report) -> None:
        """Repeat the rows that figures need as long as there is time; then the figures."""
        for seed in () if out.quick else SEEDS[1:]:
            for name in GOAL_ROWS:
                if self._has_time(name, SEEDS_WITHIN_S):
                    await self._train(out, name, seed)
        self._rows(out)
        self._figures(out)

    async def _train(self, out: Report, name: str, seed: int) -> None:
        """Train with real peers."""
        steps = out.choose(STEPS, QUICK_STEPS)
        manifest = made(settings()[name], self.files, seed, steps)
        folder = self.folder / f"run-{sum(map(len, self.taken.values()))}"
        started = time.monotonic()
        outcome = await swarms.train(folder, manifest, self.files, PEERS, RUN_S, KEYS)
        wall_s = time.monotonic() - started
        snapshot = newest_weights(folder / "peer-0", manifest)
        loss = await asyncio.to_thread(held_out_loss, manifest, self.files, snapshot.state.theta, VALIDATION_SAMPLES)
        sent = sum(status["bytes_sent"] for status in outcome.statuses)
        tokens = outcome.histories[0][-1]["tokens_total"]
        self._note(out, name, seed, Taken(loss, sent, outcome.rounds, wall_s), tokens / manifest.planned_tokens)

    def _note(self, out: Report, name: str, seed: int, taken: Taken, done: float) -> None:
        self.taken.setdefault(name, {})[seed] = taken
        out.say(f"  {name}, seed {seed}: {taken.loss:.4f}, {taken.sent_bytes / 1e6:.2f} MB, {taken.wall_s:.0f} s")
        fields = {"loss": taken.loss, "sent_MB": taken.sent_bytes / 1e6, "rounds": taken.rounds, "wall_s": taken.wall_s}
        out.row("runs", setting=name, seed=seed, **fields, share_of_tokens=done)

    async def _other(self, out: Report, rival: Rival) -> None:
        """Train with another system, each trainer on a host of its own; a failure is a row, not the end."""
        steps = out.choose(STEPS, QUICK_STEPS)
        try:
            taken = await asyncio.wait_for(self._run_other(rival, steps), OTHER_S)
        except (RuntimeError, TimeoutError, OSError) as error:
            out.row("not run", what=rival.name, why=" ".join(str(error).split())[-300:] or type(error).__name__)
            return
        self._note(out, rival.name, SEEDS[0], taken, 1.0)

    async def _run_other(self, rival: Rival, steps: int) -> Taken:
        manifest = _with_adamw(made(Setting("fp16", rival.interval), self.files, SEEDS[0], steps), rival.outer)
        folder = self.folder / f"other-{RIVALS.index(rival)}"
        folder.mkdir()
        path = folder / "manifest.json"
        path.write_text(manifest.model_dump_json())
        started = time.monotonic()
        async with contextlib.AsyncExitStack() as stack:
            made_hosts = stack.enter_context(hosts.hosts([hosts.Link()] * PEERS))
            trainers: list[Child] = []
            common = {"manifest": str(path), "files": str(self.files), "peers": PEERS, "steps": steps, "mode": "local-tuned"}
            common |= {"scheduled": True, "meeting": made_hosts[0].address}
            addresses: list[str] = []
            for index, host in enumerate(made_hosts):
                record = str(folder / "weights") if index == 0 else None
                own = {"rank": index, "name": str(index), "address": host.address, "device": host.device, "record": record}
                process = child(
                    rival.module, folder / f"{index}.log", prefix=host.prefix, initial_peers=addresses, **own, **common
                )
                trainers.append(await stack.enter_async_context(process))
                hello = await trainers[-1].receive(START_S)
                addresses = addresses or hello.get("addresses", [])
            for trainer in trainers:
                await trainer.tell("go")
            rounds = await asyncio.gather(*(_until(trainer, steps) for trainer in trainers))
            sent = sum(host.counters()[0] for host in made_hosts)
        theta = np.load(folder / "weights" / f"round-{rounds[0]}.npy")
        loss = await asyncio.to_thread(held_out_loss, manifest, self.files, theta, VALIDATION_SAMPLES)
        return Taken(loss, sent, rounds[0], time.monotonic() - started)

    def _has_time(self, name: str, within_s: float) -> bool:
        """Whether another run that takes as long as this row's still ends in time; what was never taken does."""
        expected_s = max((taken.wall_s for taken in self.taken.get(name, {}).values()), default=0.0)
        return time.monotonic() - self.started_s + expected_s <= within_s

    def _rows(self, out: Report) -> None:
        """Loss against bytes, from the most to the least traffic."""
        reference = self.taken.get(SYNC, {})
        points = {}
        for name, runs in sorted(self.taken.items(), key=lambda item: -_mean_bytes(item[1])):
            losses = [taken.loss for taken in runs.values()]
            spread = max(losses) - min(losses)
            sent = _mean_bytes(runs)
            fields: dict[str, Any] = {"setting": name, "seeds": len(runs), "loss": statistics.mean(losses), "spread": spread}
            fields |= {
                "MB_per_peer": sent / PEERS / 1e6,
                "share_of_sync_bytes": sent / _mean_bytes(reference) if reference else None,
            }
            out.row("loss against bytes", **fields)
            points[name] = [(taken.sent_bytes / PEERS / 1e6, taken.loss) for taken in runs.values()]
        out.plot("loss against bytes", points, x="MB sent per peer", y="held-out loss, nats per byte", log="x")

    def _figures(self, out: Report) -> None:
        self._ratio(out, "auto_over_sync_validation_loss", AUTO, SYNC, "<= 1.0")
        self._ratio(out, "auto_over_muon_sync_validation_loss", AUTO, MUON, "<= 1.06")
        self._ratio(out, "auto_over_tuned_sync_validation_loss", AUTO, TUNED_SYNC, "")
        self._ratio(out, "auto_over_tuned_muon_sync_validation_loss", AUTO, TUNED_MUON, "")
        self._ratio(out, "int8_over_fp16_validation_loss", INT8, FP16, "<= 1.005")
        self._share(out)
        for system in ("hivemind", "torchft"):
            names = [name for name in self.taken if name.startswith(system)]
            if names and AUTO in self.taken:
                best = min(names, key=lambda name: self.taken[name][SEEDS[0]].loss)
                self._ratio(out, f"auto_over_{system}_validation_loss", AUTO, best, "<= 1.0")
                share = _mean_bytes(self.taken[AUTO]) / _mean_bytes(self.taken[best])
                out.figure(
                    f"auto_over_{system}_bytes", share, f"bytes of `auto` over those of `{best}`, by its hosts' interfaces"
                )

    def _share(self, out: Report) -> None:
        seeds = self._common(AUTO, SYNC)
        if seeds:
            ours, theirs = (sum(self.taken[row][seed].sent_bytes for seed in seeds) for row in (AUTO, SYNC))
            how = (
                f"all that peers sent to peers, framing and signed messages included, over the same of fp16 `sync`; seeds {seeds}"
            )
            out.figure("auto_over_sync_bytes", ours / theirs, how, "<= 0.03")

    def _ratio(self, out: Report, name: str, ours: str, theirs: str, goal: str) -> None:
        seeds = self._common(ours, theirs)
        if not seeds:
            return
        above, below = (statistics.mean(self.taken[row][seed].loss for seed in seeds) for row in (ours, theirs))
        how = f"{above:.4f} of `{ours}` / {below:.4f} of `{theirs}`, on {VALIDATION_SAMPLES} held-out samples, seeds {seeds}"
        out.figure(name, above / below, how, goal)

    def _common(self, first: str, second: str) -> list[int]:
        return sorted(self.taken.get(first, {}).keys() & self.taken.get(second, {}).keys())


def _mean_bytes(runs: Mapping[int, Taken]) -> float:
    return statistics.mean(taken.sent_bytes for taken in runs.values())


def _with_adamw(manifest: Manifest, outer: Outer) -> Manifest:
    strategy = manifest.strategy
    if not isinstance(strategy, DiLoCo):
        raise TypeError("the comparison is with diloco")
    return manifest.model_copy(update={"strategy": strategy.model_copy(update={"inner": AdamW(), "outer": outer})})


async def _until(trainer: Child, steps: int) -> int:
    """Wait until a trainer has done its steps; how many synchronisations that took."""
    while True:
        note = await trainer.receive(EPOCH_S)
        if note.get("steps", 0) >= steps:
            return int(note["round"])


def main(argv: Sequence[str] | None = None) -> int:
    """Measure."""
    with report.workspace() as folder:
        parts = Quality(folder)
        sections: dict[str, report.Section] = {
            "goals": parts.goals,
            "others": parts.others,
            "codecs": parts.codecs,
            "seeds": parts.seeds,
        }
        return report.run("quality", __doc__, sections, argv)


if __name__ == "__main__":
    sys.exit(main())
