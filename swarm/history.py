"""The course of a run in bounded memory: a point for every confirmed round, in the order of the confirmations.

When there are too many, each two neighbours become one that stands for both, so that sums stay exact; all points stand for
equally many rounds, but for the last, which is still being filled. What comes out follows from the ledger's entries alone.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

MOST_POINTS = 1024


@dataclass(slots=True)
class Point:
    """Rounds that were confirmed one after the other: how many, when the last of them was, and sums over their contributions."""

    at_us: int
    rounds: int = 0
    peers: int = 0
    tokens: int = 0
    weight: int = 0
    weighted_loss: float = 0.0

    @property
    def loss(self) -> float | None:
        """The mean loss by weight, in nats per token; None where nothing was contributed."""
        return self.weighted_loss / self.weight if self.weight else None

    def joined(self, other: Point) -> Point:
        """One point for both; `other` is the later one."""
        return Point(
            max(self.at_us, other.at_us),
            self.rounds + other.rounds,
            self.peers + other.peers,
            self.tokens + other.tokens,
            self.weight + other.weight,
            self.weighted_loss + other.weighted_loss,
        )


class History:
    """At most `most` points; each but the last stands for `stride` rounds."""

    __slots__ = ("_most", "points", "stride")

    def __init__(self, points: Iterable[Point] = (), stride: int = 1, most: int = MOST_POINTS) -> None:
        self.points = list(points)
        self.stride = stride
        self._most = most

    @property
    def rounds(self) -> int:
        """How many rounds were confirmed."""
        return (len(self.points) - 1) * self.stride + self.points[-1].rounds if self.points else 0

    def confirmed(self, at_us: int, peers: int) -> int:
        """A round is confirmed in which so many peers took part; its place among the confirmed ones, from 0 on."""
        place = self.rounds
        if place % self.stride == 0 and len(self.points) == self._most:
            self.points = halved(self.points)
            self.stride *= 2
        if place % self.stride == 0:
            self.points.append(Point(at_us))
        point = self.points[-1]
        point.at_us = max(point.at_us, at_us)
        point.rounds += 1
        point.peers += peers
        return place

    def contributed(self, place: int, weight: int, tokens: int, loss: float) -> None:
        """A contribution to the round at this place is verified; it may come long after the confirmation."""
        point = self.points[place // self.stride]
        point.tokens += tokens
        point.weight += weight
        point.weighted_loss += weight * loss


def halved(points: list[Point]) -> list[Point]:
    """Each two neighbours as one; an odd last one stays as it is."""
    pairs = [first.joined(second) for first, second in zip(points[::2], points[1::2], strict=False)]
    return pairs + points[len(points) & ~1 :]
