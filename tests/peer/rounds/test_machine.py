"""The round's state machine under crashes, partitions, silence, delays, duplicates, losses and hostile messages."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from peer.rounds import machine
from peer.rounds.checks import problem_of
from peer.rounds.planning import leader_of, quorum_of, spans_of
from peer.rounds.state import RoundSetup, RoundState
from peer.rounds.values import (
    Action,
    Adopt,
    AdoptionArrived,
    BallotNumber,
    CommitArrived,
    Complain,
    ComplaintArrived,
    Complete,
    Completed,
    Event,
    Expose,
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
    RosterMember,
    SealArrived,
    SealReplyArrived,
    SealReplyFacts,
    SendReady,
    SendSeal,
    SendSealReply,
    SpanArrived,
    SpanFacts,
    SpanFetched,
    Tick,
    Trained,
)
from tests.peer.rounds.simulation import (
    RUN_ID,
    Faults,
    Member,
    World,
    commit_of,
    grant_if_dead,
    names,
    never_grant,
    proposal_of,
    setup_of,
    span_of,
)

UNDISTURBED_S = 0.2
FAULTS_END_S = 8.0
BOUND_S = 60.0


def leader(count: int, term: int = 0) -> str:
    """The leader of a term in the simulated round."""
    return leader_of(RUN_ID, 3, names(count), term)


def follower(count: int) -> str:
    """Somebody who doesn't lead at first."""
    return leader(count, 1)


def check_action(world: World, member: Member, action: Action) -> None:
    """What must hold whenever a machine decides something."""
    state, setup = member.state, member.state.setup
    assert setup.me not in state.gone
    if isinstance(action, Complete):
        assert state.gathered
    if isinstance(action, SendReady):
        assert state.gathered
        assert action.ballot == state.standing
    if isinstance(action, Propose):
        included = [item.peer for item in action.commits]
        invited = [item.peer for item in action.next_roster]
        assert included == sorted(set(included))
        assert set(included) <= set(setup.peers) & set(state.commits)
        assert len(included) >= setup.quorum or state.grant is not None
        assert not set(invited) & state.gone - set(state.joiners)
        assert 0 < len(invited) <= setup.max_peers
        assert set(invited) <= set(setup.peers) | set(state.joiners)
        unhurt = [other for other in world.members.values() if other.alive and not other.harmed and other.done is not None]
        if not world.faults.lose and not member.harmed:
            assert not unhurt, "a new proposal after somebody within reach had completed one"


def finished(world: World) -> list[Member]:
    """Everybody alive, checked to have completed."""
    living = world.living()
    assert all(member.done is not None for member in living), [(member.name, member.done_s) for member in living]
    return living


def only_proposal(members: list[Member]) -> ProposalFacts:
    """The one proposal that all of them completed."""
    done = {member.done.proposal_hash: member.done for member in members if member.done is not None}
    assert len(done) == 1
    return next(iter(done.values()))


networks = st.builds(
    Faults,
    latency_s=st.sampled_from([(0.002, 0.02), (0.002, 0.1), (0.0, 0.5)]),
    transfer_s=st.sampled_from([(0.01, 0.05), (0.01, 0.3), (0.0, 1.0)]),
    duplicate=st.sampled_from([0.0, 0.3]),
    lose_of_the_dead=st.sampled_from([0.0, 0.5, 1.0]),
    until_s=st.just(FAULTS_END_S),
)
moments = st.floats(0.0, 4.0)


@st.composite
def worlds(draw: st.DrawFn, kinds: tuple[str, ...], lose: float = 0.0) -> World:
    """Up to six peers with faults of these kinds, all over by `FAULTS_END_S`, at least one peer left alive."""
    count = draw(st.integers(1, 6))
    peers = names(count)
    training = draw(st.lists(st.sampled_from([0.5, 1.0, 1.01, 2.0, 4.0]), min_size=count, max_size=count))
    world = World(
        count,
        draw(st.integers(0, 1 << 32)),
        train_s=dict(zip(peers, training, strict=True)),
        faults=replace(draw(networks), lose=lose),
        hook=check_action,
        all_gather=draw(st.booleans()),
    )
    killed: set[str] = set()
    for kind, peer, moment in draw(st.lists(st.tuples(st.sampled_from(kinds), st.sampled_from(peers), moments), max_size=4)):
        if kind == "kill" and len(killed | {peer}) < count:
            killed.add(peer)
            world.at(moment, lambda peer=peer: world.kill(peer))
        if kind == "stop":
            world.at(moment, lambda peer=peer: world.stop(peer))
            world.at(draw(st.floats(moment, FAULTS_END_S)), lambda peer=peer: world.resume(peer))
        if kind == "cut":
            side, silent = draw(st.sets(st.sampled_from(peers))), draw(st.booleans())
            world.at(moment, lambda side=side, silent=silent: world.cut(side, silent))
            world.at(draw(st.floats(moment, FAULTS_END_S)), world.heal)
    if draw(st.booleans()):
        world.at(draw(moments), lambda: world.join("zoe"))
    return world


# --- safety and liveness --------------------------------------------------------------------------------------------------


@given(worlds(("kill",)))
@settings(max_examples=120, deadline=None)
def test_crashes_leave_the_survivors_with_one_proposal(world: World) -> None:
    """Whoever is killed and whenever, in whatever order messages arrive: the others all complete the same proposal, soon."""
    world.run(BOUND_S)
    only_proposal(finished(world))


@given(worlds(("kill", "stop", "cut")))
@settings(max_examples=120, deadline=None)
def test_nobody_ends_differently_without_a_grant(world: World) -> None:
    """With partitions and stopped peers too, all complete the same proposal once these end.

    Only where the coordinator let a minority go on can the others have completed another one, unheard.
    """
    world.run(BOUND_S)
    assume(world.granted is None or any(world.members[peer].alive for peer in world.granted))
    finished(world)
    untouched = [member for member in world.living() if not member.harmed]
    if world.granted is None:
        only_proposal([member for member in world.members.values() if member.done is not None])
    elif untouched:
        only_proposal(untouched)
    votes = Counter(member.done.proposal_hash for member in world.members.values() if member.done is not None)
    assert sum(count >= quorum_of(len(world.peers)) for count in votes.values()) <= 1


@given(worlds(("kill", "cut"), lose=0.2))
@settings(max_examples=60, deadline=None)
def test_lost_messages_delay_but_never_stop_a_round(world: World) -> None:
    """Where a fifth of the messages vanish for a while, every survivor still completes, and no two quorums differ."""
    world.run(BOUND_S)
    finished(world)
    votes = Counter(member.done.proposal_hash for member in world.members.values() if member.done is not None)
    assert sum(count >= quorum_of(len(world.peers)) for count in votes.values()) <= 1


@given(
    st.integers(2, 6),
    st.booleans(),
    st.data(),
    st.one_of(st.floats(0.0, 1.0), st.floats(0.98, 1.2)),
    st.integers(0, 1 << 32),
)
@settings(max_examples=150, deadline=None)
def test_a_kill_costs_the_others_less_than_a_second(
    count: int, all_gather: bool, data: st.DataObject, moment: float, seed: int
) -> None:
    """kill -9 of anybody at any moment, when connections to the dead are refused at once: the rest are done within a second."""
    world = World(count, seed, all_gather=all_gather, hook=check_action)
    victim = data.draw(st.sampled_from(world.peers))
    world.at(moment, lambda: world.kill(victim))
    world.run(BOUND_S)
    survivors = finished(world)
    only_proposal(survivors)
    assert max(member.done_s or 0.0 for member in survivors) < 1.0 + UNDISTURBED_S + 1.0


@given(st.integers(1, 7), st.booleans(), networks, st.integers(0, 1 << 32))
@settings(max_examples=40, deadline=None)
def test_nothing_is_lost_where_nothing_fails(count: int, all_gather: bool, faults: Faults, seed: int) -> None:
    """Without faults, whatever the order of messages, everybody's commit is included at the first ballot; nobody is refused."""
    world = World(count, seed, all_gather=all_gather, faults=faults, hook=check_action, exchange_s=10.0)
    world.run(BOUND_S)
    proposal = only_proposal(finished(world))
    assert [item.peer for item in proposal.contributors] == list(world.peers)
    assert proposal.ballot == BallotNumber()
    assert [member.peer for member in proposal.next_roster] == list(world.peers)
    assert not world.refused


# --- hostile messages -----------------------------------------------------------------------------------------------------

PEERS = names(4)
anybody = st.sampled_from((*PEERS, "stranger", ""))
ballots = st.builds(BallotNumber, st.one_of(st.integers(0, 5), st.just(1 << 30)), st.integers(0, 3))
commits = st.builds(
    lambda peer, weight, nonce, parts, upload, leaving: commit_of(
        peer, weight, parts, nonce=nonce, upload_bytes_per_s=upload, leaving=leaving
    ),
    anybody,
    st.sampled_from([0, 10, 1 << 60]),
    st.integers(0, 1),
    st.sampled_from([7, 7, 7, 3]),
    st.sampled_from([0, 1, 1 << 40]),
    st.booleans(),
)


