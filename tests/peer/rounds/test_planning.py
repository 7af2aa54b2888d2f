"""A leader's decisions: rotation, quorum, spans, quotas, grace."""

from __future__ import annotations

import statistics

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peer.rounds.planning import grace_of, held_back, leader_of, quorum_of, quotas_of, roster_hash, spans_of
from peer.rounds.values import CommitFacts, RosterMember
from tests.peer.rounds.simulation import commit_of, names

rates = st.one_of(st.just(0), st.integers(1, 100), st.integers(1, 1 << 40))
uploads = st.dictionaries(st.sampled_from(names(12)), rates, min_size=1)
seconds = st.one_of(st.just(0.0), st.floats(0, 1e308), st.sampled_from([1e-308, 5e-324, 1.0, 2.0, 8.0]))


@given(uploads, st.integers(1, 500))
@settings(deadline=None)
def test_spans_cover_every_part_once(table: dict[str, int], parts: int) -> None:
    """In the order of peer ids, each span begins where the one before ends, and the last ends at the last part."""
    spans = spans_of(parts, table)
    assert list(spans) == sorted(table)
    end = 0
    for first, count in spans.values():
        assert first == end
        assert count >= 0
        end = first + count
    assert end == parts


@given(uploads, st.integers(1, 500))
@settings(deadline=None)
def test_spans_are_proportional_to_upload(table: dict[str, int], parts: int) -> None:
    """A span is less than one part away from its exact share; an unknown rate counts as the median of the known."""
    known = [rate for rate in table.values() if rate]
    middle = int(statistics.median(known)) if known else 1
    rate = {peer: value or middle for peer, value in table.items()}
    for peer, (_, count) in spans_of(parts, table).items():
        assert abs(count - parts * rate[peer] / sum(rate.values())) < 1.0001


def test_equal_uploads_share_evenly_with_ties_by_peer_id() -> None:
    """Seven parts among three equals: the first by peer id gets the odd one."""
    assert spans_of(7, {"c": 5, "a": 5, "b": 5}) == {"a": (0, 3), "b": (3, 2), "c": (5, 2)}
    assert spans_of(2, {"c": 0, "a": 0, "b": 0}) == {"a": (0, 1), "b": (1, 1), "c": (2, 0)}


@given(st.binary(min_size=1, max_size=32), st.integers(0, 1 << 40), st.integers(1, 64), st.integers(0, 1 << 20))
@settings(deadline=None)
def test_the_rotation_reaches_everybody(run_id: bytes, number: int, count: int, term: int) -> None:
    """As many consecutive terms as there are peers have each of them as the leader once."""
    leaders = [leader_of(run_id, number, names(count), term + step) for step in range(count)]
    assert sorted(leaders) == list(names(count))


def test_rounds_start_with_different_leaders() -> None:
    """The first leader follows from run and round, so that no peer leads always."""
    assert {leader_of(b"run", number, names(5), 0) for number in range(100)} == set(names(5))
    assert [leader_of(b"run", 9, names(5), 0)] * 3 == [leader_of(b"run", 9, names(5), 0) for _ in range(3)]


@given(st.integers(1, 200))
def test_two_quorums_always_meet(size: int) -> None:
    """A quorum is the least number of peers of which two groups must share one."""
    assert 2 * quorum_of(size) > size
    assert 2 * (quorum_of(size) - 1) <= size


def test_the_roster_hash_names_members_and_quotas() -> None:
    """Another member, another quota or another order is another roster."""
    one, two = RosterMember("a", 1), RosterMember("b", 2)
    hashes = {roster_hash(item) for item in ([one, two], [two, one], [one], [one, RosterMember("b", 3)])}
    assert len(hashes) == 4
    assert all(len(item) == 32 for item in hashes)


@st.composite
def rosters(draw: st.DrawFn) -> tuple[tuple[str, ...], dict[str, int], dict[str, CommitFacts], int]:
    """Members of the next round, quotas of this one, the commits, and the full quota."""
    members = tuple(sorted(draw(st.sets(st.sampled_from(names(8)), min_size=1))))
    full = draw(st.integers(1, 5000))
    previous = draw(st.dictionaries(st.sampled_from(names(8)), st.integers(0, full)))
    weights = st.sampled_from([0, 1, 10])
    commits = {
        peer: commit_of(peer, weight, seconds=time_s)
        for peer, (weight, time_s) in draw(st.dictionaries(st.sampled_from(names(8)), st.tuples(weights, seconds))).items()
    }
    return members, previous, commits, full


