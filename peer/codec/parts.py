"""Cutting a vector into parts of a fixed number of values."""

from __future__ import annotations

from dataclasses import dataclass


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
