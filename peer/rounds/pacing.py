"""How long to wait: learnt from recent rounds, so that no deadline is a fixed number of seconds."""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from peer.rounds.planning import grace_of

HISTORY = 64
PATIENCE_FLOOR_S = 2.0
EXCHANGE_FLOOR_S = 2.0
SHORTEST_FIRST_EXCHANGE_S, LONGEST_FIRST_EXCHANGE_S = 10.0, 600.0
SLOW_LINK_BITS_PER_S, BITS_PER_VALUE = 5e6, 16
FIRST_PATIENCE_S = 5.0
ENOUGH = 3


def _recent() -> deque[float]:
    return deque(maxlen=HISTORY)


def first_exchange_s(parameters: int) -> float:
    """How long the first exchanges may take: a whole update in 16 bits over a slow link, in seconds."""
    return min(LONGEST_FIRST_EXCHANGE_S, max(SHORTEST_FIRST_EXCHANGE_S, parameters * BITS_PER_VALUE / SLOW_LINK_BITS_PER_S))


@dataclass
class Pacing:
    """Recent durations in seconds, and the deadlines that follow: median + k x MAD, never below a floor."""

    floor_s: float
    mads: float
    first_exchange_s: float = SHORTEST_FIRST_EXCHANGE_S
    _lateness: deque[float] = field(default_factory=_recent)
    _proposing: deque[float] = field(default_factory=_recent)
    _exchanging: deque[float] = field(default_factory=_recent)

    def observe(self, committed_s: Iterable[float], proposed_s: float, completed_s: float) -> None:
        """Take a finished round into account: when each commit arrived, the proposal, and the last merged part."""
        arrivals = sorted(committed_s)
        if not arrivals:
            return
        quorum_s = arrivals[len(arrivals) // 2]
        self._lateness.extend(arrival - quorum_s for arrival in arrivals if arrival > quorum_s)
        self._proposing.append(max(0.0, proposed_s - arrivals[-1]))
        self._exchanging.append(max(0.0, completed_s - proposed_s))

    @property
    def grace_s(self) -> float:
        """How long a late commit is waited for once a quorum has committed."""
        return grace_of(self._lateness, self.floor_s, self.mads)

    @property
    def patience_s(self) -> float:
        """How long a leader may take to propose once it could."""
        if len(self._proposing) < ENOUGH:
            return FIRST_PATIENCE_S
        return grace_of(self._proposing, PATIENCE_FLOOR_S, self.mads)

    @property
    def typical_exchange_s(self) -> float:
        """How long exchanges have taken; 0 before the first."""
        return statistics.median(self._exchanging) if self._exchanging else 0.0

    @property
    def exchange_s(self) -> float:
        """How long an exchange may take before those who hold it up are looked at."""
        if len(self._exchanging) < ENOUGH:
            return self.first_exchange_s
        return grace_of(self._exchanging, EXCHANGE_FLOOR_S, self.mads)
