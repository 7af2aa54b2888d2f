"""Who is first at a validation loss over home uplinks: the swarm with several codecs, and what people would use instead.

Four trainers, each on a host of its own, train a byte-level model of 0.87 M parameters. Links are scaled so that computing and
traffic stand to each other as for 124 M parameters at 2 s a step: where a step takes T seconds with all four on this machine, a
link has (0.87 / 124) x (2 / T) of its real rate. Weights are stored after every round and evaluated afterwards, so that
evaluation takes none of the time.
"""

from __future__ import annotations

import asyncio
import contextlib
import statistics
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from bench import hosts, linked
from bench.children import Child, child
from bench.hosts import MBIT, Host, Link
from bench.report import Report
from bench.single import held_out_loss
from peer.recipes import demo_manifest
from swarm import auto
from swarm.manifest import UNAUDITED, AdamW, Manifest, Muon

REAL_PARAMETERS, REAL_STEP_S = 124_000_000, 2.0
STEPS, STEPS_QUICK = 160, 60
INNER_STEPS = 10
BATCH_SAMPLES = 8
VALIDATION_SAMPLES = 512
BELOW_ALONE = 0.1
BOUND_OVER_OURS = 10.5
START_S, NOTE_S = 300.0, 3600.0
AVERAGING_S = 600.0
GRACE_S = 20.0
RIVAL_STEPS, SELDOM = 3, 40
HIVEMIND_ALWAYS = "hivemind.Optimizer, every step"
HIVEMIND_OFTEN = f"hivemind.Optimizer, every {INNER_STEPS}"
HIVEMIND_SELDOM = f"hivemind.Optimizer, every {SELDOM}"
RENDEZVOUS_PORT = 29500
AUTO = "auto"


@dataclass(frozen=True)
class Point:
    """Weights as they were so many seconds after the start."""

    seconds: float
    steps: int
    weights: Path


@dataclass(frozen=True)
class Curve:
    """What trainer 0 of a row kept, in order; `seconds` until it was stopped or had no steps left."""

    points: Sequence[Point]
    seconds: float
    sent_bytes_per_round: float
    computed_s: float = 0.0


@dataclass(frozen=True)
class Reached:
    """When a row had the loss; where it never had it, `seconds` is None and `at_least_s` how long it tried."""

    seconds: float | None
    at_least_s: float
    loss: float | None

    @property
    def time_s(self) -> float:
        """When it had the loss, or how long it tried."""
        return self.at_least_s if self.seconds is None else self.seconds


