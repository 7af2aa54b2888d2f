"""Turning the included updates into one, with the same bits on every machine.

Only separate IEEE additions, multiplications, divisions and square roots in a fixed order: no BLAS, no fused
operations, no sums whose order depends on a processor's vector width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from swarm.errors import Rejected

Vector = NDArray[np.float32]

BLOCK_VALUES = 1 << 16


def check_weight(weight: int, limit: int) -> int:
    """The weight itself. Raises `Rejected("bad_weight")` unless it is an integer from 0 to `limit`."""
    if isinstance(weight, bool) or not isinstance(weight, int) or not 0 <= weight <= limit:
        raise Rejected("bad_weight", f"{weight!r} is not between 0 and {limit}")
    return weight


def weighted_mean(decoded: Sequence[Vector], weights: Sequence[int], scales: Sequence[float] | None = None) -> Vector:
    """The mean of vectors, each [n], by `weights`, each first multiplied by its scale (1 by default); in the given order.

    Each coefficient weight x scale / total weight is rounded to float32 once; vectors are multiplied and added one
    after the other. All weights zero gives zeros.
    """
    if not decoded or len(decoded) != len(weights) or (scales is not None and len(scales) != len(weights)):
        raise ValueError(f"{len(decoded)} vectors with {len(weights)} weights")
    if len({vector.shape for vector in decoded}) != 1:
        raise ValueError("vectors of different lengths")
    coefficients = _coefficients(weights, scales or [1.0] * len(weights))
    out = np.zeros(decoded[0].shape, dtype=np.float32)
    product = np.empty(min(BLOCK_VALUES, out.size), dtype=np.float32)
    for start in range(0, out.size, BLOCK_VALUES):
        target = out[start : start + BLOCK_VALUES]
        term = product[: target.size]
        for vector, coefficient in zip(decoded, coefficients, strict=True):
            np.multiply(vector[start : start + target.size], coefficient, out=term)
            np.add(target, term, out=target)
    return out


def _coefficients(weights: Sequence[int], scales: Sequence[float]) -> list[np.float32]:
    total = sum(weights)
    if total == 0:
        return [np.float32(0)] * len(weights)
    return [np.float32(weight / total * scale) for weight, scale in zip(weights, scales, strict=True)]


def clip_scales(norms: Sequence[float], ratio: float) -> list[float]:
    """A factor of at most 1 for each update: one whose norm exceeds `ratio` x the median norm is scaled down to that.

    The median is the lower one over the norms that are not zero: joiners' empty updates don't count, and of two updates
    the larger can't vouch for itself.
    """
    present = sorted(norm for norm in norms if norm > 0)
    if not present:
        return [1.0] * len(norms)
    limit = ratio * present[(len(present) - 1) // 2]
    return [limit / norm if norm > limit else 1.0 for norm in norms]


def tree_sum(values: NDArray[np.floating]) -> float:
    """The sum in float64, by halving.

    Blocks of 65536 values, padded with zeros, add their second half to their first until one value is left; then the
    blocks' sums are treated the same way.
    """
    sums = np.array(
        [_halve(values[start : start + BLOCK_VALUES].astype(np.float64)) for start in range(0, values.size, BLOCK_VALUES)]
    )
    return tree_sum(sums) if sums.size > 1 else float(sums[0]) if sums.size else 0.0


def norm(vector: Vector) -> float:
    """The Euclidean norm, with squares and sum in float64."""
    sums = np.array([_squares(vector[start : start + BLOCK_VALUES]) for start in range(0, vector.size, BLOCK_VALUES)])
    return math.sqrt(tree_sum(sums))


def _squares(block: Vector) -> float:
    wide = block.astype(np.float64)
    return _halve(np.multiply(wide, wide, out=wide))


def _halve(block: NDArray[np.float64]) -> float:
    """The sum of a block, overwriting it."""
    length = block.size
    while length > 1:
        half = 1 << (length - 1).bit_length() - 1
        np.add(block[: length - half], block[half:length], out=block[: length - half])
        length = half
    return float(block[0])


def arithmetic_is_ieee() -> bool:
    """Whether this thread keeps subnormal numbers; libraries built with fast-math flags can switch them off."""
    tiny = np.array([1e-45, 1e-40], dtype=np.float32)
    return bool((np.multiply(tiny, np.float32(1)) != 0).all())
