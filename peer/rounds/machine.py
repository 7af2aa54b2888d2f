"""The round as a pure state machine: `step(state, event, now_s) -> (state, actions)`.

It knows no clock, no socket and no tensor, so that every interleaving of messages, losses and crashes can be explored.

What is promised: all peers that complete the round complete the same proposal. It is Paxos (Lamport 1998) with "ready" for
"accepted": a peer that holds every merged part of a proposal says so to all, and completes once a quorum has said so at one
ballot. To replace a proposal, a leader has a quorum promise never to be ready at a lower ballot; if any of them was ready, what
was ready at the highest ballot is proposed again, and since it is held in full there, it costs no work. The exception is a
minority that goes on by the coordinator's grant: what the absent completed, unheard, is theirs to repair.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import replace
from typing import Any

from peer.rounds.checks import TERMS_AHEAD, fits, misquotes, problem_of, unknown_commits
from peer.rounds.planning import held_back, quotas_of, spans_of
from peer.rounds.state import EMPTY, NEVER_S, SILENCE_FLOOR_S, RoundSetup, RoundState
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

PROBE_EVERY_S = 0.5
LOST_PROBE_EVERY_S = 2.0
LEADER_PROBES, OTHER_PROBES = 12, 4  # at a time: all of a large roster asking all would take longer than the round
GRANT_EVERY_S = 1.0
HELP_EVERY_S = 1.0
EXTENSIONS = 4
DOUBLINGS = 6
EARLY_SPANS = 4
ABOUT_LEADERS = ("leader_silent", "left_behind")
BAD_PART = "bad_part"

Outcome = tuple[RoundState, list[Action]]


def begin(setup: RoundSetup, now_s: float) -> RoundState:
    """The state at the start of a round."""
    return RoundState(setup=setup, started_s=now_s)


def step(state: RoundState, event: Event, now_s: float) -> Outcome:
    """Take one event into account; the new state and what to do."""
    state, actions = _handle(state, event, now_s)
    state, more = _advance(state, now_s)
    return state, actions + more


def _handle(state: RoundState, event: Event, now_s: float) -> Outcome:
    match event:
        case Trained(commit):
            return _on_trained(state, commit, now_s)
        case CommitArrived(commit, forwarded):
            return _on_commit(state, commit, now_s, forwarded)
        case JoinArrived(peer, admission, newcomer):
            newcomers = state.newcomers | {peer} if newcomer else state.newcomers - {peer}
            return replace(state, joiners=_with(state.joiners, peer, admission), newcomers=newcomers), []
        case ProposalArrived(proposal):
            return _on_proposal(state, proposal, now_s)
        case SealArrived(sender, ballot):
            return _on_seal(state, sender, ballot, now_s)
        case SealReplyArrived(reply):
            return _on_seal_reply(state, reply, now_s)
        case ComplaintArrived(sender, about, reason):
            return _on_complaint(state, sender, about, reason, now_s)
        case Reduced(span):
            return _on_reduced(state, span)
        case SpanArrived(span):
            return _on_span(state, span, now_s)
        case SpanFetched(proposal_hash, reducer):
            return _on_span_fetched(state, proposal_hash, reducer)
        case FetchFailed():
            return _on_fetch_failed(state, event, now_s)
        case ReadyArrived():
            return _on_ready(state, event, now_s)
        case AdoptionArrived(leader, ballot, reply):
            return _on_adoption(state, leader, ballot, reply, now_s)
        case Completed(peer, proposal_hash):
            return _on_completed(state, peer, proposal_hash, now_s)
        case PeerLost(peer):
            return _on_lost(state, peer)
        case PeerAlive(peer):
            return _saw(state, peer, now_s), []
        case GrantArrived(grant, present):
            return replace(state, grant=grant, granted_to=frozenset(present) or state.grant_asked_for), []
        case Tick():
            return state, []


# --- commits --------------------------------------------------------------------------------------------------------------


def _on_trained(state: RoundState, commit: CommitFacts, now_s: float) -> Outcome:
    if state.setup.me in state.commits:
        return state, []
    state, actions = _on_commit(state, commit, now_s)
    return state, [SendCommit(commit), *actions]


def _on_commit(state: RoundState, commit: CommitFacts, now_s: float, forwarded: bool = False) -> Outcome:
    if commit.peer not in state.setup.peers:
        return state, [Refuse(commit.peer, "not_in_roster")]
    if not forwarded:
        state = _saw(state, commit.peer, now_s)
    known = state.commits.get(commit.peer)
    if known is not None and known.commit_hash == commit.commit_hash:
        return state, []
    place = state.accepted.included(commit.peer) if state.accepted is not None else None
    wanted = place is not None and place.commit_hash == commit.commit_hash
    if known is not None and not wanted:
        return state, [Refuse(commit.peer, "two_commits")]
    if commit.weight and len(commit.part_hashes) != state.setup.part_count:
        return state, [Refuse(commit.peer, "wrong_part_count")]
    if state.setup.is_too_heavy(commit.peer, commit.weight):
        return state, [Refuse(commit.peer, "over_quota")]
    arrived_s = _with(state.arrived_s, commit.peer, state.arrived_s.get(commit.peer, now_s))
    state = replace(state, commits=_with(state.commits, commit.peer, commit), arrived_s=arrived_s)
    return _reduce_if_possible(state) if wanted else (state, [])


# --- proposals ------------------------------------------------------------------------------------------------------------


def _on_proposal(state: RoundState, proposal: ProposalFacts, now_s: float) -> Outcome:
    problem = problem_of(state, proposal)
    if problem:
        return state, [Refuse(proposal.leader, problem)]
    if proposal.leader != state.setup.me:
        state = _saw(state, proposal.leader, now_s)
    if state.complete or proposal.ballot < state.promised:
        return state, []
    if state.accepted is not None and state.standing == proposal.ballot:
        if state.accepted.proposal_hash != proposal.proposal_hash:
            state, actions = _leave_two_faced(state, proposal.leader, now_s)
            return state, [*actions, *_contradiction(state.accepted, proposal)]
        return _reduce_if_possible(state)
    return _accept(state, proposal, proposal.ballot, now_s)


def _accept(state: RoundState, proposal: ProposalFacts, ballot: BallotNumber, now_s: float) -> Outcome:
    """Work on `proposal`, which stands at `ballot`; what has been fetched of the same proposal is kept."""
    leads = state.setup.leader(ballot.term) == state.setup.me
    same = state.accepted is not None and state.accepted.proposal_hash == proposal.proposal_hash
    state = replace(
        state,
        accepted_s=now_s,
        promised=max(state.promised, ballot),
        standing=ballot,
        term=ballot.term,
        stage="proposed" if leads else "idle",
        ballot=ballot if leads else state.ballot,
        overdue_s=now_s + _doubled(state, state.setup.exchange_s + state.setup.patience_s),
        complaints=EMPTY,
        extensions=0,
        waiting_for="",
    )
    if same:
        return _reduce_if_possible(state)
    early = (span for span in state.early if fits(proposal, span))
    spans = {span.reducer: span for span in early}
    state = replace(state, accepted=proposal, reducing=False, reduced=False, spans=spans, fetched=frozenset(), failed=frozenset())
    state = replace(state, shown=frozenset())
    state, actions = _reduce_if_possible(state)
    return state, actions + _fetches(state, spans)


# --- sealing --------------------------------------------------------------------------------------------------------------


def _on_seal(state: RoundState, sender: str, ballot: BallotNumber, now_s: float) -> Outcome:
    if sender == state.setup.me or sender != state.setup.leader(ballot.term) or ballot.term > state.term + TERMS_AHEAD:
        return state, [Refuse(sender, "wrong_leader")]
    state = _saw(state, sender, now_s)
    if state.complete:
        return state, [SendSealReply(sender, ballot)]
    if ballot < state.promised:
        return state, [SendSealReply(sender, state.promised)]
    overdue_s = None if state.accepted is None else now_s + _doubled(state, (EXTENSIONS + 1) * state.setup.seal_s)
    state = replace(state, promised=ballot, term=ballot.term, stage="idle", overdue_s=overdue_s)
    return state, [SendSealReply(sender, ballot)]


def _on_seal_reply(state: RoundState, reply: SealReplyFacts, now_s: float) -> Outcome:
    if reply.peer not in state.setup.peers:
        return state, [Refuse(reply.peer, "not_in_roster")]
    if state.complete or reply.peer == state.setup.me:
        return state, []
    if reply.complete and reply.accepted is not None:
        return _on_decision(state, reply, reply.accepted, now_s)
    if _asks(state) and reply.ballot == state.ballot:
        state = replace(_saw(state, reply.peer, now_s), replies=_with(state.replies, reply.peer, reply))
        return _take_commits(state, reply, now_s)
    if state.promised < reply.ballot and state.term < reply.ballot.term <= state.term + TERMS_AHEAD:
        return replace(state, term=reply.ballot.term, stage="idle", overdue_s=None), []
    return state, []


def _asks(state: RoundState) -> bool:
    """Whether we lead and have not proposed yet, so that a completed proposal can still take the place of ours."""
    return state.leads and state.stage in ("sealing", "collecting") and state.promised == state.ballot


def _take_commits(state: RoundState, reply: SealReplyFacts, now_s: float) -> Outcome:
    """Learn commits that we lack; those that differ from ours, or are of another state, are no concern of a reply."""
    actions: list[Action] = []
    for commit in reply.commits:
        if commit.peer in state.setup.peers and commit.peer not in state.commits and _is_of_our_state(state, commit):
            state, more = _on_commit(state, commit, now_s, forwarded=True)
            actions += more
    return state, actions


def _is_of_our_state(state: RoundState, commit: CommitFacts) -> bool:
    """Nobody else would take a commit of another state, nor a proposal that comes with it."""
    return commit.base_root == state.setup.base_root


def _on_decision(state: RoundState, reply: SealReplyFacts, proposal: ProposalFacts, now_s: float) -> Outcome:
    """Somebody completed a proposal before it could be replaced: it stands, and its parts can be had there."""
    ballot = max(reply.ballot, proposal.ballot)
    asked = _asks(state) and reply.ballot == state.ballot
    state = _saw(state, reply.peer, now_s) if asked else state
    if ballot < state.promised:
        return _lead_if_stuck(state, now_s)
    if not _may_stand(state, proposal, ballot) and len(state.votes_for(proposal.proposal_hash)) < state.setup.quorum:
        return state, []
    done = replace(state, completers=_with(state.completers, reply.peer, proposal.proposal_hash))
    taken = _take_over(done, reply, proposal, ballot, now_s)
    if isinstance(taken, str):
        return state, [Refuse(reply.peer, taken)]
    return taken[0], [*([ForwardDecision(reply)] if asked else []), *taken[1]]


def _on_adoption(state: RoundState, leader: str, ballot: BallotNumber, reply: SealReplyFacts, now_s: float) -> Outcome:
    """A leader found somebody ready for a proposal: it's proposed again, and can be had there."""
    proposal = reply.accepted
    if leader != state.setup.leader(ballot.term) or ballot.term > state.term + TERMS_AHEAD:
        return state, [Refuse(leader, "wrong_leader")]
    if leader != state.setup.me:
        state = _saw(state, leader, now_s)
    if state.complete or ballot < state.promised or proposal is None or not (reply.ready or reply.complete):
        return state, []
    other = state.accepted is not None and state.accepted.proposal_hash != proposal.proposal_hash
    if other and state.standing == ballot:
        return _leave_two_faced(state, leader, now_s)
    ready = {} if reply.peer == state.setup.me else {reply.peer: (reply.standing, proposal.proposal_hash)}
    taken = _take_over(replace(state, readies={**state.readies, **ready}), reply, proposal, ballot, now_s)
    return (state, [Refuse(leader, taken)]) if isinstance(taken, str) else taken


