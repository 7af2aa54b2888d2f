"""Audits: how long cheats last, how often somebody honest is accused, and what it costs everybody.

Work and leaves are real, from the peers' own trainer; who is audited by whom is drawn by the ledger's own rules. Honest work is
computed twice under different numbers of threads and micro-batches, and judged as an auditor does. A cheat counts as found out
when two auditors have said so. Where nobody can compute again, audits go by the loss (`bench.weighed`). Costs are those of a
peer whose keys are no longer new, at the manifest's default rate.
"""

from __future__ import annotations

import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench import report
from bench.report import Report
from bench.simulate import Feedback
from bench.single import open_shards, threads
from bench.weighed import by_loss
from peer.codec import make_codec
from peer.device import PRECISIONS
from peer.judging import Judgement, judge_leaves, judge_update, promised, tolerance, what_to_look_at
from peer.leaves import Leaf, pack
from peer.model import initial_theta
from peer.recipes import demo_manifest
from peer.sketch import BLOCKS, Sketcher, sketch_seed
from peer.trainer import Trainer, Vector
from swarm import manifest
from swarm.audits import FAILED, Case, draw_case, escape_chance

AUDITS, QUICK_AUDITS = 10_000, 200
HISTORIES, QUICK_HISTORIES = 4000, 100
SYNC_AUDITS_SHARE = 0.8
TOLD_EVERY = 500
LONGEST_HISTORY = 5000
SKIPPED = 0.1
CODEC_ROUNDS = 6
PRECISION_ROUNDS = 250
COST_REPEATS, QUICK_COST_REPEATS = 5, 1
LARGE_PARAMETERS = 124_000_000
ROSTER = 8
VERDICT_BYTES = 2600
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Run:
    """A manifest whose rounds can be computed again, and its files."""

    manifest: manifest.Manifest
    files: Path

    @classmethod
    def make(cls, files: Path, strategy: str, **changes: Any) -> Run:
        """`sync`, or `diloco` with Muon and a fresh inner state."""
        files.mkdir(parents=True, exist_ok=True)
        made = demo_manifest(files, peers=4, rounds=40, data_bytes=1_000_000, strategy=strategy, name="bench-audit", **changes)
        values = made.model_dump(mode="json")
        if strategy == "diloco":
            values["strategy"]["inner_state"] = "fresh"
        return cls(manifest.Manifest.model_validate(values), files)

    @property
    def quota(self) -> int:
        """A round's work: samples, or inner steps."""
        strategy = self.manifest.training
        return strategy.batch_samples // 4 if isinstance(strategy, manifest.Sync) else strategy.inner_steps

    @property
    def pace(self) -> np.float32:
        """How far the weights go along an update, so that audits look at other weights every round."""
        return np.float32(1.0 if isinstance(self.manifest.strategy, manifest.DiLoCo) else 0.5)

    def trainer(self, micro_batch: int, dtype: torch.dtype = torch.float32) -> Trainer:
        """A peer's."""
        shards = open_shards(self.manifest, self.files, self.manifest.data.train)
        return Trainer(self.manifest, CPU, shards, micro_batch=micro_batch, dtype=dtype)

    def sketcher(self, number: int) -> Sketcher:
        """That of a round."""
        return Sketcher(sketch_seed(bytes(32), number, bytes(32)), self.manifest.model.parameters)


@dataclass
class Work:
    """A contribution, and what computing it again gives, leaf by leaf."""

    run: Run
    theta: Vector
    number: int
    update: Vector
    leaves: tuple[Leaf, ...]
    precision: str
    sketcher: Sketcher
    trainer: Trainer
    _again: dict[int, tuple[Leaf, ...]] = field(default_factory=dict)

    @property
    def first(self) -> int | None:
        """The first leaf that an audit computes; None where it is the one that it looks at."""
        return 0 if isinstance(self.run.manifest.strategy, manifest.DiLoCo) else None

    def again(self, leaf: int) -> tuple[Leaf, ...]:
        """What an auditor comes to."""
        if leaf not in self._again:
            lengths = [item.samples for item in self.leaves]
            found = self.trainer.replay(
                self.theta, self.number, "peer", 0, lengths, leaf, self.sketcher, precision=self.precision
            )
            self._again[leaf] = found or ()
        return self._again[leaf]

    def judge(self, leaves: Sequence[Leaf], leaf: int) -> Judgement:
        """What an auditor finds about leaves that somebody claims."""
        first = leaf if self.first is None else self.first
        return judge_leaves(leaves, self.again(leaf), first, tolerance(self.run.manifest, self.precision))


