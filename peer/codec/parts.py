"""Cutting a vector into parts of a fixed number of values, whose encoded size is known beforehand."""

from __future__ import annotations

from dataclasses import dataclass

from swarm.errors import Rejected


@dataclass(frozen=True)
class Parts:
    """`values` values in parts of `part_values`, of which only the last may be shorter."""

    values: int
    part_values: int

    @property
    def part_count(self) -> int:
        """Number of parts."""
        return -(-self.values // self.part_values)

    def part_span(self, index: int) -> tuple[int, int]:
        """First value of part `index` and the one after its last."""
        if not 0 <= index < self.part_count:
            raise IndexError(index)
        start = index * self.part_values
        return start, min(start + self.part_values, self.values)

    def part_length(self, index: int) -> int:
        """Number of values in part `index`."""
        start, end = self.part_span(index)
        return end - start

    def part_size_limit(self, index: int) -> int:
        """The exact number of bytes of part `index`."""
        raise NotImplementedError

    def check_shape(self, shape: tuple[int, ...], index: int) -> None:
        """Raises `ValueError` unless values of this shape are those of part `index`."""
        if shape != (self.part_length(index),):
            raise ValueError(f"part {index} has {self.part_length(index)} values, not {shape}")

    def check_size(self, size_bytes: int, index: int) -> None:
        """Raises `Rejected("bad_part")` unless part `index` has this many bytes."""
        if size_bytes != self.part_size_limit(index):
            raise Rejected("bad_part", f"part {index} has {size_bytes} bytes instead of {self.part_size_limit(index)}")