def _take_over(
    state: RoundState, reply: SealReplyFacts, proposal: ProposalFacts, ballot: BallotNumber, now_s: float
) -> Outcome | str:
    """Work on what the author of `reply` holds in full, and fetch it there; why not, if that breaks a rule."""
    known, actions = _take_commits(state, reply, now_s)
    problem = problem_of(known, proposal)
    spans = {span.reducer: span for span in reply.spans if fits(proposal, span)}
    if problem or set(spans) != {commit.peer for commit in proposal.reducers}:
        return problem or "incomplete_decision"
    wanted = {item.peer: item.commit_hash for item in proposal.commits}
    named = (commit for commit in reply.commits if wanted.get(commit.peer) == commit.commit_hash)
    commits = {commit.peer: commit for commit in named if _is_of_our_state(known, commit)}
    state = replace(known, commits={**known.commits, **commits})
    if state.accepted is None or state.accepted.proposal_hash != proposal.proposal_hash or state.standing < ballot:
        state, more = _accept(state, proposal, ballot, now_s)
        actions += more
    held = {peer: span for peer, span in state.spans.items() if peer in state.fetched}
    others = [
        (known, spans[peer]) for peer, known in state.spans.items() if peer in spans and known.signed and known != spans[peer]
    ]
    state = replace(state, spans={**state.spans, **spans, **held})
    return state, [*actions, *(Expose(known.signed, span.signed) for known, span in others), *_fetches(state, spans)]


