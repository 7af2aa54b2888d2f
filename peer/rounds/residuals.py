"""Error feedback of one peer over the rounds: of its own updates, and of the span that it merges.

A reducer's residual belongs to its merge: the roots of its residual before and after stand in the signed span, and both are
served by hash, so that anybody can merge again. Where a span moves, what both have stays and the rest starts at zero.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock

import numpy as np
import structlog
import torch

from peer.codec import Codec, Vector, encode
from peer.codec.feedback import CPU, EXACT, ErrorFeedback, Fed
from swarm.errors import CheckpointCorrupt, DiskFull
from swarm.merkle import root_of

FILE_NAME = "residual.safetensors"
ENCODING_THREADS = 2

log = structlog.get_logger(__name__)


@dataclass
class SpanMerge:
    """A reducer's encoding of its span for one proposal: the residual before it, and the one that comes out."""

    before: ErrorFeedback
    after: ErrorFeedback
    roots: tuple[bytes, bytes] = (b"", b"")

    def encode_part(self, merged: Vector, index: int) -> Fed:
        """Encode one merged part, [values of the part], with its residual."""
        return self.after.encode_part(merged, index)

    def close(self) -> None:
        """Name both residuals, once every part is encoded."""
        self.roots = (root_of(_hashes(self.before)), root_of(_hashes(self.after)))


@dataclass
class Residuals:
    """What the peer's encodings have lost and still owe.

    `directory` is where the residual of its updates survives restarts, `device` where they are encoded. With `momentum` what
    travels is a running average of the updates, m = momentum x m + (1 - momentum) x update, which begins anew with each start.
    """

    directory: Path
    run_id: str
    momentum: float = 0.0
    device: torch.device = CPU
    _lock: Lock = field(default_factory=Lock)
    _average: Vector | None = None
    _own: ErrorFeedback | None = None
    _merged: ErrorFeedback | None = None
    _before: ErrorFeedback | None = None
    _trees: dict[bytes, tuple[bytes, ...]] = field(default_factory=dict)
    _parts: dict[bytes, tuple[ErrorFeedback, int]] = field(default_factory=dict)

    def encode(self, codec: Codec, update: Vector) -> list[bytes]:
        """All parts of our update, [parameters], with what earlier rounds owe. Raises `ValueError` where it isn't finite."""
        if self.momentum:
            update = self._averaged(update)
        if codec.kind == EXACT:
            self._own = None
            return encode(codec, update)
        with self._lock:
            feedback = self._own = self._continued(codec)
            try:
                return feedback.encode(update, ENCODING_THREADS, self.device)
            except ValueError:
                feedback.reset()
                raise

    def merging(self, codec: Codec, parts: range) -> SpanMerge | None:
        """Begin a merge of these parts; None for a codec that loses nothing worth keeping."""
        if codec.kind == EXACT:
            return None
        known = self._merged
        carried = known is not None and known.codec == codec
        before = known.moved(parts) if known is not None and carried else ErrorFeedback(codec, parts)
        return SpanMerge(before, before.moved(parts))

    def settle(self, included: bool, merge: SpanMerge | None) -> None:
        """The round is over. What wasn't sent or didn't count owes nothing; a merge that counted is continued and served."""
        if not included and self._own is not None:
            self._own.reset()
        self._before = merge.before if merge is not None else None
        self._merged = merge.after if merge is not None else None
        self._trees, self._parts = {}, {}
        if merge is not None:
            self._serve(merge)

    def disown(self) -> None:
        """The round that was settled changed nothing: our updates owe nothing, and our span what it owed before."""
        if self._own is not None:
            self._own.reset()
        self._average, self._merged = None, self._before

    def hashes(self, root: bytes) -> tuple[bytes, ...]:
        """The part hashes of a residual of our last merge; empty for any other root."""
        return self._trees.get(root, ())

    def lookup(self, name: bytes) -> memoryview | None:
        """A part of a residual of our last merge, as little-endian float32."""
        place = self._parts.get(name)
        if place is None:
            return None
        feedback, index = place
        return feedback.residual(index).astype("<f4", copy=False).view(np.uint8).data

    def save(self, round_index: int) -> None:
        """Keep the residual of our updates on disk. Raises `DiskFull`."""
        with self._lock:
            if self._own is not None:
                self._own.save(self.directory / FILE_NAME, self.run_id, round_index)

    def _averaged(self, update: Vector) -> Vector:
        """Worker momentum (Karimireddy, He and Jaggi, 2012.10333). An update that isn't finite leaves no trace."""
        before = self._average if self._average is not None else update
        average = np.add(np.multiply(before, np.float32(self.momentum)), np.multiply(update, np.float32(1 - self.momentum)))
        self._average = average if np.isfinite(average).all() else None
        return average

    def _continued(self, codec: Codec) -> ErrorFeedback:
        """The residual of our updates, taken over from the codec before, or from disk at the first round."""
        if self._own is None:
            fresh = ErrorFeedback(codec)
            path = self.directory / FILE_NAME
            try:
                if path.exists():
                    fresh.restore(path, self.run_id)
            except CheckpointCorrupt as error:
                log.warning("residual_skipped", reason=error.message)
            return fresh
        return self._own if self._own.codec == codec else self._own.with_codec(codec)

    def _serve(self, merge: SpanMerge) -> None:
        for root, feedback in zip(merge.roots, (merge.before, merge.after), strict=True):
            hashes = _hashes(feedback)
            self._trees[root] = hashes
            self._parts |= {name: (feedback, index) for name, index in zip(hashes, feedback.parts, strict=True)}


def save_quietly(residuals: Residuals, round_index: int) -> None:
    """Keep the residual; a full disk costs nothing else."""
    try:
        residuals.save(round_index)
    except DiskFull as error:
        log.warning("residual_not_saved", error=error.message)


def _hashes(feedback: ErrorFeedback) -> tuple[bytes, ...]:
    return tuple(feedback.part_hash(index) for index in feedback.parts)