@given(rosters(), st.booleans())
@settings(max_examples=300, deadline=None)
def test_shared_quotas_add_up_to_the_batch(plan: tuple, scale: bool) -> None:
    """Whatever the speeds, the quotas add up to the target batch, with one sample each at the least."""
    members, previous, commits, full = plan
    quotas = quotas_of(members, previous, commits, full, True, scale)
    assert set(quotas) == set(members)
    assert sum(quotas.values()) == max(full, len(members))
    assert min(quotas.values()) >= 1


@given(rosters(), st.booleans())
@settings(max_examples=300, deadline=None)
def test_own_quotas_stay_within_limits(plan: tuple, scale: bool) -> None:
    """Nobody gets more than the full quota or less than a sixteenth of it."""
    members, previous, commits, full = plan
    quotas = quotas_of(members, previous, commits, full, False, scale)
    assert set(quotas) == set(members)
    assert all(max(1, int(full / 16)) <= quota <= full for quota in quotas.values())
    if not scale:
        assert set(quotas.values()) == {full}


def test_quotas_follow_speed() -> None:
    """Half the speed is half the work; a joiner gets what the slowest gets; who came too late gets half of what it had."""
    previous = {"a": 100, "b": 100, "late": 60}
    commits = {"a": commit_of("a", seconds=10.0), "b": commit_of("b", seconds=20.0)}
    members = ["a", "b", "late", "new"]
    assert quotas_of(members, previous, commits, 100, False, True) == {"a": 100, "b": 50, "late": 30, "new": 50}
    shared = quotas_of(members, previous, commits, 300, True, True)
    assert shared == {"a": 135, "b": 68, "late": 30, "new": 67}


def test_small_changes_of_speed_leave_the_quota() -> None:
    """Noise of some percent in the time taken doesn't move the quota."""
    commits = {"a": commit_of("a", seconds=10.0), "b": commit_of("b", seconds=10.9)}
    assert quotas_of(["a", "b"], {"a": 100, "b": 100}, commits, 100, False, True) == {"a": 100, "b": 100}


def test_newcomers_get_less_while_there_are_others() -> None:
    """At most half of a full quota, or in `sync` of an even one, whose rest the others take; alone they get all there is."""
    quotas = {"a": 100, "b": 60, "new": 90, "slow": 20}
    assert held_back(quotas, {"new", "slow"}, 0.5, 100, False) == {"a": 100, "b": 60, "new": 50, "slow": 20}
    assert held_back(quotas, {"new", "slow"}, 0.5, 270, True) == {"a": 136, "b": 81, "new": 33, "slow": 20}
    assert held_back(quotas, set(quotas), 0.5, 100, False) == quotas
    assert held_back(quotas, set(), 0.5, 100, True) == quotas
    assert held_back({"a": 1, "new": 1}, {"new"}, 0.1, 2, True) == {"a": 1, "new": 1}


@given(rosters(), st.booleans(), st.floats(0.01, 1.0), st.data())
def test_holding_newcomers_back_loses_no_work_of_a_batch(plan: tuple, shared: bool, share: float, data: st.DataObject) -> None:
    """Nobody's quota vanishes, no newcomer gets more than before, and a shared batch stays whole."""
    members, previous, commits, full = plan
    before = quotas_of(members, previous, commits, full, shared, True)
    newcomers = data.draw(st.sets(st.sampled_from(sorted(members))))
    after = held_back(before, newcomers, share, full, shared)
    assert after.keys() == before.keys()
    assert min(after.values()) >= 1
    assert all(after[peer] <= before[peer] for peer in newcomers)
    if shared:
        assert sum(after.values()) == sum(before.values())


@given(st.lists(st.floats(0, 1e4), max_size=64), st.floats(0.1, 100), st.floats(0.1, 100))
@settings(deadline=None)
def test_grace_is_never_below_its_floor_and_follows_the_median(lateness: list[float], floor_s: float, mads: float) -> None:
    """Without experience ten times the floor; with it, at least the floor and the median lateness."""
    grace = grace_of(lateness, floor_s, mads)
    assert grace >= floor_s
    if lateness:
        assert grace >= statistics.median(lateness)
    else:
        assert grace == 10 * floor_s


def test_one_outlier_hardly_moves_the_grace() -> None:
    """Median and MAD: one peer that once took an hour doesn't make everybody wait for an hour."""
    assert grace_of([1.0, 1.1, 0.9, 1.0, 3600.0], 0.5, 6.0) == pytest.approx(1.6)
