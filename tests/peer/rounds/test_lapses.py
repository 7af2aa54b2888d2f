"""How long those who hold rounds up stay out."""

from __future__ import annotations

from peer.rounds.lapses import MOST_ROUNDS, Lapses


def rounds_out(lapses: Lapses, peer: str, start: int) -> int:
    """For how many rounds from `start` on it isn't asked again."""
    return next(count for count in range(10 * MOST_ROUNDS) if peer not in lapses.barred(start + count))


def test_each_time_is_twice_as_long() -> None:
    """Two rounds at first, and never more than the most."""
    lapses = Lapses()
    assert lapses.barred(0) == frozenset()
    found = []
    for start in range(0, 9000, 1000):
        lapses.note(["b"], start)
        found.append(rounds_out(lapses, "b", start))
    assert found[:4] == [2, 4, 8, 16]
    assert found[-1] == MOST_ROUNDS
    assert rounds_out(lapses, "a", 0) == 0
