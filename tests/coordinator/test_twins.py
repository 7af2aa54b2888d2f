"""Which of the machines that use one key counts."""

from __future__ import annotations

from coordinator.twins import MOST_REMEMBERED, Starts
from swarm.rpc.v1.coordinator_pb2 import TWIN_OTHER_COUNTS, TWIN_THIS_COUNTS, TWIN_UNSPECIFIED

TTL_S = 45.0


def test_who_began_last_counts() -> None:
    """Whoever is heard first."""
    seen = Starts(b"b", 20.0).heard(b"a", 10.0, 30.0)
    assert (seen.counts, seen.told(b"a", 30.0, TTL_S), seen.told(b"b", 30.0, TTL_S)) == (
        b"b",
        TWIN_OTHER_COUNTS,
        TWIN_THIS_COUNTS,
    )
    seen = Starts(b"a", 10.0).heard(b"b", 20.0, 30.0)
    assert (seen.counts, seen.told(b"b", 30.0, TTL_S)) == (b"b", TWIN_UNSPECIFIED)
    assert seen.heard(b"a", 10.0, 31.0).told(b"b", 31.0, TTL_S) == TWIN_THIS_COUNTS


def test_what_is_decided_stays() -> None:
    """Two that began at the same moment, by clocks that disagree from call to call, aren't both told to stop."""
    seen = Starts(b"a", 10.0)
    for now_s in range(20, 40):
        seen = seen.heard(b"b", 10.0 + (now_s % 3 - 1) / 10, float(now_s)).heard(b"a", 10.0 + (now_s % 2) / 10, now_s + 0.5)
    assert len({seen.told(name, 40.0, TTL_S) for name in (b"a", b"b")}) == 2


def test_a_restart_is_no_twin() -> None:
    """Nobody hears of a machine that isn't there any more; and of many only the latest are remembered."""
    seen = Starts(b"0", 0.0)
    for number in range(1, 20):
        seen = seen.heard(b"%d" % number, float(number), float(number))
        assert seen.told(b"%d" % number, float(number), TTL_S) == TWIN_UNSPECIFIED
    assert len(seen.superseded) == MOST_REMEMBERED
    assert seen.heard(b"0", 0.0, 30.0).told(b"0", 30.0, TTL_S) == TWIN_OTHER_COUNTS
