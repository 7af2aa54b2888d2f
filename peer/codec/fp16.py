"""Half precision with one power-of-two scale per part.

A part is, little-endian: the scale as float32, then one IEEE binary16 per value; a value is half x scale. The scale is
chosen so that the part's largest magnitude lies in [2^14, 2^15): tiny gradients don't underflow, large ones don't
overflow, and decoding is exact.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from peer.codec.parts import Parts
from swarm.errors import Rejected

HEADER = struct.Struct("<f")
VALUE_BYTES = 2
LARGEST_HALF = 65504.0
TOP_EXPONENT = 15
MIN_SCALE_EXPONENT = -126
MAX_SCALE_EXPONENT = 112  # 65504 x 2^112 is the largest product that float32 holds


@dataclass(frozen=True)
class Fp16(Parts):
    """Two bytes per value."""

    kind: str = "fp16"
    topology: Literal["butterfly"] = "butterfly"

    def part_size_limit(self, index: int) -> int:
        """The exact number of bytes of part `index`."""
        return HEADER.size + VALUE_BYTES * self.part_length(index)

    def encode_part(self, values: NDArray[np.float32], index: int) -> bytes:
        """The bytes of part `index`. Raises `ValueError` for values that are not finite or too few."""
        if values.shape != (self.part_length(index),):
            raise ValueError(f"part {index} has {self.part_length(index)} values, not {values.shape}")
        largest = float(np.max(np.abs(values)))
        if not math.isfinite(largest):
            raise ValueError("an update that is not finite can't travel")
        exponent = _scale_exponent(largest)
        halves = np.clip(np.ldexp(values, -exponent), -LARGEST_HALF, LARGEST_HALF).astype("<f2")
        return HEADER.pack(math.ldexp(1.0, exponent)) + halves.tobytes()

    def decode_part(self, data: bytes | bytearray | memoryview, index: int) -> NDArray[np.float32]:
        """The values of part `index`, checked before memory is taken. Raises `Rejected("bad_part")`."""
        if len(data) != self.part_size_limit(index):
            raise Rejected("bad_part", f"part {index} has {len(data)} bytes instead of {self.part_size_limit(index)}")
        scale = _checked_scale(HEADER.unpack_from(data)[0], index)
        halves = np.frombuffer(data, dtype="<f2", offset=HEADER.size)
        if not np.isfinite(halves).all():
            raise Rejected("bad_part", f"part {index} has values that are not finite")
        decoded: NDArray[np.float32] = np.multiply(halves.astype(np.float32), np.float32(scale))
        return decoded


def _scale_exponent(largest: float) -> int:
    if largest == 0:
        return 0
    _, exponent = math.frexp(largest)
    return min(max(exponent - TOP_EXPONENT, MIN_SCALE_EXPONENT), MAX_SCALE_EXPONENT)


def _checked_scale(scale: float, index: int) -> float:
    mantissa, exponent = math.frexp(scale)
    if mantissa != 0.5 or not MIN_SCALE_EXPONENT <= exponent - 1 <= MAX_SCALE_EXPONENT:
        raise Rejected("bad_part", f"part {index} has a scale that is not an allowed power of two")
    return scale
