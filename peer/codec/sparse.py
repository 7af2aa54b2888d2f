"""SparseLoCo's updates (Sarfi et al., 2025): the strongest values of every chunk of 4096, two bits each.

`top_k` values of a whole chunk travel, and of a shorter last one as many per value, rounded up: those with the largest
magnitudes, of equal ones those with the lowest index. A value's two bits are its sign and which of the chunk's two levels
stands for its magnitude. Indices are Elias-Fano coded (Elias, 1974): 8 bits each at top-64 of 4096, where 7.4 is the least
possible and 12 the plain size, and every part has a fixed length. Together 0.164 bits per value of the vector.

A part is, little-endian: its scale as float32 (`peer.codec.scales`); then for the whole chunks, and after them for a shorter
last one, four tables, each of them filled up with zero bits to a byte, first bit least significant:

1. per chunk the lower and the upper level, binary16, times the part's scale;
2. per value, ordered by chunk and index: 1 for the upper level, 1 for a negative sign;
3. per value the `l` low bits of its index, l = floor(log2(chunk length / values of the chunk));
4. per chunk the high rests h of its indices: a one at h + i for the i-th value, zeros elsewhere.

Where zeros are left out (`leave_out_zeros`) one bit per chunk follows the scale, the first least significant and filled up with
zeros to a byte: 1 for a chunk that has a value other than zero. The tables are of those chunks only.

Levels are the means of the magnitudes on both sides of a threshold, which starts at their mean and moves halfway between the
levels three times (Lloyd, 1982). Sums are by halving (`peer.merge`), so that the bytes don't depend on the processor.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from peer.buffers import buffers
from peer.codec.parts import Parts
from peer.codec.scales import (
    HALF,
    HEADER,
    checked_group_scales,
    checked_scale,
    largest_magnitude,
    scale_exponent,
    to_halves,
)
from swarm.errors import Rejected

Vector = NDArray[np.float32]
Indices = NDArray[np.int64]
Bits = NDArray[np.uint8]

CHUNK_VALUES = 4096
INDEX_BITS = 12
TOP_K = 64
VALUE_BITS = 2
LLOYD_STEPS = 3
GROUPS_PER_KEPT = 4
MANY_CANDIDATES = 4


@dataclass(frozen=True)
class Section:
    """`chunks` chunks of `length` values, of which `kept` travel, from value `start` of a part on."""

    start: int
    chunks: int
    length: int
    kept: int

    @property
    def low_bits(self) -> int:
        """Bits of an index that travel as they are."""
        return (self.length // self.kept).bit_length() - 1

    @property
    def high_width(self) -> int:
        """Elias-Fano: a one per value and a zero per step to the next high rest."""
        return self.kept + ((self.length - 1) >> self.low_bits)

    @property
    def table_bytes(self) -> tuple[int, int, int, int]:
        """Sizes of the four tables."""
        pairs = self.chunks * self.kept
        bits = (pairs * VALUE_BITS, pairs * self.low_bits, self.chunks * self.high_width)
        values, low, high = (-(-count // 8) for count in bits)
        return 2 * HALF.itemsize * self.chunks, values, low, high

    @property
    def size_bytes(self) -> int:
        """All four tables."""
        return sum(self.table_bytes)


@dataclass(frozen=True)
class Sparse(Parts):
    """`top_k` of 4096 values; the others are zero."""

    top_k: int = TOP_K
    leave_out_zeros: bool = False
    kind: str = "sparse"
    topology: Literal["all_gather"] = "all_gather"

    def part_size_limit(self, index: int) -> int:
        """The number of bytes of part `index`: the exact one, or where zeros are left out the largest."""
        length = self.part_length(index)
        return self._tables_start(length) + sum(section.size_bytes for section in self._sections(length))

    def encode_part(self, values: Vector, index: int) -> bytes:
        """The bytes of part `index`. Raises `ValueError` for values that are not finite or too few."""
        self.check_shape(values.shape, index)
        magnitudes = np.abs(values)
        scale = math.ldexp(1.0, scale_exponent(largest_magnitude(magnitudes)))
        pieces = [HEADER.pack(scale)]
        if self.leave_out_zeros:
            travels = _has_values(magnitudes)
            pieces.append(_packed(travels))
            if not travels.all():
                places = np.repeat(travels, CHUNK_VALUES)[: values.size]
                values, magnitudes = values[places], magnitudes[places]
        for section in self._sections(values.size):
            span = slice(section.start, section.start + section.chunks * section.length)
            pieces += _encode(section, values[span], magnitudes[span], scale)
        return b"".join(pieces)

    def decode_part(self, data: bytes | bytearray | memoryview, index: int) -> Vector:
        """The values of part `index`, checked before memory is taken. Raises `Rejected("bad_part")`."""
        places, values = self.decode_pairs(data, index)
        out = buffers.empty(self.part_length(index))
        out.fill(0)
        out[places] = values
        return out

    def decode_pairs(self, data: bytes | bytearray | memoryview, index: int) -> tuple[Indices, Vector]:
        """Strictly ascending places within part `index`, and the values there. Raises `Rejected("bad_part")`."""
        length, view = self.part_length(index), memoryview(data)
        starts = self._starts(view, index)
        travelling = int(np.minimum(length - starts, CHUNK_VALUES).sum())
        sections, rest = list(self._sections(travelling)), view[self._tables_start(length) :]
        size = sum(section.size_bytes for section in sections)
        if len(rest) != size:
            raise Rejected("bad_part", f"part {index} has {len(view)} bytes instead of {self._tables_start(length) + size}")
        scale = checked_scale(HEADER.unpack_from(view)[0], index)
        places, values = [np.empty(0, dtype=np.int64)], [np.empty(0, dtype=np.float32)]
        for section in sections:
            section_places, section_values = _decode(section, rest[: section.size_bytes], scale, index)
            places.append(section_places)
            values.append(section_values)
            rest = rest[section.size_bytes :]
        found = np.concatenate(places)
        if travelling < length:
            found = starts[found // CHUNK_VALUES] + found % CHUNK_VALUES
        return found, np.concatenate(values)

    def _tables_start(self, length: int) -> int:
        """Where the tables of a part of so many values begin."""
        chunks = -(-length // CHUNK_VALUES)
        return HEADER.size + (-(-chunks // 8) if self.leave_out_zeros else 0)

    def _starts(self, view: memoryview, index: int) -> Indices:
        """Where the chunks that travel begin, once the part is long enough to tell. Raises `Rejected("bad_part")`."""
        length = self.part_length(index)
        starts: Indices = np.arange(0, length, CHUNK_VALUES)
        if not self.leave_out_zeros:
            self.check_size(len(view), index)
            return starts
        end = self._tables_start(length)
        if len(view) < end:
            raise Rejected("bad_part", f"part {index} has {len(view)} bytes instead of {end} or more")
        return starts[_unpacked(view[HEADER.size : end], starts.shape, index).view(np.bool_)]

    def _sections(self, length: int) -> Iterator[Section]:
        chunks, rest = divmod(length, CHUNK_VALUES)
        if chunks:
            yield Section(0, chunks, CHUNK_VALUES, self.top_k)
        if rest:
            yield Section(chunks * CHUNK_VALUES, 1, rest, -(-rest * self.top_k // CHUNK_VALUES))


def _has_values(magnitudes: Vector) -> NDArray[np.bool_]:
    """Which chunks have a value other than zero, [chunks]; the last may be shorter."""
    starts = np.arange(0, magnitudes.size, CHUNK_VALUES)
    found: NDArray[np.bool_] = np.maximum.reduceat(magnitudes, starts) > 0
    return found


def _encode(section: Section, values: Vector, magnitudes: Vector, scale: float) -> list[bytes]:
    """The four tables."""
    indices = strongest(magnitudes.reshape(section.chunks, section.length), section.kept)
    places = indices + np.arange(section.chunks)[:, None] * section.length
    kept = magnitudes[places] * np.float32(1 / scale)
    halves = to_halves(_levels(kept), scale, 1)
    lower, upper = (halves[:, side, None].astype(np.float32) for side in range(2))
    pairs = np.stack((kept > np.multiply(np.add(lower, upper), np.float32(0.5)), values[places] < 0), axis=-1)
    low = indices[..., None] >> np.arange(section.low_bits) & 1
    high = np.zeros((section.chunks, section.high_width), dtype=np.uint8)
    np.put_along_axis(high, (indices >> section.low_bits) + np.arange(section.kept), 1, axis=1)
    return [halves.tobytes(), *(_packed(table) for table in (pairs, low, high))]


def _decode(section: Section, data: memoryview, scale: float, index: int) -> tuple[Indices, Vector]:
    """Places within the part, and values there, each [chunks x kept]."""
    tables = []
    for size in section.table_bytes:
        tables.append(data[:size])
        data = data[size:]
    levels = checked_group_scales(tables[0], 2 * section.chunks, scale, 1, index).reshape(-1, 2)
    if (levels[:, 0] > levels[:, 1]).any():
        raise Rejected("bad_part", f"part {index} has levels in the wrong order")
    shape = (section.chunks, section.kept)
    pairs = _unpacked(tables[1], (*shape, VALUE_BITS), index)
    low = _unpacked(tables[2], (*shape, section.low_bits), index)
    high = _unpacked(tables[3], (section.chunks, section.high_width), index)
    indices = _indices(section, low, high, index)
    values = np.where(pairs[..., 0], levels[:, 1, None], levels[:, 0, None])
    np.negative(values, out=values, where=pairs[..., 1].view(np.bool_))
    places = indices + (section.start + np.arange(section.chunks)[:, None] * section.length)
    return places.reshape(-1), values.reshape(-1)


def _indices(section: Section, low: Bits, high: Bits, index: int) -> Indices:
    """Indices within chunks, [chunks, kept]. Raises `Rejected("bad_part")` unless they ascend strictly and are in range."""
    if (np.count_nonzero(high, axis=1) != section.kept).any():
        raise Rejected("bad_part", f"part {index} has a chunk with another number of values than {section.kept}")
    columns = np.nonzero(high)[1].reshape(section.chunks, section.kept)
    rests = columns - np.arange(section.kept)
    indices: Indices = (rests << section.low_bits) + low @ (1 << np.arange(section.low_bits))
    if (indices[:, -1] >= section.length).any() or (indices[:, 1:] <= indices[:, :-1]).any():
        raise Rejected("bad_part", f"part {index} has indices that are repeated, unsorted or out of range")
    return indices


def _packed(bits: NDArray[Any]) -> bytes:
    return np.packbits(bits.astype(np.uint8, copy=False), bitorder="little").tobytes()


def _unpacked(data: memoryview, shape: tuple[int, ...], index: int) -> Bits:
    bits = np.unpackbits(np.frombuffer(data, dtype=np.uint8), bitorder="little")
    count = math.prod(shape)
    if bits[count:].any():
        raise Rejected("bad_part", f"part {index} has padding that is not zero")
    return bits[:count].reshape(shape)


def strongest(magnitudes: Vector, kept: int) -> Indices:
    """Ascending indices of the `kept` largest magnitudes of each chunk, [chunks, kept]; of equal ones the lowest indices."""
    chunks, length = magnitudes.shape
    candidates = np.flatnonzero(magnitudes >= _floor(magnitudes, kept)[:, None])
    if candidates.size > MANY_CANDIDATES * chunks * kept:
        return _strongest_by_threshold(magnitudes, kept)
    rows, columns = np.divmod(candidates, length)
    strength = magnitudes.reshape(-1)[candidates].view(np.int32).astype(np.int64)  # positive floats are ordered as their bits
    keys = (rows << (31 + INDEX_BITS)) + ((0x7FFFFFFF - strength) << INDEX_BITS) + columns
    keys.sort()
    first = np.searchsorted(rows, np.arange(chunks))
    picked: Indices = keys[first[:, None] + np.arange(kept)] & (CHUNK_VALUES - 1)
    picked.sort(axis=1)
    return picked


def _strongest_by_threshold(magnitudes: Vector, kept: int) -> Indices:
    """The same, slower, but at a cost that doesn't grow with the number of equal magnitudes."""
    chunks, length = magnitudes.shape
    threshold = np.partition(magnitudes, length - kept, axis=1)[:, length - kept, None]
    above, equal = magnitudes > threshold, magnitudes == threshold
    missing = kept - np.count_nonzero(above, axis=1)
    first = np.cumsum(equal, axis=1, dtype=np.int32) <= missing[:, None]
    columns: Indices = np.nonzero(above | (equal & first))[1]
    return columns.reshape(chunks, kept)


