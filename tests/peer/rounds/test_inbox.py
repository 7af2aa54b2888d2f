"""What waits for its round, and how much of it."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peer.rounds.agreement import Agreement
from peer.rounds.inbox import (
    EVENTS_PER_ROUND,
    EVENTS_PER_SENDER,
    RESULTS_KEPT_ROUNDS,
    RESULTS_PER_ROUND,
    ROUNDS_AHEAD,
    Arrival,
    Inbox,
)
from peer.rounds.values import (
    BallotNumber,
    CommitArrived,
    ComplaintArrived,
    Completed,
    IncludedCommit,
    ProposalArrived,
    RosterMember,
    SealArrived,
)
from peer.rounds.wire import ResultFacts
from swarm.errors import Rejected
from swarm.rpc.v1.signed_pb2 import Signed
from tests.peer.rounds.simulation import commit_of, names, proposal_of


def complaint(number: int, sender: str = "a", about: str = "b") -> Arrival:
    """Some event of a round."""
    return Arrival(number, sender, ComplaintArrived(sender, about, "why"))


def result(peer: str, number: int, root: bytes = b"root") -> ResultFacts:
    """A result of a round."""
    return ResultFacts(peer, number, b"proposal", root, 1, 1, Signed())


def reason_of(call: Any, *arguments: Any) -> str:
    """Why something isn't kept."""
    with pytest.raises(Rejected) as caught:
        call(*arguments)
    return caught.value.reason


def test_early_events_wait_for_their_round() -> None:
    """Events of the current round and the next few are kept in order; older and much later ones are rejected."""
    inbox = Inbox(current=5)
    kept = [complaint(number) for number in range(5, 5 + ROUNDS_AHEAD + 1)]
    for arrival in kept:
        inbox.add(arrival)
    assert reason_of(inbox.add, complaint(4)) == "stale"
    assert reason_of(inbox.add, complaint(5 + ROUNDS_AHEAD + 1)) == "too_early"
    assert [inbox.events_of(number) for number in range(4, 10)] == [[], *([item] for item in kept), []]
    inbox.advance(6)
    assert inbox.events_of(5) == []
    assert inbox.events_of(6) == [kept[1]]
    assert reason_of(inbox.add, complaint(5)) == "stale"


def test_a_repeated_event_is_kept_once() -> None:
    """Replaying somebody's message doesn't use up the space for its author's others."""
    inbox = Inbox()
    for _ in range(EVENTS_PER_SENDER + 5):
        inbox.add(Arrival(1, "a", CommitArrived(commit_of("a"))))
    inbox.add(complaint(1))
    assert len(inbox.events_of(1)) == 2


def test_one_sender_cant_crowd_out_the_others() -> None:
    """Beyond its share a sender's early messages are refused as busy; the others' are still kept."""
    inbox = Inbox()
    for number in range(EVENTS_PER_SENDER):
        inbox.add(complaint(1, about=str(number)))
    assert reason_of(inbox.add, complaint(1, about="one more")) == "busy"
    inbox.add(complaint(1, sender="b"))
    assert len(inbox.events_of(1)) == EVENTS_PER_SENDER + 1


def test_the_current_rounds_messages_pass_even_when_full() -> None:
    """What belongs to the round in progress is never refused for want of space, only not kept."""
    inbox = Inbox(current=1)
    for number in range(EVENTS_PER_SENDER + 1):
        inbox.add(complaint(1, about=str(number)))
    assert len(inbox.events_of(1)) == EVENTS_PER_SENDER


def test_a_round_holds_only_so_many_events() -> None:
    """However many senders there are, what waits for a round is bounded."""
    inbox = Inbox()
    senders = EVENTS_PER_ROUND // EVENTS_PER_SENDER
    for sender in range(senders):
        for number in range(EVENTS_PER_SENDER):
            inbox.add(complaint(1, sender=str(sender), about=str(number)))
    assert reason_of(inbox.add, complaint(1, sender="another")) == "busy"
    assert len(inbox.events_of(1)) == EVENTS_PER_ROUND


def test_results_become_events_once() -> None:
    """A peer's first result of a round is an event; a corrected one replaces it silently."""
    inbox = Inbox(current=3)
    assert inbox.add_result(result("a", 3)) == Completed("a", b"proposal")
    assert inbox.add_result(result("a", 3)) is None
    assert inbox.add_result(result("a", 3, b"repaired")) is None
    assert inbox.results(3)["a"].root == b"repaired"
    assert inbox.results(4) == {}


