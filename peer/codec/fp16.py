"""Half precision with one power-of-two scale per part.

A part is, little-endian: the scale as float32, then one IEEE binary16 per value; a value is half x scale. The scale is
chosen so that the part's largest magnitude lies in [2^14, 2^15): tiny gradients don't underflow, large ones don't
overflow, and decoding is exact.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from peer.codec.parts import Parts
from peer.codec.scales import HALF, HEADER, LARGEST_HALF, checked_scale, largest_magnitude, scale_exponent
from swarm.errors import Rejected

VALUE_BYTES = 2


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
        self.check_shape(values.shape, index)
        exponent = scale_exponent(largest_magnitude(np.abs(values)))
        halves = np.clip(np.ldexp(values, -exponent), -LARGEST_HALF, LARGEST_HALF).astype(HALF)
        return HEADER.pack(math.ldexp(1.0, exponent)) + halves.tobytes()

    def decode_part(self, data: bytes | bytearray | memoryview, index: int) -> NDArray[np.float32]:
        """The values of part `index`, checked before memory is taken. Raises `Rejected("bad_part")`."""
        self.check_size(len(data), index)
        scale = checked_scale(HEADER.unpack_from(data)[0], index)
        halves = np.frombuffer(data, dtype=HALF, offset=HEADER.size)
        if not np.isfinite(halves).all():
            raise Rejected("bad_part", f"part {index} has values that are not finite")
        decoded: NDArray[np.float32] = np.multiply(halves.astype(np.float32), np.float32(scale))
        return decoded