@st.composite
def proposals(draw: st.DrawFn) -> ProposalFacts:
    """Anything from a perfect proposal of these peers to nonsense."""
    ballot = draw(ballots)
    honest = draw(st.booleans())
    if honest:
        chosen = sorted(draw(st.sets(st.sampled_from(PEERS), min_size=3)))
        spans = spans_of(7, dict.fromkeys(chosen, 0))
        included = tuple(IncludedCommit(peer, commit_of(peer).commit_hash, 10, *spans[peer]) for peer in chosen)
        roster = tuple(RosterMember(peer, 10) for peer in PEERS)
        return proposal_of(ballot, leader_of(RUN_ID, 3, PEERS, ballot.term), included, roster)
    small = st.integers(0, 8)
    included = tuple(draw(st.lists(st.builds(IncludedCommit, anybody, st.binary(max_size=2), small, small, small), max_size=4)))
    roster = tuple(draw(st.lists(st.builds(RosterMember, anybody, st.integers(0, 1 << 30)), max_size=5)))
    return proposal_of(ballot, draw(anybody), included, roster, draw(st.booleans()))


@st.composite
def spans(draw: st.DrawFn) -> SpanFacts:
    """A reducer's true span, or nonsense."""
    proposal, reducer = draw(proposals()), draw(anybody)
    span = span_of(proposal, reducer)
    return span if draw(st.booleans()) else replace(span, first_part=draw(st.integers(0, 9)), part_hashes=(b"x",))


names_of_proposals = st.builds(lambda proposal: proposal.proposal_hash, proposals())
replies = st.builds(
    SealReplyFacts,
    anybody,
    ballots,
    st.none() | proposals(),
    st.booleans(),
    st.lists(commits, max_size=3).map(tuple),
    st.lists(spans(), max_size=4).map(tuple),
    st.frozensets(anybody, max_size=3),
    st.booleans(),
    ballots,
)
reasons = st.sampled_from(["unreachable", "silent", "missing_commit", "leader_silent", "left_behind", "bad_part", ""])
foreign_events = st.one_of(
    st.builds(CommitArrived, commits, st.booleans()),
    st.builds(JoinArrived, anybody),
    st.builds(ProposalArrived, proposals()),
    st.builds(SealArrived, anybody, ballots),
    st.builds(SealReplyArrived, replies),
    st.builds(AdoptionArrived, anybody, ballots, replies),
    st.builds(ReadyArrived, anybody, ballots, names_of_proposals, st.booleans()),
    st.builds(ComplaintArrived, anybody, anybody, reasons),
    st.builds(SpanArrived, spans()),
    st.builds(Completed, anybody, names_of_proposals),
)
own_events = st.one_of(
    st.just(Trained(commit_of(PEERS[0]))),
    st.builds(Reduced, spans().map(lambda span: replace(span, reducer=PEERS[0]))),
    st.builds(SpanFetched, names_of_proposals, anybody),
    st.builds(FetchFailed, names_of_proposals, anybody, st.booleans(), reasons),
    st.builds(PeerLost, anybody),
    st.builds(PeerAlive, anybody),
    st.builds(GrantArrived, st.just("grant"), st.lists(anybody, max_size=3).map(tuple)),
    st.just(Tick()),
)


@given(st.lists(st.tuples(st.one_of(foreign_events, own_events), st.floats(0, 5)), max_size=25), st.booleans())
@settings(max_examples=250, deadline=None)
def test_no_sequence_of_events_breaks_the_machine(history: list[tuple[Event, float]], all_gather: bool) -> None:
    """Whatever arrives in whatever order: no exception, promises only grow, and nothing of a stranger is ever taken in."""
    state = machine.begin(setup_of(PEERS[0], PEERS, all_gather=all_gather, max_peers=5), 0.0)
    now_s = 0.0
    for event, pause_s in history:
        now_s += pause_s
        before = state
        state, actions = machine.step(state, event, now_s)
        assert state.promised >= before.promised
        assert PEERS[0] not in state.gone
        assert state.gone <= set(PEERS)
        assert set(state.commits) <= set(PEERS)
        assert all(commit.weight == 0 or len(commit.part_hashes) == 7 for commit in state.commits.values())
        assert len(state.early) <= machine.EARLY_SPANS * len(PEERS)
        assert not (before.complete and (not state.complete or state.accepted is not before.accepted))
        for action in actions:
            if isinstance(action, Complete):
                assert state.gathered
                assert problem_of(replace(state, term=action.proposal.ballot.term), action.proposal) == ""
            if isinstance(action, Propose):
                assert {item.peer for item in action.commits} <= set(PEERS)
                assert 0 < len(action.next_roster) <= 5
            if isinstance(action, SendSealReply):
                assert action.to in PEERS


@given(st.integers(1, 4), st.lists(st.tuples(foreign_events, moments), min_size=1, max_size=12), st.integers(0, 1 << 32))
@settings(max_examples=60, deadline=None)
def test_strangers_change_nothing(count: int, hostile: list[tuple[Event, float]], seed: int) -> None:
    """Messages in the name of nobody in the roster leave a round as it is: one proposal, all commits, the usual time."""
    world = World(count, seed, hook=check_action)
    for event, moment in hostile:
        if _author(event) not in PEERS and not isinstance(event, JoinArrived):
            for peer in world.peers:
                world.at(moment, lambda peer=peer, event=event: world.put(peer, event))
    world.run(BOUND_S)
    proposal = only_proposal(finished(world))
    assert [item.peer for item in proposal.contributors] == list(world.peers)
    assert max(member.done_s or 0.0 for member in world.living()) < 1.0 + UNDISTURBED_S


def _author(event: Event) -> str:
    match event:
        case CommitArrived(commit):
            return commit.peer
        case ProposalArrived(proposal):
            return proposal.leader
        case SealReplyArrived(reply):
            return reply.peer
        case SpanArrived(span):
            return span.reducer
        case SealArrived(sender) | ComplaintArrived(sender):
            return sender
        case Completed(peer):
            return peer
        case _:
            return ""


# --- scenarios: leaders ---------------------------------------------------------------------------------------------------


def test_the_leader_dies_before_proposing() -> None:
    """The next in the rotation proposes without it; nobody else's work is lost."""

    def die(world: World, member: Member, action: Action) -> None:
        check_action(world, member, action)
        if isinstance(action, Propose) and member.name == leader(5):
            world.kill(member.name)

    world = World(5, hook=die)
    world.run(BOUND_S)
    proposal = only_proposal(finished(world))
    assert proposal.ballot == BallotNumber(1, 0)
    assert {item.peer for item in proposal.contributors} == set(world.peers) - {leader(5)}
    assert leader(5) not in {member.peer for member in proposal.next_roster}
    assert max(member.done_s or 0 for member in world.living()) < 2.0


@pytest.mark.parametrize("all_gather", [False, True])
def test_the_leader_dies_after_sending_its_proposal_to_one_peer(all_gather: bool) -> None:
    """The one that has it promises the new leader not to complete it, and all complete the new one."""
    only = follower(5)

    def die(world: World, member: Member, action: Action) -> None:
        if isinstance(action, Propose) and member.name == leader(5):
            facts = proposal_of(action.ballot, member.name, action.commits, action.next_roster)
            world.at(world.now_s, lambda: world.put(only, ProposalArrived(facts)))
            world.kill(member.name)

    world = World(5, hook=die, all_gather=all_gather)
    world.run(BOUND_S)
    proposal = only_proposal(finished(world))
    assert proposal.ballot.term > 0
    assert max(member.done_s or 0 for member in world.living()) < 2.0


def test_a_silent_leader_is_replaced() -> None:
    """A leader that is stopped before it proposes costs its patience, not the round; and it is not invited to the next."""
    world = World(5, hook=check_action)
    world.at(0.9, lambda: world.stop(leader(5)))
    world.run(20)
    others = [member for member in world.living() if member.name != leader(5)]
    proposal = only_proposal(others)
    assert leader(5) not in {member.peer for member in proposal.next_roster}
    assert 2.0 <= max(member.done_s or 99.0 for member in others) < 8.0


def test_two_proposals_of_one_leader() -> None:
    """A leader that signs two proposals for one ballot is refused by name and left; the first stands until the next one asks."""
    peers = names(3)
    me = next(peer for peer in peers if peer != leader(3) and peer != leader(3, 1))
    state = with_commits(setup_of(me, peers))
    first, second = planned(peers, BallotNumber()), planned(peers, BallotNumber(), quota=7)
    first, second = replace(first, signed="first"), replace(second, signed="second")
    state, _ = machine.step(state, ProposalArrived(first), 1.0)
    state, actions = machine.step(state, ProposalArrived(second), 1.0)
    assert Refuse(leader(3), "two_proposals") in actions
    assert Expose("first", "second") in actions
    assert Complain(leader(3, 1), leader(3), "leader_silent") in actions
    assert (state.accepted, state.leader) == (first, leader(3, 1))
    again, actions = machine.step(state, ProposalArrived(second), 1.0)
    assert actions == [Refuse(leader(3), "two_proposals"), Expose("first", "second")]
    assert again == state


