"""Ternary with one half-precision scale per 32 values: 1.6 + 0.5 = 2.1 bits per value.

The layout is that of `peer.codec.grouped`. Five trits make a byte from 0 to 242, the first the least significant; 0 stands for
0, 1 for 1 and 2 for -1. Byte j of m holds the values j, m + j, 2m + j, 3m + j and 4m + j; those after the last are zero.

A group's scale has the least squared error of all scales (Li and Liu, 2016, exactly instead of approximately). The entropy of
the trits is then about 1.5 bits: coding it would save 5 % and make the length of a part depend on its content.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from peer.codec.grouped import Grouped, Integers, Vector

TRITS = 5
BASE = np.uint8(3)


@dataclass(frozen=True)
class Int2(Grouped):
    """A fifth of a byte per value."""

    group: ClassVar[int] = 32
    levels: ClassVar[int] = 1

    kind: str = "int2"
    topology: Literal["butterfly"] = "butterfly"

    def fitting_scales(self, magnitudes: Vector, unit: np.float32) -> Vector:
        """The mean of each group's m largest magnitudes, times `unit`, for the m with the largest (sum of them)^2 / m.

        Sums run from the largest to the smallest; of equal ones the smallest m counts.
        """
        ascending = np.sort(np.multiply(magnitudes, unit), axis=1)
        ranked = np.ascontiguousarray(ascending.T[::-1])  # [group, groups]
        total: Vector = ranked[0].copy()
        scales: Vector = ranked[0].copy()
        best = np.square(total)
        for place in range(1, self.group):
            np.add(total, ranked[place], out=total)
            mean = np.divide(total, np.float32(place + 1))
            gain = np.multiply(mean, total)
            np.copyto(scales, mean, where=gain > best)
            np.maximum(best, gain, out=best)
        return scales

    def packed_bytes(self, count: int) -> int:
        """Five in a byte."""
        return -(-count // TRITS)

    def pack(self, integers: Integers) -> bytes:
        """Horner's rule over the five rows."""
        rows = np.zeros((TRITS, self.packed_bytes(integers.size)), dtype=np.uint8)
        bits = integers.view(np.uint8)
        np.add(bits & 1, bits >> 7, out=rows.reshape(-1)[: integers.size])
        packed: NDArray[np.uint8] = rows[TRITS - 1].copy()
        for row in rows[TRITS - 2 :: -1]:
            np.multiply(packed, BASE, out=packed)
            np.add(packed, row, out=packed)
        return packed.tobytes()

    def unpack(self, packed: NDArray[np.uint8], count: int) -> Integers:
        """Repeated division by three; the last digit of a byte above 242 is 3, which is out of range."""
        rows = np.empty((TRITS, packed.size), dtype=np.uint8)
        rest = packed
        for row in rows[: TRITS - 1]:
            quotient = rest // BASE
            np.subtract(rest, quotient * BASE, out=row)
            rest = quotient
        rows[TRITS - 1] = rest
        integers: Integers = rows.view(np.int8) - np.int8(3) * (rows == 2)
        return integers.reshape(-1)
