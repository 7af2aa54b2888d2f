"""Error feedback: what a codec loses in one round is added to the next (Seide et al., 2014; Karimireddy et al., 2019).

    values = decay x residual + update;  part = encode(values);  residual = values - decode(part)

Both ends use it: a sender over the whole vector, a reducer over the parts that it merges. `feed` is the pure step, so that
whoever has the residual from before can check a reducer's part and the residual after it; `ErrorFeedback` keeps the residual.
Only separate IEEE operations in float32: residuals have the same bits on every machine.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from peer.codec import Codec, Vector, on_device
from peer.codec.sparse import Sparse
from swarm.errors import CheckpointCorrupt, DiskFull
from swarm.merkle import blob_hash

EXACT = "fp16"  # the codec that loses nothing worth feeding back
FORMAT = "swarm-feedback-1"
RESIDUAL = "residual"
CPU = torch.device("cpu")
DENSE_DECAY = 1.0
SPARSE_DECAY = 0.95
FULL_DISK = frozenset({errno.ENOSPC, errno.EDQUOT})


@dataclass(frozen=True)
class Fed:
    """A part, the values that others decode from it, and what is left for the next round; both [values of the part]."""

    part: bytes
    decoded: Vector
    residual: Vector


def default_decay(codec: Codec) -> float:
    """What a residual is multiplied by each round: 1, and 0.95 for `sparse` (SparseLoCo)."""
    return SPARSE_DECAY if codec.kind == "sparse" else DENSE_DECAY


def feed(codec: Codec, index: int, update: Vector, residual: Vector, decay: float) -> Fed:
    """Part `index` of `update` plus `residual`, both [values of the part]. Raises `ValueError` for values that aren't finite."""
    with np.errstate(over="ignore", invalid="ignore"):
        values = update + residual if decay == 1 else np.add(np.multiply(residual, np.float32(decay)), update)
    part = codec.encode_part(values, index)
    decoded = codec.decode_part(part, index)
    return Fed(part, decoded, np.subtract(values, decoded, out=values))


