"""Audits by the loss, where nobody can compute a round again: how often they tell work from none, and how often they are wrong.

Four peers of `auto`'s kind train without a network, with an inner state that is kept. In every round each of them weighs what the
others sent, and what some cheats would have sent in their place.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from bench.report import Report
from bench.simulate import Feedback
from bench.single import open_shards
from peer.codec import Vector, make_codec
from peer.judging import Gain, judge_gain
from peer.merge import merge_part
from peer.model import initial_theta
from peer.outer import apply, initial_state
from peer.recipes import demo_manifest
from peer.rounds.training import TrainingThread
from peer.rounds.values import CommitFacts
from peer.rounds.weighing import Scales
from peer.trainer import Trainer
from swarm.audits import FAILED, PASSED
from swarm.manifest import Manifest

PEERS, STEPS, ROUNDS, QUICK_ROUNDS = 4, 12, 26, 8
LEARNING_RATE = 1.6e-2
HONEST = "honest"
Cheat = Callable[[Sequence[Vector], int, np.random.Generator], Vector]

CHEATS: Mapping[str, Cheat] = {
    "another's update": lambda sent, peer, random: sent[(peer + 1) % len(sent)],
    "the mean of the others'": lambda sent, peer, random: _mean([update for other, update in enumerate(sent) if other != peer]),
    "noise of the same norm": lambda sent, peer, random: _noise(sent[peer], random),
    "1000 times its update": lambda sent, peer, random: sent[peer] * np.float32(1000),
    "nothing": lambda sent, peer, random: np.zeros_like(sent[peer]),
}


async def by_loss(out: Report, folder: Path) -> None:
    """Judge honest work and cheats in every round."""
    rounds = out.choose(ROUNDS, QUICK_ROUNDS)
    run = _manifest(folder, rounds)
    reader, codec = open_shards(run, folder, run.data.train), make_codec(run.codec, run.model.parameters)
    trainers = [Trainer(run, torch.device("cpu"), reader) for _ in range(PEERS)]
    thread = TrainingThread(Trainer(run, torch.device("cpu"), reader))
    state = initial_state(run.strategy, initial_theta(run.model))
    senders, reducers = [Feedback() for _ in range(PEERS)], Feedback()
    random, found = np.random.default_rng(0), {name: Counter[str]() for name in (HONEST, *CHEATS)}
    training_s = weighing_s = 0.0
    for number in range(1, rounds + 1):
        started = time.perf_counter()
        made = [
            trainer.train_round(state.theta, number, f"peer-{peer}", STEPS, state.tokens) for peer, trainer in enumerate(trainers)
        ]
        sent = [sender.pass_through(codec, update.update)[0] for sender, update in zip(senders, made, strict=True)]
        scales = Scales(thread, number, state.theta, random.bytes(32))
        trained = time.perf_counter()
        honest = [await _weigh(scales, peer, update) for peer, update in enumerate(sent)]
        training_s, weighing_s = training_s + trained - started, weighing_s + time.perf_counter() - trained
        found[HONEST].update(judge_gain(ours, its).finding for ours in honest for its in honest if its is not ours)
        for name, cheat in CHEATS.items():
            false = [await _weigh(scales, peer, cheat(sent, peer, random)) for peer in range(PEERS)]
            found[name].update(
                judge_gain(ours, its).finding
                for judge, ours in enumerate(honest)
                for peer, its in enumerate(false)
                if peer != judge
            )
        merged, _ = reducers.pass_through(codec, merge_part(sent, [update.tokens for update in made], run.merge))
        state = apply(run.strategy, state, merged, sum(update.tokens for update in made))
    thread.close()
    for name, counts in found.items():
        said = counts[PASSED] + counts[FAILED]
        share = counts[FAILED] / said if said else None
        out.row(
            "audits by the loss",
            sent=name,
            audits=counts.total(),
            passed=counts[PASSED],
            failed=counts[FAILED],
            failed_of_said=share,
        )
    how = f"{rounds} rounds of {PEERS} peers, each judged by the others; {found[HONEST].total()} audits"
    out.figure("wrongful_findings_by_loss", found[HONEST][FAILED], how, "== 0")
    how = f"weighing our own update and another's, over training a round of {STEPS} steps and encoding it"
    out.figure("loss_audit_over_round", 2 * weighing_s / training_s, how)


def _manifest(folder: Path, rounds: int) -> Manifest:
    folder.mkdir(parents=True, exist_ok=True)
    values = demo_manifest(folder, peers=PEERS, rounds=rounds, inner_steps=STEPS, name="bench-weighed").model_dump(mode="json")
    values["codec"]["kind"] = "int4"
    values["strategy"]["inner"] = {"kind": "muon", "lr": LEARNING_RATE, "adamw": {"lr": LEARNING_RATE / 2}}
    values["strategy"]["schedule"]["final_fraction"] = 0.0
    return Manifest.model_validate(values)


async def _weigh(scales: Scales, peer: int, update: Vector) -> Gain:
    found = await scales.gain(CommitFacts(f"peer-{peer}", b"", STEPS * 8, ()), update)
    if found is None:
        raise RuntimeError("stopped")
    return found


def _mean(updates: Sequence[Vector]) -> Vector:
    return np.asarray(np.mean(updates, axis=0), dtype=np.float32)


def _noise(update: Vector, random: np.random.Generator) -> Vector:
    drawn = random.standard_normal(update.size, dtype=np.float32)
    return np.asarray(drawn * np.float32(np.linalg.norm(update) / np.linalg.norm(drawn)))
