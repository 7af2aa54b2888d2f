"""Turning the included updates into one, with the same bits on every machine.

Only separate IEEE additions, multiplications, divisions and square roots in a fixed order: no BLAS, no fused
operations, no sums whose order depends on a processor's vector width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from peer.buffers import buffers
from swarm.errors import Rejected
from swarm.manifest import CenteredClip, Mean

Vector = NDArray[np.float32]
Places = NDArray[np.int64]
Scaled = Callable[[Sequence[int], Sequence[float]], None]

BLOCK_VALUES = 1 << 16


def ignore(weights: Sequence[int], scales: Sequence[float]) -> None:
    """Nobody wants to know which updates were scaled down."""


def check_weight(weight: int, limit: int) -> int:
    """The weight itself. Raises `Rejected("bad_weight")` unless it is an integer from 0 to `limit`."""
    if isinstance(weight, bool) or not isinstance(weight, int) or not 0 <= weight <= limit:
        raise Rejected("bad_weight", f"{weight!r} is not between 0 and {limit}")
    return weight


def merge_part(decoded: Sequence[Vector], weights: Sequence[int], rule: Mean | CenteredClip, told: Scaled = ignore) -> Vector:
    """One part of every contributor, each [values of the part], merged by the manifest's rule.

    `told` is called once, with the weights and the factors of at most 1 that the rule scaled the vectors by in the end.
    """
    if isinstance(rule, CenteredClip):
        return centered_clip(decoded, weights, rule.radius_ratio, rule.iterations, told)
    scales = clip_scales([norm(vector) for vector in decoded], rule.clip_ratio)
    told(weights, scales)
    return weighted_mean(decoded, weights, scales)


def weighted_mean(decoded: Sequence[Vector], weights: Sequence[int], scales: Sequence[float] | None = None) -> Vector:
    """The mean of vectors, each [n], by `weights`, each first multiplied by its scale (1 by default); in the given order.

    Each coefficient weight x scale / total weight is rounded to float32 once; vectors are multiplied and added one
    after the other. All weights zero gives zeros.
    """
    if not decoded or len(decoded) != len(weights) or (scales is not None and len(scales) != len(weights)):
        raise ValueError(f"{len(decoded)} vectors with {len(weights)} weights")
    return _combination(decoded, _coefficients(weights, scales or [1.0] * len(weights)))


def merge_pairs(
    pairs: Sequence[tuple[Places, Vector]], weights: Sequence[int], rule: Mean, size: int, told: Scaled = ignore
) -> Vector:
    """The weighted mean of sparse vectors, each the ascending places and the values of its entries; dense, [size].

    The same sums as those of `merge_part`, in a small part of the time; norms are taken over the entries alone.
    """
    out = buffers.empty(size)
    out.fill(0)
    scales = clip_scales([norm(values) for _, values in pairs], rule.clip_ratio)
    told(weights, scales)
    for (places, values), coefficient in zip(pairs, _coefficients(weights, scales), strict=True):
        out[places] += np.multiply(values, coefficient)
    return out


def _combination(vectors: Sequence[Vector], coefficients: Sequence[np.float32]) -> Vector:
    """Each vector times its coefficient, added one after the other."""
    if len({vector.shape for vector in vectors}) != 1:
        raise ValueError("vectors of different lengths")
    out = buffers.empty(vectors[0].size)
    out.fill(0)
    product = np.empty(min(BLOCK_VALUES, out.size), dtype=np.float32)
    for start in range(0, out.size, BLOCK_VALUES):
        target = out[start : start + BLOCK_VALUES]
        term = product[: target.size]
        for vector, coefficient in zip(vectors, coefficients, strict=True):
            np.multiply(vector[start : start + target.size], coefficient, out=term)
            np.add(target, term, out=target)
    return out


def _coefficients(weights: Sequence[int], scales: Sequence[float]) -> list[np.float32]:
    total = sum(weights)
    if total == 0:
        return [np.float32(0)] * len(weights)
    return [np.float32(weight / total * scale) for weight, scale in zip(weights, scales, strict=True)]


def centered_clip(
    decoded: Sequence[Vector], weights: Sequence[int], radius_ratio: float, iterations: int, told: Scaled = ignore
) -> Vector:
    """Centered clipping (Karimireddy, He and Jaggi, 2012.10333) of vectors, each [n], by `weights`.

    It starts at the median of each value. In every iteration a vector farther from the centre than `radius_ratio` x the median
    of the first distances counts as if it lay at that distance, in its direction, and the weighted mean is the next centre. Where
    nothing is too far it is `weighted_mean`, to the bit. So what a minority sends moves the outcome by a bounded amount,
    whatever it sends.
    """
    centre, limit, scales = coordinate_median(decoded), -1.0, [1.0] * len(decoded)
    for _ in range(iterations):
        distances = [distance(vector, centre) for vector in decoded]
        if limit < 0:
            limit = radius_ratio * sorted(distances)[(len(distances) - 1) // 2]
        scales = [limit / far if far > limit else 1.0 for far in distances]
        if all(scale == 1 for scale in scales):
            told(weights, scales)
            return weighted_mean(decoded, weights)
        coefficients = _coefficients(weights, scales)
        rest = np.float32(max(0.0, 1.0 - sum(float(coefficient) for coefficient in coefficients)))
        centre = _combination([centre, *decoded], [rest, *coefficients])
    told(weights, scales)
    return centre


def coordinate_median(vectors: Sequence[Vector]) -> Vector:
    """The median of each value, [n]; of an even number the mean of the two in the middle.

    Rows are sorted by Batcher's odd-even mergesort, whole blocks at a time. Zeros come out positive.
    """
    if not vectors or len({vector.shape for vector in vectors}) != 1:
        raise ValueError("no vectors, or of different lengths")
    count, out = len(vectors), np.empty(vectors[0].shape, dtype=np.float32)
    exchanges, half = tuple(_exchanges(count)), np.float32(0.5)
    spare = np.empty(min(BLOCK_VALUES, out.size), dtype=np.float32)
    for start in range(0, out.size, BLOCK_VALUES):
        rows = [np.add(vector[start : start + BLOCK_VALUES], np.float32(0)) for vector in vectors]
        larger = spare[: rows[0].size]
        for low, high in exchanges:
            np.maximum(rows[low], rows[high], out=larger)
            np.minimum(rows[low], rows[high], out=rows[low])
            rows[high][:] = larger
        below, above = rows[(count - 1) // 2], rows[count // 2]
        middle = below if count % 2 else np.add(np.multiply(below, half), np.multiply(above, half))
        out[start : start + BLOCK_VALUES] = np.add(middle, np.float32(0))  # the halves of the smallest negatives are -0
    return out


def _exchanges(count: int) -> Iterator[tuple[int, int]]:
    """The comparators of Batcher's network for so many rows, in order (Knuth, TAOCP 5.2.2, algorithm M)."""
    block = 1
    while block < count:
        step = block
        while step:
            for start in range(step % block, count - step, 2 * step):
                for low in range(start, start + min(step, count - start - step)):
                    if low // (2 * block) == (low + step) // (2 * block):
                        yield low, low + step
            step //= 2
        block *= 2


def distance(one: Vector, other: Vector) -> float:
    """The Euclidean distance of two vectors, [n]; subtracted, squared and added in float64."""
    return _root_of_squares(
        np.subtract(one[start : start + BLOCK_VALUES], other[start : start + BLOCK_VALUES], dtype=np.float64)
        for start in range(0, one.size, BLOCK_VALUES)
    )


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
    return _root_of_squares(
        vector[start : start + BLOCK_VALUES].astype(np.float64) for start in range(0, vector.size, BLOCK_VALUES)
    )


def _root_of_squares(blocks: Iterable[NDArray[np.float64]]) -> float:
    """Overwrites the blocks."""
    sums = [_halve(np.multiply(block, block, out=block)) for block in blocks]
    return math.sqrt(tree_sum(np.array(sums)))


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
