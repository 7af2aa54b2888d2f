"""Four bits per value with one half-precision scale per 64 values: 4.25 bits per value.

The layout is that of `peer.codec.grouped`; integers are two's complement nibbles from -7 to 7, the even value in a byte's low
half, the odd one in its high half. After an odd number of values the last high half is zero.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from peer.codec.grouped import Grouped, Integers

PAIR = np.dtype("<u2")
NIBBLES = np.uint16(0x0F0F)
SIGN = np.int8(8)


@dataclass(frozen=True)
class Int4(Grouped):
    """Half a byte per value."""

    group: ClassVar[int] = 64
    levels: ClassVar[int] = 7

    kind: str = "int4"
    topology: Literal["butterfly"] = "butterfly"

    def packed_bytes(self, count: int) -> int:
        """Two in a byte."""
        return -(-count // 2)

    def pack(self, integers: Integers) -> bytes:
        """Two neighbours at a time, as one 16-bit number."""
        even = np.append(integers, np.int8(0)) if integers.size % 2 else integers
        pairs = np.bitwise_and(even.view(PAIR), NIBBLES)
        packed: NDArray[np.uint8] = np.bitwise_or(pairs, pairs >> 4).astype(np.uint8)
        return packed.tobytes()

    def unpack(self, packed: NDArray[np.uint8], count: int) -> Integers:
        """The other way round; the sign bit is extended by (n xor 8) - 8."""
        pairs = packed.astype(PAIR)
        nibbles: Integers = np.bitwise_and(np.bitwise_or(pairs, pairs << 4), NIBBLES).view(np.int8)
        return (nibbles ^ SIGN) - SIGN
