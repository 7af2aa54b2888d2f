"""Who has held rounds up, as the leader that had to go on without them saw it, and for how long they stay out."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

MOST_ROUNDS = 64


@dataclass
class Lapses:
    """A peer that answers and commits, but whose merged parts don't come in all the time that they are given, costs that time.

    Each time it stays out of the rosters that we propose for twice as many rounds, so that a slow link is tried again soon, and
    malice comes to nothing.
    """

    _times: dict[str, int] = field(default_factory=dict)
    _until: dict[str, int] = field(default_factory=dict)

    def note(self, peers: Iterable[str], round_index: int) -> None:
        """These held up a round that we led."""
        for peer in peers:
            times = self._times[peer] = self._times.get(peer, 0) + 1
            self._until[peer] = round_index + min(MOST_ROUNDS, 1 << min(times, MOST_ROUNDS.bit_length()))

    def barred(self, round_index: int) -> frozenset[str]:
        """Who stays out of the roster after this round."""
        return frozenset(peer for peer, until in self._until.items() if round_index < until)
