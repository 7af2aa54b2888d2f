"""A deterministic world for the round's state machine: a virtual clock, messages in any order, and peers that fail.

It does with actions what `peer.rounds.run` does, without bytes: a proposal's hash is that of its content, a merged span's follows
from the proposal, and whether a transfer works depends on who is alive and who holds what.
"""

from __future__ import annotations

import hashlib
import heapq
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from peer.rounds import machine
from peer.rounds.state import RoundSetup, RoundState
from peer.rounds.values import (
    Action,
    Adopt,
    AdoptionArrived,
    BallotNumber,
    CommitArrived,
    CommitFacts,
    Complain,
    ComplaintArrived,
    Complete,
    Completed,
    Event,
    FetchFailed,
    FetchSpan,
    ForwardDecision,
    GrantArrived,
    IncludedCommit,
    JoinArrived,
    PeerAlive,
    PeerLost,
    Probe,
    ProposalArrived,
    ProposalFacts,
    Propose,
    ReadyArrived,
    Reduce,
    Reduced,
    Refuse,
    RequestGrant,
    ResendProposal,
    RosterMember,
    SealArrived,
    SealReplyArrived,
    SealReplyFacts,
    SendCommit,
    SendReady,
    SendSeal,
    SendSealReply,
    SpanArrived,
    SpanFacts,
    SpanFetched,
    Tick,
    Trained,
)

RUN_ID, BASE = b"run", b"base"
TICK_S = 0.1
TRANSFER_TIMEOUT_S = 4.0
APPLY_S = 0.02
GRANT_S = 0.05


def names(count: int) -> tuple[str, ...]:
    """Peer ids, sorted."""
    return tuple(f"p{index:02}" for index in range(count))


def digest(*content: object) -> bytes:
    """A hash of anything with a stable repr."""
    return hashlib.blake2b(repr(content).encode(), digest_size=8).digest()


def setup_of(me: str, peers: Iterable[str], **changes: Any) -> RoundSetup:
    """A round with short deadlines."""
    roster = tuple(RosterMember(peer, 10) for peer in peers)
    defaults: dict[str, Any] = {"part_count": 7, "grace_s": 1.0, "patience_s": 1.0, "exchange_s": 2.0, "full_quota": 10}
    return RoundSetup(me, RUN_ID, 3, BASE, roster, **{**defaults, **changes})


def commit_of(peer: str, weight: int = 10, part_count: int = 7, **changes: Any) -> CommitFacts:
    """A commit; `nonce` tells a peer's second one from its first."""
    nonce = changes.pop("nonce", 0)
    hashes = tuple(digest(peer, nonce, part) for part in range(part_count)) if weight else ()
    return CommitFacts(
        peer, digest("commit", peer, weight, nonce), weight, hashes, **{"seconds": 5.0, "base_root": BASE, **changes}
    )


def proposal_of(
    ballot: BallotNumber,
    leader: str,
    commits: tuple[IncludedCommit, ...],
    next_roster: tuple[RosterMember, ...],
    grant: bool = False,
) -> ProposalFacts:
    """A proposal, named by its content."""
    name = digest("proposal", ballot, leader, commits, next_roster, grant)
    return ProposalFacts(name, ballot, leader, BASE, commits, next_roster, grant)


def span_of(proposal: ProposalFacts, reducer: str) -> SpanFacts:
    """What an honest reducer publishes."""
    place = proposal.included(reducer)
    first, count = (place.first_part, place.part_span) if place is not None else (0, 0)
    hashes = tuple(digest("merged", proposal.proposal_hash, first + part) for part in range(count))
    return SpanFacts(reducer, proposal.proposal_hash, first, hashes, signed=True)


@dataclass
class Faults:
    """What the network does to messages, as probabilities, and how long they take, in seconds."""

    latency_s: tuple[float, float] = (0.002, 0.02)
    transfer_s: tuple[float, float] = (0.01, 0.05)
    duplicate: float = 0.0
    lose: float = 0.0
    lose_of_the_dead: float = 0.5
    until_s: float = float("inf")


@dataclass
class Member:
    """One peer: its machine, what it holds, and what has become of it."""

    name: str
    state: RoundState
    alive: bool = True
    stopped: bool = False
    harmed: bool = False
    done_s: float | None = None
    done: ProposalFacts | None = None
    trained: bool = False
    holds: set[bytes] = field(default_factory=set)
    merged: set[tuple[bytes, str]] = field(default_factory=set)
    frozen: list[Event] = field(default_factory=list)
    fetching: set[tuple[bytes, str]] = field(default_factory=set)
    epoch: int = 0


GrantPolicy = Callable[["World", str, tuple[str, ...]], bool]
Hook = Callable[["World", Member, Action], None]
Watch = Callable[["World", Member, Event], None]