@pytest.mark.parametrize("count", [3, 4, 5, 8])
@pytest.mark.parametrize("all_gather", [False, True])
def test_a_two_faced_leader_costs_a_round_little_and_loses_its_place(count: int, all_gather: bool) -> None:
    """Whoever works on one of its proposals shows it to those who work on the other; the next leader needs no deadline.

    Where one of the two gets a quorum, it stands, and the others take it.
    """
    world = World(count, two_faced={leader(count)}, hook=check_action, all_gather=all_gather)
    world.run(60.0)
    proposal = only_proposal(finished(world))
    assert max(member.done_s or 99.0 for member in world.living()) < 4.0
    if proposal.leader != leader(count):
        assert {member.peer for member in proposal.next_roster} == set(world.peers) - {leader(count)}
    assert {(sender, reason) for _, sender, reason in world.refused} <= {(leader(count), "two_proposals")}


@given(worlds(("kill", "stop", "cut")), st.data())
@settings(max_examples=120, deadline=None)
def test_two_faced_leaders_divide_nobody(world: World, data: st.DataObject) -> None:
    """Whatever fails besides, while they are fewer than half everybody alive ends, and without a grant with the same proposal."""
    most = (len(world.peers) - 1) // 2
    world.two_faced = data.draw(st.frozensets(st.sampled_from(world.peers), max_size=most))
    world.hook = None
    world.run(BOUND_S)
    assume(world.granted is None or any(world.members[peer].alive for peer in world.granted))
    living = finished(world)
    if world.granted is None:
        only_proposal(living)


# --- scenarios: reducers and completed proposals --------------------------------------------------------------------------


def test_a_reducer_dies_after_one_peer_got_its_span() -> None:
    """Whoever has completed serves the others: the proposal stands, the dead reducer's update included."""
    victim = leader(5, 3)

    def watch(world: World, member: Member, event: Event) -> None:
        if isinstance(event, SpanFetched) and event.reducer == victim and world.members[victim].alive:
            world.kill(victim)

    world = World(5, watch=watch, faults=Faults(lose_of_the_dead=1.0, transfer_s=(0.01, 0.05)), hook=check_action)
    world.run(BOUND_S)
    proposal = only_proposal(finished(world))
    assert max(member.done_s or 0 for member in world.living()) < 2.2
    assert proposal.ballot == BallotNumber() or proposal.included(victim) is None


def test_the_only_one_who_is_ready_is_heard_by_the_next_leader() -> None:
    """The leader and a reducer die when one peer alone has every part: its proposal is adopted, and all fetch them from it."""
    count, survivor = 5, leader(5, 2)
    victims = {leader(count, 0), leader(count, 3)}

    def strike(world: World, member: Member, action: Action) -> None:
        check_action(world, member, action)
        if isinstance(action, SendReady) and member.name == survivor:
            for victim in victims:
                world.kill(victim)

    world = World(count, hook=strike)
    fetch = world._fetch

    def only_the_survivor(member: Member, span: SpanFacts, sources: list[str], epoch: int, reason: str) -> None:
        if member.name != survivor and span.reducer in victims and world.members[span.reducer].alive:
            world.at(world.now_s + 0.01, lambda: only_the_survivor(member, span, sources, epoch, reason))
        else:
            fetch(member, span, sources, epoch, reason)

    world._fetch = only_the_survivor  # type: ignore[method-assign]
    world.run(BOUND_S)
    proposal = only_proposal(finished(world))
    assert proposal.ballot == BallotNumber()
    assert {item.peer for item in proposal.contributors} == set(names(count))
    assert max(member.done_s or 0 for member in world.living()) < 3.0


def test_all_gather_parts_of_the_dead_are_had_from_who_holds_them() -> None:
    """Sparse updates: once anybody has a dead peer's parts, its work counts, and all get them there."""
    victim, holder = leader(4, 1), leader(4, 2)

    def watch(world: World, member: Member, event: Event) -> None:
        if isinstance(event, Reduced) and member.name == holder and world.members[victim].alive:
            world.kill(victim)

    world = World(4, 5, watch=watch, all_gather=True, hook=check_action, faults=Faults(transfer_s=(0.05, 0.3)))
    world.run(BOUND_S)
    proposal = only_proposal(finished(world))
    assert proposal.included(victim) is not None
    assert victim in {member.peer for member in proposal.next_roster} or proposal.ballot > BallotNumber()


def test_a_promise_outlives_the_last_missing_part() -> None:
    """A peer that promised a higher ballot doesn't complete the lower one when its last part arrives."""
    state, proposal = exchanging(names(3), leader(3, 2))
    state, actions = machine.step(state, SealArrived(leader(3, 1), BallotNumber(1, 0)), 1.2)
    assert SendSealReply(leader(3, 1), BallotNumber(1, 0)) in actions
    for item in proposal.reducers:
        state, actions = machine.step(state, SpanFetched(proposal.proposal_hash, item.peer), 1.3)
        assert not any(isinstance(action, Complete) for action in actions)
    assert not state.complete


def test_a_completed_proposal_stands_whatever_is_promised_later() -> None:
    """A peer that hears of a completed proposal promises another leader nothing that matters: it completes it too."""
    peers = names(5)
    me = leader(5, 3)
    proposal = planned(peers, BallotNumber())
    state = with_commits(setup_of(me, peers))
    state, _ = machine.step(state, SealArrived(leader(5, 1), BallotNumber(1, 0)), 1.0)
    state, actions = machine.step(state, SealReplyArrived(decision(proposal, leader(5, 4), BallotNumber(1, 0))), 1.1)
    assert any(isinstance(action, FetchSpan) for action in actions)
    state, actions = machine.step(state, SealArrived(leader(5, 2), BallotNumber(2, 0)), 1.2)
    assert SendSealReply(leader(5, 2), BallotNumber(2, 0)) in actions
    for item in proposal.reducers:
        state, actions = machine.step(state, SpanFetched(proposal.proposal_hash, item.peer), 1.3)
    assert state.complete
    assert not any(isinstance(action, SendReady) for action in actions)


def test_a_decision_below_a_promise_takes_the_leader_who_asked() -> None:
    """Who promised a higher ballot doesn't take a lower decision from its owner; that leader may be proposing anew already."""
    peers = names(5)
    proposal = planned(peers, BallotNumber())
    state = with_commits(setup_of(leader(5, 3), peers))
    state, _ = machine.step(state, SealArrived(leader(5, 1), BallotNumber(1, 0)), 1.0)
    state, actions = machine.step(state, SealReplyArrived(decision(proposal, leader(5, 4), BallotNumber())), 1.1)
    assert state.accepted is None
    assert not any(isinstance(action, FetchSpan) for action in actions)
    state, _ = machine.step(state, SealReplyArrived(decision(proposal, leader(5, 4), BallotNumber(1, 0))), 1.2)
    assert state.accepted == proposal


def test_a_decision_that_comes_after_the_replacement_is_too_late() -> None:
    """A leader that has proposed anew doesn't go back when somebody whom it couldn't hear turns out to have completed."""
    peers = names(5)
    me, late = leader(5, 1), leader(5, 4)
    state = with_commits(setup_of(me, peers))
    state, actions = machine.step(state, PeerLost(leader(5)), 1.0)
    ballot = next(action.ballot for action in actions if isinstance(action, SendSeal))
    state, _ = machine.step(state, PeerLost(late), 1.0)
    for peer in (leader(5, 2), leader(5, 3)):
        state, actions = machine.step(state, SealReplyArrived(SealReplyFacts(peer, ballot, None, False)), 1.1)
    proposed = next(action for action in actions if isinstance(action, Propose))
    mine = proposal_of(ballot, me, proposed.commits, proposed.next_roster)
    reply = decision(planned(peers, BallotNumber()), late, ballot)
    state, actions = machine.step(state, SealReplyArrived(reply), 1.2)
    assert not any(isinstance(action, ForwardDecision) for action in actions)
    state, _ = machine.step(state, ProposalArrived(mine), 1.2)
    state, _ = machine.step(state, SealReplyArrived(reply), 1.3)
    assert state.accepted == mine


def test_a_decision_in_time_stands() -> None:
    """A leader that hears of a completed proposal while it asks passes the proof on instead of proposing."""
    peers = names(5)
    me = leader(5, 1)
    state = with_commits(setup_of(me, peers))
    state, actions = machine.step(state, PeerLost(leader(5)), 1.0)
    ballot = next(action.ballot for action in actions if isinstance(action, SendSeal))
    proposal = planned(peers, BallotNumber())
    reply = decision(proposal, leader(5, 4), ballot)
    state, actions = machine.step(state, SealReplyArrived(reply), 1.1)
    assert ForwardDecision(reply) in actions
    for peer in (leader(5, 2), leader(5, 3)):
        state, actions = machine.step(state, SealReplyArrived(SealReplyFacts(peer, ballot, None, False)), 1.2)
        assert not any(isinstance(action, Propose) for action in actions)
    for item in proposal.reducers:
        state, _ = machine.step(state, SpanFetched(proposal.proposal_hash, item.peer), 1.3)
    assert state.complete


