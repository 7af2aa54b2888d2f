"""Longer budgets, simulated: the peers' own trainers, codecs with error feedback, merge and outer step, without a network.

Every peer trains its full share of every round, one after the other, in one process for each setting. What comes out depends on
the manifest only. 1,200 steps of four peers take several minutes a setting; settings run side by side, one on each core.
"""

from __future__ import annotations

import multiprocessing
import os
import re
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from bench import report
from bench.report import Report
from bench.settings import PEERS, longer, made
from bench.single import held_out_loss, one_thread, open_shards
from peer.codec import Codec, Vector, decode, make_codec
from peer.codec.feedback import EXACT, ErrorFeedback
from peer.merge import merge_part
from peer.model import initial_theta
from peer.outer import apply, initial_state
from peer.trainer import Trainer
from swarm import manifest

STEPS, QUICK_STEPS = 1200, 20
QUICK_SETTINGS = 2
VALIDATION_SAMPLES = 1024
FP16_BYTES = 2
Told = Callable[[int, float], None]


@dataclass(frozen=True)
class Simulated:
    """The weights at the end, [parameters], and the payload that each peer would have sent, without framing and control."""

    theta: Vector
    payload_bytes_per_peer: float
    rounds: int
    steps: int


@dataclass
class Feedback:
    """What is left at one place, a sender or the reducers; kept when a dense codec follows another."""

    held: ErrorFeedback | None = None

    def pass_through(self, codec: Codec, update: Vector) -> tuple[Vector, int]:
        """What others decode of `update`, [parameters], and how many bytes it took."""
        if codec.kind == EXACT:
            parts = [codec.encode_part(update[slice(*codec.part_span(index))], index) for index in range(codec.part_count)]
        else:
            parts = self._for(codec).encode(update)
        return decode(codec, parts), sum(map(len, parts))

    def _for(self, codec: Codec) -> ErrorFeedback:
        before = self.held
        if before is not None and before.codec == codec:
            return before
        fresh = self.held = ErrorFeedback(codec)
        if before is not None and before.codec.topology == codec.topology:
            fresh._residual[:] = before._residual
        return fresh


@one_thread()
def simulate(run: manifest.Manifest, files: Path, peers: int, *, told: Told = lambda done, loss: None) -> Simulated:
    """Train all rounds of `run` with `peers` equal peers; `told` hears of every round and its mean training loss."""
    strategy = run.strategy
    reader = open_shards(run, files, run.data.train)
    trainers = [Trainer(run, torch.device("cpu"), reader) for _ in range(peers)]
    state = initial_state(strategy, initial_theta(run.model))
    senders, reducers = [Feedback() for _ in range(peers)], Feedback()
    payload, steps = 0.0, 0
    for round_index in range(1, run.rounds.total + 1):
        phase = run.phase(round_index)
        quota = strategy.batch_samples // peers if isinstance(strategy, manifest.Sync) else phase.inner_steps
        updates = [
            trainer.train_round(state.theta, round_index, f"peer-{index}", quota, state.tokens)
            for index, trainer in enumerate(trainers)
        ]
        codec = make_codec(phase.codec, state.theta.size)
        sent = [sender.pass_through(codec, update.update) for sender, update in zip(senders, updates, strict=True)]
        tokens = [update.tokens for update in updates]
        merged = merge_part([values for values, _ in sent], tokens, run.merge)
        if codec.topology == "butterfly":
            merged, size = reducers.pass_through(codec, merged)
            payload += (peers - 1) / peers * 2 * size
        else:
            payload += (peers - 1) * sum(size for _, size in sent) / peers
        state = apply(strategy, state, merged, sum(tokens))
        steps += phase.inner_steps
        told(round_index, float(np.mean([update.loss_mean for update in updates])))
    return Simulated(state.theta, payload, run.rounds.total, steps)


@dataclass(frozen=True)
class Longer:
    """The only section."""

    folder: Path

    def measure(self, out: Report) -> None:
        """Every setting once, as many at a time as there are cores."""
        steps = out.choose(STEPS, QUICK_STEPS)
        names = list(longer())[: out.choose(len(longer()), QUICK_SETTINGS)]
        made(longer()[names[0]], self.folder, 0, steps)  # the files are written once
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(len(os.sched_getaffinity(0)), context) as pool:
            waiting = {pool.submit(_outcome, name, self.folder, steps): name for name in names}
            for done in as_completed(waiting):
                loss, payload = done.result()
                out.say(f"  {waiting[done]}: {loss:.4f}")
                out.row(f"{steps} steps, simulated, one seed", setting=waiting[done], loss=loss, payload_share_of_fp16=payload)
                how = f"held-out loss after {steps} steps of {PEERS} simulated peers, seed 0: {waiting[done]}"
                out.figure(f"validation_loss_{_slug(waiting[done])}", loss, how)


def _slug(name: str) -> str:
    return "_".join(re.findall(r"[a-z0-9]+", name.lower()))


def _outcome(name: str, files: Path, steps: int) -> tuple[float, float]:
    """Held-out loss in nats per byte, and the payload relative to fp16 after every step."""
    run = made(longer()[name], files, 0, steps)
    simulated = simulate(run, files, PEERS)
    reference = steps * 2 * (PEERS - 1) / PEERS * FP16_BYTES * run.model.parameters
    loss = held_out_loss(run, files, simulated.theta, VALIDATION_SAMPLES)
    return loss, simulated.payload_bytes_per_peer / reference


def main(argv: Sequence[str] | None = None) -> int:
    """Measure."""
    with report.workspace() as folder:
        return report.run("simulate", __doc__, {"longer": Longer(folder).measure}, argv)


if __name__ == "__main__":
    sys.exit(main())
