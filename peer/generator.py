"""What a peer does in a run that generates: its share of a round's samples, as a piece; and a look at others' pieces.

It stands where `peer.trainer` stands in a run that trains, and knows as little of other peers.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from peer.data import ShardReader
from peer.device import PRECISIONS
from peer.generating import (
    LEEWAYS,
    MEAN_GAPS,
    Check,
    Sample,
    ShouldStop,
    Writer,
    check_length,
    never_stop,
    write_span,
)
from peer.pieces import Piece, pack
from peer.prompts import Prompts
from peer.trainer import Progress, TrainedUpdate, Vector, ignore_progress
from swarm.errors import DataInvalid
from swarm.manifest import Generate, Manifest


@dataclass(frozen=True)
class Looked:
    """What a look at some samples of a piece has come to: the worst of them, by its place in the piece."""

    place: int = 0
    problem: str = ""
    gap: float = 0.0
    tolerance: float = 0.0


class Generator:
    """Writes the samples of a run with its base. Not for several threads at once."""

    def __init__(self, run: Manifest, writer: Writer, prompts: Prompts) -> None:
        self.writer, self.prompts = writer, prompts
        self.passed_off: Callable[[Sequence[Sample]], Sequence[Sample]] = lambda samples: samples
        """What a hostile peer gives out for its samples; see `peer.attacks`."""
        self._manifest = run

    @classmethod
    def open(cls, run: Manifest, device: torch.device, files: Path) -> Generator:
        """That of a run whose files lie in `files` by their roots and were verified before. Raises `DataInvalid`."""
        strategy, data = run.strategy, run.data
        if not isinstance(strategy, Generate):
            raise DataInvalid("the run doesn't generate")
        check_length(run.model.config, data.sequence_length + 1, strategy.sampling)
        writer = Writer.open(run.model, run.tokenizer, files, strategy.sampling, bytes.fromhex(run.run_id), device)
        reader = ShardReader.open(data.train, files, data.sequence_length, writer.vocabulary, data.layout)
        return cls(run, writer, Prompts(reader, run.run_id, strategy.samples_per_prompt))

    @property
    def precision(self) -> str:
        """What matrix products are computed in."""
        return self.writer.precision

    @property
    def is_loaded(self) -> bool:
        """Whether the model takes memory on the device."""
        return self.writer.is_loaded

    def release(self) -> None:
        """Free the model's and the device's memory."""
        self.writer.release()

    def evaluate(self, theta: Vector, max_samples: int | None = None) -> float:
        """Load the model, so that the first round isn't slower than others; there is no loss to speak of."""
        del theta, max_samples
        self.writer.load()
        return math.nan

    def write_round(
        self,
        first: int,
        count: int,
        should_stop: ShouldStop = never_stop,
        progress: Callable[[Progress], None] = ignore_progress,
    ) -> TrainedUpdate:
        """The samples from `first` on, `count` of them or as many as the run still lacks, as a piece with a zero update.

        Raises what `Writer.write` raises.
        """
        started, done = time.monotonic(), list[Sample]()
        end = min(first + count, self.prompts.samples)

        def note(samples: Sequence[Sample]) -> None:
            done.extend(samples)
            progress(Progress(len(done), max(0, end - first), None))

        write_span(self.writer, self.prompts, first, count, should_stop, note)
        given = self.passed_off(done)
        piece = Piece(tuple(given), self.precision) if done else None
        tokens, loss = (piece.tokens, piece.loss) if piece is not None else (0, math.nan)
        return TrainedUpdate(
            update=np.zeros(self._manifest.model.parameters, dtype=np.float32),
            samples=tokens,
            tokens=tokens,
            loss_first=done[0].loss if done else math.nan,
            loss_mean=loss,
            loss_last=done[-1].loss if done else math.nan,
            seconds=time.monotonic() - started,
            stopped=should_stop(),
            piece=pack(given, self.precision) if done else b"",
        )

    def look(self, piece: Piece, most: int, seed: bytes, should_stop: ShouldStop = never_stop) -> Looked | None:
        """Compute up to `most` samples of a piece again, drawn by `seed`; None when stopped.

        The first one that the model can't have written is named, else the one with the largest gap.
        """
        if piece.precision not in PRECISIONS or piece.samples[-1].index >= self.prompts.samples:
            return Looked(problem="piece")
        worst = Looked(tolerance=LEEWAYS[piece.precision].logit)
        for place in np.sort(np.random.default_rng(list(seed)).permutation(len(piece.samples))[:most]):
            if should_stop() is not None:
                return None
            sample = piece.samples[place]
            check = self.writer.check(self.prompts.of(sample.index, 1)[0], sample, piece.precision)
            found = _looked(int(place), sample, check, piece.precision)
            if found.problem:
                return found
            worst = max(worst, found, key=lambda looked: looked.gap)
        return worst


def _looked(place: int, sample: Sample, check: Check, precision: str) -> Looked:
    problem = check.problem(sample, precision)
    if problem == "tokens" and check.worst <= LEEWAYS[precision].logit:
        return Looked(place, problem, check.mean, MEAN_GAPS[precision] + LEEWAYS[precision].logit / sample.tokens.size)
    return Looked(place, problem, check.worst, LEEWAYS[precision].logit)