def test_a_commit_of_another_state_that_a_reply_holds_is_left_alone() -> None:
    """Proposed, it would keep everybody from taking the proposal: one peer of another state could stop the round."""
    peers = names(3)
    me, liar, third = leader(3, 1), leader(3), leader(3, 2)
    whole = with_commits(setup_of(me, peers))
    state = replace(whole, commits={peer: commit for peer, commit in whole.commits.items() if peer != liar})
    state, actions = machine.step(state, PeerLost(liar), 1.0)
    ballot = next(action.ballot for action in actions if isinstance(action, SendSeal))
    reply = SealReplyFacts(third, ballot, None, False, commits=(replace(whole.commits[liar], base_root=b"another"),))
    state, actions = machine.step(state, SealReplyArrived(reply), 1.1)
    proposed = next(action for action in actions if isinstance(action, Propose))
    assert {item.peer for item in proposed.commits} == {me, third}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"leader": "stranger"}, "wrong_leader"),
        ({"base_root": b"other"}, "wrong_base"),
        ({"commits": ()}, "no_quorum"),
    ],
)
def test_a_made_up_decision_is_refused(changes: dict[str, Any], reason: str) -> None:
    """Who claims to have completed a proposal that breaks the rules is refused like a leader who sends it."""
    peers = names(5)
    state = with_commits(setup_of(leader(5, 1), peers))
    proposal = replace(planned(peers, BallotNumber()), **changes)
    state, actions = machine.step(state, SealReplyArrived(decision(proposal, leader(5, 4), BallotNumber())), 1.0)
    assert Refuse(leader(5, 4), reason) in actions
    assert state.accepted is None


def holding_everything(peers: tuple[str, ...], me: str) -> tuple[RoundState, ProposalFacts]:
    """A peer that holds every merged part of the first leader's proposal, and has said so."""
    state, proposal = exchanging(peers, me)
    for item in proposal.reducers:
        state, _ = machine.step(state, SpanArrived(span_of(proposal, item.peer)), 1.1)
        state, _ = machine.step(state, Reduced(span_of(proposal, me)), 1.1)
        state, actions = machine.step(state, SpanFetched(proposal.proposal_hash, item.peer), 1.2)
    assert SendReady(BallotNumber(), proposal.proposal_hash) in actions
    return state, proposal


def test_a_quorum_that_is_ready_completes_the_round() -> None:
    """Holding everything isn't enough: a peer completes with the quorum's last vote, and votes for other ballots don't add up."""
    peers = names(5)
    me = leader(5, 4)
    state, proposal = holding_everything(peers, me)
    first, second, third = (peer for peer in state.setup.others if peer != leader(5))
    state, _ = machine.step(state, ReadyArrived(first, BallotNumber(), proposal.proposal_hash), 1.3)
    state, _ = machine.step(state, ReadyArrived(second, BallotNumber(1), proposal.proposal_hash), 1.3)
    assert not state.complete
    state, actions = machine.step(state, ReadyArrived(third, BallotNumber(), proposal.proposal_hash), 1.4)
    assert state.complete
    assert Complete(proposal) in actions


def test_a_vote_that_got_lost_is_cast_again() -> None:
    """While it waits for a quorum, a peer repeats that it is ready; whoever has completed answers with the proof."""
    state, proposal = holding_everything(names(5), leader(5, 4))
    state, actions = machine.step(state, Tick(), 3.0)
    assert SendReady(BallotNumber(), proposal.proposal_hash, again=True) in actions
    for peer in state.setup.others[:2]:
        state, _ = machine.step(state, ReadyArrived(peer, BallotNumber(), proposal.proposal_hash), 3.1)
    late = state.setup.others[3]
    _, once = machine.step(state, ReadyArrived(late, BallotNumber(), proposal.proposal_hash), 3.2)
    _, again = machine.step(state, ReadyArrived(late, BallotNumber(), proposal.proposal_hash, again=True), 3.2)
    assert state.complete
    assert not once
    assert again == [SendSealReply(late, state.promised)]


def test_a_peer_that_was_frozen_doesnt_complete_what_the_others_replaced() -> None:
    """A leader that has everything, and sleeps while it is replaced, completes what the others did, not its own proposal."""
    count, sleeper = 5, leader(5)

    def strike(world: World, member: Member, action: Action) -> None:
        check_action(world, member, action)
        if isinstance(action, SendReady) and member.name == sleeper and not member.harmed:
            world.stop(sleeper)
            world.at(world.now_s + 12.0, lambda: world.resume(sleeper))

    world = World(count, hook=strike)
    fetch = world._fetch

    def slowly(member: Member, span: SpanFacts, sources: list[str], epoch: int, reason: str) -> None:
        if member.name == sleeper or world.members[sleeper].stopped:
            fetch(member, span, sources, epoch, reason)
        else:
            world.at(world.now_s + 0.01, lambda: slowly(member, span, sources, epoch, reason))

    world._fetch = slowly  # type: ignore[method-assign]
    world.run(BOUND_S)
    assert only_proposal(finished(world)).leader != sleeper


def test_an_adoption_replaces_what_was_accepted() -> None:
    """A leader's adoption of a ready proposal is taken like a proposal of its ballot; a second one of that ballot is refused."""
    peers = names(5)
    me = leader(5, 3)
    proposal = planned(peers, BallotNumber())
    state = with_commits(setup_of(me, peers))
    ballot = BallotNumber(1)
    reply = replace(decision(proposal, leader(5, 4), ballot), complete=False, ready=True)
    state, actions = machine.step(state, AdoptionArrived(leader(5, 2), ballot, reply), 1.0)
    assert Refuse(leader(5, 2), "wrong_leader") in actions
    state, actions = machine.step(state, AdoptionArrived(leader(5, 1), ballot, reply), 1.1)
    assert state.accepted == proposal
    assert state.standing == ballot
    assert any(isinstance(action, FetchSpan) and leader(5, 4) in action.sources for action in actions)
    other = planned(peers, BallotNumber(0, 1))
    state, actions = machine.step(state, AdoptionArrived(leader(5, 1), ballot, replace(reply, accepted=other)), 1.2)
    assert Refuse(leader(5, 1), "two_proposals") in actions
    assert state.accepted == proposal
    _, actions = machine.step(state, AdoptionArrived(leader(5, 1), ballot, replace(reply, ready=False)), 1.3)
    assert not any(isinstance(action, Adopt) for action in actions)


def test_a_late_span_doesnt_spoil_what_a_completed_peer_serves() -> None:
    """After completing, the merged spans of that proposal are kept as proof, whatever else the reducers publish."""
    state, proposal = exchanging(names(3))
    for item in proposal.reducers:
        state, _ = machine.step(state, SpanArrived(span_of(proposal, item.peer)), 1.1)
        state, _ = machine.step(state, Reduced(span_of(proposal, state.setup.me)), 1.1)
        state, _ = machine.step(state, SpanFetched(proposal.proposal_hash, item.peer), 1.2)
    assert not state.complete
    state, _ = machine.step(state, ReadyArrived(state.setup.others[0], BallotNumber(), proposal.proposal_hash), 1.3)
    assert state.complete
    before = state.spans
    other = planned(names(3), BallotNumber(1, 0))
    for item in other.reducers:
        state, _ = machine.step(state, SpanArrived(span_of(other, item.peer)), 1.3)
    assert state.spans == before


def test_spans_that_overtake_their_proposal_are_used() -> None:
    """A merged span that arrives before the proposal, among spans of other proposals, is fetched when the proposal comes."""
    peers = names(3)
    me = next(peer for peer in peers if peer != leader(3))
    proposal, other = planned(peers, BallotNumber()), planned(peers, BallotNumber(), quota=7)
    state = with_commits(setup_of(me, peers))
    for span in (span_of(proposal, leader(3)), span_of(other, leader(3))):
        state, actions = machine.step(state, SpanArrived(span), 1.0)
        assert not any(isinstance(action, FetchSpan) for action in actions)
    state, actions = machine.step(state, ProposalArrived(proposal), 1.1)
    assert [action.span for action in actions if isinstance(action, FetchSpan)] == [span_of(proposal, leader(3))]


# --- scenarios: quorums ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("silent", [False, True])
def test_the_minority_side_of_a_partition_waits(silent: bool) -> None:
    """Two of five that are cut off complete nothing, whatever they try; afterwards they complete what the three did."""
    minority = sorted(names(5))[:2]
    world = World(5, hook=check_action)
    world.at(0.5, lambda: world.cut(minority, silent))
    world.run(20.0)
    assert all(world.members[peer].done is None for peer in minority)
    majority = [member for member in world.members.values() if member.name not in minority]
    assert all(member.done is not None for member in majority)
    assert all(world.members[peer].state.waiting_for == "no_quorum" for peer in minority if world.members[peer].state.leads)
    world.heal()
    world.run(40.0)
    only_proposal(finished(world))


