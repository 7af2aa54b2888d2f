"""Judging work by what it does to the loss, where nobody can compute it again."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from peer.codec import Vector
from peer.data import ShardReader
from peer.judging import Gain, judge_gain
from peer.merge import merge_part
from peer.model import initial_theta
from peer.outer import OuterState, apply, initial_state
from peer.recipes import tiny_manifest
from peer.rounds.training import TrainingThread
from peer.rounds.values import CommitFacts
from peer.rounds.weighing import Scales
from peer.trainer import Trainer
from swarm.audits import FAILED, PASSED, UNABLE
from swarm.manifest import Manifest, Mean

PEERS = ("12D3KooWa", "12D3KooWb", "12D3KooWc")
ROUNDS, STEPS = 16, 24
CPU = torch.device("cpu")


@dataclass
class Swarm:
    """Peers that train one after the other, without a network, and somebody who weighs what they made of their last round."""

    manifest: Manifest
    trainers: Sequence[Trainer]
    thread: TrainingThread
    state: OuterState
    updates: dict[str, Vector]
    number: int = 0

    def play(self, rounds: int) -> None:
        """Train some rounds; the last isn't merged yet."""
        for _ in range(rounds):
            if self.updates:
                merged = merge_part(list(self.updates.values()), [1] * len(PEERS), Mean())
                self.state = apply(self.manifest.strategy, self.state, merged, len(PEERS) * STEPS * 8 * 32)
            self.number += 1
            for peer, trainer in zip(PEERS, self.trainers, strict=True):
                made = trainer.train_round(self.state.theta, self.number, peer, STEPS, self.state.tokens)
                self.updates[peer] = made.update

    async def weigh(self, peer: str, update: Vector, weight: int = 8 * STEPS) -> Gain:
        """What an update does to a peer's samples."""
        scales = Scales(self.thread, self.number, self.state.theta, bytes(range(32)))
        found = await scales.gain(CommitFacts(peer, b"", weight, ()), update)
        assert found is not None
        return found


@pytest.fixture
async def swarm(tmp_path: Path) -> AsyncIterator[Swarm]:
    """Three peers, Muon with a state that is kept."""
    made = tiny_manifest(tmp_path, len(PEERS), total=ROUNDS)
    values = made.model_dump(mode="json")
    values["strategy"] |= {"inner_steps": STEPS, "inner": {"kind": "muon", "lr": 1.6e-2, "adamw": {"lr": 8e-3}}}
    values["strategy"]["schedule"]["total_tokens"] = ROUNDS * STEPS * len(PEERS) * 8 * 32
    manifest = Manifest.model_validate(values)
    reader = ShardReader.open(manifest.data.train, tmp_path, manifest.data.sequence_length, 257)
    trainers = [Trainer(manifest, CPU, reader) for _ in PEERS]
    thread = TrainingThread(Trainer(manifest, CPU, reader))
    yield Swarm(manifest, trainers, thread, initial_state(manifest.strategy, initial_theta(manifest.model)), {})
    thread.close()


async def test_work_shows_and_the_lack_of_it_too(swarm: Swarm) -> None:
    """Honest updates pass; another's, noise, nothing, the opposite and far too much fail; in the first round nobody can tell."""
    swarm.play(1)
    first = await swarm.weigh(PEERS[0], swarm.updates[PEERS[0]])
    assert judge_gain(first, await swarm.weigh(PEERS[1], swarm.updates[PEERS[0]])).finding == UNABLE

    swarm.play(ROUNDS - 1)
    me, other, third = PEERS
    ours, honest = await swarm.weigh(me, swarm.updates[me]), swarm.updates[other]
    assert ours.is_plain
    assert judge_gain(ours, await swarm.weigh(other, honest)).finding == PASSED
    noise = np.random.default_rng(0).standard_normal(honest.size, dtype=np.float32)
    noise *= np.float32(np.linalg.norm(honest) / np.linalg.norm(noise))
    for false in (swarm.updates[third], noise, np.zeros_like(honest), np.negative(honest), honest * np.float32(1000)):
        judged = judge_gain(ours, await swarm.weigh(other, false))
        assert (judged.finding, judged.reason) == (FAILED, "no_gain")
        assert len(judged.claimed) == len(judged.found) == 16


async def test_weighing_leaves_the_network_where_it_was(swarm: Swarm) -> None:
    """A round that was begun early goes on from there. Once told to stop, nothing is said."""
    swarm.play(1)
    trainer = swarm.thread.trainer
    trainer.train_round(swarm.state.theta, 1, PEERS[0], 2, 0)
    before = trainer.parameters.read(trainer._network)
    samples = trainer.samples_of(1, PEERS[0], 5)
    losses = trainer.losses(swarm.state.theta, samples)
    assert losses is not None
    assert losses.shape == (5,)
    assert np.array_equal(trainer.parameters.read(trainer._network), before)
    one = trainer.losses(swarm.state.theta, samples[:1])
    assert one is not None
    assert one[0] == pytest.approx(losses[0], rel=1e-5)
    swarm.thread.stop("paused")
    scales = Scales(swarm.thread, 1, swarm.state.theta, bytes(32))
    assert await scales.gain(CommitFacts(PEERS[0], b"", 8, ()), swarm.updates[PEERS[0]]) is None


@pytest.mark.parametrize(
    ("its", "finding"),
    [
        (Gain(0.2, 0.1, 0.01, 64), PASSED),
        (Gain(0.13, 0.1, 0.01, 64), PASSED),
        (Gain(0.12, 0.1, 0.005, 64), FAILED),
        (Gain(0.12, 0.1, 0.0101, 64), UNABLE),
        (Gain(-0.3, 0.1, 0.01, 64), FAILED),
        (Gain(0.1, 0.1, 0.001, 15), UNABLE),
        (Gain(-5.0, -5.1, 1.0, 64), FAILED),
        (Gain(float("nan"), 0.1, 0.01, 64), FAILED),
        (Gain(0.1, float("-inf"), 0.01, 64), FAILED),
    ],
)
def test_what_counts_as_none(its: Gain, finding: str) -> None:
    """Far less than ours, and surely so; the measure has to be plain itself."""
    ours = Gain(0.2, 0.1, 0.0125, 64)
    assert judge_gain(ours, its).finding == finding
    assert judge_gain(replace(ours, error=0.013), its).finding == UNABLE
