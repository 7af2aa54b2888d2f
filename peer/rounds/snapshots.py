"""The states that a peer serves: the newest two, and an older one for as long as a joiner is fetching it."""

from __future__ import annotations

from dataclasses import dataclass, field

from peer.state import Snapshot
from swarm.clock import Clock, SystemClock

LEASE_S = 300.0
MAX_LEASES = 2


@dataclass
class Snapshots:
    """Chunks of recent states by hash."""

    clock: Clock = SystemClock()
    _kept: list[Snapshot] = field(default_factory=list)
    _leases: dict[bytes, tuple[Snapshot, float]] = field(default_factory=dict)
    _chunks: dict[bytes, tuple[Snapshot, int]] = field(default_factory=dict)

    def add(self, snapshot: Snapshot) -> None:
        """Serve a new state; the one before the last goes, unless it is leased."""
        self._kept = [*self._kept[-1:], snapshot]
        now = self.clock.monotonic_s()
        self._leases = {root: lease for root, lease in self._leases.items() if lease[1] > now}
        self._index()

    def clear(self) -> None:
        """Serve nothing any more."""
        self._kept, self._leases, self._chunks = [], {}, {}

    @property
    def newest(self) -> Snapshot | None:
        """The state after the last finished round."""
        return self._kept[-1] if self._kept else None

    @property
    def previous(self) -> Snapshot | None:
        """The state before that."""
        return self._kept[-2] if len(self._kept) > 1 else None

    def lease(self, root: bytes) -> tuple[bytes, ...]:
        """The chunk hashes of a state, which is then kept for a while; empty if it isn't here."""
        for snapshot in [*self._kept, *(item for item, _ in self._leases.values())]:
            if snapshot.root == root:
                if root in self._leases or len(self._leases) < MAX_LEASES:
                    self._leases[root] = (snapshot, self.clock.monotonic_s() + LEASE_S)
                return snapshot.chunk_hashes
        return ()

    def lookup(self, name: bytes) -> memoryview | None:
        """A chunk by its hash."""
        place = self._chunks.get(name)
        return place[0].chunk(place[1]) if place else None

    def _index(self) -> None:
        held = [*self._kept, *(item for item, _ in self._leases.values())]
        self._chunks = {name: (item, index) for item in held for index, name in enumerate(item.chunk_hashes)}