@pytest.mark.parametrize("victim", names(2))
@pytest.mark.parametrize("moment", [0.5, 1.03])
def test_a_roster_of_two_with_one_dead_gets_on_by_the_grant(victim: str, moment: float) -> None:
    """The survivor goes on alone, in the same round, as soon as the coordinator says that the other is gone."""
    world = World(2, hook=check_action)
    world.at(moment, lambda: world.kill(victim))
    world.run(BOUND_S)
    proposal = only_proposal(finished(world))
    assert proposal.grant or moment > 1.0
    assert [member.peer for member in proposal.next_roster] == [peer for peer in names(2) if peer != victim] or not proposal.grant
    assert max(member.done_s or 0 for member in world.living()) < 2.2


def test_without_a_grant_the_last_of_two_waits() -> None:
    """While the coordinator doesn't answer, half a roster goes on asking and completes nothing."""
    world = World(2, grant=never_grant, hook=check_action)
    world.at(0.5, lambda: world.kill(leader(2)))
    world.run(30.0)
    survivor = world.living()[0]
    assert survivor.done is None
    assert survivor.state.waiting_for == "no_quorum"
    world.grant_policy = grant_if_dead
    world.run(35.0)
    assert survivor.done is not None


def test_a_roster_of_two_with_one_silent_gets_on_by_the_grant() -> None:
    """A stopped leader refuses no connection, but its silence is enough to ask the coordinator."""
    world = World(2, hook=check_action)
    world.at(0.5, lambda: world.stop(leader(2)))
    world.run(20.0)
    survivor = world.members[leader(2, 1)]
    assert survivor.done is not None
    assert survivor.done.grant


def test_a_grant_covers_only_those_it_names() -> None:
    """A commit of a peer that the grant doesn't name stays out: the proposal would be refused with it."""
    peers = names(5)
    me, unnamed = leader(5), leader(5, 1)
    state = machine.begin(setup_of(me, peers), 0.0)
    state, _ = machine.step(state, CommitArrived(commit_of(unnamed)), 1.0)
    state, _ = machine.step(state, GrantArrived("grant", (me,)), 1.0)
    for peer in (leader(5, 2), leader(5, 3), leader(5, 4)):
        state, _ = machine.step(state, PeerLost(peer), 1.0)
    state, actions = machine.step(state, Trained(commit_of(me)), 1.0)
    proposed = next(action for action in actions if isinstance(action, Propose))
    assert [item.peer for item in proposed.commits] == [me]


def test_a_peer_that_answers_but_not_to_the_seal_is_asked_again() -> None:
    """A seal or its answer may be lost: whoever gives signs of life gets it again before it is taken for lost."""
    peers = names(3)
    me, dead, quiet = leader(3, 1), leader(3), leader(3, 2)
    state, _ = machine.step(with_commits(setup_of(me, peers)), PeerLost(dead), 1.0)
    assert state.stage == "sealing"
    seals = 0
    for tenth in range(1, 60):
        state, actions = machine.step(state, PeerAlive(quiet), 1.0 + tenth / 10)
        seals += sum(isinstance(action, SendSeal) for action in actions)
        assert not any(isinstance(action, Propose) for action in actions)
    assert seals == 2
    assert quiet not in state.lost


def test_a_peer_that_comes_back_while_sealing_is_asked_too() -> None:
    """Where a quorum is missing, a peer that was unreachable gets the seal as soon as it answers again."""
    peers = names(3)
    me, dead, back = leader(3, 1), leader(3), leader(3, 2)
    state, _ = machine.step(with_commits(setup_of(me, peers)), PeerLost(back), 1.0)
    state, _ = machine.step(state, PeerLost(dead), 1.0)
    state, actions = machine.step(state, Tick(), 1.1)
    assert not any(isinstance(action, SendSeal) for action in actions)
    state, actions = machine.step(state, PeerAlive(back), 1.5)
    assert [action.ballot for action in actions if isinstance(action, SendSeal)] == [state.ballot]


# --- scenarios: who is in the next roster ---------------------------------------------------------------------------------


def test_a_stopped_peer_is_given_up_after_the_grace_and_not_invited() -> None:
    """SIGSTOP before the commit: the others wait for the whole grace, and then go on without it for good."""
    victim = follower(4)
    world = World(4, hook=check_action)
    world.at(0.5, lambda: world.stop(victim))
    world.run(20.0)
    others = [member for member in world.living() if member.name != victim]
    proposal = only_proposal(others)
    assert victim not in {member.peer for member in proposal.next_roster}
    assert all(2.0 <= (member.done_s or 0) < 5.0 for member in others)


def test_a_stopped_reducer_is_given_up_after_the_exchange_deadline() -> None:
    """SIGSTOP in the exchange: it gets as long as exchanges take, then the others merge without it."""
    victim = follower(4)

    def watch(world: World, member: Member, event: Event) -> None:
        if isinstance(event, ProposalArrived) and member.name == victim:
            world.stop(victim)

    world = World(4, hook=check_action, watch=watch)
    world.run(30.0)
    others = [member for member in world.living() if member.name != victim]
    proposal = only_proposal(others)
    assert proposal.included(victim) is None
    assert victim not in {member.peer for member in proposal.next_roster}
    assert all(3.0 <= (member.done_s or 0) < 12.0 for member in others)


@pytest.mark.parametrize("slow", names(4))
def test_a_slow_trainer_stays_in_the_roster(slow: str) -> None:
    """Who is still training when the grace is over, but answers, is left out of this round alone; it follows the result."""
    world = World(4, train_s={peer: 30.0 if peer == slow else 1.0 for peer in names(4)}, hook=check_action)
    world.run(BOUND_S)
    proposal = only_proposal(finished(world))
    assert proposal.included(slow) is None
    assert slow in {member.peer for member in proposal.next_roster}
    assert all(2.0 <= (member.done_s or 0) < 4.0 for member in world.members.values() if member.name != slow)
    assert world.members[slow].done_s is not None
    assert world.members[slow].done_s < 5.0


def test_a_peer_that_leaves_is_merged_but_not_invited() -> None:
    """A commit that says goodbye counts, and its author isn't in the next roster."""
    gone = follower(4)
    world = World(4, commits={gone: commit_of(gone, leaving=True)}, hook=check_action)
    world.run(BOUND_S)
    proposal = only_proposal(finished(world))
    assert proposal.included(gone) is not None
    assert [member.peer for member in proposal.next_roster] == [peer for peer in names(4) if peer != gone]


def test_joiners_get_in_while_there_is_room() -> None:
    """The next roster has the members and as many joiners as fit, and the proposal goes to those."""
    world = World(3, max_peers=4, hook=check_action)
    for joiner in ("zoe", "amy"):
        world.join(joiner)
    world.run(BOUND_S)
    proposal = only_proposal(finished(world))
    assert [member.peer for member in proposal.next_roster] == ["amy", *names(3)]


def test_a_lost_member_that_asks_again_is_invited() -> None:
    """A peer that died and came back within a round is in the next roster, without its commit."""
    peers = names(3)
    me, back = leader(3), leader(3, 1)
    state = machine.begin(setup_of(me, peers), 0.0)
    state, _ = machine.step(state, PeerLost(back), 0.5)
    state, _ = machine.step(state, JoinArrived(back, "token"), 0.6)
    state, _ = machine.step(state, CommitArrived(commit_of(leader(3, 2))), 1.0)
    state, actions = machine.step(state, Trained(commit_of(me)), 1.0)
    proposed = next(action for action in actions if isinstance(action, Propose))
    assert back in {member.peer for member in proposed.next_roster}
    assert back not in {item.peer for item in proposed.commits}


def test_the_first_round_waits_for_enough_peers() -> None:
    """With `min_peers` = 3, a single member proposes only once two have asked to join."""
    peers = names(1)
    state = machine.begin(setup_of(peers[0], peers, min_peers=3), 0.0)
    state, actions = machine.step(state, Trained(commit_of(peers[0], weight=0)), 0.0)
    for joiner in ("amy", "zoe"):
        assert not any(isinstance(action, Propose) for action in actions)
        state, actions = machine.step(state, JoinArrived(joiner), 50.0)
    proposed = next(action for action in actions if isinstance(action, Propose))
    assert [member.peer for member in proposed.next_roster] == ["amy", "p00", "zoe"]


# --- scenarios: complaints and signs of life ------------------------------------------------------------------------------


def test_one_complaint_drops_nobody() -> None:
    """A leader that hears one complaint looks for itself first; most of the others together are believed."""
    peers = names(5)
    me = leader(5)
    state, _ = exchanging(peers, me)
    about, *accusers = (peer for peer in peers if peer != me)
    state, _ = machine.step(state, ComplaintArrived(accusers[0], about, "silent"), 1.1)
    assert about not in state.gone
    state, actions = machine.step(state, ComplaintArrived(accusers[1], about, "silent"), 1.1)
    state, actions = machine.step(state, ComplaintArrived(accusers[2], about, "silent"), 1.1)
    assert about in state.dropped
    assert any(isinstance(action, SendSeal) for action in actions) or state.stage == "sealing"