def _may_stand(state: RoundState, proposal: ProposalFacts, ballot: BallotNumber) -> bool:
    """Whether no other proposal has been made at this ballot, as far as we know."""
    if state.leads and state.stage == "proposed" and ballot == state.ballot and state.sealed:
        return proposal.ballot == ballot
    other = state.accepted is not None and state.accepted.proposal_hash != proposal.proposal_hash
    return not (other and ballot == state.standing)


def _on_complaint(state: RoundState, sender: str, about: str, reason: str, now_s: float) -> Outcome:
    if sender not in state.setup.peers or about not in state.setup.peers:
        return state, [Refuse(sender, "not_in_roster")]
    if sender == state.setup.me:
        return state, []
    state = _saw(state, sender, now_s)
    if state.complete:
        return state, [SendSealReply(sender, state.promised)]
    if reason == "missing_commit":
        return state, _say_again(state, sender)
    if about == state.setup.me:
        if reason != "left_behind":
            return state, []
        return (state, _say_again(state, sender)) if state.leads else _lead_if_stuck(state, now_s)
    if state.leads and reason not in ABOUT_LEADERS:
        return _judge(state, sender, about, now_s)
    return _ask_for_life(state, {about} & {state.leader, *(_needed(state) if state.leads else ())}, now_s)


def _lead_if_stuck(state: RoundState, now_s: float) -> Outcome:
    """Where we are stuck in waiting for a leader, and it shows that none will come, lead ourselves.

    It shows when somebody waits for us to lead, or when the decision is below our promise: our own ballot brings it out.
    """
    if state.leads or state.help_asked_s == NEVER_S or not _is_stuck(state, now_s):
        return state, []
    following = range(state.term + 1, state.term + 1 + len(state.setup.peers))
    term = next(term for term in following if state.setup.leader(term) == state.setup.me)
    return replace(state, term=term, stage="idle", overdue_s=None), []


def _say_again(state: RoundState, peer: str) -> list[Action]:
    """Send what stands to somebody whom it hasn't reached; an adopted proposal once we can serve it."""
    if state.accepted is None:
        return []
    if state.leads and state.standing == state.ballot != state.accepted.ballot and state.gathered:
        return [Adopt(state.ballot, None, peer)]
    return [ResendProposal(peer)]


def _judge(state: RoundState, sender: str, about: str, now_s: float) -> Outcome:
    """Drop a peer that most of the others can't use; look for ourselves before that."""
    if state.accepted is not None and about in state.held & state.lost and state.accepted.included(about):
        state = replace(state, unobtainable=state.unobtainable | {about})
    complaints = _with(state.complaints, about, state.complaints.get(about, frozenset()) | {sender})
    state = replace(state, complaints=complaints)
    judges = state.reachable - {about}
    if 2 * len(complaints[about] & judges) > max(2, len(judges)):
        return replace(state, dropped=state.dropped | {about}), []
    return _ask_for_life(state, {about}, now_s)


# --- the exchange ---------------------------------------------------------------------------------------------------------