@dataclass(frozen=True)
class Row:
    """One way to train: who, how, and whether it is ours."""

    name: str
    ours: bool
    what: str
    module: str = "linked_peer"
    manifest: Manifest | None = None
    given: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class Race:
    """The section of the benchmark."""

    folder: Path
    peers: int
    real: Link
    steps: int = STEPS
    target: float = 0.0
    step_s: float = 0.0
    link: Link = field(default_factory=Link)
    losses: dict[str, list[tuple[float, float]]] = field(default_factory=dict)

    @property
    def files(self) -> Path:
        """Tokenizer and shards."""
        return self.folder / "files"

    async def run(self, out: Report) -> None:
        """All rows: first ours that spend their time computing, then together all that wait for their links."""
        problem = hosts.unavailable()
        if problem:
            raise RuntimeError(problem)
        self.steps = out.choose(STEPS, STEPS_QUICK)
        self.folder.mkdir(parents=True, exist_ok=True)
        await self._alone(out)
        found: dict[str, tuple[Row, Reached]] = {}
        for row in self._busy_rows(out):
            out.say(f"  {row.name}")
            found[row.name] = (row, await self._judge(out, row, await self._race(row, NOTE_S)))
        times = [reached.seconds for _, reached in found.values() if reached.seconds is not None]
        bound_s = BOUND_OVER_OURS * min(times, default=max(reached.time_s for _, reached in found.values()))
        waiting = self._waiting_rows(out)
        out.say(f"  side by side, for at most {bound_s:.0f} s: {', '.join(row.name for row in waiting)}")
        curves = await asyncio.gather(*(self._race(row, bound_s) for row in waiting), return_exceptions=True)
        for row, curve in zip(waiting, curves, strict=True):
            if isinstance(curve, BaseException):
                out.row("first to the loss", kind=row.name, what=f"can't be run: {str(curve)[-300:]}")
                continue
            found[row.name] = (row, await self._judge(out, row, curve))
        self._figures(out, found)
        out.plot("loss over time", self.losses, x="seconds of training", y="held-out loss, nats per byte", log="x")

    # --- what is aimed at -----------------------------------------------------------------------------------------------

    async def _alone(self, out: Report) -> None:
        """Four processes at once that don't cooperate: how long a step takes, and the loss to get below."""
        out.say("  alone")
        manifest = self._changed(Muon(), self.steps, trainers=1)
        path, every = self._write("alone", manifest), self.steps // 4
        async with AsyncExitStack() as stack:
            started = []
            for index in range(self.peers):
                process = child(
                    "alone_peer",
                    self.folder / f"alone-{index}.log",
                    manifest=path,
                    files=str(self.files),
                    name=f"alone-{index}",
                    record=str(self.folder / f"alone-{index}"),
                    steps=self.steps,
                    every=every,
                )
                started.append(await stack.enter_async_context(process))
            await _ready(started)
            curves = await asyncio.gather(*(_follow(each, self.folder / f"alone-{index}") for index, each in enumerate(started)))
        step_s = self.step_s = statistics.mean(curve.computed_s / curve.points[-1].steps for curve in curves)
        losses = [await self._loss(curve.points[-1].weights) for curve in curves]
        self.target = min(losses) - BELOW_ALONE
        parameters = manifest.model.parameters
        scale = parameters / REAL_PARAMETERS * REAL_STEP_S / step_s
        self.link = Link(round(self.real.up_bit_s * scale), round(self.real.down_bit_s * scale))
        out.figure("step_s", step_s, f"an inner step of 8 x 128 bytes, {self.peers} processes of one thread at once")
        how = f"best of {self.peers} processes that don't cooperate: Muon, {self.steps} steps each, on its own samples"
        out.figure("alone_validation_loss", min(losses), how)
        out.figure("target_validation_loss", self.target, f"alone_validation_loss less {BELOW_ALONE}, nats per byte")
        how = f"uplink of each host: 20 Mbit/s x ({parameters / 1e6:.2f} / 124) x (2 s / step_s); its downlink has 5 times that"
        out.figure("scaled_up_bit_s", self.link.up_bit_s, how)

    # --- who takes part -------------------------------------------------------------------------------------------------

    def _busy_rows(self, out: Report) -> list[Row]:
        """Ours that spend much of their time computing: they have the machine for themselves."""
        return [
            self._auto(out),
            self._ours("int4", "off"),
            self._ours("int4", "on"),
            self._ours("int2", "on"),
            self._ours("sparse", "off"),
        ]

    def _waiting_rows(self, out: Report) -> list[Row]:
        """Rows that mostly wait for their links; the others' trainers get as many steps as they have time for."""
        every_step = self._changed(AdamW(), self.steps, inner_steps=1)
        often = self._changed(AdamW(), self.steps * RIVAL_STEPS, inner_steps=INNER_STEPS)
        seldom = self._changed(AdamW(), self.steps * RIVAL_STEPS, inner_steps=SELDOM)
        averaging = "averaged parameters in fp16 after every {} local AdamW steps; told the group's size"
        rows = [
            self._ours("fp16", "off"),
            self._ours("int8", "off"),
            Row("sync, fp16", True, "gradients of AdamW averaged at every step", manifest=self._sync()),
            Row(
                HIVEMIND_ALWAYS,
                False,
                "its default: averaged gradients in fp16, target batch of 4 x 8; told the group's size",
                "hivemind_peer",
                every_step,
                {"mode": "gradients-tuned"},
            ),
            Row(HIVEMIND_OFTEN, False, averaging.format(INNER_STEPS), "hivemind_peer", often, {"mode": "local-tuned"}),
            Row(HIVEMIND_SELDOM, False, averaging.format(SELDOM), "hivemind_peer", seldom, {"mode": "local-tuned"}),
            Row("gloo DDP", False, "AdamW, gradients averaged by its fp16 hook at every step", "ddp_peer", every_step),
        ]
        if find_spec("torchft") is None:
            out.row("first to the loss", kind="torchft DiLoCo", what="torchft isn't installed: pip install torchft")
            return rows
        plain = "outer SGD with rate 1: plain averaging, which does better at this budget than its textbook values"
        return [*rows, Row("torchft DiLoCo", False, f"AdamW, fp32 every {INNER_STEPS} steps, {plain}", "torchft_peer", often)]

    def _auto(self, out: Report) -> Row:
        """What `auto` makes of the model, the budget and these links."""
        base = self._base
        draft = auto.Draft(
            parameters=base.model.parameters,
            sequence_length=base.data.sequence_length,
            tokens=self._step_tokens * self.steps,
            batch_samples=BATCH_SAMPLES,
            peers=self.peers,
            upload_mbit=self.link.up_bit_s / MBIT,
            download_mbit=self.link.down_bit_s / MBIT,
            step_s=self.step_s,
        )
        plan = auto.plan(draft)
        for reason in plan.why:
            out.say(f"    {reason}")
        values = plan.applied(base.model_dump(mode="json"))
        values["rounds"] |= {"scale_to_speed": False, "grace_floor_s": GRACE_S}
        return Row(AUTO, True, "; ".join(plan.why), manifest=Manifest.model_validate(values))

    def _ours(self, codec: str, overlap: str) -> Row:
        manifest = self._changed(Muon(), self.steps, codec={"kind": codec}, overlap=overlap)
        name = f"swarm, {codec} every {INNER_STEPS}" + (", overlap" if overlap == "on" else "")
        return Row(name, True, f"Muon inside, {codec} outside, overlap {overlap}", manifest=manifest)

    def _sync(self) -> Manifest:
        made = demo_manifest(
            self.files,
            peers=self.peers,
            batch_samples=BATCH_SAMPLES,
            rounds=self.steps,
            strategy="sync",
            name="bench-links",
        )
        rounds = made.rounds.model_copy(update={"scale_to_speed": False, "grace_floor_s": GRACE_S})
        return made.model_copy(update={"rounds": rounds})

    def _changed(
        self,
        inner: AdamW | Muon,
        steps: int,
        *,
        trainers: int | None = None,
        inner_steps: int = INNER_STEPS,
        codec: Mapping[str, Any] | None = None,
        overlap: str = "off",
    ) -> Manifest:
        """The run with so many steps per trainer, its schedule as long as they are; nobody audits, as in short runs of `auto`."""
        base = self._base
        tokens = (trainers or self.peers) * steps * BATCH_SAMPLES * base.data.sequence_length
        values = base.model_dump(mode="json")
        values["strategy"] |= {"inner": inner.model_dump(), "inner_steps": inner_steps, "overlap": overlap}
        values["strategy"]["schedule"] |= {"total_tokens": tokens}
        values["rounds"] |= {"total": steps // inner_steps, "scale_to_speed": False, "grace_floor_s": GRACE_S}
        values["codec"] = dict(codec or {})
        values["audit"] |= UNAUDITED
        return Manifest.model_validate(values)

    @cached_property
    def _base(self) -> Manifest:
        return demo_manifest(self.files, peers=self.peers, batch_samples=BATCH_SAMPLES, name="bench-links")

    # --- running them ---------------------------------------------------------------------------------------------------

    async def _race(self, row: Row, bound_s: float) -> Curve:
        """Train until the row has no steps left or the time is up."""
        folder = self.folder / row.name.replace(" ", "-")
        folder.mkdir()
        if row.manifest is None:
            raise RuntimeError(f"{row.name} has no manifest")
        if row.module == "linked_peer":
            async with linked.running(folder, row.manifest, self.files, [self.link] * self.peers, record=True) as swarm:
                return await _follow(swarm.peers[0], folder / "weights", swarm.hosts[0], bound_s, self._step_tokens)
        async with self._rivals(folder, row) as (made, trainers):
            return await _follow(trainers[0], folder / "weights", made[0], bound_s)

    @asynccontextmanager
    async def _rivals(self, folder: Path, row: Row) -> AsyncIterator[tuple[Sequence[Host], Sequence[Child]]]:
        """Trainers of another system, each on its host, all of them told to begin."""
        manifest = row.manifest or self._base
        given: dict[str, Any] = {
            **{"manifest": self._write(row.name, manifest), "files": str(self.files), "peers": self.peers, "device": "eth0"},
            **{"steps": manifest.rounds.total * manifest.phase(1).inner_steps, "scheduled": True},
            **{"averaging_timeout_s": AVERAGING_S, **row.given},
        }
        async with AsyncExitStack() as stack:
            made = stack.enter_context(hosts.hosts([self.link] * self.peers))
            meeting = f"{made[0].address}:{RENDEZVOUS_PORT}" if row.module == "ddp_peer" else made[0].address
            addresses: list[str] = []
            trainers: list[Child] = []
            for index, host in enumerate(made):
                process = child(
                    row.module,
                    folder / f"{index}.log",
                    prefix=host.prefix,
                    **given,
                    name=f"trainer-{index}",
                    rank=index,
                    address=host.address,
                    meeting=meeting,
                    initial_peers=addresses,
                    record=str(folder / "weights") if index == 0 else None,
                )
                trainers.append(await stack.enter_async_context(process))
                if row.module == "hivemind_peer" and not addresses:
                    addresses = (await trainers[0].receive(START_S))["addresses"]
            await _ready(trainers[1:] if addresses else trainers, [] if not addresses else trainers[:1])
            yield made, trainers

    def _write(self, name: str, manifest: Manifest) -> str:
        path = self.folder / f"{name.replace(' ', '-')}.json"
        path.write_text(manifest.model_dump_json())
        return str(path)

    @property
    def _step_tokens(self) -> int:
        return self.peers * BATCH_SAMPLES * self._base.data.sequence_length

    # --- what came of it ------------------------------------------------------------------------------------------------

    async def _judge(self, out: Report, row: Row, curve: Curve) -> Reached:
        """Find the first weights that have the loss, by halving: losses fall but for noise."""
        low, high = 0, len(curve.points)
        losses: dict[int, float] = {}
        if curve.points:
            losses[high - 1] = await self._loss(curve.points[-1].weights)
            low = high if losses[high - 1] > self.target else 0
        while low < high:
            middle = (low + high) // 2
            losses[middle] = losses.get(middle) or await self._loss(curve.points[middle].weights)
            low, high = (low, middle) if losses[middle] <= self.target else (middle + 1, high)
        self.losses[row.name] = [(curve.points[index].seconds, loss) for index, loss in losses.items()]
        done = low < len(curve.points)
        point = curve.points[low if done else -1] if curve.points else None
        index = low if done else len(curve.points) - 1
        reached = Reached(point.seconds if done and point else None, curve.seconds, losses.get(index))
        out.row(
            "first to the loss",
            kind=row.name,
            seconds=reached.seconds,
            at_least_s=None if done else reached.at_least_s,
            loss=reached.loss,
            steps=point.steps if point else 0,
            rounds=len(curve.points),
            whole_s=curve.seconds,
            sent_MB_per_round=curve.sent_bytes_per_round / 1e6,
            what=row.what,
        )
        return reached

    async def _loss(self, weights: Path) -> float:
        theta = await asyncio.to_thread(np.load, weights)
        return await asyncio.to_thread(held_out_loss, self._base, self.files, theta, VALIDATION_SAMPLES)

    def _figures(self, out: Report, found: Mapping[str, tuple[Row, Reached]]) -> None:
        times = {name: reached.seconds for name, (row, reached) in found.items() if row.ours and reached.seconds is not None}
        if not times:
            raise RuntimeError("none of ours has reached the loss")
        name = AUTO if AUTO in times else min(times, key=lambda item: times[item])
        how = (
            f"{self.peers} trainers in network namespaces, links scaled (see scaled_up_bit_s), from the start of training to the "
            f"first synchronised weights with {self.target:.3f} nats per byte on {VALIDATION_SAMPLES} held-out samples, "
            "evaluated afterwards"
        )
        out.figure("time_to_loss_s", times[name], f"{name}: {how}")
        others = {name: reached for name, (row, reached) in found.items() if not row.ours}
        hivemind = {name: reached for name, reached in others.items() if name in (HIVEMIND_ALWAYS, HIVEMIND_OFTEN)}
        if hivemind:
            _speedup(out, "time_to_loss_speedup_over_hivemind", hivemind, name, times[name], ">= 10")
        if others:
            _speedup(out, "time_to_loss_speedup_over_best_other", others, name, times[name], ">= 1.5")


def _speedup(out: Report, figure: str, rows: Mapping[str, Reached], ours: str, seconds: float, goal: str) -> None:
    """The time of the fastest of these rows over ours; one that never had the loss counts with the time that it tried."""
    best = min(rows, key=lambda item: rows[item].time_s)
    bound = "" if rows[best].seconds is not None else "at least, as it ended without having reached the loss: "
    out.figure(figure, rows[best].time_s / seconds, f"{bound}time of {best} over that of {ours}, best of {', '.join(rows)}", goal)


async def _ready(waiting: Sequence[Child], others: Sequence[Child] = ()) -> None:
    """Wait until these say that they are ready, then tell them and `others` to begin."""
    for each in waiting:
        await each.receive(START_S)
    for each in (*others, *waiting):
        await each.tell("go")


async def _follow(trainer: Child, folder: Path, host: Host | None = None, bound_s: float = NOTE_S, step_tokens: int = 0) -> Curve:
    """Take a trainer's notes until it has ended or the time is up. Ours begin with the start of their first round."""
    note = await trainer.receive(START_S)
    sent = host.counters()[0] if host is not None else 0
    started_s = note["at_s"] - (note.get("wall_s", 0.0))
    points: list[Point] = []
    computed_s = 0.0
    with contextlib.suppress(TimeoutError):
        while not note.get("ended"):
            if "round" in note:
                steps = note["tokens"] // step_tokens if step_tokens else note["steps"]
                points.append(Point(note["at_s"] - started_s, steps, folder / f"round-{note['round']}.npy"))
                computed_s = note["computed_s"]
            note = await trainer.receive(max(0.0, started_s + bound_s - time.time()))
    seconds = min(bound_s, time.time() - started_s)
    counted = max(1, len(points) - bool(step_tokens))
    return Curve(points, seconds, (host.counters()[0] - sent) / counted if host is not None else 0.0, computed_s)