@dataclass(frozen=True)
class Audits:
    """The sections."""

    folder: Path

    def honest(self, out: Report) -> None:
        """Honest work, computed again under other conditions."""
        count = out.choose(AUDITS, QUICK_AUDITS)
        done = wrong = 0
        sync = int(SYNC_AUDITS_SHARE * count)
        for strategy, wanted in (("sync", sync), ("diloco", count - sync)):
            run = Run.make(
                self.folder / f"honest-{strategy}", strategy, hidden_size=64, layers=2, sequence_length=64, inner_steps=20
            )
            distances: list[float] = []
            for off, passed in _honest_audits(run, wanted):
                distances.append(off)
                wrong += not passed
                if len(distances) % TOLD_EVERY == 0:
                    out.say(f"  {strategy}: {len(distances)} of {wanted}, {wrong} wrong")
            done += len(distances)
            ranked = sorted(distances)
            out.row(
                "distance of honest work",
                strategy=strategy,
                audits=len(ranked),
                median=statistics.median(ranked),
                p999=ranked[int(0.999 * (len(ranked) - 1))],
                largest=ranked[-1],
                tolerated=tolerance(run.manifest),
            )
        how = "1 or 2 threads, micro-batches of 1 to 8 on either side, four fifths `sync`, the rest `diloco` with Muon, 20 steps"
        out.figure("honest_audits", done, how, ">= 10000")
        out.figure("wrongful_findings", wrong, "of these, by one auditor", "== 0")
        out.figure("wrongful_suspensions", wrong, "at most: were every wrong finding's second auditor wrong as well", "== 0")

    def precisions(self, out: Report) -> None:
        """Honest work in half precision, computed again in the same with other kernels, as other hardware would."""
        rounds = {"sync": out.choose(PRECISION_ROUNDS, 10), "diloco": out.choose(PRECISION_ROUNDS // 10, 1)}
        wrong = done = 0
        for strategy, count in rounds.items():
            run = Run.make(self.folder / f"precisions-{strategy}", strategy, hidden_size=64, layers=2, sequence_length=64)
            for precision in ("bf16", "fp16"):
                author, auditor = run.trainer(8, PRECISIONS[precision]), run.trainer(4)
                theta, off = initial_theta(run.manifest.model), list[float]()
                for number in range(count):
                    work = _work(run, number, author, auditor, theta)
                    for leaf in [len(work.leaves) - 1] if work.first == 0 else range(len(work.leaves)):
                        with sdpa_kernel([SDPBackend.MATH]):
                            judged = work.judge(work.leaves, leaf)
                        off.append(judged.distance)
                        wrong += judged.finding == FAILED
                    theta = theta - work.update * run.pace
                done += len(off)
                out.row(
                    "distance of honest work in half precision",
                    strategy=strategy,
                    precision=precision,
                    audits=len(off),
                    median=statistics.median(off),
                    largest=max(off),
                    tolerated=tolerance(run.manifest, precision),
                )
        how = f"{done} audits by a processor that emulates the author's precision, attention computed by another kernel"
        out.figure("wrongful_findings_in_half_precision", wrong, how, "== 0")

    def codecs(self, out: Report) -> None:
        """How far what is sent may be from what was computed, since lossy codecs carry over what they owe."""
        run = Run.make(self.folder / "codecs", "diloco", hidden_size=64, layers=2, sequence_length=64, inner_steps=10)
        wrong = 0
        for kind in ("fp16", "int8", "int4", "int2", "sparse"):
            codec = make_codec(manifest.Codec(kind=kind, part_values=1 << 14), run.manifest.model.parameters)
            feedback, theta, cosines, norms = Feedback(), initial_theta(run.manifest.model), list[float](), list[float]()
            trainer = run.trainer(8)
            for number in range(CODEC_ROUNDS):
                sketcher = run.sketcher(number)
                made = trainer.train_round(theta, number, "peer", run.quota, 0, sketcher=sketcher)
                sent, _ = feedback.pass_through(codec, made.update)
                expected, sketched = promised(run.manifest, made.leaves), sketcher.of_vector(sent)
                blocks = [slice(None)] if codec.topology == "all_gather" else [slice(block, block + 1) for block in range(BLOCKS)]
                for rows in blocks:
                    judged = judge_update(kind, expected[rows], sketched[rows])
                    wrong += judged.finding == FAILED
                    cosines.append(1 - judged.distance)
                    norms.append(float(np.linalg.norm(sketched[rows]) / np.linalg.norm(expected[rows])))
                theta = theta - made.update
            out.row("what is sent beside what was computed", codec=kind, least_cosine=min(cosines), largest_norm=max(norms))
        out.figure("wrongful_update_findings", wrong, f"every stretch of {CODEC_ROUNDS} rounds under each codec", "== 0")

    def cheats(self, out: Report) -> None:
        """Rounds until a cheat is found out, at an audit rate of 5 %, once its key isn't new any more."""
        worst: dict[str, float] = {}
        histories = out.choose(HISTORIES, QUICK_HISTORIES)
        for strategy in ("sync", "diloco"):
            run = Run.make(
                self.folder / f"cheats-{strategy}", strategy, hidden_size=32, layers=2, sequence_length=32, inner_steps=32
            )
            work = _work(run, 0, run.trainer(8), run.trainer(4))
            for name, forge in _cheats(strategy).items():
                lasted = [_rounds_until_found(work, forge, history) for history in range(histories)]
                out.row(
                    "rounds until found out",
                    strategy=strategy,
                    cheat=name,
                    p50=statistics.median(lasted),
                    p90=sorted(lasted)[int(0.9 * (len(lasted) - 1))],
                    never=sum(rounds >= LONGEST_HISTORY for rounds in lasted),
                )
                kind = "full_faking" if name == "everything made up" else "skip10"
                worst[kind] = max(worst.get(kind, 0.0), statistics.median(lasted))
        rate = manifest.Audit().rate
        for kind, faked in (("full_faking", 1.0), ("skip10", SKIPPED)):
            chance = escape_chance(rate, faked, int(worst[kind]))
            out.row("computed chance to escape until the median of the worst row", kind=kind, rounds=worst[kind], chance=chance)
        how = f"the worst row: {histories} histories each, drawn as the ledger draws, judged against work computed again"
        out.figure("full_faking_rounds_p50", worst["full_faking"], how, "<= 14")
        out.figure("skip10_rounds_p50", worst["skip10"], how, "<= 150")

    def costs(self, out: Report) -> None:
        """Time and bytes that audits take from an honest peer."""
        repeats = out.choose(COST_REPEATS, QUICK_COST_REPEATS)
        fractions = {}
        for strategy in ("sync", "diloco"):
            run = Run.make(self.folder / f"costs-{strategy}", strategy, batch_samples=32 if strategy == "sync" else 8)
            showing, replaying = _compute_cost(run, repeats)
            fractions[strategy] = showing + run.manifest.audit.rate * replaying
            out.row(
                "share of training time",
                strategy=strategy,
                showing_own_work=showing,
                one_audit=replaying,
                at_the_default_rate=fractions[strategy],
            )
        how = "0.87 M parameters: making leaves, and the default rate times computing others' again, over training; `sync`"
        out.figure("compute_cost_fraction", fractions["sync"], how, "<= 0.03")
        out.figure("compute_cost_fraction_diloco", fractions["diloco"], "the same for `diloco`, Muon, 20 steps")
        leaves = len(pack([_blank()] * 16, "fp32"))
        for kind in ("fp16", "int4", "sparse"):
            codec = make_codec(manifest.Codec(kind=kind), LARGE_PARAMETERS)
            update = sum(codec.part_size_limit(part) for part in range(codec.part_count))
            gathers = codec.topology == "all_gather"
            exchanged = 2 * update * (ROSTER - 1) * (1 if gathers else 1 / ROSTER)
            looked_at = update if gathers else update / BLOCKS + codec.part_size_limit(0)
            audit = 2 * (leaves + looked_at) + VERDICT_BYTES
            share = run.manifest.audit.rate * audit / exchanged
            out.row("share of traffic", codec=kind, leaves_bytes=leaves, looked_at_bytes=looked_at, of_exchanged=share)
            if kind == "fp16":
                most = share
            most = max(most, share)
        how = f"124 M parameters, {ROSTER} peers, leaves, parts and verdict over what a round's exchange moves: the worst codec"
        out.figure("traffic_cost_fraction", most, how, "<= 0.02")


def _work(run: Run, number: int, author: Trainer, auditor: Trainer, theta: Vector | None = None) -> Work:
    theta = initial_theta(run.manifest.model) if theta is None else theta
    sketcher = run.sketcher(number)
    made = author.train_round(theta, number, "peer", run.quota, 0, sketcher=sketcher)
    return Work(run, theta, number, made.update, made.leaves, author.precision, sketcher, auditor)


def _honest_audits(run: Run, count: int) -> Iterator[tuple[float, bool]]:
    """Distances and outcomes of audits of honest work; the weights move on from round to round."""
    draw, number, done = random.Random(run.manifest.strategy.kind), 0, 0
    trainers = {size: run.trainer(size) for size in (1, 2, 3, 4, 8)}
    theta = initial_theta(run.manifest.model)
    while done < count:
        with threads(draw.choice((1, 2))):
            work = _work(run, number, trainers[draw.choice(list(trainers))], trainers[draw.choice(list(trainers))], theta)
        for leaf in range(len(work.leaves)) if work.first is None else draw.sample(range(len(work.leaves)), 4):
            work.trainer = trainers[draw.choice(list(trainers))]
            with threads(draw.choice((1, 2))):
                judged = work.judge(work.leaves, leaf)
            yield judged.distance, judged.finding != FAILED
            done += 1
            if done == count:
                return
        with threads(1):
            theta = theta - trainers[8].train_round(theta, number, "other", run.quota, 0).update * run.pace
        number += 1


Forge = Callable[[Sequence[Leaf], random.Random], list[Leaf]]


def _cheats(strategy: str) -> dict[str, Forge]:
    """What is claimed instead of the honest leaves. Who skips takes the sketch of another of its own leaves."""

    def everything(leaves: Sequence[Leaf], draw: random.Random) -> list[Leaf]:
        noise = np.random.default_rng(draw.getrandbits(32))
        return [_made_up(leaf, noise) for leaf in leaves]

    def some(leaves: Sequence[Leaf], draw: random.Random) -> list[Leaf]:
        return [
            replace(leaf, sketch=leaves[place - 1].sketch) if draw.random() < SKIPPED else leaf
            for place, leaf in enumerate(leaves)
        ]

    def end(leaves: Sequence[Leaf], draw: random.Random) -> list[Leaf]:
        """The last tenth, rounded up or down by chance."""
        count = int(SKIPPED * len(leaves) + draw.random())
        honest = len(leaves) - count
        return [*leaves[:honest], *(replace(leaf, sketch=leaves[place].sketch) for place, leaf in enumerate(leaves[honest:]))]

    found: dict[str, Forge] = {"everything made up": everything, "a tenth of the samples skipped": some}
    return found | ({"the last tenth of the steps skipped": end} if strategy == "diloco" else {})


def _made_up(leaf: Leaf, noise: np.random.Generator) -> Leaf:
    drawn = noise.standard_normal(leaf.sketch.shape, dtype=np.float32)
    return replace(leaf, sketch=drawn * np.float32(np.linalg.norm(leaf.sketch) / np.linalg.norm(drawn)))


def _rounds_until_found(work: Work, forge: Forge, history: int) -> int:
    """How many rounds a peer gets away with it."""
    draw, rate = random.Random(history), manifest.Audit().rate
    others = [f"auditor-{place}" for place in range(ROSTER - 1)]
    for number in range(1, LONGEST_HISTORY):
        case: Case | None = draw_case(draw.randbytes(32), number, "peer", b"", rate, others)
        if case is None:
            continue
        claimed = forge(work.leaves, draw)
        leaf, _ = what_to_look_at(case.duty.seed, len(claimed))
        for auditor in case.auditors:
            if not case.outcome:
                case.findings[auditor] = work.judge(claimed, leaf).finding
        if case.outcome == FAILED:
            return number
    return LONGEST_HISTORY


def _compute_cost(run: Run, repeats: int) -> tuple[float, float]:
    """What making leaves costs, and what an average audit costs, both relative to training: the least of some repeats."""
    theta, sketcher, trainer = initial_theta(run.manifest.model), run.sketcher(0), run.trainer(8)
    plain, showing, replaying = list[float](), list[float](), list[float]()

    def replay(leaf: int) -> float:
        return _timed(lambda: trainer.replay(theta, 0, "peer", 0, lengths, leaf, sketcher))

    with threads(1):
        made = trainer.train_round(theta, 0, "peer", run.quota, 0, sketcher=sketcher)
        lengths = [leaf.samples for leaf in made.leaves]
        for _ in range(repeats):
            plain.append(_timed(lambda: trainer.train_round(theta, 0, "peer", run.quota, 0)))
            showing.append(_timed(lambda: trainer.train_round(theta, 0, "peer", run.quota, 0, sketcher=sketcher)))
            replaying.append(statistics.mean(replay(leaf) for leaf in range(len(lengths))))
    return max(0.0, min(showing) / min(plain) - 1), min(replaying) / min(plain)


def _timed(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def _blank() -> Leaf:
    return Leaf(1, 1.0, np.zeros((BLOCKS, 32), dtype=np.float32))


def main(argv: Sequence[str] | None = None) -> int:
    """Measure."""
    with report.workspace() as folder:
        parts = Audits(folder)
        sections: dict[str, report.Section] = {
            "precisions": parts.precisions,
            "codecs": parts.codecs,
            "cheats": parts.cheats,
            "costs": parts.costs,
            "by_loss": lambda out: by_loss(out, folder / "by-loss"),
            "honest": parts.honest,
        }
        return report.run("audit", __doc__, sections, argv)


if __name__ == "__main__":
    sys.exit(main())
