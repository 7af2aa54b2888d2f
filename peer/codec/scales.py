"""The scale of a part: a power of two, so that half-precision numbers of any magnitude travel and decode exactly.

A part starts with it as little-endian float32. Half-precision scales of groups are multiples of it; those are positive, or
zero where nothing of a group travels.
"""

from __future__ import annotations

import math
import struct

import numpy as np
from numpy.typing import NDArray

from swarm.errors import Rejected

HEADER = struct.Struct("<f")
HALF = np.dtype("<f2")
HALF_BITS = np.dtype("<u2")
INFINITE_HALF = 0x7C00
TOP_EXPONENT = 15
MIN_SCALE_EXPONENT = -126
MAX_SCALE_EXPONENT = 112  # 65504 x 2^112 is the largest product that float32 holds
LARGEST_HALF = 65504.0
LARGEST_FLOAT = float(np.finfo(np.float32).max)


def scale_exponent(largest: float) -> int:
    """The exponent of the scale that puts `largest` into [2^14, 2^15), as far as the range of scales allows."""
    if largest == 0:
        return 0
    _, exponent = math.frexp(largest)
    return min(max(exponent - TOP_EXPONENT, MIN_SCALE_EXPONENT), MAX_SCALE_EXPONENT)


def checked_scale(scale: float, index: int) -> float:
    """The scale of part `index`. Raises `Rejected("bad_part")` unless it is an allowed power of two."""
    mantissa, exponent = math.frexp(scale)
    if mantissa != 0.5 or not MIN_SCALE_EXPONENT <= exponent - 1 <= MAX_SCALE_EXPONENT:
        raise Rejected("bad_part", f"part {index} has a scale that is not an allowed power of two")
    return scale


def largest_magnitude(magnitudes: NDArray[np.float32]) -> float:
    """The largest of a part's magnitudes. Raises `ValueError` where one is not finite."""
    return finite(float(np.max(magnitudes)))


def finite(largest: float) -> float:
    """The number itself. Raises `ValueError` if it is not finite."""
    if not math.isfinite(largest):
        raise ValueError("an update that is not finite can't travel")
    return largest


def to_halves(multiples: NDArray[np.float32], scale: float, factor: int) -> NDArray[np.float16]:
    """The groups' scales, as multiples of the part's, in half precision: nearest, but never so large that `factor` overflows."""
    return np.minimum(multiples, np.float32(largest_half(scale, factor))).astype(HALF)


def largest_half(scale: float, factor: int) -> np.float16:
    """The largest half-precision number whose `factor`-fold times `scale` is finite in float32."""
    limit = min(LARGEST_HALF, LARGEST_FLOAT / (scale * factor))
    largest = np.float16(limit)
    return np.nextafter(largest, np.float16(0)) if float(largest) > limit else largest


def group_scales(halves: NDArray[np.float16], scale: float) -> NDArray[np.float32]:
    """What the groups' half-precision scales stand for: each times the part's scale, exact unless it is subnormal."""
    product: NDArray[np.float32] = np.multiply(halves.astype(np.float32), np.float32(scale))
    return product


def checked_group_scales(data: memoryview, count: int, scale: float, factor: int, index: int) -> NDArray[np.float32]:
    """`group_scales` of `count` halves at the start of `data`.

    Raises `Rejected("bad_part")` for one that is negative (-0 too), not finite, or whose `factor`-fold is not.
    """
    bits = np.frombuffer(data, dtype=HALF_BITS, count=count)
    if (bits >= INFINITE_HALF).any():
        raise Rejected("bad_part", f"part {index} has a group's scale that is negative or not finite")
    halves = bits.view(HALF)
    if float(halves.max()) * scale * factor > LARGEST_FLOAT:
        raise Rejected("bad_part", f"part {index} has values that are not finite")
    return group_scales(halves, scale)