def test_a_leader_whose_own_parts_cant_be_decoded_is_replaced() -> None:
    """It would be asked in vain to go on without itself: the next one seals at once, and neither includes nor keeps it."""
    peers = names(4)
    bad, me = leader(4), leader(4, 1)
    state, proposal = exchanging(peers, me)
    state, actions = machine.step(state, FetchFailed(proposal.proposal_hash, bad, False, "bad_part"), 1.1)
    assert state.leads
    assert [action.ballot for action in actions if isinstance(action, SendSeal)] == [BallotNumber(1, 0)]
    for peer in peers:
        if peer != me:
            reply = SealReplyFacts(peer, BallotNumber(1, 0), proposal, complete=False)
            state, actions = machine.step(state, SealReplyArrived(reply), 1.2)
    (proposed,) = (action for action in actions if isinstance(action, Propose))
    assert {commit.peer for commit in proposed.commits} == set(peers) - {bad}
    assert {member.peer for member in proposed.next_roster} == set(peers) - {bad}


def test_a_merge_that_cant_be_decoded_is_asked_for_once() -> None:
    """However often others are ready: it stays what it is. The merge that somebody has completed with takes its place."""
    peers = names(4)
    me = leader(4, 1)
    state, proposal = exchanging(peers, me)
    bad, holder = leader(4, 2), leader(4, 3)
    sound = span_of(proposal, bad)
    rotten = replace(sound, part_hashes=(b"rotten",) * len(sound.part_hashes), signed="rotten")
    state, actions = machine.step(state, SpanArrived(rotten), 1.1)
    assert [action.span for action in actions if isinstance(action, FetchSpan)] == [rotten]
    state, actions = machine.step(state, FetchFailed(proposal.proposal_hash, bad, True, "bad_part"), 1.2)
    assert Complain(leader(4), bad, "bad_part") in actions
    for second in range(5):
        ready = ReadyArrived(holder, BallotNumber(), proposal.proposal_hash, True)
        state, actions = machine.step(state, ready, 1.3 + second / 10)
        assert not [action for action in actions if isinstance(action, FetchSpan)]
    reply = decision(proposal, holder, BallotNumber())
    state, actions = machine.step(state, SealReplyArrived(reply), 1.9)
    assert state.spans[bad] == sound
    assert sound in [action.span for action in actions if isinstance(action, FetchSpan)]
    assert Expose("rotten", sound.signed) in actions


def test_two_merges_of_one_reducer() -> None:
    """The first stands; the second, and any more, is exposed with it."""
    peers = names(4)
    state, proposal = exchanging(peers)
    reducer = leader(4, 2)
    first = replace(span_of(proposal, reducer), signed="first")
    second = replace(first, part_hashes=(b"second",) * len(first.part_hashes), signed="second")
    state, _ = machine.step(state, SpanArrived(first), 1.1)
    state, actions = machine.step(state, SpanArrived(second), 1.2)
    assert state.spans[reducer] == first
    assert actions == [Refuse(reducer, "two_merges"), Expose("first", "second")]


def test_a_follower_tells_the_next_leader() -> None:
    """Whoever can't decode the leader's parts follows the next one; a part of somebody else's is the leader's business."""
    peers = names(4)
    bad, me, other = leader(4), leader(4, 2), leader(4, 3)
    state, proposal = exchanging(peers, me)
    same, actions = machine.step(state, FetchFailed(proposal.proposal_hash, other, False, "bad_part"), 1.1)
    assert same.leader == bad
    assert Complain(bad, other, "bad_part") in actions
    state, actions = machine.step(state, FetchFailed(proposal.proposal_hash, bad, False, "bad_part"), 1.1)
    assert state.leader == leader(4, 1)
    assert Complain(leader(4, 1), bad, "leader_silent") in actions


def test_a_lie_about_completing_holds_nobody_up_for_long() -> None:
    """A member that claims to have completed, but serves nobody, keeps the leader from going on until the deadline only."""
    liar, victim = leader(4, 1), leader(4, 2)

    def claim(world: World, member: Member, event: Event) -> None:
        if isinstance(event, ProposalArrived) and member.name == liar and member.state.accepted is None:
            world.kill(victim)
            world.send(liar, world.peers, Completed(liar, event.proposal.proposal_hash))

    world = World(4, watch=claim, hook=check_action, faults=Faults(lose_of_the_dead=1.0))
    world.run(BOUND_S)
    assert only_proposal(finished(world)).included(victim) is None
    assert max(member.done_s or 0 for member in world.living()) < 1.0 + UNDISTURBED_S + 4.0


def test_late_peers_are_not_dropped_below_a_quorum() -> None:
    """Of two, neither can go on without the other while it answers: after all deadlines the leader tries again with both."""
    peers = names(2)
    state, proposal = exchanging(peers, leader(2))
    state, _ = machine.step(state, Reduced(span_of(proposal, leader(2))), 1.0)
    for tenth in range(1, 150):
        state, actions = machine.step(state, PeerAlive(leader(2, 1)), 1.0 + tenth / 10)
        if any(isinstance(action, SendSeal) for action in actions):
            break
    assert state.stage == "sealing"
    assert not state.gone
    reply = SealReplyFacts(leader(2, 1), state.ballot, None, False)
    _, actions = machine.step(state, SealReplyArrived(reply), 20.0)
    proposed = next(action for action in actions if isinstance(action, Propose))
    assert [item.peer for item in proposed.commits] == list(peers)


def test_an_accused_reducer_is_dropped_at_the_first_deadline() -> None:
    """A reducer that answers, but that half of the others can't use, is given up when exchanges usually are over, not later."""
    state, _ = exchanging(names(3), leader(3))
    about, accuser = leader(3, 1), leader(3, 2)
    state, _ = machine.step(state, ComplaintArrived(accuser, about, "silent"), 1.1)
    state, _ = machine.step(state, PeerAlive(about), 2.9)
    assert not state.gone
    state, actions = machine.step(state, PeerAlive(about), 3.1)
    assert state.gone == {about}
    assert any(isinstance(action, SendSeal) for action in actions)


def test_a_lost_reducer_is_reported_by_whoever_notices() -> None:
    """A follower whose probe of a reducer is refused tells the leader, which may not know yet."""
    state, _ = exchanging(names(4))
    victim = leader(4, 2)
    state, actions = machine.step(state, PeerLost(victim), 1.1)
    assert Complain(leader(4), victim, "unreachable") in actions
    _, actions = machine.step(state, PeerLost(victim), 1.2)
    assert not any(isinstance(action, Complain) for action in actions)


def asked_in_turn(state: RoundState, wanted: set[str], most: int) -> list[set[str]]:
    """Whom the probes are for, tick by tick, until everybody who is wanted has been asked."""
    asked: list[set[str]] = []
    while not asked or set().union(*asked) < wanted:
        assert len(asked) < most
        state, actions = machine.step(state, Tick(), 2.0 + 0.5 * len(asked))
        asked.append({action.peer for action in actions if isinstance(action, Probe)})
    return asked


def test_a_large_roster_is_asked_a_few_at_a_time() -> None:
    """Whoever waits asks those first whom it has neither heard nor asked for longest, and a follower its leader always."""
    peers = names(32)
    me = leader(32)
    state, _ = machine.step(machine.begin(setup_of(me, peers), 1.0), Trained(commit_of(me)), 1.5)
    asked = asked_in_turn(state, set(peers) - {me}, 3)
    assert max(map(len, asked)) == 12

    state, proposal = exchanging(peers)
    asked = asked_in_turn(state, {item.peer for item in proposal.reducers} - {state.setup.me}, 2)
    assert all(leader(32) in group and len(group) <= 5 for group in asked)


def test_a_replaced_leader_learns_of_it() -> None:
    """Whoever asks with a ballot that is too low is told the higher one, and follows its leader."""
    peers = names(3)
    state = with_commits(setup_of(leader(3, 2), peers))
    state, _ = machine.step(state, SealArrived(leader(3, 1), BallotNumber(1, 0)), 1.0)
    _, actions = machine.step(state, SealArrived(leader(3), BallotNumber(0, 1)), 1.1)
    assert actions[0] == SendSealReply(leader(3), BallotNumber(1, 0))
    old, _ = exchanging(peers, leader(3))
    old, _ = machine.step(old, SealReplyArrived(SealReplyFacts(leader(3, 2), BallotNumber(1, 0), None, False)), 1.2)
    assert old.leader == leader(3, 1)


def test_parts_that_nobody_gives_are_given_up() -> None:
    """All-gather: a dead peer's commit stays in while somebody claims to hold its parts, until a complaint shows otherwise."""
    peers = names(3)
    me, dead, liar = leader(3), leader(3, 1), leader(3, 2)
    state = with_commits(setup_of(me, peers, all_gather=True))
    state, _ = machine.step(state, ProposalArrived(gathered(peers)), 1.0)
    state, _ = machine.step(state, PeerLost(dead), 1.1)
    included: list[list[str]] = []
    for now_s in (1.2, 1.4, 1.6):
        reply = SealReplyFacts(liar, state.ballot, None, False, holds=frozenset({dead}))
        state, actions = machine.step(state, SealReplyArrived(reply), now_s)
        for proposed in (action for action in actions if isinstance(action, Propose)):
            included.append([item.peer for item in proposed.commits])
            facts = proposal_of(proposed.ballot, me, proposed.commits, proposed.next_roster)
            state, _ = machine.step(state, ProposalArrived(facts), now_s)
            state, _ = machine.step(state, FetchFailed(facts.proposal_hash, dead, False, "unreachable"), now_s + 0.1)
    assert included == [list(peers), sorted([me, liar])]