def _on_reduced(state: RoundState, span: SpanFacts) -> Outcome:
    if state.accepted is None or state.accepted.proposal_hash != span.proposal_hash:
        return state, []
    me = state.setup.me
    state = replace(state, reduced=True, reducing=False, fetched=state.fetched | {me}, failed=state.failed - {me})
    return replace(state, spans={me: span, **state.spans}), []


def _on_span(state: RoundState, span: SpanFacts, now_s: float) -> Outcome:
    if span.reducer not in state.setup.peers:
        return state, [Refuse(span.reducer, "not_in_roster")]
    if span.reducer == state.setup.me:
        return state, []
    state = _saw(state, span.reducer, now_s)
    if state.accepted is None or state.accepted.proposal_hash != span.proposal_hash:
        return replace(state, early=_kept_early(state.early, span)), []
    if not fits(state.accepted, span):
        return state, [Refuse(span.reducer, "wrong_span")]
    known = state.spans.get(span.reducer)
    if known is not None:
        same = known.part_hashes == span.part_hashes
        return state, [] if same else [Refuse(span.reducer, "two_merges"), Expose(known.signed, span.signed)]
    state = replace(state, spans=_with(state.spans, span.reducer, span))
    return state, [] if state.complete else _fetches(state, [span.reducer])


def _kept_early(early: tuple[SpanFacts, ...], span: SpanFacts) -> tuple[SpanFacts, ...]:
    """Spans of proposals that we haven't accepted: the last few of each reducer."""
    others = [item for item in early if item.reducer != span.reducer]
    same = [item for item in early if item.reducer == span.reducer and item.proposal_hash != span.proposal_hash]
    return (*others, *same[-EARLY_SPANS + 1 :], span)


def _on_span_fetched(state: RoundState, proposal_hash: bytes, reducer: str) -> Outcome:
    if state.accepted is None or state.accepted.proposal_hash != proposal_hash:
        return state, []
    return replace(state, fetched=state.fetched | {reducer}, failed=state.failed - {reducer}), []


def _on_fetch_failed(state: RoundState, event: FetchFailed, now_s: float) -> Outcome:
    proposal = state.accepted
    if state.complete or proposal is None or proposal.proposal_hash != event.proposal_hash:
        return state, []
    again = event.peer in state.failed
    failed = state.failed | ({event.peer} if event.merged else set())
    state = replace(state, failed=failed, reducing=state.reducing and event.merged)
    if event.reason == BAD_PART and event.peer in state.setup.others:
        rotten = {state.spans[event.peer]} if event.merged and event.peer in state.spans else set[SpanFacts]()
        state = replace(state, bad=state.bad | {event.peer}, rotten=state.rotten | rotten)
    if event.reason == "unreachable":
        state, _ = _on_lost(state, event.peer)
    if event.merged and _helpers(state) and not again:
        return state, _fetches(state, [event.peer])
    if event.peer not in state.setup.others:
        return state, []
    if state.leads:
        return _judge(state, state.setup.me, event.peer, now_s)
    return state, [Complain(state.leader, event.peer, event.reason)]


def _on_ready(state: RoundState, event: ReadyArrived, now_s: float) -> Outcome:
    if event.peer not in state.setup.others:
        return state, [Refuse(event.peer, "not_in_roster")]
    state = _saw(state, event.peer, now_s)
    if state.complete:
        return state, [SendSealReply(event.peer, state.promised)] if event.again else []
    known = state.readies.get(event.peer)
    if known is not None and known[0] == event.ballot and known[1] != event.proposal_hash:
        return state, [Refuse(event.peer, "two_votes")]
    if known is None or known[0] < event.ballot:
        state = replace(state, readies=_with(state.readies, event.peer, (event.ballot, event.proposal_hash)))
    stuck = state.failed | (state.lost & set(state.spans) - state.fetched)
    return state, _fetches(state, sorted(stuck))


def _on_completed(state: RoundState, peer: str, proposal_hash: bytes, now_s: float) -> Outcome:
    if peer not in state.setup.others:
        return state, []
    state = replace(_saw(state, peer, now_s), completers=_with(state.completers, peer, proposal_hash))
    stuck = state.failed | (state.lost & set(state.spans) - state.fetched)
    return state, [] if state.complete else _fetches(state, sorted(stuck))


def _fetches(state: RoundState, reducers: Mapping[str, SpanFacts] | list[str]) -> list[Action]:
    """Pull these reducers' merged parts, unless they are here, or were and can't be decoded."""
    spans = [state.spans[peer] for peer in reducers if peer in state.spans and peer not in state.fetched]
    return [FetchSpan(span, sources) for span in spans if span not in state.rotten and (sources := _sources(state, span))]


def _sources(state: RoundState, span: SpanFacts) -> tuple[str, ...]:
    """Where merged parts can be had: at the reducer, and at everybody who has completed."""
    first = () if span.reducer in state.lost else (span.reducer,)
    helpers = tuple(peer for peer in _helpers(state) if peer != span.reducer)
    return tuple(peer for peer in (*first, *helpers) if peer != state.setup.me)


def _helpers(state: RoundState) -> tuple[str, ...]:
    """Who holds all of the accepted proposal and can still be reached."""
    name = state.accepted.proposal_hash if state.accepted is not None else None
    ready = {peer for peer, (_, held) in state.readies.items() if held == name}
    done = {peer for peer, held in state.completers.items() if held == name}
    return tuple(sorted((ready | done) - state.lost - {state.setup.me}))


