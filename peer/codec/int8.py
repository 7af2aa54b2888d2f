"""Bytes with one half-precision scale per 256 values: 8.06 bits per value.

The layout is that of `peer.codec.grouped`; integers are two's complement bytes from -127 to 127.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from peer.codec.grouped import Grouped, Integers


@dataclass(frozen=True)
class Int8(Grouped):
    """One byte per value."""

    group: ClassVar[int] = 256
    levels: ClassVar[int] = 127

    kind: str = "int8"
    topology: Literal["butterfly"] = "butterfly"

    def packed_bytes(self, count: int) -> int:
        """One byte each."""
        return count

    def pack(self, integers: Integers) -> bytes:
        """Two's complement."""
        return integers.tobytes()

    def unpack(self, packed: NDArray[np.uint8], count: int) -> Integers:
        """Two's complement; nothing is padded."""
        return packed.view(np.int8)