def test_a_leader_that_answers_gets_more_time_in_the_exchange() -> None:
    """Followers replace a silent leader after the exchange's deadline, one that gives signs of life after several."""
    peers = names(3)
    moments = {}
    for answers in (True, False):
        state, _ = exchanging(peers, leader(3, 2))
        tenths = 0
        while state.term == 0 and tenths < 1000:
            tenths += 1
            event = PeerAlive(leader(3)) if answers else Tick()
            state, _ = machine.step(state, event, 1.0 + tenths / 10)
        moments[answers] = tenths / 10
    assert 2.0 <= moments[False] < 6.0
    assert 10.0 <= moments[True] < 20.0


def test_a_leader_that_knows_less_than_others_asks_first() -> None:
    """A first leader that hears that somebody has completed already, after a restart say, seals before it proposes."""
    peers = names(3)
    state = machine.begin(setup_of(leader(3), peers), 0.0)
    state, actions = machine.step(state, Completed(leader(3, 1), b"something"), 0.5)
    assert [action.ballot for action in actions if isinstance(action, SendSeal)] == [BallotNumber(0, 1)]


def test_nobody_is_talked_out_of_leading() -> None:
    """Complaints about the leader, sent to the leader, don't make it take itself for lost."""
    peers = names(3)
    state, _ = exchanging(peers, leader(3))
    for sender in (leader(3, 1), leader(3, 2)):
        state, _ = machine.step(state, ComplaintArrived(sender, leader(3), "unreachable"), 1.1)
    assert not state.gone


def test_a_commit_that_others_pass_on_is_no_sign_of_life() -> None:
    """The commit of a dead peer, forwarded by a leader or a reply, doesn't bring it back."""
    peers = names(3)
    state = machine.begin(setup_of(leader(3), peers), 0.0)
    state, _ = machine.step(state, PeerLost(leader(3, 1)), 1.0)
    state, _ = machine.step(state, CommitArrived(commit_of(leader(3, 1)), forwarded=True), 1.1)
    assert leader(3, 1) in state.lost
    state, _ = machine.step(state, CommitArrived(commit_of(leader(3, 1))), 1.2)
    assert leader(3, 1) not in state.lost


def test_seals_of_a_far_future_are_refused() -> None:
    """Nobody can push the rotation to the end of its numbers."""
    peers = names(3)
    state = machine.begin(setup_of(peers[0], peers), 0.0)
    term = next(term for term in range(1 << 30, (1 << 30) + 3) if leader(3, term) != peers[0])
    state, actions = machine.step(state, SealArrived(leader(3, term), BallotNumber(term, 0)), 1.0)
    assert Refuse(leader(3, term), "wrong_leader") in actions
    assert state.term == 0


def test_two_commits_of_one_peer() -> None:
    """The second is refused by name; if the leader has the other one, the proposal decides which of them counts."""
    peers = names(3)
    me = leader(3, 1)
    liar = leader(3, 2)
    state = with_commits(setup_of(me, peers))
    other = commit_of(liar, nonce=1)
    state, actions = machine.step(state, CommitArrived(other), 1.0)
    assert Refuse(liar, "two_commits") in actions
    proposal = planned(peers, BallotNumber(), {liar: other})
    state, actions = machine.step(state, ProposalArrived(proposal), 1.1)
    assert not any(isinstance(action, Refuse) for action in actions)
    state, _ = machine.step(state, CommitArrived(other, forwarded=True), 1.2)
    assert state.commits[liar] == other
    assert state.reducing


def test_nobody_commits_to_more_than_its_quota() -> None:
    """The roster says how much each may do, and so how much each may weigh; a proposal that lists more is refused, too."""
    peers = names(3)
    me, other = sorted(set(peers) - {leader(3)})
    setup = setup_of(me, peers, quota_samples=4)
    state, actions = machine.step(machine.begin(setup, 0.0), CommitArrived(commit_of(other, weight=41)), 1.0)
    assert actions == [Refuse(other, "over_quota")]
    state, actions = machine.step(state, CommitArrived(commit_of(other, weight=40)), 1.0)
    assert actions == []
    heavy = replace(planned(peers, BallotNumber()).commits[0], weight=41)
    proposal = planned(peers, BallotNumber())
    proposal = replace(proposal, commits=(heavy, *proposal.commits[1:]))
    _, actions = machine.step(machine.begin(setup, 0.0), ProposalArrived(proposal), 1.0)
    assert actions == [Refuse(leader(3), "over_quota")]


def test_a_newcomer_that_joins_gets_half_of_the_work() -> None:
    """While there are others; a member that is one gets half of it, too."""
    world = World(3, new_weight=0.5, newcomers=frozenset({"p01"}))
    for peer in world.peers:
        world.at(0.5, lambda peer=peer: world.put(peer, JoinArrived("zoe", "token", newcomer=True)))
    world.run(20.0)
    proposal = only_proposal(finished(world))
    assert {member.peer: member.quota for member in proposal.next_roster} == {"p00": 10, "p01": 5, "p02": 10, "zoe": 5}


def test_a_repeated_proposal_starts_nothing_twice() -> None:
    """The same proposal twice, and a commit twice, give one merge."""
    state, proposal = exchanging(names(3))
    for event in (ProposalArrived(proposal), CommitArrived(commit_of(leader(3)))):
        state, actions = machine.step(state, event, 1.1)
        assert not any(isinstance(action, machine.Reduce) for action in actions)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"leader": "stranger"}, "wrong_leader"),
        ({"base_root": b"other"}, "wrong_base"),
        ({"next_roster": ()}, "roster_too_large"),
        ({"next_roster": tuple(RosterMember(f"q{number:03}", 1) for number in range(65))}, "roster_too_large"),
        ({"next_roster": (RosterMember("b", 1), RosterMember("a", 1))}, "unsorted"),
        ({"next_roster": (RosterMember("a", 1), RosterMember("a", 1))}, "unsorted"),
    ],
)
def test_a_proposal_that_breaks_a_rule_is_refused_with_its_leaders_name(changes: dict[str, Any], reason: str) -> None:
    """Leader, base, order and size of the roster are checked."""
    peers = names(3)
    state = with_commits(setup_of(leader(3, 1), peers))
    proposal = replace(planned(peers, BallotNumber()), **changes)
    state, actions = machine.step(state, ProposalArrived(proposal), 1.0)
    assert Refuse(proposal.leader, reason) in actions
    assert state.accepted is None


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda items: items[:1], "no_quorum"),
        (lambda items: items[::-1], "unsorted"),
        (lambda items: (*items, IncludedCommit("stranger", b"", 1)), "not_in_roster"),
        (lambda items: (replace(items[0], part_span=items[0].part_span + 1), *items[1:]), "wrong_spans"),
        (lambda items: (replace(items[0], part_span=0), *items[1:]), "wrong_spans"),
        (lambda items: (replace(items[0], first_part=1), *items[1:]), "wrong_spans"),
    ],
)
def test_commits_and_spans_of_a_proposal_are_checked(known: bool, change: Any, reason: str) -> None:
    """Even a peer that knows none of the commits sees that the spans don't cover every part once."""
    peers = names(3)
    setup = setup_of(leader(3, 1), peers)
    state = with_commits(setup) if known else machine.begin(setup, 0.0)
    proposal = planned(peers, BallotNumber())
    state, actions = machine.step(state, ProposalArrived(replace(proposal, commits=change(proposal.commits))), 1.0)
    assert Refuse(leader(3), reason) in actions


def test_weights_are_the_committed_ones() -> None:
    """A leader can't change the weight of a commit, nor make a contribution count nothing."""
    peers = names(3)
    state = with_commits(setup_of(leader(3, 1), peers))
    for weight in (0, 11):
        proposal = planned(peers, BallotNumber())
        items = (replace(proposal.commits[0], weight=weight), *proposal.commits[1:])
        _, actions = machine.step(state, ProposalArrived(replace(proposal, commits=items)), 1.0)
        assert Refuse(leader(3), "wrong_commit") in actions