def test_results_are_kept_for_some_rounds() -> None:
    """Joiners can still ask for recent results; older ones go, and far future ones don't come in."""
    inbox = Inbox(current=20)
    inbox.add_result(result("a", 20 - RESULTS_KEPT_ROUNDS))
    assert reason_of(inbox.add_result, result("a", 20 - RESULTS_KEPT_ROUNDS - 1)) == "stale"
    assert reason_of(inbox.add_result, result("a", 20 + ROUNDS_AHEAD + RESULTS_KEPT_ROUNDS + 1)) == "too_early"
    inbox.advance(21)
    assert inbox.results(20 - RESULTS_KEPT_ROUNDS) == {}


def test_results_of_a_round_are_bounded() -> None:
    """A crowd of keys fills no memory; a peer already counted can still correct itself."""
    inbox = Inbox()
    for number in range(RESULTS_PER_ROUND):
        inbox.add_result(result(str(number), 0))
    assert reason_of(inbox.add_result, result("another", 0)) == "busy"
    inbox.add_result(result("7", 0, b"repaired"))
    assert inbox.results(0)["7"].root == b"repaired"


def test_proposals_come_the_highest_first() -> None:
    """A round's proposals by ballot, and nothing else of it."""
    inbox = Inbox()
    low, high, other = (proposal_of(BallotNumber(term), peer, (), ()) for term, peer in ((0, "a"), (2, "a"), (3, "b")))
    for proposal in (high, low, other):
        inbox.add(Arrival(1, proposal.leader, ProposalArrived(proposal)))
    inbox.add(Arrival(1, "a", SealArrived("a", BallotNumber(9))))
    assert inbox.proposals(1) == [other, high, low]
    assert inbox.proposals(2) == []


def test_a_joiner_follows_the_proposal_that_most_have_completed() -> None:
    """Of two proposals by a leader with two faces, results tell which one stands; our own vote counts for nothing."""
    inbox = Inbox(current=1)
    commits = tuple(IncludedCommit(name, name.encode(), 10, 0, 0) for name in "abcm")
    roster = tuple(RosterMember(name, 4) for name in "abcm")
    stands = proposal_of(BallotNumber(), "a", commits, roster)
    other = proposal_of(BallotNumber(), "a", commits, tuple(RosterMember(name, 2) for name in "abcm"))
    assert inbox.agreement_on(1, stands, "m") == inbox.agreement_on(1, other, "m") == Agreement("open")
    for name in "mb":
        inbox.add_result(replace(result(name, 1), proposal_hash=stands.proposal_hash))
    assert inbox.agreement_on(1, stands, "m").root is None
    inbox.add_result(replace(result("c", 1), proposal_hash=stands.proposal_hash))
    inbox.add_result(replace(result("a", 1, b"lie"), proposal_hash=other.proposal_hash))
    found = inbox.agreement_on(1, stands, "m")
    assert (found.root, found.holders) == (b"root", ("b", "c"))
    assert inbox.agreement_on(1, other, "m").verdict == "split"


def test_who_is_ahead_is_noticed_even_from_messages_that_are_too_early() -> None:
    """Messages of later rounds and results tell how far their senders are, kept or not."""
    inbox = Inbox(current=2)
    inbox.add(complaint(3, "next"))
    assert reason_of(inbox.add, complaint(50, "far")) == "too_early"
    inbox.add_result(result("done", 2))
    inbox.add(complaint(2, "here"))
    assert inbox.ahead(2) == {"next", "far", "done"}
    assert inbox.ahead(3) == {"far"}


@given(st.lists(st.tuples(st.integers(0, 12), st.sampled_from(names(3)), st.integers(0, 3), st.booleans()), max_size=60))
@settings(deadline=None)
def test_only_rounds_within_reach_are_ever_kept(history: list[tuple[int, str, int, bool]]) -> None:
    """Whatever arrives while rounds pass, nothing of past or far rounds stays, and nothing else is raised than `Rejected`."""
    inbox = Inbox()
    for number, sender, detail, advance in history:
        if advance:
            inbox.advance(max(inbox.current, number))
        for call, item in ((inbox.add, complaint(number, sender, str(detail))), (inbox.add_result, result(sender, number))):
            with contextlib.suppress(Rejected):
                call(item)
        assert all(inbox.current <= index <= inbox.current + ROUNDS_AHEAD for index in inbox._waiting if inbox._waiting[index])
        assert all(index >= inbox.current - RESULTS_KEPT_ROUNDS for index in inbox._results)