def _reduce_if_possible(state: RoundState) -> Outcome:
    """Start merging once every included commit is known; never for a leader that names losses which they don't have."""
    proposal = state.accepted
    if proposal is None or not proposal.contributors or state.complete or state.reduced or state.reducing:
        return state, []
    mine = proposal.included(state.setup.me)
    if not state.setup.all_gather and (mine is None or not mine.part_span):
        return state, []
    if unknown_commits(state, proposal) or misquotes(state, proposal):
        return state, []
    holders: tuple[str, ...] = ()
    if state.setup.all_gather:
        helpers = _helpers(state)
        holders = (*helpers, *sorted(state.reachable - set(helpers) - {state.setup.me}))
    return replace(state, reducing=True), [Reduce(proposal, holders)]


# --- signs of life --------------------------------------------------------------------------------------------------------


def _saw(state: RoundState, peer: str, now_s: float) -> RoundState:
    """Take any direct message for a sign of life."""
    if peer not in state.setup.peers:
        return state
    asked_s = {name: since for name, since in state.asked_s.items() if name != peer}
    return replace(state, seen_s=_with(state.seen_s, peer, now_s), asked_s=asked_s, lost=state.lost - {peer})


def _on_lost(state: RoundState, peer: str) -> Outcome:
    joiners = {name: admission for name, admission in state.joiners.items() if name != peer}
    state = replace(state, joiners=joiners)
    if peer not in state.setup.others or peer in state.lost:
        return state, []
    state = replace(state, lost=state.lost | {peer})
    tell = not state.leads and not state.sealed and peer in _needed(state) and state.leader not in state.lost
    return state, [Complain(state.leader, peer, "unreachable")] if tell else []


def _lose_the_silent(state: RoundState, now_s: float) -> RoundState:
    """Before the exchange and after it, whoever has left probes unanswered for long enough is taken for lost."""
    if not state.sealed and not state.gathered:
        return state
    silent = {peer for peer, since in state.asked_s.items() if now_s >= since + state.setup.silence_s}
    return replace(state, lost=state.lost | silent) if silent - state.lost else state


def _look_around(state: RoundState, now_s: float) -> Outcome:
    """Ask for signs of life from those whose silence holds the round up, and try again what failed."""
    if now_s < state.probed_s + PROBE_EVERY_S or not _is_waiting(state):
        return state, []
    awaited = _awaited(state) - state.lost
    asked_s = {peer: since for peer, since in state.asked_s.items() if peer in awaited | state.lost}
    chosen = _least_heard(state, awaited)
    if now_s >= state.lost_probed_s + LOST_PROBE_EVERY_S:
        chosen |= _least_heard(state, state.lost)
        state = replace(state, lost_probed_s=now_s)
    state, probes = _ask_for_life(replace(state, probed_s=now_s, asked_s=asked_s), chosen, now_s, again=True)
    state, retries = _try_again(state)
    state, shown = _show_proposal(state)
    state, help_wanted = _ask_for_help(state, now_s)
    return state, probes + retries + shown + help_wanted


def _least_heard(state: RoundState, peers: Set[str]) -> set[str]:
    """Of these, the leader and the few that we have neither heard nor asked for longest; whoever leads asks more at a time."""

    def heard_s(peer: str) -> float:
        return max(state.seen_s.get(peer, NEVER_S), state.tried_s.get(peer, NEVER_S))

    first = peers & {state.leader}
    others = sorted(peers - first - {state.setup.me}, key=lambda peer: (heard_s(peer), peer))
    return {*first - {state.setup.me}, *others[: LEADER_PROBES if state.leads else OTHER_PROBES]}


def _ask_for_life(state: RoundState, peers: Set[str], now_s: float, again: bool = False) -> Outcome:
    asked = sorted(peer for peer in peers if again or peer not in state.asked_s)
    since = dict.fromkeys(asked, now_s)
    state = replace(state, asked_s={**since, **state.asked_s}, tried_s={**state.tried_s, **since})
    return state, [Probe(peer) for peer in asked]


def _is_waiting(state: RoundState) -> bool:
    """Whether we have done our own part and wait for others."""
    return state.setup.me in state.commits or state.accepted is not None or state.quorum_s is not None or state.stage != "idle"


def _awaited(state: RoundState) -> set[str]:
    """Whose signs of life matter now."""
    helpers = set(_helpers(state)) if state.failed else set()
    if not state.leads:
        return {state.leader} | (set() if state.sealed else _needed(state)) | helpers
    if state.stage == "sealing":
        return set(state.reachable - set(state.replies))
    if state.stage == "proposed" and not state.sealed:
        return _needed(state) | helpers | (set(state.setup.others) - state.votes_now if state.gathered else set())
    return set(state.setup.others)


def _needed(state: RoundState) -> set[str]:
    """Who still has to do something for the accepted proposal to be completed, as far as we can tell."""
    proposal = state.accepted
    if proposal is None:
        return set()
    needed = {item.peer for item in proposal.reducers if item.peer not in state.fetched}
    if state.reducing or (state.setup.all_gather and not state.reduced):
        needed |= {item.peer for item in proposal.contributors} - state.held
    needed |= {peer for peer in state.complaints if proposal.included(peer)} - state.held
    return needed - {state.setup.me}


def _try_again(state: RoundState) -> Outcome:
    """Repeat what failed for want of a peer that may be back, and ask for commits that didn't come."""
    if state.accepted is None:
        return state, []
    missing = unknown_commits(state, state.accepted)
    mine = state.accepted.included(state.setup.me)
    merges = state.setup.all_gather or (mine is not None and mine.part_span > 0)
    asks: list[Action] = []
    if missing and merges and not state.reduced and not state.leads:
        asks = [Complain(state.leader, missing[0], "missing_commit")]
    state, reduces = _reduce_if_possible(state)
    fetches = _fetches(state, sorted(state.failed))
    return replace(state, failed=state.failed - {item.span.reducer for item in fetches if isinstance(item, FetchSpan)}), [
        *asks,
        *reduces,
        *fetches,
    ]


