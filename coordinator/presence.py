"""Who is alive: announcements expire after a time to live. Nothing here is durable, apart from who may start the run."""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from itertools import islice

from coordinator.twins import Starts
from swarm.errors import Rejected
from swarm.rpc.v1.coordinator_pb2 import TWIN_UNSPECIFIED, Twin

MAX_PEERS = 200_000
MAX_ADDRESSES = 16
MAX_ADDRESS_CHARACTERS = 512
RECENT_HASHES = 16
NOT_PLAYING = frozenset(
    {"starting", "connecting", "fetching_data", "joining", "waiting_for_peers", "protocol_mismatch", "paused", "failed", ""}
)

Rosters = Callable[[int], Collection[frozenset[str]]]


@dataclass(slots=True)
class Sighting:
    """The newest announcement of one peer."""

    peer_id: str
    addresses: tuple[str, ...]
    round: int
    heard_s: float
    state_root: bytes = b""
    playing: bool = False
    reachable: bool = True
    starts: Starts | None = None


@dataclass(frozen=True, slots=True)
class _Issue:
    """The newest second in which a peer signed announcements, and their hashes."""

    issued_at: int
    hashes: tuple[bytes, ...]


class Presence:
    """The alive peers, ordered by when they were last heard; every call is told the time.

    `started_s` counts as the last sign of everyone who wasn't heard yet: after a restart nobody is presumed dead.
    """

    def __init__(self, ttl_s: float, started_s: float, genesis: str = "") -> None:
        self.ttl_s = ttl_s
        self.started_s = started_s
        self.genesis = genesis
        self._alive: OrderedDict[str, Sighting] = OrderedDict()
        self._issued: OrderedDict[tuple[str, bytes], _Issue] = OrderedDict()
        self._resuming = ""
        self._idle_since_s = started_s

    @property
    def interval_s(self) -> float:
        """How often to announce: a live peer is always heard within a third of the time to live."""
        return self.ttl_s / 4.5

    @property
    def silence_s(self) -> float:
        """After which silence a peer of the roster counts as gone."""
        return max(5.0, self.ttl_s / 3)

    def __len__(self) -> int:
        return len(self._alive)

    def is_repeat(self, peer_id: str, issued_at: int, payload_hash: bytes, start: bytes = b"") -> bool:
        """Whether this is the newest announcement of a start once more. Raises `Rejected` if it is an older one."""
        known = self._issued.get((peer_id, start))
        if known is None or issued_at > known.issued_at:
            return False
        if known.hashes[-1] == payload_hash and issued_at == known.issued_at:
            return True
        if issued_at < known.issued_at or payload_hash in known.hashes:
            raise Rejected("replayed", f"issued at {issued_at}, newest {known.issued_at}", peer_id)
        return False

    def counts(self, peer_id: str, start: bytes) -> bool:
        """Whether an announcement speaks for its peer; not a superseded twin's, or that of who has a look (no start)."""
        known = self._alive.get(peer_id)
        return known is None or known.starts is None or known.starts.counts == start

    def meet(self, peer_id: str, start: bytes, uptime_s: float, now_s: float) -> Twin.ValueType:
        """What a start under a key is to be told about others under the same. Call `expire` before."""
        known = self._alive.get(peer_id)
        if not start or known is None or known.starts is None:
            return TWIN_UNSPECIFIED
        known.starts = known.starts.heard(start, now_s - uptime_s, now_s)
        return known.starts.told(start, now_s, self.ttl_s)

    def announced(
        self, sighting: Sighting, issued_at: int, payload_hash: bytes, start: bytes = b"", uptime_s: float = 0.0
    ) -> None:
        """Take in a fresh announcement, of the start that counts."""
        self.note_issue(sighting.peer_id, issued_at, payload_hash, start)
        known = self._alive.get(sighting.peer_id)
        if sighting.state_root and not any(other.state_root for other in self._alive.values()):
            self._idle_since_s = max(self._idle_since_s, sighting.heard_s)  # the first of those that may resume the run
        before = known.starts if known is not None else None
        sighting.starts = before or (Starts(start, sighting.heard_s - uptime_s) if start else None)
        self._alive[sighting.peer_id] = sighting
        self._alive.move_to_end(sighting.peer_id)
        if len(self._alive) > MAX_PEERS:
            self._alive.popitem(last=False)

    def left(self, peer_id: str, issued_at: int, payload_hash: bytes, start: bytes = b"") -> None:
        """Forget a peer that says good-bye."""
        self.note_issue(peer_id, issued_at, payload_hash, start)
        self._alive.pop(peer_id, None)
        if self.genesis == peer_id:
            self.genesis = ""

    def forget(self, peer_id: str) -> None:
        """Name a peer to nobody any more."""
        self._alive.pop(peer_id, None)
        if self.genesis == peer_id:
            self.genesis = ""

    def sighting(self, peer_id: str) -> Sighting | None:
        """The newest announcement of a peer that is alive."""
        return self._alive.get(peer_id)

    def heard(self, peer_id: str, now_s: float) -> None:
        """A signed message other than an announcement also shows that an announced peer is alive."""
        sighting = self._alive.get(peer_id)
        if sighting is not None:
            sighting.heard_s = now_s
            self._alive.move_to_end(peer_id)

    def expire(self, now_s: float) -> None:
        """Forget everyone who was silent for the time to live."""
        while self._alive:
            oldest = next(iter(self._alive.values()))
            if now_s - oldest.heard_s <= self.ttl_s:
                break
            del self._alive[oldest.peer_id]
        if self.genesis and self.genesis not in self._alive and now_s - self.started_s > self.ttl_s:
            self.genesis = ""

    def choose_genesis(self, peer_id: str) -> bool:
        """Whether `peer_id` starts the run: the first to ask, until it leaves or expires. Call `expire` before."""
        self.genesis = self.genesis or peer_id
        return self.genesis == peer_id

    def choose_resumer(self, peer_id: str, rosters: Rosters, now_s: float) -> bool:
        """Whether `peer_id` resumes a run whose peers were all gone. Call `expire` before.

        Nobody may be playing. The newest state that a majority of the roster of its round holds wins at once; the newest that
        anybody holds only after a time of silence since the first of them spoke, so that others can still come with a newer one.
        Of its holders the smallest peer id resumes, and stays chosen while it is alive and nobody plays. Who began the run is no
        better than others.
        """
        if any(sighting.playing for sighting in self._alive.values()):
            self._idle_since_s, self._resuming = now_s, ""
            return False
        chosen = self._alive.get(self._resuming)
        if chosen is None or not chosen.state_root:
            self._resuming = self._resumer(rosters, now_s - self._idle_since_s > self.silence_s)
        return self._resuming == peer_id

    def _resumer(self, rosters: Rosters, waited: bool) -> str:
        holders: dict[tuple[int, bytes], list[str]] = defaultdict(list)
        for sighting in self._alive.values():
            if sighting.state_root:
                holders[sighting.round, sighting.state_root].append(sighting.peer_id)
        agreed = [
            state
            for state, peers in holders.items()
            if any(2 * len(roster.intersection(peers)) > len(roster) for roster in rosters(state[0]))
        ]
        candidates = agreed or (list(holders) if waited else [])
        if not candidates:
            return ""
        return min(holders[max(candidates, key=lambda state: (state[0], len(holders[state]), state[1]))])

    def others(self, peer_id: str, limit: int) -> list[Sighting]:
        """The most recently heard peers other than `peer_id`."""
        newest = (sighting for sighting in reversed(self._alive.values()) if sighting.peer_id != peer_id)
        return list(islice(newest, limit))

    def recently_heard(self, peer_ids: Iterable[str], now_s: float) -> list[str]:
        """Those of `peer_ids` that can't be presumed gone."""
        return [peer_id for peer_id in peer_ids if now_s - self._heard_s(peer_id) <= self.silence_s]

    def _heard_s(self, peer_id: str) -> float:
        sighting = self._alive.get(peer_id)
        return self.started_s if sighting is None else sighting.heard_s

    def note_issue(self, peer_id: str, issued_at: int, payload_hash: bytes, start: bytes) -> None:
        """Remember an announcement, so that it isn't taken again."""
        issuer = peer_id, start
        known = self._issued.get(issuer)
        earlier = known.hashes[1 - RECENT_HASHES :] if known is not None and known.issued_at == issued_at else ()
        self._issued[issuer] = _Issue(issued_at, (*earlier, payload_hash))
        self._issued.move_to_end(issuer)
        if len(self._issued) > MAX_PEERS:
            self._issued.popitem(last=False)