def grant_if_dead(world: World, asker: str, present: tuple[str, ...]) -> bool:
    """The coordinator's rule: only if it hasn't heard of any of the absent."""
    return all(not world.members[peer].alive or world.members[peer].stopped for peer in world.peers if peer not in present)


def never_grant(world: World, asker: str, present: tuple[str, ...]) -> bool:
    """A coordinator that is down."""
    return False


class World:
    """Peers, a clock and a pool of messages. The same arguments give the same history."""

    def __init__(
        self,
        count: int,
        seed: int = 0,
        *,
        train_s: dict[str, float] | float = 1.0,
        commits: dict[str, CommitFacts] | None = None,
        faults: Faults | None = None,
        grant: GrantPolicy = grant_if_dead,
        hook: Hook | None = None,
        watch: Watch | None = None,
        two_faced: Iterable[str] = (),
        **setup: Any,
    ) -> None:
        self.random = random.Random(seed)
        self.now_s = 0.0
        self.peers = names(count)
        self.faults = faults or Faults()
        self.grant_policy = grant
        self.granted: frozenset[str] | None = None
        self.hook = hook
        self.watch = watch
        self.two_faced = frozenset(two_faced)
        self.cuts: set[frozenset[str]] = set()
        self.cut_is_silent = False
        self.pool: list[tuple[float, int, Callable[[], None]]] = []
        self.serial = 0
        self.proposals: dict[bytes, ProposalFacts] = {}
        self.attempts: set[tuple[str, int, BallotNumber]] = set()
        self.proposed: list[tuple[float, str, ProposalFacts]] = []
        self.refused: list[tuple[str, str, str]] = []
        self.actions = 0
        parts = setup.get("part_count", 7)
        self.commits = {peer: commit_of(peer, part_count=parts) for peer in self.peers} | (commits or {})
        self.members = {peer: Member(peer, machine.begin(setup_of(peer, self.peers, **setup), 0.0)) for peer in self.peers}
        for peer in self.peers:
            duration_s = train_s[peer] if isinstance(train_s, dict) else train_s
            self.at(duration_s, lambda peer=peer: self._train(peer))
            self.at(self.random.uniform(0, TICK_S), lambda peer=peer: self._tick(peer))

    # --- what happens ---------------------------------------------------------------------------------------------------

    def at(self, when_s: float, happening: Callable[[], None]) -> None:
        """Do something at a time."""
        self.serial += 1
        heapq.heappush(self.pool, (when_s, self.serial, happening))

    def after(self, range_s: tuple[float, float], happening: Callable[[], None]) -> None:
        """Do something after a random time."""
        self.at(self.now_s + self.random.uniform(*range_s), happening)

    def kill(self, peer: str) -> None:
        """kill -9: from now on connections to it are refused."""
        self.members[peer].alive = False
        self.members[peer].harmed = True

    def stop(self, peer: str) -> None:
        """SIGSTOP: connections stay, nothing answers."""
        self.members[peer].stopped = True
        self.members[peer].harmed = True

    def resume(self, peer: str) -> None:
        """SIGCONT: what came meanwhile is read now."""
        member = self.members[peer]
        member.stopped = False
        waiting, member.frozen = member.frozen, []
        for event in waiting:
            self.put(peer, event)

    def cut(self, side: Iterable[str], silent: bool = False) -> None:
        """A partition between `side` and the rest."""
        self.cut_is_silent = silent
        side = set(side)
        for peer in side:
            for other in set(self.peers) - side:
                self.cuts.add(frozenset({peer, other}))
                self.members[peer].harmed = True

    def heal(self) -> None:
        """End all partitions."""
        self.cuts.clear()

    def join(self, joiner: str) -> None:
        """A joiner asks the whole roster."""
        for peer in self.peers:
            self.after(self.faults.latency_s, lambda peer=peer: self.put(peer, JoinArrived(joiner, "token")))

    def connected(self, one: str, other: str) -> bool:
        """Whether packets get through."""
        return one == other or frozenset({one, other}) not in self.cuts

    def run(self, until_s: float) -> None:
        """Let time pass until then, or until everybody alive is done."""
        while self.pool and self.pool[0][0] <= until_s:
            if all(member.done for member in self.members.values() if member.alive):
                return
            self.now_s, _, happening = heapq.heappop(self.pool)
            happening()
        self.now_s = max(self.now_s, until_s)

    def living(self) -> list[Member]:
        """Who is alive."""
        return [member for member in self.members.values() if member.alive]

    def put(self, peer: str, event: Event) -> None:
        """Hand an event to a peer's machine and do what follows."""
        member = self.members[peer]
        if not member.alive:
            return
        if member.stopped:
            member.frozen.append(event)
            return
        if self.watch is not None:
            self.watch(self, member, event)
        before = member.state.accepted
        member.state, actions = machine.step(member.state, event, self.now_s)
        if member.state.accepted is not before:
            member.epoch += 1
            member.fetching.clear()
        for action in actions:
            self.actions += 1
            if self.hook is not None:
                self.hook(self, member, action)
            if not member.alive:
                return
            self._perform(member, action)

    # --- messages -------------------------------------------------------------------------------------------------------

    def send(self, sender: str, to: Iterable[str], event: Event) -> None:
        """Deliver to each, late, twice or not at all."""
        for peer in to:
            if peer not in self.members or peer == sender:
                continue
            copies = 1 + (self.random.random() < self.faults.duplicate)
            for _ in range(copies):
                self.after(self.faults.latency_s, lambda peer=peer: self._arrive(sender, peer, event))

    def _arrive(self, sender: str, peer: str, event: Event) -> None:
        if not self.connected(sender, peer):
            return
        if not self.members[sender].alive and self.random.random() < self.faults.lose_of_the_dead:
            return
        if self.now_s < self.faults.until_s and self.random.random() < self.faults.lose:
            return
        self.put(peer, event)

    def _train(self, peer: str) -> None:
        member = self.members[peer]
        if member.done is None:
            member.holds.add(self.commits[peer].commit_hash)
            self.put(peer, Trained(self.commits[peer]))

    def _tick(self, peer: str) -> None:
        member = self.members[peer]
        if member.alive and member.done is None:
            if not member.stopped:
                self.put(peer, Tick())
            self.at(self.now_s + TICK_S, lambda: self._tick(peer))

    # --- actions --------------------------------------------------------------------------------------------------------

    def _perform(self, member: Member, action: Action) -> None:
        me, others = member.name, member.state.setup.others
        match action:
            case SendCommit(commit):
                self.send(me, others, CommitArrived(commit))
            case Propose():
                self._propose(member, action)
            case ResendProposal(to):
                self._send_proposal(member, [to], member.state.accepted, tuple(member.state.commits.values()))
            case SendSeal(ballot):
                self.send(me, others, SealArrived(me, ballot))
            case SendSealReply(to, ballot):
                self.send(me, [to], SealReplyArrived(self._seal_reply(member, ballot)))
            case SendReady(ballot, proposal_hash, again):
                self.send(me, others, ReadyArrived(me, ballot, proposal_hash, again))
            case Adopt(ballot, reply, to):
                self.send(me, [to] if to else others, AdoptionArrived(me, ballot, reply or self._seal_reply(member, ballot)))
            case ForwardDecision(reply):
                self.send(me, others, SealReplyArrived(reply))
            case Reduce():
                epoch = member.epoch
                self.after(self.faults.transfer_s, lambda: self._reduce(member, action, epoch))
            case FetchSpan(span, sources):
                key = (span.proposal_hash, span.reducer)
                if key not in member.fetching and span.reducer not in member.state.fetched:
                    member.fetching.add(key)
                    epoch = member.epoch
                    self.after(self.faults.transfer_s, lambda: self._fetch(member, span, list(sources), epoch, "missing"))
            case Complain(leader, about, reason):
                self.send(me, [leader], ComplaintArrived(me, about, reason))
            case Probe(peer):
                self.after(self.faults.latency_s, lambda: self._probe(me, peer))
            case RequestGrant(present):
                self.at(self.now_s + GRANT_S, lambda: self._grant(me, present))
            case Complete(proposal):
                self._complete(member, proposal)
            case Refuse(sender, reason):
                self.refused.append((me, sender, reason))

    def _propose(self, member: Member, action: Propose) -> None:
        covered = self.granted is not None and {item.peer for item in action.commits} <= self.granted
        grant = member.state.grant is not None and covered
        faces = 2 if member.name in self.two_faced else 1
        attempt = (member.name, member.epoch, action.ballot)
        assert attempt not in self.attempts, f"{attempt} proposes twice, which would prove it guilty"
        self.attempts.add(attempt)
        for face in reversed(range(faces)):
            roster = tuple(replace(item, quota=item.quota + face) for item in action.next_roster)
            facts = proposal_of(action.ballot, member.name, action.commits, roster, grant)
            self.proposals[facts.proposal_hash] = facts
            self.proposed.append((self.now_s, member.name, facts))
            self._send_proposal(member, member.state.setup.others[face::faces], facts, action.forward)
        self.at(self.now_s, lambda: self.put(member.name, ProposalArrived(facts)))

    def _send_proposal(
        self, member: Member, to: Iterable[str], facts: ProposalFacts | None, commits: tuple[CommitFacts, ...]
    ) -> None:
        if facts is None:
            return
        for commit in commits:
            self.send(member.name, to, CommitArrived(commit, forwarded=True))
        self.send(member.name, to, ProposalArrived(facts))

    def _seal_reply(self, member: Member, ballot: BallotNumber) -> SealReplyFacts:
        state = member.state
        ready = state.complete or state.gathered
        spans = tuple(span for span in state.spans.values() if span.signed is not None) if ready else ()
        holds = [peer for peer, commit in state.commits.items() if commit.weight and commit.commit_hash in member.holds]
        return SealReplyFacts(
            member.name,
            ballot,
            state.accepted,
            state.complete,
            tuple(state.commits.values()),
            spans,
            frozenset(holds if state.setup.all_gather else ()),
            ready,
            state.standing,
        )

    def _serves(self, source: str, to: str) -> str:
        """Why a connection gives nothing; empty if it works."""
        member = self.members[source]
        if not member.alive:
            return "unreachable"
        if not self.connected(source, to):
            return "silent" if self.cut_is_silent else "unreachable"
        return "silent" if member.stopped else ""

    def _is_idle(self, member: Member, epoch: int, later: Callable[[], None]) -> bool:
        """Whether a transfer is cancelled, or has to wait until the peer runs again."""
        if member.stopped:
            self.at(self.now_s + TICK_S, later)
        return member.stopped or member.epoch != epoch or not member.alive

    def _fails(self, member: Member, proposal_hash: bytes, peer: str, merged: bool, reason: str, epoch: int) -> None:
        def report() -> None:
            if member.epoch == epoch:
                member.fetching.discard((proposal_hash, peer))
                self.put(member.name, FetchFailed(proposal_hash, peer, merged, reason))

        self.at(self.now_s + (TRANSFER_TIMEOUT_S if reason == "silent" else 0.0), report)

    def _reduce(self, member: Member, action: Reduce, epoch: int) -> None:
        proposal = action.proposal
        if self._is_idle(member, epoch, lambda: self._reduce(member, action, epoch)):
            return
        for item in proposal.contributors:
            if item.commit_hash in member.holds:
                continue
            problem = ""
            for source in (item.peer, *action.holders):
                problem = self._serves(source, member.name)
                if not problem and item.commit_hash in self.members[source].holds:
                    member.holds.add(item.commit_hash)
                    break
            else:
                self._fails(
                    member, proposal.proposal_hash, item.peer, False, self._serves(item.peer, member.name) or "missing", epoch
                )
                return
        span = span_of(proposal, member.name)
        if member.state.setup.all_gather:
            span = replace(span, signed=None)
        else:
            self.send(member.name, member.state.setup.others, SpanArrived(span))
        member.merged.add((proposal.proposal_hash, member.name))
        self.put(member.name, Reduced(span))

    def _fetch(self, member: Member, span: SpanFacts, sources: list[str], epoch: int, reason: str) -> None:
        if self._is_idle(member, epoch, lambda: self._fetch(member, span, sources, epoch, reason)):
            return
        key = (span.proposal_hash, span.reducer)
        if not sources:
            self._fails(member, span.proposal_hash, span.reducer, True, reason, epoch)
            return
        problem = self._serves(sources[0], member.name)
        if not problem and key in self.members[sources[0]].merged:
            member.merged.add(key)
            self.put(member.name, SpanFetched(*key))
            return
        wait_s = TRANSFER_TIMEOUT_S if problem == "silent" else 0.0
        reason = {"silent": "timeout", "": "missing"}.get(problem, problem)
        self.at(self.now_s + wait_s, lambda: self._fetch(member, span, sources[1:], epoch, reason))

    def _probe(self, sender: str, peer: str) -> None:
        problem = self._serves(peer, sender) if peer in self.members else "unreachable"
        if problem != "silent":
            event: Event = PeerLost(peer) if problem else PeerAlive(peer)
            self.after(self.faults.latency_s, lambda: self.put(sender, event))

    def _grant(self, asker: str, present: tuple[str, ...]) -> None:
        fits = self.granted is None or set(present) <= self.granted
        if fits and self.grant_policy(self, asker, present):
            self.granted = self.granted or frozenset(present)
            self.put(asker, GrantArrived("grant", tuple(sorted(self.granted))))

    def _complete(self, member: Member, proposal: ProposalFacts) -> None:
        member.done, member.done_s = proposal, self.now_s
        missing = {item.peer for item in proposal.reducers if (proposal.proposal_hash, item.peer) not in member.merged}
        if missing:
            raise AssertionError(f"{member.name} completed without the parts of {missing}")
        event = Completed(member.name, proposal.proposal_hash)
        self.at(self.now_s + APPLY_S, lambda: member.alive and self.send(member.name, member.state.setup.others, event))
