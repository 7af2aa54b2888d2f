"""Machines that use one key at the same time, which would contradict each other: the one that began last counts. Pure."""

from __future__ import annotations

from dataclasses import dataclass, replace

from swarm.rpc.v1.coordinator_pb2 import TWIN_OTHER_COUNTS, TWIN_THIS_COUNTS, TWIN_UNSPECIFIED, Twin

MOST_REMEMBERED = 4


@dataclass(frozen=True, slots=True)
class Starts:
    """The starts of a program that have announced under one key: the one that counts, when it began, and those that don't.

    `other_heard_s` is when one of these was last heard, None if not since the newest began. What was decided about a start stays,
    however its clock goes. Times are those of the coordinator's monotonic clock.
    """

    counts: bytes
    began_s: float
    superseded: tuple[bytes, ...] = ()
    other_heard_s: float | None = None

    def heard(self, start: bytes, began_s: float, now_s: float) -> Starts:
        """With an announcement of `start`."""
        if start == self.counts:
            return self
        if start not in self.superseded and began_s >= self.began_s:
            return Starts(start, began_s, (*self.superseded, self.counts)[-MOST_REMEMBERED:])
        others = tuple(name for name in self.superseded if name != start)
        return replace(self, superseded=(*others, start)[-MOST_REMEMBERED:], other_heard_s=now_s)

    def told(self, start: bytes, now_s: float, ttl_s: float) -> Twin.ValueType:
        """What `start` is told: that another counts; or that it does, though another was heard within `ttl_s`."""
        if start != self.counts:
            return TWIN_OTHER_COUNTS
        heard = self.other_heard_s is not None and now_s - self.other_heard_s <= ttl_s
        return TWIN_THIS_COUNTS if heard else TWIN_UNSPECIFIED
