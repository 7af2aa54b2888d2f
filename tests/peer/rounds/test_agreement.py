"""Counting signed results."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peer.rounds.agreement import Agreement, count, newest, present_rounds
from tests.peer.rounds.simulation import names

roots = st.sampled_from([b"a", b"b", b"c"])
votes = st.dictionaries(st.sampled_from((*names(7), "stranger")), roots)


@given(votes, st.integers(1, 7), st.none() | roots)
@settings(deadline=None)
def test_a_verdict_takes_more_than_half_of_all_voters(table: dict[str, bytes], size: int, mine: bytes | None) -> None:
    """A root wins with a majority of the voters, whether or not all voted; strangers' votes count nothing."""
    voters = names(size)
    found = count(table, voters, mine)
    numbers = {root: sum(table.get(peer) == root for peer in voters) for root in (b"a", b"b", b"c")}
    winners = [root for root, number in numbers.items() if 2 * number > size]
    if winners:
        assert found.root == winners[0]
        assert found.verdict == ("agreed" if found.root == mine else "differs")
        assert set(found.holders) == {peer for peer in voters if table.get(peer) == found.root}
    else:
        assert found == Agreement("split" if all(peer in table for peer in voters) else "open")


def test_half_is_no_majority() -> None:
    """Two against two stays undecided, and is a split once all have voted."""
    assert count({"a": b"x", "b": b"x", "c": b"y"}, ["a", "b", "c", "d"], b"x").verdict == "open"
    assert count({"a": b"x", "b": b"x", "c": b"y", "d": b"y"}, ["a", "b", "c", "d"], b"x").verdict == "split"


def test_nobody_votes() -> None:
    """Without a vote, or without voters, nothing is decided."""
    assert count({}, ["a"], b"x") == Agreement("open")
    assert count({"a": b"x"}, [], b"x") == Agreement("open")


def test_the_newest_state_needs_support() -> None:
    """Two honest results outweigh a single liar's later round; the next round counts once it has comparable support."""
    honest = [(5, b"five", "a"), (5, b"five", "b"), (5, b"five", "c")]
    assert newest([*honest, (99, b"lie", "liar")]) == (5, b"five", ("a", "b", "c"))
    assert newest([(5, b"five", "a"), (5, b"five", "b"), (99, b"lie", "liar")]) == (5, b"five", ("a", "b"))
    assert newest([*honest, (6, b"six", "a")]) == (5, b"five", ("a", "b", "c"))
    assert newest([*honest, (6, b"six", "a"), (6, b"six", "b")]) == (6, b"six", ("a", "b"))
    assert newest([]) is None


@given(st.lists(st.tuples(st.integers(0, 5), roots, st.sampled_from(names(5))), min_size=1))
@settings(deadline=None)
def test_saying_it_twice_doesnt_count_twice(results: list[tuple[int, bytes, str]]) -> None:
    """Repeating results changes nothing, nor does their order; who is named has vouched for just that root."""
    found = newest(results)
    assert found is not None
    assert found == newest([*results, *results]) == newest(results[::-1])
    assert set(found[2]) == {signer for number, root, signer in results if (number, root) == found[:2]}


@pytest.mark.parametrize(
    ("claims", "first"),
    [
        ([7], 7),
        ([7, 7, 8], 8),  # on their way from one round to the next
        ([7, 7, 1_000_007], 7),
        ([7, 8, 3], 8),
        ([3, 3, 3, 8], 3),
        ([7, 900], 900),  # word against word: the other one is tried next
    ],
)
def test_the_present_round_is_that_of_most_peers(claims: list[int], first: int) -> None:
    """One who claims a round that nobody else has reached, or is left behind, doesn't decide; every claim is tried in the end."""
    likely = present_rounds({str(index): claim for index, claim in enumerate(claims)})
    assert likely[0] == first
    assert sorted(likely) == sorted(set(claims))