def test_losses_are_the_committed_ones_where_they_decide() -> None:
    """A leader quotes every commit's loss; one that quotes another is refused, or gets no merge once the commit is known."""
    peers = names(3)
    me, commits = leader(3, 1), {peer: commit_of(peer, loss=2.5) for peer in names(3)}
    items = tuple(replace(item, loss=2.5) for item in planned(peers, BallotNumber(), commits).commits)
    right = replace(planned(peers, BallotNumber(), commits), commits=items)
    wrong = replace(right, commits=(replace(items[0], loss=99.0), *items[1:]))
    for proposal, reduces in ((right, True), (wrong, False)):
        state = machine.begin(setup_of(me, peers, quotes_losses=True), 0.0)
        state, _ = machine.step(state, ProposalArrived(proposal), 1.0)
        assert state.accepted == proposal
        done: list[Action] = []
        for commit in commits.values():
            state, actions = machine.step(state, CommitArrived(commit), 1.1)
            done += actions
        assert any(isinstance(action, Reduce) for action in done) is reduces
        known = machine.begin(setup_of(me, peers, quotes_losses=True), 0.0)
        for commit in commits.values():
            known, _ = machine.step(known, CommitArrived(commit), 1.0)
        _, actions = machine.step(known, ProposalArrived(proposal), 1.1)
        assert (Refuse(leader(3), "wrong_loss") in actions) is not reduces


@pytest.mark.parametrize("quotes", [True, False])
def test_a_leader_quotes_losses_only_where_they_decide(quotes: bool) -> None:
    """In other runs a proposal is what it always was."""
    peers = names(3)
    state = machine.begin(setup_of(leader(3), peers, quotes_losses=quotes), 0.0)
    done: list[Action] = []
    for place, peer in enumerate(peers):
        state, actions = machine.step(state, CommitArrived(commit_of(peer, loss=2.0 + place)), 1.0)
        done += actions
    proposed = next(action for action in done if isinstance(action, Propose))
    assert [item.loss for item in proposed.commits] == ([2.0, 3.0, 4.0] if quotes else [0.0] * 3)


def test_a_peer_that_lacks_a_commit_asks_the_leader_for_it() -> None:
    """A reducer that can't merge for want of a commit complains, and the leader answers with the proposal and the commits."""
    peers = names(3)
    me, quiet = leader(3, 1), leader(3, 2)
    state = machine.begin(setup_of(me, peers), 0.0)
    for peer in (me, leader(3)):
        state, _ = machine.step(state, CommitArrived(commit_of(peer)), 1.0)
    asked: list[Action] = []
    state, actions = machine.step(state, ProposalArrived(planned(peers, BallotNumber())), 1.1)
    for tick in range(10):
        asked += actions
        state, actions = machine.step(state, Tick(), 1.2 + tick / 10)
    assert Complain(leader(3), quiet, "missing_commit") in asked
    other, _ = exchanging(peers, leader(3))
    _, actions = machine.step(other, ComplaintArrived(me, quiet, "missing_commit"), 1.2)
    assert machine.ResendProposal(me) in actions


def test_a_leader_sends_again_what_did_not_arrive() -> None:
    """A follower that waits for a proposal that was lost says that it is left behind, and gets it."""
    peers = names(3)
    state, _ = exchanging(peers, leader(3))
    _, actions = machine.step(state, ComplaintArrived(leader(3, 2), leader(3), "left_behind"), 1.2)
    assert machine.ResendProposal(leader(3, 2)) in actions


def test_a_leader_sends_an_adopted_proposal_again_as_adopted() -> None:
    """Who promised the ballot of an adoption would take the same proposal at its old ballot for stale."""
    peers = names(3)
    me, missed = leader(3, 1), leader(3, 2)
    state, proposal, ballot = adopting(peers, me, missed)
    _, actions = machine.step(state, ComplaintArrived(missed, me, "left_behind"), 2.2)
    assert Adopt(ballot, None, missed) in actions
    assert state.accepted == proposal


def test_two_that_wait_for_each_other_get_a_leader() -> None:
    """Who is stuck and hears that somebody waits for it to lead does so; who isn't stuck doesn't."""
    peers = names(4)
    me, sender = leader(4, 1), leader(4, 2)
    complaint = ComplaintArrived(sender, me, "left_behind")
    state = waiting_in_vain(peers, me, (me,))
    state, actions = machine.step(state, complaint, 22.0)
    assert any(isinstance(action, SendSeal) and action.ballot.term % 4 == 1 for action in actions)
    busy = machine.begin(setup_of(me, peers), 0.0)
    busy, actions = machine.step(busy, complaint, 1.0)
    assert not any(isinstance(action, SendSeal) for action in actions)
    assert busy.term == 0


def test_a_decision_below_a_promise_is_brought_out_by_who_is_stuck() -> None:
    """Bound to a leader that died, a peer learns that others have completed: it asks them at a ballot of its own, and follows."""
    peers = names(5)
    me, helper = leader(5, 3), leader(5, 4)
    proposal = planned(peers, BallotNumber())
    state = waiting_in_vain(peers, me, (me,), SealArrived(leader(5, 1), BallotNumber(1, 0)))
    state, actions = machine.step(state, SealReplyArrived(decision(proposal, helper, BallotNumber())), 22.0)
    ballot = next(action.ballot for action in actions if isinstance(action, SendSeal))
    assert ballot > BallotNumber(1, 0)
    state, _ = machine.step(state, SealReplyArrived(decision(proposal, helper, ballot)), 22.1)
    assert state.accepted == proposal


def test_an_older_vote_of_somebody_dead_is_not_waited_on() -> None:
    """A vote at a lower ballot says nothing about the one that stands: its author is probed, and its loss is noticed."""
    peers = names(3)
    me, voter = leader(3, 1), leader(3, 2)
    state, proposal, ballot = adopting(peers, me, voter)
    assert state.standing == ballot
    state, _ = machine.step(state, ReadyArrived(voter, BallotNumber(), proposal.proposal_hash), 2.2)
    assert not state.complete
    state, actions = machine.step(state, Tick(), 3.0)
    assert Probe(voter) in actions
    state, actions = machine.step(state, PeerLost(voter), 3.1)
    assert RequestGrant((me,)) in actions


# --- helpers --------------------------------------------------------------------------------------------------------------


def with_commits(setup: RoundSetup) -> RoundState:
    """The state of a peer that holds everybody's commit, just before the leader's proposal comes."""
    state = machine.begin(setup, 0.0)
    for peer in setup.peers:
        state, _ = machine.step(state, CommitArrived(commit_of(peer)), 1.0)
    return state


def planned(
    peers: tuple[str, ...], ballot: BallotNumber, changed: dict[str, Any] | None = None, quota: int = 10
) -> ProposalFacts:
    """What an honest leader proposes when all have committed."""
    table = spans_of(7, dict.fromkeys(peers, 0))
    facts = {peer: (changed or {}).get(peer, commit_of(peer)) for peer in peers}
    included = tuple(IncludedCommit(peer, facts[peer].commit_hash, facts[peer].weight, *table[peer]) for peer in peers)
    name = leader(len(peers), ballot.term)
    return proposal_of(ballot, name, included, tuple(RosterMember(peer, quota) for peer in peers))


def gathered(peers: tuple[str, ...]) -> ProposalFacts:
    """The all-gather proposal of everybody's commit."""
    included = tuple(IncludedCommit(peer, commit_of(peer).commit_hash, 10) for peer in peers)
    return proposal_of(BallotNumber(), leader(len(peers)), included, tuple(RosterMember(peer, 10) for peer in peers))


def decision(proposal: ProposalFacts, peer: str, ballot: BallotNumber) -> SealReplyFacts:
    """A peer's proof that it completed a proposal."""
    facts = tuple(commit_of(item.peer) for item in proposal.commits)
    return SealReplyFacts(peer, ballot, proposal, True, facts, tuple(span_of(proposal, item.peer) for item in proposal.reducers))


def adopting(peers: tuple[str, ...], me: str, other: str) -> tuple[RoundState, ProposalFacts, BallotNumber]:
    """The second leader, which held everything when the first was lost, asked `other`, and proposed the same again."""
    state, proposal = holding_everything(peers, me)
    state, actions = machine.step(state, PeerLost(leader(len(peers))), 2.0)
    ballot = next(action.ballot for action in actions if isinstance(action, SendSeal))
    state, actions = machine.step(state, SealReplyArrived(SealReplyFacts(other, ballot, None, False)), 2.1)
    assert Adopt(ballot, None) in actions
    return state, proposal, ballot


def waiting_in_vain(peers: tuple[str, ...], me: str, commits: tuple[str, ...], *first: Event) -> RoundState:
    """A peer that lacks a quorum of commits and has begun to ask its leader, which is alive, for help."""
    state = machine.begin(setup_of(me, peers), 0.0)
    for event in (*(CommitArrived(commit_of(peer)) for peer in commits), *first):
        state, _ = machine.step(state, event, 1.0)
    asked: list[Action] = []
    for tick in range(80):
        now_s = 1.0 + tick / 4
        state, actions = machine.step(state, PeerAlive(state.leader), now_s)
        asked += [action for action in actions if isinstance(action, Complain)]
    assert asked == [Complain(state.leader, state.leader, "left_behind")] * len(asked)
    assert asked
    return state


def exchanging(peers: tuple[str, ...], me: str = "") -> tuple[RoundState, ProposalFacts]:
    """A peer (by default the next leader) that has accepted the first proposal."""
    state = with_commits(setup_of(me or leader(len(peers), 1), peers))
    proposal = planned(peers, BallotNumber())
    state, _ = machine.step(state, ProposalArrived(proposal), 1.0)
    assert state.accepted == proposal
    return state, proposal