def _ask_for_help(state: RoundState, now_s: float) -> Outcome:
    """We can't go on: whoever has completed can prove it and serve us. If we know of nobody, the leader may have."""
    completers = sorted(peer for peer in state.completers if peer not in state.lost)
    wait_s = HELP_EVERY_S if completers else state.setup.silence_s
    asked = completers or ([] if state.leads else [state.leader])
    since_s = max(state.help_asked_s, state.arrived_s.get(state.setup.me, state.started_s))
    if not asked or now_s < since_s + wait_s or not _is_stuck(state, now_s):
        return state, []
    chosen = asked[state.helps % len(asked)]
    return replace(state, help_asked_s=now_s, helps=state.helps + 1), [Complain(chosen, state.leader, "left_behind")]


def _is_stuck(state: RoundState, now_s: float) -> bool:
    """Whether something that we need isn't on its way: the proposal, a span that never came, or one that can't be had."""
    if state.sealed or state.accepted is None:
        return True
    if state.gathered:
        return False
    unknown = {item.peer for item in state.accepted.reducers if item.peer not in state.spans}
    if unknown & state.lost or state.failed:
        return True
    idle = state.setup.all_gather and not state.reducing
    return (bool(unknown) or idle) and now_s >= state.accepted_s + HELP_EVERY_S


# --- what follows from the state ------------------------------------------------------------------------------------------


def _advance(state: RoundState, now_s: float) -> Outcome:
    actions: list[Action] = []
    state = _lose_the_silent(state, now_s)
    if state.quorum_s is None and state.has_quorum:
        state = replace(state, quorum_s=now_s)
    for rule in (_become_ready, _complete_if_chosen, _follow_leader, _lead, _look_around):
        if state.complete:
            break
        state, more = rule(state, now_s)
        actions += more
    return state, actions


def _become_ready(state: RoundState, now_s: float) -> Outcome:
    """Say once that everything is here, and again while a quorum that is ready is waited for; never for two at one ballot."""
    proposal = state.accepted
    if proposal is None or state.sealed or not state.gathered:
        return state, []
    mine, voted = (state.standing, proposal.proposal_hash), state.readies.get(state.setup.me)
    again = voted == mine
    if voted is not None and not again and voted[0] == state.standing:
        return state, []
    if again and now_s < state.ready_sent_s + HELP_EVERY_S:
        return state, []
    state = replace(state, readies=_with(state.readies, state.setup.me, mine), ready_sent_s=now_s)
    return state, [SendReady(*mine, again)]


def _complete_if_chosen(state: RoundState, now_s: float) -> Outcome:
    """A proposal for which a quorum is ready, or that somebody completed, is the round's; our promises don't change that."""
    proposal = state.accepted
    if proposal is None or not state.gathered:
        return state, []
    if len(state.votes) < state.votes_needed and proposal.proposal_hash not in state.completers.values():
        return state, []
    return replace(state, complete=True, waiting_for=""), [Complete(proposal)]


def _follow_leader(state: RoundState, now_s: float) -> Outcome:
    """Move to the next term when the leader is gone or long overdue, or its own commit can't be used: it might insist on it."""
    if state.leads:
        return state, []
    state = _with_deadline(state, now_s)
    overdue = state.overdue_s is not None and now_s >= state.overdue_s
    if not overdue and state.leader not in state.lost | state.bad:
        return state, []
    return _next_term(replace(state, suspicions=state.suspicions + int(overdue)), now_s)


def _next_term(state: RoundState, now_s: float) -> Outcome:
    """Leave the leader for the next one who could lead."""
    unfit, left, last = state.lost | state.bad, state.leader, state.term + len(state.setup.peers)
    term = next(term for term in range(state.term + 1, last + 1) if state.setup.leader(term) not in unfit or term == last)
    state = _with_deadline(replace(state, term=term, stage="idle", overdue_s=None), now_s)
    return state, [] if state.leads else [Complain(state.leader, left, "leader_silent")]


def _contradiction(accepted: ProposalFacts | None, proposal: ProposalFacts) -> list[Action]:
    """What a leader has signed twice, if it has: what stands at a ballot may also be an older proposal, made again."""
    if accepted is None or (accepted.leader, accepted.ballot) != (proposal.leader, proposal.ballot):
        return []
    return [Expose(accepted.signed, proposal.signed)]


def _leave_two_faced(state: RoundState, leader: str, now_s: float) -> Outcome:
    """A leader has proposed two things at one ballot: neither may ever get a quorum, so the next one has to ask what stands.

    It's a lie, or a leader that was restarted; its place in the next roster is what it costs in either case.
    """
    told: list[Action] = [Refuse(leader, "two_proposals")]
    state = replace(state, two_faced=state.two_faced | {leader})
    if state.leader != leader:
        return state, told
    state, actions = _next_term(state, now_s)
    return state, [*told, *actions]


def _show_proposal(state: RoundState) -> Outcome:
    """Show our proposal to those who work on another one, once: if its leader made both, it's to be left."""
    proposal = state.accepted
    if proposal is None or state.sealed or proposal.ballot != state.standing:
        return state, []
    elsewhere = {span.reducer for span in state.early if span.proposal_hash != proposal.proposal_hash}
    votes = state.readies.items()
    elsewhere |= {peer for peer, (ballot, name) in votes if ballot == state.standing and name != proposal.proposal_hash}
    unaware = sorted(elsewhere - state.shown)
    return replace(state, shown=state.shown | elsewhere), [ResendProposal(peer) for peer in unaware]