def _floor(magnitudes: Vector, kept: int) -> Vector:
    """For each chunk a value that at least `kept` of its magnitudes reach, and few more do, [chunks].

    That is the `kept`-th largest of the maxima of small groups: every one of them is the magnitude of another value.
    """
    chunks, length = magnitudes.shape
    group = max(1, 1 << (length // (GROUPS_PER_KEPT * kept)).bit_length() - 1) if length == CHUNK_VALUES else 1
    maxima = magnitudes.reshape(chunks, group, -1).max(axis=1)
    place = maxima.shape[1] - kept
    floor: Vector = np.partition(maxima, place, axis=1)[:, place]
    return floor


def _levels(kept: Vector) -> Vector:
    """The lower and the upper level of each chunk, [chunks, 2], for magnitudes [chunks, kept]."""
    by_value = np.ascontiguousarray(kept.T)
    lower = upper = threshold = _mean(by_value, np.ones_like(by_value, dtype=np.bool_))
    for _ in range(LLOYD_STEPS):
        above = by_value > threshold
        lower, upper = _mean(by_value, ~above), _mean(by_value, above)
        threshold = np.multiply(np.add(lower, upper), np.float32(0.5))
    return np.stack((lower, np.maximum(lower, upper)), axis=1)


def _mean(by_value: Vector, chosen: NDArray[np.bool_]) -> Vector:
    """The mean of the chosen values of each column of [kept, chunks], zero where there are none."""
    rows = np.multiply(by_value, chosen)
    count = rows.shape[0]
    while count > 1:
        half = 1 << (count - 1).bit_length() - 1
        np.add(rows[: count - half], rows[half:count], out=rows[: count - half])
        count = half
    mean: Vector = np.divide(rows[0], np.maximum(np.count_nonzero(chosen, axis=0), 1).astype(np.float32))
    return mean
