"""Receiving: every message is verified, then goes to the round that it belongs to; early ones wait, bounded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from peer.rounds.agreement import Agreement, count
from peer.rounds.values import (
    CommitArrived,
    ComplaintArrived,
    Completed,
    Event,
    ProposalArrived,
    ProposalFacts,
    SealArrived,
    SealReplyArrived,
    SpanArrived,
)
from peer.rounds.wire import Checker, ResultFacts
from swarm.errors import Rejected
from swarm.rpc.v1.peer_pb2 import Delivery

ROUNDS_AHEAD = 3
EVENTS_PER_ROUND = 4096
EVENTS_PER_SENDER = 64
RESULTS_PER_ROUND = 4096
RESULTS_KEPT_ROUNDS = 8


@dataclass(frozen=True)
class Arrival:
    """A verified event of a round."""

    round_index: int
    sender: str
    event: Event


def read_delivery(checker: Checker, delivery: Delivery) -> list[Arrival]:
    """Verify one delivery. Results are not events of the machine alone; see `Inbox.results`. Raises `Rejected`."""
    match delivery.WhichOneof("body"):
        case "commit":
            return [_commit(checker, delivery)]
        case "proposal":
            return _proposal(checker, delivery)
        case "merged_span":
            round_index, span = checker.span(delivery.merged_span)
            return [Arrival(round_index, span.reducer, SpanArrived(span))]
        case "seal":
            round_index, ballot = checker.seal(delivery.seal)
            return [Arrival(round_index, delivery.seal.signer, SealArrived(delivery.seal.signer, ballot))]
        case "seal_reply":
            round_index, reply = checker.seal_reply(delivery.seal_reply)
            return [Arrival(round_index, reply.peer, SealReplyArrived(reply))]
        case "ready":
            round_index, ready = checker.ready(delivery.ready)
            return [Arrival(round_index, ready.peer, ready)]
        case "adoption":
            round_index, adoption = checker.adoption(delivery.adoption)
            return [Arrival(round_index, adoption.leader, adoption)]
        case "complaint":
            round_index, about, reason = checker.complaint(delivery.complaint)
            sender = delivery.complaint.signer
            return [Arrival(round_index, sender, ComplaintArrived(sender, about, reason))]
        case _:
            raise Rejected("malformed", "empty delivery")


def _commit(checker: Checker, delivery: Delivery) -> Arrival:
    round_index, facts = checker.commit(delivery.commit)
    return Arrival(round_index, facts.peer, CommitArrived(facts))


def _proposal(checker: Checker, delivery: Delivery) -> list[Arrival]:
    round_index, proposal = checker.proposal(delivery.proposal.proposal)
    arrivals = []
    for announced in delivery.proposal.commits[:64]:
        commit_round, facts = checker.commit(announced)
        arrivals.append(Arrival(commit_round, facts.peer, CommitArrived(facts, forwarded=True)))
    arrivals.append(Arrival(round_index, proposal.leader, ProposalArrived(proposal)))
    return arrivals


@dataclass
class Inbox:
    """What has arrived for the current round and the next few, and the results of the last few."""

    current: int = 0
    _waiting: dict[int, list[Arrival]] = field(default_factory=dict)
    _results: dict[int, dict[str, ResultFacts]] = field(default_factory=dict)
    _latest: dict[str, int] = field(default_factory=dict)

    def add(self, arrival: Arrival) -> None:
        """Keep an event for its round, each once. Raises `Rejected` for rounds that are over or too far ahead.

        Of one sender, and of all together, only so many are kept; those of later rounds are `busy` then, those of the current one
        only aren't there if the round is played again.
        """
        self._latest[arrival.sender] = max(arrival.round_index, self._latest.get(arrival.sender, 0))
        if arrival.round_index < self.current:
            raise Rejected("stale", f"round {self.current} is on", arrival.sender)
        if arrival.round_index > self.current + ROUNDS_AHEAD:
            raise Rejected("too_early", f"round {self.current} is on", arrival.sender)
        events = self._waiting.setdefault(arrival.round_index, [])
        same = [event for event in events if event.sender == arrival.sender]
        if arrival in same:
            return
        if len(same) < EVENTS_PER_SENDER and len(events) < EVENTS_PER_ROUND:
            events.append(arrival)
        elif arrival.round_index > self.current:
            raise Rejected("busy", "too many messages for one round", arrival.sender)

    def add_result(self, result: ResultFacts) -> Completed | None:
        """Keep a result; the event for the machine if it is the peer's first. A later one, after a repair, replaces it.

        Raises `Rejected` for rounds that nobody asks about any more or not yet, and when too many have come.
        """
        self._latest[result.peer] = max(result.round_index + 1, self._latest.get(result.peer, 0))
        if result.round_index + RESULTS_KEPT_ROUNDS < self.current:
            raise Rejected("stale", "result", result.peer)
        if result.round_index > self.current + ROUNDS_AHEAD + RESULTS_KEPT_ROUNDS:
            raise Rejected("too_early", "result", result.peer)
        results = self._results.setdefault(result.round_index, {})
        known = result.peer in results
        if not known and len(results) >= RESULTS_PER_ROUND:
            raise Rejected("busy", "too many results for one round", result.peer)
        results[result.peer] = result
        return None if known else Completed(result.peer, result.proposal_hash)

    def events_of(self, round_index: int) -> list[Arrival]:
        """Everything that has arrived for a round, in order."""
        return list(self._waiting.get(round_index, []))

    def results(self, round_index: int) -> Mapping[str, ResultFacts]:
        """The results of a round by peer."""
        return self._results.get(round_index, {})

    def proposals(self, round_index: int) -> list[ProposalFacts]:
        """The proposals of a round that have come, the highest ballot's first."""
        arrived = [arrival.event for arrival in self._waiting.get(round_index, [])]
        found = [event.proposal for event in arrived if isinstance(event, ProposalArrived)]
        return sorted(found, key=lambda proposal: proposal.ballot, reverse=True)

    def agreement(self, round_index: int, voters: Sequence[str], mine: bytes | None) -> Agreement:
        """What the voters' results of a round say about the root `mine`."""
        return count({peer: result.root for peer, result in self.results(round_index).items()}, voters, mine)

    def others_than(self, root: bytes, round_index: int, proposal: ProposalFacts) -> list[str]:
        """Participants that hold another root after the same proposal."""
        named = {item.peer for item in proposal.commits}
        return [
            peer
            for peer, result in self.results(round_index).items()
            if peer in named and result.proposal_hash == proposal.proposal_hash and result.root != root
        ]

    def agreement_on(self, round_index: int, proposal: ProposalFacts, me: str) -> Agreement:
        """The root that most participants of a proposal but us hold after it; `split` once so many have completed another."""
        voters = [item.peer for item in proposal.commits if item.peer != me]
        named = {peer: result for peer, result in self.results(round_index).items() if peer in voters}
        roots = {peer: result.root for peer, result in named.items() if result.proposal_hash == proposal.proposal_hash}
        if 2 * (len(named) - len(roots)) >= len(voters):
            return Agreement("split")
        return count(roots, voters, None)

    def ahead(self, round_index: int) -> frozenset[str]:
        """Peers that have spoken of a round after `round_index`."""
        return frozenset(peer for peer, latest in self._latest.items() if latest > round_index)

    def advance(self, round_index: int) -> None:
        """Forget everything of rounds before `round_index`, and results that nobody asks for any more."""
        self.current = round_index
        self._waiting = {index: events for index, events in self._waiting.items() if index >= round_index}
        oldest = round_index - RESULTS_KEPT_ROUNDS
        self._results = {index: results for index, results in self._results.items() if index >= oldest}
        if len(self._latest) > 4096:
            self._latest = {peer: latest for peer, latest in self._latest.items() if latest >= round_index}
