"""What an auditor makes of what it sees: pure functions of the leaves that a peer committed to and of what was computed again.

Computing again gives the same only nearly: other processors add in another order. What that comes to was measured by
`python -m bench.audit`; what was made up is off by about the size of the thing itself.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from peer.leaves import Leaf
from peer.sketch import BLOCKS
from swarm.audits import FAILED, PASSED, UNABLE, WITHHELD
from swarm.manifest import DiLoCo, Manifest

GRADIENT_TOLERANCES = {"fp32": 2e-3, "bf16": 0.1, "fp16": 0.02}  # twice what `bench.audit --only precisions` finds, or more
MOVEMENT_TOLERANCE = 0.25
LOSS_TOLERANCE = 0.05
LEAST_COSINE = {"fp16": 0.99, "int8": 0.98, "int4": 0.85, "int2": 0.4, "sparse": 0.05}
MOST_NORMS = {"sparse": 4.0}
DEFAULT_MOST_NORMS = 2.0
PLAIN_DEVIATIONS, SURE_DEVIATIONS = 8.0, 3.0
LEAST_SHARE, LACKING_SHARE = 0.25, 0.5
FEWEST_SAMPLES = 16
MOST_FIGURE = 1e6
TINY = 1e-12

Sketch = NDArray[np.float32]
Losses = NDArray[np.float64]


@dataclass(frozen=True)
class Judgement:
    """A finding, why, and for a leaf which one was worst, how far it was off, and both sketches."""

    finding: str
    reason: str = ""
    leaf: int = 0
    distance: float = 0.0
    tolerance: float = 0.0
    claimed: bytes = b""
    found: bytes = b""


UNABLE_TO_LOOK = Judgement(UNABLE)
NOT_SHOWN = Judgement(WITHHELD, "not_shown")


def what_to_look_at(seed: bytes, leaves: int) -> tuple[int, int]:
    """The leaf and the block that an audit looks at, by its seed."""
    return int.from_bytes(seed[:8], "big") % leaves, seed[8] % BLOCKS


def tolerance(manifest: Manifest, precision: str = "fp32") -> float:
    """The largest relative distance of honest leaves, both computed in the same precision, if on other hardware."""
    if isinstance(manifest.strategy, DiLoCo):
        return MOVEMENT_TOLERANCE
    return GRADIENT_TOLERANCES[precision]


def distance(claimed: Sketch, found: Sketch) -> float:
    """How far a sketch is from what it should be, relative to the larger of them; 0 for two zeros."""
    size = max(float(np.linalg.norm(claimed)), float(np.linalg.norm(found)))
    return float(np.linalg.norm(claimed.astype(np.float64) - found) / size) if size else 0.0


def adds_up(leaves: Sequence[Leaf], weight: int, unit: int) -> bool:
    """Whether the leaves are whole units of samples, and together those that the commit claims."""
    return sum(leaf.samples for leaf in leaves) == weight and all(leaf.samples % unit == 0 for leaf in leaves)


def judge_leaves(claimed: Sequence[Leaf], found: Sequence[Leaf], first: int, most: float) -> Judgement:
    """Compare leaves from `first` on with what computing them again gave."""
    worst = Judgement(PASSED, tolerance=most)
    for place, (its, ours) in enumerate(zip(claimed[first:], found, strict=False), first):
        off = distance(its.sketch, ours.sketch)
        lost = abs(its.loss - ours.loss) / max(1e-6, abs(ours.loss))
        bad = off > most or lost > LOSS_TOLERANCE
        if bad or off > worst.distance:
            sketches = its.sketch.astype("<f4").tobytes(), ours.sketch.astype("<f4").tobytes()
            reason = ("leaf" if off > most else "loss") if bad else ""
            worst = Judgement(FAILED if bad else PASSED, reason, place, off, most, *sketches)
        if bad:
            return worst
    return replace(worst, leaf=first + min(len(found), len(claimed) - first) - 1)


def promised(manifest: Manifest, leaves: Sequence[Leaf]) -> Sketch:
    """The sketch of the update that the leaves amount to."""
    if isinstance(manifest.strategy, DiLoCo):
        return np.negative(np.sum([leaf.sketch for leaf in leaves], axis=0, dtype=np.float32))
    total = sum(leaf.samples for leaf in leaves)
    return np.asarray(sum(leaf.sketch * np.float32(leaf.samples / total) for leaf in leaves), dtype=np.float32)


def judge_update(kind: str, expected: Sketch, sent: Sketch) -> Judgement:
    """Whether what was sent is what the leaves amount to, but for what the codec loses or still owes from before."""
    ours, its = float(np.linalg.norm(expected)), float(np.linalg.norm(sent))
    least = LEAST_COSINE[kind]
    if not ours:
        return Judgement(PASSED if not its else FAILED, "" if not its else "update")
    cosine = float(np.vdot(expected, sent)) / (ours * its) if its else 0.0
    fits = cosine >= least and its <= MOST_NORMS.get(kind, DEFAULT_MOST_NORMS) * ours
    sketches = (expected.astype("<f4").tobytes(), sent.astype("<f4").tobytes()) if not fits else (b"", b"")
    return Judgement(PASSED if fits else FAILED, "" if fits else "update", 0, 1 - cosine, 1 - least, *sketches)


def judge_samples(place: int, problem: str, gap: float, most: float) -> Judgement:
    """Whether the model wrote the samples of a piece that were computed again: the gap is that of the worst, at this place."""
    off = min(MOST_FIGURE, gap) if math.isfinite(gap) else MOST_FIGURE
    return Judgement(FAILED if problem else PASSED, f"sample_{problem}" if problem else "", place, off, most)


@dataclass(frozen=True)
class Gain:
    """By how much the loss fell under a peer's update: on samples that it had to train on, and on others; nats per token.

    `error` is the standard error of the difference, over `samples` of either kind.
    """

    own: float
    others: float
    error: float
    samples: int

    @classmethod
    def of(cls, own: Losses, others: Losses) -> Gain:
        """From how the loss fell on each sample, [samples] of either kind."""
        error = math.sqrt(float(own.var()) / len(own) + float(others.var()) / len(others))
        return cls(float(own.mean()), float(others.mean()), error, len(own))

    @property
    def difference(self) -> float:
        """What training on the samples themselves has brought."""
        return self.own - self.others

    @property
    def deviations(self) -> float:
        """The difference in its own standard errors."""
        return self.difference / max(self.error, TINY)

    @property
    def is_plain(self) -> bool:
        """Whether honest work shows so clearly that the lack of it would, too."""
        return math.isfinite(self.deviations) and self.deviations >= PLAIN_DEVIATIONS

    def packed(self) -> bytes:
        """As it goes into a verdict: four little-endian float32."""
        return np.array([self.own, self.others, self.error, self.samples], dtype="<f4").tobytes()


def judge_gain(ours: Gain, its: Gain) -> Judgement:
    """Whether an update does to the samples of its author what ours, as the measure of honest work, does to our own.

    Work on samples lowers the loss on these more than on others; what was copied, made up or trained on other samples doesn't
    (after Gauntlet: Lidin et al., 2505.21684), and what raises it on them is no work at all. Nothing is said where our own work
    shows it too little, or its samples are few.
    """
    if not ours.is_plain or its.samples < FEWEST_SAMPLES:
        return UNABLE_TO_LOOK
    figures = its.packed(), ours.packed()
    if not math.isfinite(its.deviations) or its.own + SURE_DEVIATIONS * its.error < 0:
        return Judgement(FAILED, "no_gain", 0, MOST_FIGURE, 1 - LEAST_SHARE, *figures)
    share = its.difference / ours.difference
    off = min(MOST_FIGURE, max(0.0, 1 - share))
    if share >= LEAST_SHARE:
        return Judgement(PASSED, "", 0, off, 1 - LEAST_SHARE, *figures)
    if its.difference + SURE_DEVIATIONS * its.error < LACKING_SHARE * ours.difference:
        return Judgement(FAILED, "no_gain", 0, off, 1 - LEAST_SHARE, *figures)
    return UNABLE_TO_LOOK
