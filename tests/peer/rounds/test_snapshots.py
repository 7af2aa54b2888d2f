"""Which states a peer serves, and for how long."""

from __future__ import annotations

import numpy as np
import pytest

from peer.outer import OuterState
from peer.rounds.snapshots import IDLE_S, MAX_LEASES, Snapshots
from peer.state import Snapshot
from swarm.clock import ManualClock


def state_after(round_index: int) -> Snapshot:
    """A small state, another one after each round."""
    theta = np.full(100, round_index, dtype=np.float32)
    return Snapshot.from_state(OuterState(theta, {"momentum": -theta}, round_index, round_index, round_index))


@pytest.fixture
def clock() -> ManualClock:
    """Time that the test makes pass."""
    return ManualClock()


@pytest.fixture
def snapshots(clock: ManualClock) -> Snapshots:
    """What a peer serves after two rounds."""
    served = Snapshots(clock)
    served.add(state_after(0))
    served.add(state_after(1))
    return served


def chunk_of(served: Snapshots, round_index: int) -> bytes | None:
    """The chunk with the weights after a round, if it is served."""
    chunk = served.lookup(state_after(round_index).chunk_hashes[1])
    return None if chunk is None else bytes(chunk)


def test_the_newest_two_states_are_served(snapshots: Snapshots) -> None:
    """A third takes the place of the first."""
    snapshots.add(state_after(2))
    assert [chunk_of(snapshots, index) is not None for index in range(3)] == [False, True, True]


def test_a_state_that_is_being_fetched_is_kept_as_long_as_that_takes(snapshots: Snapshots, clock: ManualClock) -> None:
    """Every chunk that is asked for prolongs its lease."""
    assert snapshots.lease(state_after(0).root) == state_after(0).chunk_hashes
    for index in range(2, 12):
        clock.advance(IDLE_S / 2)
        snapshots.add(state_after(index))
        assert chunk_of(snapshots, 0) == bytes(state_after(0).chunk(1))


def test_a_lease_that_nobody_uses_ends(snapshots: Snapshots, clock: ManualClock) -> None:
    """Its memory is free then, and another joiner can have one."""
    for index in range(MAX_LEASES + 1):
        snapshots.lease(state_after(index).root)
        snapshots.add(state_after(index + 2))
    assert [chunk_of(snapshots, index) is not None for index in range(MAX_LEASES + 1)] == [True] * MAX_LEASES + [False]
    clock.advance(IDLE_S)
    newest = MAX_LEASES + 2
    snapshots.lease(state_after(newest).root)
    for index in range(newest + 1, newest + 4):
        snapshots.add(state_after(index))
    assert [chunk_of(snapshots, index) is not None for index in (0, 1, newest)] == [False, False, True]


def test_a_state_that_isnt_here_has_no_chunks(snapshots: Snapshots) -> None:
    """A root that we don't have is no error, and leases nothing."""
    assert snapshots.lease(state_after(7).root) == ()
