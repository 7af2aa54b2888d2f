"""The course of a run takes bounded memory, and its sums stay exact."""

from __future__ import annotations

import pytest

from swarm.credits import fold
from swarm.history import MOST_POINTS, History, Point, halved
from tests.world import COORDINATOR, NOW_S, SEQUENCE_LENGTH, World, entry, identity

PEERS = [identity(number) for number in range(3)]


def run_of(rounds: int, most: int) -> History:
    """Rounds with one contribution each, of so many tokens as the round has a number."""
    history = History(most=most)
    for number in range(rounds):
        place = history.confirmed(1000 + number, peers=2)
        assert place == number
        history.contributed(place, weight=1, tokens=number, loss=float(number))
    return history


@pytest.mark.parametrize("rounds", [0, 1, 7, 8, 9, 16, 17, 1000])
def test_points_are_few_and_their_sums_exact(rounds: int) -> None:
    """However many rounds there are, at most so many points stand for all of them, equally many each but for the last."""
    history = run_of(rounds, most=8)
    assert len(history.points) <= 8
    assert history.rounds == rounds == sum(point.rounds for point in history.points)
    assert {point.rounds for point in history.points[:-1]} <= {history.stride}
    assert sum(point.tokens for point in history.points) == sum(range(rounds))
    assert sum(point.peers for point in history.points) == 2 * rounds
    assert [point.at_us for point in history.points] == sorted(point.at_us for point in history.points)
    for place, point in enumerate(history.points):
        covered = range(place * history.stride, place * history.stride + point.rounds)
        assert point.loss == sum(covered) / len(covered)


def test_late_contributions_find_their_round() -> None:
    """A report that comes long after its round was confirmed counts where that round is by now."""
    history = run_of(100, most=8)
    place = 37
    before = history.points[place // history.stride].tokens
    history.contributed(place, weight=1, tokens=5, loss=0.0)
    assert history.points[place // history.stride].tokens == before + 5


def test_a_round_without_work_has_no_loss() -> None:
    """Where nothing was contributed there is nothing to show."""
    assert Point(0, rounds=1).loss is None


def test_halving_keeps_an_odd_last_point() -> None:
    """Neighbours are joined two by two."""
    joined = halved([Point(1, 1), Point(3, 1), Point(2, 1)])
    assert [(point.at_us, point.rounds) for point in joined] == [(3, 2), (2, 1)]


def test_the_ledger_gives_the_history() -> None:
    """Every confirmed round is a point, at the time of its confirmation; late reports count, others' rounds don't."""
    world = World()
    entries = world.ledger(PEERS, 3)
    proposal, reports = world.round(PEERS, 3)
    entries += [entry(proposed=proposal), entry(reported=reports[0])]
    state = fold(entries, COORDINATOR.peer_id)
    history = state.history(world.run_id)
    tokens = 3 * 4 * SEQUENCE_LENGTH
    assert [(point.at_us, point.rounds, point.peers, point.tokens) for point in history.points] == [
        (int(NOW_S * 1e6), 1, 3, tokens)
    ] * 3
    assert {point.loss for point in history.points} == {2.5}
    assert sum(point.tokens for point in history.points) == state.progress(world.run_id).tokens
    assert MOST_POINTS >= 1000