def _with_deadline(state: RoundState, now_s: float) -> RoundState:
    """Set when the leader is overdue: once it could act, and later while it answers and the exchange goes on."""
    setup = state.setup
    if state.overdue_s is None:
        due = not state.sealed or _proposal_is_due(state, now_s)
        return replace(state, overdue_s=now_s + _doubled(state, setup.patience_s)) if due else state
    exchanges = not state.sealed and now_s < state.accepted_s + (EXTENSIONS + 1) * setup.exchange_s
    if now_s >= state.overdue_s and exchanges and _was_seen(state, state.leader, now_s):
        return replace(state, overdue_s=now_s + setup.exchange_s)
    return state


def _doubled(state: RoundState, duration_s: float) -> float:
    """A deadline, doubled with every suspicion, so that views converge."""
    return duration_s * float(2 ** min(state.suspicions, DOUBLINGS))


def _was_seen(state: RoundState, peer: str, now_s: float) -> bool:
    """Whether there was a sign of life lately."""
    return now_s < state.seen_s.get(peer, NEVER_S) + state.setup.silence_s


def _answers(state: RoundState, peer: str, now_s: float) -> bool:
    """Whether the peer answered the last probes, or may well be about to."""
    return peer in state.seen_s and now_s < state.asked_s.get(peer, now_s) + 2 * PROBE_EVERY_S


def _proposal_is_due(state: RoundState, now_s: float) -> bool:
    """All that are alive have committed; or a quorum has, the grace is over, and we know which of the others are alive."""
    setup = state.setup
    if not state.has_quorum or len(state.joiners) + len(setup.peers) < setup.min_peers:
        return False
    missing = [peer for peer in state.alive if peer not in state.commits]
    if not missing or state.quorum_s is None:
        return not missing
    over_s = state.quorum_s + setup.grace_s
    return now_s >= over_s and (now_s >= over_s + setup.silence_s or all(_answers(state, peer, now_s) for peer in missing))


def _lead(state: RoundState, now_s: float) -> Outcome:
    if not state.leads:
        return replace(state, stage="idle"), []
    match state.stage:
        case "idle":
            return _start_leading(state, now_s)
        case "sealing":
            return _finish_sealing(state, now_s)
        case "collecting":
            return _propose_if_due(state, now_s)
        case "proposed":
            return _amend_if_needed(state, now_s)


def _start_leading(state: RoundState, now_s: float) -> Outcome:
    fresh = state.term == 0 and state.promised == BallotNumber() and state.accepted is None and not state.completers
    if fresh:
        return _propose_if_due(replace(state, stage="collecting", ballot=BallotNumber(), sealed_s=now_s), now_s)
    return _seal(state, now_s, "leader_silent")


def _seal(state: RoundState, now_s: float, reason: str) -> Outcome:
    ballot = BallotNumber(state.term, state.promised.amendment + 1 if state.promised.term == state.term else 0)
    state = replace(state, stage="sealing", ballot=ballot, promised=ballot, replies=EMPTY, seals=0, probed_s=NEVER_S)
    if len(state.alive) < state.setup.quorum:
        state = replace(state, dropped=frozenset())
    state, first = _send_seal(state, now_s, reason)
    state, more = _finish_sealing(state, now_s)
    return state, first + more


def _send_seal(state: RoundState, now_s: float, reason: str) -> Outcome:
    state = replace(state, sealed_s=now_s, sealed_to=state.reachable, seals=state.seals + 1)
    return state, [SendSeal(state.ballot, reason)]


def _finish_sealing(state: RoundState, now_s: float) -> Outcome:
    """Go on when all that can be reached have promised; whoever is late is asked again while it gives signs of life."""
    promised = frozenset({*state.replies, state.setup.me})
    if now_s >= state.sealed_s + state.setup.seal_s:
        late = state.reachable - promised
        mute = late if state.seals > EXTENSIONS else {peer for peer in late if state.seen_s.get(peer, NEVER_S) < state.sealed_s}
        state = replace(state, lost=state.lost | mute)
        if late - mute:
            return _send_seal(state, now_s, "late")
    missing = state.reachable - promised
    if missing:
        return _send_seal(state, now_s, "peer_back") if missing - state.sealed_to else (state, [])
    if len(promised) < state.setup.quorum and state.grant is None:
        return _ask_for_grant(state, promised, now_s)
    if state.gathered or any(reply.ready for reply in state.replies.values()):
        return _adopt(state, now_s)
    return _propose_if_due(replace(state, stage="collecting"), now_s)


def _adopt(state: RoundState, now_s: float) -> Outcome:
    """Propose again what was ready at the highest ballot among those that have promised, ourselves included."""
    ready = [reply for reply in state.replies.values() if reply.ready and reply.accepted is not None]
    best = max(ready, key=lambda reply: (reply.standing, reply.peer), default=None)
    mine = state.accepted if state.gathered else None
    if mine is not None and (best is None or state.standing >= best.standing):
        action = Adopt(state.ballot, None)
        state, more = _accept(state, mine, state.ballot, now_s)
        return replace(state, sealed_s=now_s), [action, *more]
    if best is None:
        return state, []
    before = state
    state, more = _on_adoption(state, state.setup.me, state.ballot, best, now_s)
    if state.standing != state.ballot:
        return replace(before, replies={peer: reply for peer, reply in before.replies.items() if reply is not best}), more
    return replace(state, sealed_s=now_s), [Adopt(state.ballot, best), *more]


