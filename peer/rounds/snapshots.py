"""The states that a peer serves: the newest two, and an older one for as long as a joiner is fetching it."""

from __future__ import annotations

from dataclasses import dataclass, field

from peer.state import Snapshot
from swarm.clock import Clock, SystemClock

IDLE_S = 60.0
MAX_LEASES = 2


@dataclass
class Lease:
    """A state that somebody fetches, and when a chunk of it was last asked for."""

    snapshot: Snapshot
    used_s: float


@dataclass
class Snapshots:
    """Chunks of recent states by hash."""

    clock: Clock = SystemClock()
    _kept: list[Snapshot] = field(default_factory=list)
    _leases: dict[bytes, Lease] = field(default_factory=dict)
    _chunks: dict[bytes, tuple[Snapshot, int]] = field(default_factory=dict)

    def add(self, snapshot: Snapshot) -> None:
        """Serve a new state; the one before the last goes, unless it is leased."""
        self._kept = [*self._kept[-1:], snapshot]
        self._end_idle_leases()
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
        """The chunk hashes of a state, which is then kept for as long as it's being fetched; empty if it isn't here."""
        self._end_idle_leases()
        for snapshot in self._held:
            if snapshot.root == root:
                if root in self._leases or len(self._leases) < MAX_LEASES:
                    self._leases[root] = Lease(snapshot, self.clock.monotonic_s())
                return snapshot.chunk_hashes
        return ()

    def lookup(self, name: bytes) -> memoryview | None:
        """A chunk by its hash."""
        place = self._chunks.get(name)
        if place is None:
            return None
        snapshot, index = place
        if snapshot.root in self._leases:
            self._leases[snapshot.root].used_s = self.clock.monotonic_s()
        return snapshot.chunk(index)

    @property
    def _held(self) -> list[Snapshot]:
        return [*self._kept, *(lease.snapshot for lease in self._leases.values())]

    def _end_idle_leases(self) -> None:
        now_s = self.clock.monotonic_s()
        self._leases = {root: lease for root, lease in self._leases.items() if now_s < lease.used_s + IDLE_S}

    def _index(self) -> None:
        self._chunks = {name: (item, index) for item in self._held for index, name in enumerate(item.chunk_hashes)}