class ErrorFeedback:
    """The residual of consecutive parts, zero at first. Threads may work on different parts at once."""

    def __init__(self, codec: Codec, parts: range | None = None, decay: float | None = None) -> None:
        self.codec = codec
        self.parts = range(codec.part_count) if parts is None else parts
        self.decay = default_decay(codec) if decay is None else decay
        if self.parts.step != 1:
            raise ValueError(f"{self.parts} are not consecutive parts")
        self._start = codec.part_span(self.parts.start)[0] if self.parts else 0
        end = codec.part_span(self.parts[-1])[1] if self.parts else 0
        self._residual = np.zeros(end - self._start, dtype=np.float32)

    def encode_part(self, update: Vector, index: int) -> Fed:
        """`feed` with the residual of part `index`, which is replaced. Nothing changes where it raises."""
        place = self._place(index)
        fed = feed(self.codec, index, update, self._residual[place], self.decay)
        self._residual[place] = fed.residual
        return fed

    def encode(self, update: Vector, threads: int = 1, device: torch.device = CPU) -> list[bytes]:
        """All our parts of `update`, [values of our parts]. Raises `ValueError`; the residual is of no more use then.

        A GPU takes the work of the threads, as far as its memory allows.
        """
        if update.shape != self._residual.shape:
            raise ValueError(f"an update of {update.shape} for {self._residual.size} values")
        done: list[bytes] = []
        if device.type != CPU.type and on_device.can_encode(self.codec):
            done = on_device.feed_all(self.codec, update, self._residual, self.decay, device)
        left = self.parts[len(done) :]
        if threads == 1:
            return [*done, *(self._encoded(update, index) for index in left)]
        with ThreadPoolExecutor(threads) as pool:
            return [*done, *pool.map(lambda index: self._encoded(update, index), left)]

    def residual(self, index: int) -> Vector:
        """The residual of part `index`, a read-only view."""
        view = self._residual[self._place(index)]
        view.setflags(write=False)
        return view

    def part_hash(self, index: int) -> bytes:
        """The name of the residual of part `index` as a blob: BLAKE2b-256 of little-endian float32."""
        return _hash(self.residual(index))

    def hash(self) -> bytes:
        """BLAKE2b-256 of the whole residual."""
        return _hash(self._residual)

    def reset(self) -> None:
        """Forget what is left, as after a null round."""
        self._residual.fill(0)

    def moved(self, parts: range) -> ErrorFeedback:
        """Feedback for other parts: what both have is copied, the rest is zero."""
        other = ErrorFeedback(self.codec, parts, self.decay)
        for index in range(max(parts.start, self.parts.start), min(parts.stop, self.parts.stop)):
            other._residual[other._place(index)] = self._residual[self._place(index)]
        return other

    def with_codec(self, codec: Codec) -> ErrorFeedback:
        """The same residual of a whole vector under another codec, with that codec's decay."""
        other = ErrorFeedback(codec)
        if self.parts != range(self.codec.part_count) or other._residual.shape != self._residual.shape:
            raise ValueError("only the residual of a whole vector changes its codec")
        other._residual = self._residual
        return other

    def save(self, path: Path, run_id: str, round_index: int) -> None:
        """Write the residual after round `round_index` as safetensors that are either whole or not there. Raises `DiskFull`."""
        header = {"format": FORMAT, "run": run_id, "round": round_index, "start": self._start, "blake2b": self.hash().hex()}
        temporary = path.with_name(f".{path.name}.tmp")
        with _disk_errors(temporary):
            save_file({RESIDUAL: self._residual}, temporary, {RESIDUAL: json.dumps(header)})
            _sync(temporary)
            temporary.replace(path)
            _sync(path.parent)

    def restore(self, path: Path, run_id: str) -> int:
        """Take the residual over from `path`; returns the round after which it was saved.

        Raises `CheckpointCorrupt` and changes nothing where the file is missing, damaged or another run's.
        """
        try:
            with safe_open(path, framework="np") as file:
                header = json.loads((file.metadata() or {})[RESIDUAL])
                residual = file.get_tensor(RESIDUAL)
            round_index = int(header["round"])
            expected = {"format": FORMAT, "run": run_id, "round": round_index, "start": self._start}
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
            raise CheckpointCorrupt("the residual can't be read") from error
        shaped = residual.shape == self._residual.shape and residual.dtype == np.float32
        if not shaped or {**header, "blake2b": ""} != {**expected, "blake2b": ""}:
            raise CheckpointCorrupt("the residual belongs to another run, span or version")
        if _hash(residual).hex() != header["blake2b"]:
            raise CheckpointCorrupt("the residual is damaged")
        self._residual[:] = residual
        return round_index

    def _encoded(self, update: Vector, index: int) -> bytes:
        """The part alone; what `feed` does, in place."""
        place = self._place(index)
        values = self._residual[place]
        with np.errstate(over="ignore", invalid="ignore"):
            if self.decay != 1:
                np.multiply(values, np.float32(self.decay), out=values)
            np.add(values, update[place], out=values)
        part = self.codec.encode_part(values, index)
        if isinstance(self.codec, Sparse):
            places, sent = self.codec.decode_pairs(part, index)
            values[places] -= sent
        else:
            np.subtract(values, self.codec.decode_part(part, index), out=values)
        return part

    def _place(self, index: int) -> slice:
        if index not in self.parts:
            raise IndexError(index)
        start, end = self.codec.part_span(index)
        return slice(start - self._start, end - self._start)


def _hash(residual: Vector) -> bytes:
    return blob_hash(residual.astype("<f4", copy=False).view(np.uint8).data)


@contextmanager
def _disk_errors(temporary: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        temporary.unlink(missing_ok=True)
        if getattr(error, "errno", None) in FULL_DISK or "os error 28" in str(error):
            raise DiskFull("no space left for the residual", "free some space; training goes on meanwhile") from error
        raise


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
