"""What the dense low-bit codecs share: small integers, one half-precision scale per group of consecutive values.

A part is, little-endian: its scale as float32 (`peer.codec.scales`), one binary16 per group, then the packed integers. A value
is integer x (half x scale), in float32; the product in parentheses is exact, so that every machine decodes the same bits.
The integer is the quotient value / (half x scale), rounded to nearest, ties to even, and clipped.

Only one packing of given integers and scales is accepted: padding is zero, a group whose scale is zero has only zeros.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from peer.codec.parts import Parts
from peer.codec.scales import (
    HALF,
    HEADER,
    checked_group_scales,
    checked_scale,
    group_scales,
    largest_magnitude,
    scale_exponent,
    to_halves,
)
from swarm.errors import Rejected

Vector = NDArray[np.float32]
Integers = NDArray[np.int8]


@dataclass(frozen=True)
class Grouped(Parts):
    """Integers from -`levels` to `levels` in groups of `group` values; subclasses say how they are packed."""

    group: ClassVar[int]
    levels: ClassVar[int]

    def part_size_limit(self, index: int) -> int:
        """The exact number of bytes of part `index`."""
        return HEADER.size + HALF.itemsize * self._groups(index) + self.packed_bytes(self.part_length(index))

    def encode_part(self, values: Vector, index: int) -> bytes:
        """The bytes of part `index`. Raises `ValueError` for values that are not finite or too few."""
        self.check_shape(values.shape, index)
        groups = self._padded(values, index)
        magnitudes = np.abs(groups)
        exponent = scale_exponent(largest_magnitude(magnitudes) / self.levels)
        scale = math.ldexp(1.0, exponent)
        halves = to_halves(self.fitting_scales(magnitudes, np.float32(1 / scale)), scale, self.levels)
        integers = _quotients(groups, group_scales(halves, scale), magnitudes, self.levels)
        return b"".join((HEADER.pack(scale), halves.tobytes(), self.pack(integers.reshape(-1)[: values.size])))

    def decode_part(self, data: bytes | bytearray | memoryview, index: int) -> Vector:
        """The values of part `index`, checked before memory is taken. Raises `Rejected("bad_part")`."""
        self.check_size(len(data), index)
        view, count = memoryview(data), self._groups(index)
        scale = checked_scale(HEADER.unpack_from(view)[0], index)
        start = HEADER.size + HALF.itemsize * count
        scales = checked_group_scales(view[HEADER.size :], count, scale, self.levels, index)
        length = self.part_length(index)
        integers = self.unpack(np.frombuffer(view, dtype=np.uint8, offset=start), length)
        if integers.min() < -self.levels or integers.max() > self.levels or integers[length:].any():
            raise Rejected("bad_part", f"part {index} has integers out of range")
        return self._values(integers[:length], scales, index)

    def fitting_scales(self, magnitudes: Vector, unit: np.float32) -> Vector:
        """The scale of each group of `magnitudes`, [groups, group], times `unit`: the largest magnitude becomes `levels`."""
        scales: Vector = np.divide(np.multiply(magnitudes.max(axis=1), unit), np.float32(self.levels))
        return scales

    def packed_bytes(self, count: int) -> int:
        """Bytes that `count` integers take."""
        raise NotImplementedError

    def pack(self, integers: Integers) -> bytes:
        """The bytes of `integers`, [count]."""
        raise NotImplementedError

    def unpack(self, packed: NDArray[np.uint8], count: int) -> Integers:
        """`count` integers, and the padding after them, which may be out of range."""
        raise NotImplementedError

    def _groups(self, index: int) -> int:
        return -(-self.part_length(index) // self.group)

    def _padded(self, values: Vector, index: int) -> Vector:
        """[groups, group], the last one filled up with zeros; no copy where nothing is missing."""
        missing = self._groups(index) * self.group - values.size
        whole = np.concatenate((values, np.zeros(missing, np.float32))) if missing else values
        return whole.reshape(-1, self.group)

    def _values(self, integers: Integers, scales: Vector, index: int) -> Vector:
        groups = self._padded(integers.astype(np.float32), index)
        empty = scales == 0
        if empty.any() and groups[empty].any():
            raise Rejected("bad_part", f"part {index} has values in a group whose scale is zero")
        np.multiply(groups, scales[:, None], out=groups)
        return groups.reshape(-1)[: integers.size]


def _quotients(groups: Vector, scales: Vector, out: Vector, levels: int) -> Integers:
    """The integers, [groups, group]; `out` is overwritten."""
    divisors = np.where(scales == 0, np.float32(np.inf), scales)
    np.divide(groups, divisors[:, None], out=out)
    np.rint(out, out=out)
    np.clip(out, -levels, levels, out=out)
    return out.astype(np.int8)
