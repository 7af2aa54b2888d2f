"""Leaves: a round's work cut into pieces that others can compute again, each with its samples, its loss and a sketch.

A peer commits to the hash of its leaves before anybody knows which of them will be looked at. To make one up one would have to
compute what it stands for.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise

import numpy as np
import torch
from numpy.typing import NDArray

from peer.device import PRECISIONS
from peer.sketch import BLOCKS, SKETCH_BYTES, WIDTH, Sketcher
from swarm.errors import Rejected
from swarm.messages import parse
from swarm.rpc.v1.signed_pb2 import Leaves

MOST_LEAVES, MOST_GRADIENT_LEAVES = 16, 4
MAX_LEAVES_BYTES = MOST_LEAVES * (SKETCH_BYTES + 32) + 64

Sketch = NDArray[np.float32]
Pieces = Iterator[tuple[int, torch.Tensor | None]]


@dataclass(frozen=True)
class Leaf:
    """`samples` in a row of a peer's assignment, and their mean loss in nats per token.

    `sketch`, [BLOCKS, WIDTH], is that of the mean gradient over them (`sync`) or of how the weights moved by them (`diloco`).
    """

    samples: int
    loss: float
    sketch: Sketch


def leaf_ends(total: int, unit: int, most: int = MOST_LEAVES) -> tuple[int, ...]:
    """Where the leaves of a round of `total` samples end: at most `most` equal ones, each of whole units of samples."""
    length = unit * -(-total // (unit * most))
    return (*range(length, total, length), total)


@dataclass
class Tracer:
    """Sketches what has come of the work where a leaf begins or ends. `scale` is what gradients are multiplied with."""

    sketcher: Sketcher
    ends: tuple[int, ...]
    _marks: list[tuple[int, torch.Tensor, float]] = field(default_factory=list)

    def note(self, done: int, pieces: Pieces, *, last: bool = False, scale: float = 1.0) -> None:
        """After `done` samples; only where a leaf ends, unless it is the last call."""
        if self._marks and self._marks[-1][0] == done:
            return
        if last or not done or done in self.ends:
            self._marks.append((done, self.sketcher.of_tensors(pieces), scale))

    def forget_after(self, done: int) -> None:
        """What came after `done` samples is done again."""
        self._marks = [mark for mark in self._marks if mark[0] <= done]

    def leaves(self, losses: Sequence[tuple[float, int]], *, mean_over: int = 0) -> tuple[Leaf, ...]:
        """The leaves of a round with these losses, each with its number of samples.

        With `mean_over` the sketched values are sums of gradients of samples, divided by this, and leaves have their means.
        """
        ends = list(accumulate(samples for _, samples in losses))
        sums = dict(zip([0, *ends], accumulate((loss * samples for loss, samples in losses), initial=0.0), strict=True))
        host = [(done, mark.cpu().numpy() / np.float32(scale)) for done, mark, scale in self._marks]
        found = []
        for (start, before), (end, after) in pairwise(host):
            samples = end - start
            factor = np.float32(mean_over / samples if mean_over else 1.0)
            sketch = np.asarray((after - before) * factor, dtype=np.float32)
            found.append(Leaf(samples, (sums[end] - sums[start]) / samples, sketch))
        return tuple(found)


def pack(leaves: Sequence[Leaf], precision: str) -> bytes:
    """The bytes that a commit names by their hash."""
    message = Leaves(
        samples=[leaf.samples for leaf in leaves],
        losses=[leaf.loss for leaf in leaves],
        sketches=b"".join(leaf.sketch.astype("<f4").tobytes() for leaf in leaves),
        precision=precision,
    )
    return message.SerializeToString(deterministic=True)


def unpack(raw: bytes, author: str = "") -> tuple[tuple[Leaf, ...], str]:
    """What a peer has committed to, and how precisely it computes.

    Raises `Rejected` for anything that isn't a list of finite leaves.
    """
    if len(raw) > MAX_LEAVES_BYTES:
        raise Rejected("bad_leaves", f"{len(raw)} bytes", author)
    message = parse(Leaves, raw, author)
    count = len(message.samples)
    listed = len(message.losses) == count and len(message.sketches) == count * SKETCH_BYTES
    if message.precision not in PRECISIONS or not 0 < count <= MOST_LEAVES or not listed:
        raise Rejected("bad_leaves", f"{count} leaves", author)
    sketches = np.frombuffer(message.sketches, dtype="<f4").astype(np.float32).reshape(count, BLOCKS, WIDTH)
    if not np.isfinite(sketches).all() or not np.isfinite(message.losses).all() or min(message.samples) < 1:
        raise Rejected("bad_leaves", "not finite, or empty", author)
    leaves = zip(message.samples, message.losses, sketches, strict=True)
    return tuple(Leaf(samples, loss, sketch) for samples, loss, sketch in leaves), message.precision
