"""Who passes whose parts on."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peer.rounds.sharing import relayed_share, relays_of

PARTS = range(400)


def sent(uploads: dict[str, int]) -> dict[str, float]:
    """How many whole updates each peer sends if everybody contributes and follows the plan."""
    load: Counter[str] = Counter()
    others = len(uploads) - 1
    for author in uploads:
        relays = relays_of(7, author, PARTS, uploads, uploads)
        for part in PARTS:
            relay = relays.get(part)
            load[author] += 1 if relay else others
            if relay:
                load[relay] += others - 1
    return {peer: load[peer] / len(PARTS) for peer in uploads}


def test_equal_uplinks_send_their_parts_themselves() -> None:
    """Passing on would only add a hop."""
    assert sent(dict.fromkeys("abcde", 100)) == dict.fromkeys("abcde", 4.0)
    assert sent({"a": 100, "b": 90, "c": 110, "d": 95}) == dict.fromkeys("abcd", 3.0)


def test_unknown_uplinks_are_taken_for_ordinary() -> None:
    """In the first round nothing is known, and a newcomer counts as the median."""
    assert relays_of(1, "a", PARTS, dict.fromkeys("abcd", 0), "abcd") == {}
    assert relays_of(1, "a", PARTS, {"a": 0, "b": 100, "c": 100, "d": 100}, "abcd") == {}


def test_a_slow_uplink_sends_each_part_once() -> None:
    """One that is ten times slower hands everything to the others, who share the work."""
    load = sent({"a": 10, "b": 100, "c": 100, "d": 100, "e": 100})
    assert load["a"] == 1.0
    assert max(load.values()) < 5.1


def test_the_fastest_pass_most_on() -> None:
    """Relays are drawn by what they have to spare, never the author itself."""
    uploads = {"a": 5, "b": 5, "c": 100, "d": 400}
    for author in "ab":
        relays = Counter(relays_of(3, author, PARTS, uploads, "abcd").values())
        assert author not in relays
        assert relays["d"] > 0.9 * len(PARTS)
    assert relays_of(3, "d", PARTS, uploads, "abcd") == {}


def test_a_peer_that_only_listens_passes_on_first() -> None:
    """One that contributes nothing has its whole uplink to spare."""
    uploads = {"a": 10, "b": 100, "c": 100, "d": 100}
    relays = Counter(relays_of(3, "a", PARTS, uploads, "abc").values())
    assert relays["d"] > relays["b"] + relays["c"]


def test_two_peers_have_nobody_to_pass_on_to() -> None:
    """Nor has one alone."""
    assert relays_of(1, "a", PARTS, {"a": 1, "b": 1000}, "ab") == {}
    assert relays_of(1, "a", PARTS, {"a": 1}, "a") == {}
    assert relayed_share("stranger", {"a": 1, "b": 2, "c": 3}, "abc") == 0.0


def test_rounds_differ() -> None:
    """The same peers pass other parts on in the next round."""
    uploads = {"a": 10, "b": 100, "c": 100, "d": 100}
    assert relays_of(1, "a", PARTS, uploads, "abcd") != relays_of(2, "a", PARTS, uploads, "abcd")


@given(st.dictionaries(st.sampled_from("abcdefgh"), st.integers(0, 10**9), min_size=3))
def test_the_plan_is_never_slower_than_sending_everything_oneself(uploads: dict[str, int]) -> None:
    """The time until the last uplink has sent all is at most what it would be without passing on, within the draw's noise."""
    known = sorted(rate for rate in uploads.values() if rate)
    if not known:
        return
    slowest = known[0]
    load = sent(uploads)
    times = [load[peer] / rate for peer, rate in uploads.items() if rate]
    assert max(times) <= (len(uploads) - 1) / slowest * 1.1


@pytest.mark.parametrize("author", ["a", "b"])
def test_everybody_draws_alike(author: str) -> None:
    """The order in which a peer heard of the others doesn't matter."""
    uploads = {"a": 10, "b": 20, "c": 100, "d": 300}
    backwards = dict(reversed(uploads.items()))
    assert relays_of(5, author, PARTS, uploads, "abcd") == relays_of(5, author, PARTS, backwards, "dcba")