def _ask_for_grant(state: RoundState, present: frozenset[str], now_s: float) -> Outcome:
    """The quorum is lost: only the coordinator can tell whether the others are gone or merely cut off from us."""
    if now_s < state.grant_asked_s + GRANT_EVERY_S:
        return state, []
    state = replace(state, grant_asked_s=now_s, grant_asked_for=present, waiting_for="no_quorum")
    return state, [RequestGrant(tuple(sorted(present)))]


def _propose_if_due(state: RoundState, now_s: float) -> Outcome:
    if not _proposal_is_due(state, now_s):
        if not state.has_quorum and all(peer in state.commits for peer in state.alive):
            return _ask_for_grant(state, frozenset(state.alive), now_s)
        return _seal_again_if_stuck(state, now_s)
    commits = _included(state)
    members = _next_members(state)
    joiners = tuple(member.peer for member in members if member.peer in state.joiners)
    forward = tuple(state.commits[item.peer] for item in commits) if state.ballot != BallotNumber() else ()
    action = Propose(state.ballot, commits, members, joiners, forward)
    return replace(state, stage="proposed", sealed_s=now_s, waiting_for=""), [action]


def _seal_again_if_stuck(state: RoundState, now_s: float) -> Outcome:
    """Where a quorum of commits doesn't come, ask at growing intervals: they may have been sent while we were cut off."""
    committed_s = state.arrived_s.get(state.setup.me)
    if state.has_quorum or committed_s is None or len(state.alive) < 2:
        return state, []
    wait_s = state.setup.silence_s * float(2 ** min(state.ballot.amendment, DOUBLINGS))
    if now_s < max(state.sealed_s, committed_s) + wait_s:
        return state, []
    return _seal(state, now_s, "no_quorum")


def _included(state: RoundState) -> tuple[IncludedCommit, ...]:
    """The commits of those that are alive, and of the lost whose parts somebody holds, with their spans."""
    setup = state.setup
    facts = [state.commits[peer] for peer in state.usable]
    uploads = {commit.peer: commit.upload_bytes_per_s for commit in facts if commit.weight}
    spans = spans_of(setup.part_count, uploads) if uploads and not setup.all_gather else {}
    quotes = setup.quotes_losses
    return tuple(
        IncludedCommit(
            commit.peer, commit.commit_hash, commit.weight, *spans.get(commit.peer, (0, 0)), commit.loss if quotes else 0.0
        )
        for commit in facts
    )


def _next_members(state: RoundState) -> tuple[RosterMember, ...]:
    """Who takes part next: those that are alive, stay and are welcome, then joiners while there is room; ourselves at least."""
    setup = state.setup
    leaving = {peer for peer, commit in state.commits.items() if commit.leaving} | state.bad
    leaving |= (setup.barred | state.two_faced) - {setup.me}
    staying = [peer for peer in state.alive if peer not in leaving][: setup.max_peers]
    joiners = [peer for peer in sorted(state.joiners) if peer not in staying and peer not in leaving]
    members = sorted(staying + joiners[: setup.max_peers - len(staying)]) or [setup.me]
    quotas = quotas_of(
        members,
        {member.peer: member.quota for member in setup.roster},
        state.commits,
        setup.full_quota,
        setup.shared_quota,
        setup.scale_to_speed,
    )
    quotas = held_back(quotas, setup.newcomers | state.newcomers, setup.new_weight, setup.full_quota, setup.shared_quota)
    return tuple(RosterMember(peer, quotas[peer]) for peer in members)


def _amend_if_needed(state: RoundState, now_s: float) -> Outcome:
    """Replace our proposal when somebody that it needs is gone, or is taking far too long.

    Those that say they have completed it get a while to serve the rest; if that was the truth, sealing brings it out.
    """
    if state.accepted is None or state.standing != state.ballot:
        return (
            _seal(state, now_s, "proposal_lost") if now_s >= state.sealed_s + _doubled(state, state.setup.seal_s) else (state, [])
        )
    if state.gathered and len(state.votes_now | set(state.alive)) < state.votes_needed:
        return _seal(state, now_s, "no_quorum")
    late = now_s >= state.accepted_s + _doubled(state, state.setup.exchange_s) * (1 + state.extensions)
    if late:
        state = _give_up_on_the_late(state, now_s)
    if _needed(state) & state.gone and (late or not _helpers(state)):
        return _seal(state, now_s, "peer_lost")
    return state, []


def _give_up_on_the_late(state: RoundState, now_s: float) -> RoundState:
    """After each deadline, give those that still answer more time, a bounded number of times.

    Where the rest would be no quorum, sealing takes the dropped in again, and the deadlines double.
    """
    late = _needed(state)
    silent = {peer for peer, since in state.asked_s.items() if peer in late and now_s >= since + SILENCE_FLOOR_S}
    judges = len(state.reachable) - 1
    accused = {peer for peer, accusers in state.complaints.items() if peer in late and 2 * len(accusers) >= judges}
    dropped = late if state.extensions >= EXTENSIONS else accused
    suspicions = state.suspicions + int(state.extensions >= EXTENSIONS)
    state = replace(state, extensions=state.extensions + 1, suspicions=suspicions)
    return replace(state, lost=state.lost | silent, dropped=state.dropped | dropped)


def _with(mapping: Mapping[Any, Any], key: Any, value: Any) -> Mapping[Any, Any]:
    return {**mapping, key: value}
