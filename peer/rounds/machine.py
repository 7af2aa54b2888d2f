"""The round as a pure state machine: `step(state, event, now_s) -> (state, actions)`.

It knows no clock, no socket and no tensor, so that every interleaving of messages, losses and crashes can be explored. Safety
rests on two rules: a peer completes a proposal only if it never promised to ignore that ballot, and a leader proposes a higher
ballot only after a quorum has promised and nobody in it had completed a lower one (Paxos' argument, Lamport 1998, with "complete"
for "accepted").
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, Literal

from peer.rounds.planning import leader_of, quorum_of, quotas_of, spans_of
from peer.rounds.values import (
    Action,
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
    SendSeal,
    SendSealReply,
    SpanArrived,
    SpanFacts,
    SpanFetched,
    Tick,
    Trained,
)

EMPTY: Mapping[str, Any] = MappingProxyType({})
PROBE_EVERY_S = 0.5
GRANT_EVERY_S = 1.0
EXTENSIONS = 4


@dataclass(frozen=True)
class RoundSetup:
    """What is fixed for a round. All durations are seconds; they come from recent rounds, never from a constant."""

    me: str
    run_id: bytes
    round_index: int
    base_root: bytes
    roster: tuple[RosterMember, ...]
    part_count: int
    all_gather: bool = False
    grace_s: float = 10.0
    patience_s: float = 5.0
    exchange_s: float = 10.0
    min_peers: int = 1
    max_peers: int = 64
    full_quota: int = 1
    shared_quota: bool = False
    scale_to_speed: bool = True

    @property
    def peers(self) -> tuple[str, ...]:
        """The roster's peer ids, sorted."""
        return tuple(member.peer for member in self.roster)

    @property
    def others(self) -> tuple[str, ...]:
        """Everybody in the roster but us."""
        return tuple(peer for peer in self.peers if peer != self.me)

    def leader(self, term: int) -> str:
        """The leader of a term."""
        return leader_of(self.run_id, self.round_index, self.peers, term)


Stage = Literal["idle", "sealing", "collecting", "proposed"]


@dataclass(frozen=True)
class RoundState:
    """Everything that a peer knows about the round in progress."""

    setup: RoundSetup
    started_s: float
    commits: Mapping[str, CommitFacts] = field(default_factory=dict)
    quorum_s: float | None = None
    joiners: Mapping[str, Any] = field(default_factory=dict)
    lost: frozenset[str] = frozenset()
    seen_s: Mapping[str, float] = field(default_factory=dict)
    probed_s: float = 0.0
    term: int = 0
    promised: BallotNumber = BallotNumber()
    overdue_s: float | None = None
    suspicions: int = 0
    accepted: ProposalFacts | None = None
    accepted_s: float = 0.0
    decided: bool = False
    reduced: bool = False
    spans: Mapping[str, SpanFacts] = field(default_factory=dict)
    fetched: frozenset[str] = frozenset()
    completers: Mapping[str, bytes] = field(default_factory=dict)
    help_asked_s: float = 0.0
    complete: bool = False
    stage: Stage = "idle"
    ballot: BallotNumber = BallotNumber()
    sealed_s: float = 0.0
    replies: Mapping[str, SealReplyFacts] = field(default_factory=dict)
    complaints: Mapping[str, frozenset[str]] = field(default_factory=dict)
    extensions: int = 0
    grant: Any = None
    grant_asked_s: float | None = None
    waiting_for: str = field(default="", compare=False)

    @property
    def leader(self) -> str:
        """Whom we take for the leader now."""
        return self.setup.leader(self.term)

    @property
    def alive(self) -> tuple[str, ...]:
        """The roster without those known to be lost."""
        return tuple(peer for peer in self.setup.peers if peer not in self.lost)

    @property
    def has_quorum(self) -> bool:
        """Whether enough of the roster has committed, or the coordinator has let us go on."""
        return len(self.commits) >= quorum_of(len(self.setup.peers)) or self.grant is not None


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
        case CommitArrived(commit):
            return _on_commit(state, commit, now_s)
        case JoinArrived(peer, admission):
            return replace(state, joiners=_with(state.joiners, peer, admission)), []
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
            return _on_span(state, span)
        case SpanFetched(proposal_hash, reducer):
            if state.accepted is None or state.accepted.proposal_hash != proposal_hash:
                return state, []
            return replace(state, fetched=state.fetched | {reducer}), []
        case FetchFailed():
            return _on_fetch_failed(state, event, now_s)
        case Completed(peer, proposal_hash):
            return _on_completed(state, peer, proposal_hash)
        case PeerLost(peer):
            return _on_lost(state, peer, now_s)
        case PeerAlive(peer):
            return replace(state, seen_s=_with(state.seen_s, peer, now_s)), []
        case GrantArrived(grant):
            return replace(state, grant=grant), []
        case Tick():
            return _probe_awaited(state, now_s)


# --- events ---------------------------------------------------------------------------------------------------------------


def _on_trained(state: RoundState, commit: CommitFacts, now_s: float) -> Outcome:
    if state.setup.me in state.commits:
        return state, []
    state, _ = _on_commit(state, commit, now_s)
    return state, [SendCommit(commit)]


def _on_commit(state: RoundState, commit: CommitFacts, now_s: float) -> Outcome:
    if commit.peer not in state.setup.peers:
        return state, [Refuse(commit.peer, "not_in_roster")]
    known = state.commits.get(commit.peer)
    if known is not None:
        return state, [] if known.commit_hash == commit.commit_hash else [Refuse(commit.peer, "two_commits")]
    if commit.weight and len(commit.part_hashes) != state.setup.part_count:
        return state, [Refuse(commit.peer, "wrong_part_count")]
    had_quorum = state.has_quorum
    commits = _with(state.commits, commit.peer, commit)
    state = replace(state, commits=commits, seen_s=_with(state.seen_s, commit.peer, now_s), lost=state.lost - {commit.peer})
    if state.has_quorum and not had_quorum:
        state = replace(state, quorum_s=now_s)
    if state.accepted is not None and state.accepted.included(commit.peer):
        return state, _reduce_if_possible(state)
    return state, []


def _on_proposal(state: RoundState, proposal: ProposalFacts, now_s: float) -> Outcome:
    problem = _problem(state, proposal)
    if problem:
        return state, [Refuse(proposal.leader, problem)]
    if state.complete or state.decided or proposal.ballot < state.promised:
        return state, []
    if state.accepted is not None and state.accepted.ballot == proposal.ballot:
        if state.accepted.proposal_hash != proposal.proposal_hash:
            return state, [Refuse(proposal.leader, "two_proposals")]
        return state, _reduce_if_possible(state)
    return _accept(state, proposal, now_s)


def _accept(state: RoundState, proposal: ProposalFacts, now_s: float) -> Outcome:
    state = replace(
        state,
        accepted=proposal,
        accepted_s=now_s,
        promised=max(state.promised, proposal.ballot),
        term=max(state.term, proposal.ballot.term),
        overdue_s=now_s + state.setup.exchange_s + state.setup.patience_s,
        reduced=False,
        spans={name: span for name, span in state.spans.items() if span.proposal_hash == proposal.proposal_hash},
        fetched=frozenset(),
        complaints=EMPTY,
        extensions=0,
    )
    fetches: list[Action] = [FetchSpan(span, _sources(state, span)) for span in state.spans.values()]
    return state, _reduce_if_possible(state) + fetches


def _problem(state: RoundState, proposal: ProposalFacts) -> str:
    """Why a proposal breaks the rules; empty if it doesn't."""
    setup = state.setup
    names = [commit.peer for commit in proposal.commits]
    members = [member.peer for member in proposal.next_roster]
    contributors = {c.peer: c for c in proposal.commits if c.weight}
    known = {peer: state.commits[peer] for peer in contributors if peer in state.commits}
    uploads = {peer: facts.upload_bytes_per_s for peer, facts in known.items()}
    checks = (
        ("wrong_leader", proposal.leader == setup.leader(proposal.ballot.term)),
        ("wrong_base", proposal.base_root == setup.base_root),
        ("unsorted", names == sorted(set(names)) and members == sorted(set(members))),
        ("not_in_roster", set(names) <= set(setup.peers)),
        ("no_quorum", len(names) >= quorum_of(len(setup.peers)) or proposal.grant),
        ("roster_too_large", 0 < len(members) <= setup.max_peers),
        (
            "wrong_commit",
            all(known[peer].commit_hash == contributors[peer].commit_hash for peer in known)
            and all(known[peer].weight == contributors[peer].weight for peer in known),
        ),
        (
            "wrong_spans",
            len(known) != len(contributors)
            or _span_table(proposal) == (_planned_spans(setup, uploads) if contributors and not setup.all_gather else {}),
        ),
    )
    return next((reason for reason, fine in checks if not fine), "")


def _span_table(proposal: ProposalFacts) -> dict[str, tuple[int, int]]:
    return {commit.peer: (commit.first_part, commit.part_span) for commit in proposal.reducers}


def _planned_spans(setup: RoundSetup, uploads: Mapping[str, int]) -> dict[str, tuple[int, int]]:
    return {peer: span for peer, span in spans_of(setup.part_count, uploads).items() if span[1]}


def _on_seal(state: RoundState, sender: str, ballot: BallotNumber, now_s: float) -> Outcome:
    if sender != state.setup.leader(ballot.term):
        return state, [Refuse(sender, "wrong_leader")]
    if state.complete or state.decided:
        return state, [SendSealReply(sender, ballot)]
    if ballot < state.promised:
        return state, []
    state = replace(
        state,
        promised=ballot,
        term=max(state.term, ballot.term),
        overdue_s=None if state.accepted is None else now_s + 2 * _patience(state),
        seen_s=_with(state.seen_s, sender, now_s),
        lost=state.lost - {sender},
    )
    return state, [SendSealReply(sender, ballot)]


def _on_seal_reply(state: RoundState, reply: SealReplyFacts, now_s: float) -> Outcome:
    if reply.peer not in state.setup.peers:
        return state, [Refuse(reply.peer, "not_in_roster")]
    if reply.complete and reply.accepted is not None:
        return _on_decision(state, reply, now_s)
    if state.stage != "sealing" or reply.ballot != state.ballot:
        return state, []
    state = replace(state, replies=_with(state.replies, reply.peer, reply), seen_s=_with(state.seen_s, reply.peer, now_s))
    for commit in reply.commits:
        if commit.peer in state.setup.peers and commit.peer not in state.commits:
            state, _ = _on_commit(replace(state, lost=state.lost), commit, now_s)
    return state, []


def _on_decision(state: RoundState, reply: SealReplyFacts, now_s: float) -> Outcome:
    """Somebody completed a proposal before it could be replaced: it stands, and its parts can be had there."""
    proposal = reply.accepted
    if proposal is None or state.complete or (state.decided and state.accepted == proposal):
        return state, []
    forward: list[Action] = [ForwardDecision(reply)] if state.stage == "sealing" else []
    spans = {span.reducer: span for span in reply.spans if span.proposal_hash == proposal.proposal_hash}
    if set(spans) != {commit.peer for commit in proposal.reducers}:
        return state, [Refuse(reply.peer, "incomplete_decision")]
    commits = {commit.peer: commit for commit in reply.commits if commit.peer in state.setup.peers}
    state, _ = _accept(replace(state, commits={**commits, **state.commits}), proposal, now_s)
    completers = _with(state.completers, reply.peer, proposal.proposal_hash)
    state = replace(state, decided=True, stage="idle", spans=spans, completers=completers)
    fetches: list[Action] = [FetchSpan(span, _sources(state, span)) for span in spans.values()]
    gather: list[Action] = [Reduce(proposal)] if state.setup.all_gather and proposal.contributors else []
    return state, forward + fetches + gather


def _on_complaint(state: RoundState, sender: str, about: str, reason: str, now_s: float) -> Outcome:
    if sender not in state.setup.peers or about not in state.setup.peers:
        return state, []
    if state.complete:
        return state, [SendSealReply(sender, state.promised)]
    if state.leader != state.setup.me:
        return state, []
    if reason == "missing_commit":
        return state, [ResendProposal(sender)]
    complaints = _with(state.complaints, about, state.complaints.get(about, frozenset()) | {sender})
    state = replace(state, complaints=complaints, seen_s=_with(state.seen_s, sender, now_s))
    judges = [peer for peer in state.alive if peer != about]
    if len(complaints[about]) >= max(1, len(judges) // 2):
        return replace(state, lost=state.lost | {about}), []
    return state, [Probe(about)]


def _on_reduced(state: RoundState, span: SpanFacts) -> Outcome:
    if state.accepted is None or state.accepted.proposal_hash != span.proposal_hash:
        return state, []
    me = state.setup.me
    return replace(state, reduced=True, spans=_with(state.spans, me, span), fetched=state.fetched | {me}), []


def _on_span(state: RoundState, span: SpanFacts) -> Outcome:
    if span.reducer not in state.setup.peers:
        return state, [Refuse(span.reducer, "not_in_roster")]
    known = state.spans.get(span.reducer)
    if known is not None and known.proposal_hash == span.proposal_hash:
        return state, [] if known.part_hashes == span.part_hashes else [Refuse(span.reducer, "two_merges")]
    proposal = state.accepted
    if proposal is not None and proposal.proposal_hash == span.proposal_hash:
        place = proposal.included(span.reducer)
        if place is None or (place.first_part, place.part_span) != (span.first_part, len(span.part_hashes)):
            return state, [Refuse(span.reducer, "wrong_span")]
    state = replace(state, spans=_with(state.spans, span.reducer, span))
    if proposal is None or proposal.proposal_hash != span.proposal_hash:
        return state, []
    return state, [FetchSpan(span, _sources(state, span))]


def _on_fetch_failed(state: RoundState, event: FetchFailed, now_s: float) -> Outcome:
    proposal = state.accepted
    if state.complete or proposal is None or proposal.proposal_hash != event.proposal_hash:
        return state, []
    had_helpers = any(name == proposal.proposal_hash for name in state.completers.values())
    if event.reason == "unreachable":
        state = replace(state, lost=state.lost | {event.peer})
    if event.merged and (span := state.spans.get(event.peer)) and had_helpers:
        return state, [FetchSpan(span, _sources(state, span))]
    if state.leader == state.setup.me:
        return _on_complaint(state, state.setup.me, event.peer, event.reason, now_s)
    overdue = now_s + _patience(state)
    return replace(state, overdue_s=min(overdue, state.overdue_s or overdue)), [Complain(state.leader, event.peer, event.reason)]


def _on_completed(state: RoundState, peer: str, proposal_hash: bytes) -> Outcome:
    if peer not in state.setup.peers:
        return state, []
    state = replace(state, completers=_with(state.completers, peer, proposal_hash))
    stuck = [span for span in state.spans.values() if span.reducer not in state.fetched and span.reducer in state.lost]
    return state, [] if state.complete else [FetchSpan(span, _sources(state, span)) for span in stuck]


def _on_lost(state: RoundState, peer: str, now_s: float) -> Outcome:
    if peer == state.setup.me or peer not in state.setup.peers:
        joiners = {name: admission for name, admission in state.joiners.items() if name != peer}
        return replace(state, joiners=joiners), []
    return replace(state, lost=state.lost | {peer}), []


def _probe_awaited(state: RoundState, now_s: float) -> Outcome:
    """Ask for a sign of life from those whose silence holds the round up."""
    if state.complete or now_s - state.probed_s < PROBE_EVERY_S or not _is_waiting(state):
        return state, []
    if state.accepted is None:
        awaited = {peer for peer in state.setup.others if peer not in state.commits} | {state.leader}
    else:
        reducers = {commit.peer for commit in state.accepted.reducers}
        awaited = {peer for peer in reducers if peer not in state.fetched} | {state.leader}
    awaited -= {state.setup.me} | state.lost
    state, help_wanted = _ask_completers(replace(state, probed_s=now_s), now_s)
    return state, help_wanted + [Probe(peer) for peer in sorted(awaited)]


def _ask_completers(state: RoundState, now_s: float) -> Outcome:
    """Others are done and we are not: whoever has completed can prove it and serve us."""
    waited_s = now_s - max(state.accepted_s, state.help_asked_s)
    if not state.completers or waited_s < 2 * PROBE_EVERY_S:
        return state, []
    completer = min(state.completers)
    return replace(state, help_asked_s=now_s), [Complain(completer, state.leader, "left_behind")]


def _is_waiting(state: RoundState) -> bool:
    """Whether we have done our own part and wait for others."""
    return state.setup.me in state.commits or state.accepted is not None or state.quorum_s is not None


# --- what follows from the state ------------------------------------------------------------------------------------------


def _advance(state: RoundState, now_s: float) -> Outcome:
    if state.complete:
        return state, []
    state, actions = _complete_if_done(state)
    if state.complete:
        return state, actions
    state, turned = _follow_leader(state, now_s)
    actions += turned
    if state.leader != state.setup.me or state.decided:
        return replace(state, stage="idle" if state.leader != state.setup.me else state.stage), actions
    state, more = _lead(state, now_s)
    return state, actions + more


def _complete_if_done(state: RoundState) -> Outcome:
    proposal = state.accepted
    if proposal is None or (proposal.ballot < state.promised and not state.decided):
        return state, []
    reducers = {commit.peer for commit in proposal.reducers}
    gathered = not state.setup.all_gather or state.reduced or not proposal.contributors
    if not gathered or not reducers <= state.fetched:
        return state, []
    return replace(state, complete=True, waiting_for=""), [Complete(proposal)]


def _follow_leader(state: RoundState, now_s: float) -> Outcome:
    """Move to the next term when the leader is gone or long overdue."""
    if state.overdue_s is None and _proposal_is_due(state, now_s):
        state = replace(state, overdue_s=now_s + _patience(state))
    overdue = state.overdue_s is not None and now_s >= state.overdue_s
    if not overdue and state.leader not in state.lost:
        return state, []
    if state.leader == state.setup.me or not _is_waiting(state):
        return state, []
    silent = state.leader
    term = state.term + 1
    while state.setup.leader(term) in state.lost and term < state.term + len(state.setup.peers):
        term += 1
    state = replace(state, term=term, stage="idle", suspicions=state.suspicions + int(overdue))
    state = replace(state, overdue_s=now_s + _patience(state))
    return state, [] if state.leader == state.setup.me else [Complain(state.leader, silent, "leader_silent")]


def _patience(state: RoundState) -> float:
    """How long a leader may be silent: doubled with every suspicion, so that views converge."""
    return state.setup.patience_s * float(2 ** min(state.suspicions, 6))


def _proposal_is_due(state: RoundState, now_s: float) -> bool:
    """All that are alive have committed, or a quorum has and the grace is over."""
    if not state.has_quorum or len(state.joiners) + len(state.setup.peers) < state.setup.min_peers:
        return False
    if all(peer in state.commits for peer in state.alive):
        return True
    return state.quorum_s is not None and now_s >= state.quorum_s + state.setup.grace_s


def _lead(state: RoundState, now_s: float) -> Outcome:
    if state.stage == "idle":
        return _start_leading(state, now_s)
    if state.stage == "sealing":
        return _finish_sealing(state, now_s)
    if state.stage == "collecting":
        return _propose_if_due(state, now_s)
    return _amend_if_needed(state, now_s)


def _start_leading(state: RoundState, now_s: float) -> Outcome:
    fresh = state.term == 0 and state.promised == BallotNumber() and state.accepted is None
    if fresh:
        return _propose_if_due(replace(state, stage="collecting", ballot=BallotNumber()), now_s)
    return _seal(state, now_s, "leader_silent")


def _seal(state: RoundState, now_s: float, reason: str) -> Outcome:
    ballot = BallotNumber(state.term, state.promised.amendment + 1 if state.promised.term == state.term else 0)
    state = replace(state, stage="sealing", ballot=ballot, promised=ballot, sealed_s=now_s, replies=EMPTY)
    state, actions = _finish_sealing(state, now_s)
    return state, [SendSeal(ballot, reason), *actions]


def _finish_sealing(state: RoundState, now_s: float) -> Outcome:
    """Go on when all that are alive have promised, or a quorum has and the others are late."""
    promised = set(state.replies) | {state.setup.me}
    everybody = all(peer in promised for peer in state.alive)
    enough = len(promised) >= quorum_of(len(state.setup.peers)) or state.grant is not None
    late = now_s >= state.sealed_s + state.setup.patience_s
    if late:
        state = replace(state, lost=state.lost | {peer for peer in state.alive if peer not in promised})
    if not enough:
        return _ask_for_grant(state, tuple(sorted(promised)), now_s) if everybody or late else (state, [])
    if not (everybody or late):
        return state, []
    return _propose_if_due(replace(state, stage="collecting"), now_s)


def _ask_for_grant(state: RoundState, present: tuple[str, ...], now_s: float) -> Outcome:
    """The quorum is lost: only the coordinator can tell whether the others are gone or merely cut off from us."""
    if state.grant_asked_s is not None and now_s < state.grant_asked_s + GRANT_EVERY_S:
        return state, []
    return replace(state, grant_asked_s=now_s, waiting_for="no_quorum"), [RequestGrant(present)]


def _propose_if_due(state: RoundState, now_s: float) -> Outcome:
    if not _proposal_is_due(state, now_s):
        everybody = all(peer in state.commits for peer in state.alive)
        if everybody and not state.has_quorum:
            return _ask_for_grant(state, tuple(sorted(state.commits)), now_s)
        return state, []
    commits = _included(state)
    if len(commits) < quorum_of(len(state.setup.peers)) and state.grant is None:
        return _ask_for_grant(state, tuple(commit.peer for commit in commits), now_s)
    members = _next_members(state, now_s)
    unknown = state.ballot != BallotNumber()
    forward = tuple(state.commits[c.peer] for c in commits) if unknown else ()
    action = Propose(state.ballot, commits, members, tuple(sorted(state.joiners)), forward)
    return replace(state, stage="proposed", waiting_for=""), [action]


def _included(state: RoundState) -> tuple[IncludedCommit, ...]:
    """The commits of those that are alive, and of the lost whose parts somebody holds, with their spans."""
    setup = state.setup
    held = frozenset().union(*(reply.holds for reply in state.replies.values())) if setup.all_gather else frozenset()
    facts = [state.commits[peer] for peer in sorted(state.commits) if peer not in state.lost or peer in held]
    uploads = {commit.peer: commit.upload_bytes_per_s for commit in facts if commit.weight}
    spans = spans_of(setup.part_count, uploads) if uploads and not setup.all_gather else {}
    return tuple(
        IncludedCommit(commit.peer, commit.commit_hash, commit.weight, *spans.get(commit.peer, (0, 0))) for commit in facts
    )


def _next_members(state: RoundState, now_s: float) -> tuple[RosterMember, ...]:
    """Who takes part next: those that are alive and stay, then joiners while there is room."""
    setup = state.setup
    staying = [
        peer
        for peer in state.alive
        if (peer in state.commits and not state.commits[peer].leaving)
        or (peer not in state.commits and now_s - state.seen_s.get(peer, state.started_s) < 4 * PROBE_EVERY_S + setup.patience_s)
    ]
    room = max(0, setup.max_peers - len(staying))
    joiners = [peer for peer in sorted(state.joiners) if peer not in staying and peer not in state.lost][:room]
    members = sorted(staying + joiners) or [setup.me]
    quotas = quotas_of(
        members,
        {member.peer: member.quota for member in setup.roster},
        state.commits,
        setup.full_quota,
        setup.shared_quota,
        setup.scale_to_speed,
    )
    return tuple(RosterMember(peer, quotas[peer]) for peer in members)


def _amend_if_needed(state: RoundState, now_s: float) -> Outcome:
    """Replace our proposal when somebody that it needs is gone, or is taking far too long."""
    proposal = state.accepted
    if proposal is None or proposal.ballot != state.ballot:
        return state, []
    late = now_s >= state.accepted_s + state.setup.exchange_s * (1 + state.extensions)
    if late:
        state = _give_up_on_the_late(state, proposal)
    needed = {c.peer for c in proposal.reducers if c.peer not in state.fetched}
    needed |= {peer for peer in state.complaints if proposal.included(peer)}
    if state.setup.all_gather and not state.reduced:
        needed |= {c.peer for c in proposal.contributors}
    if needed & state.lost:
        return _seal(state, now_s, "peer_lost")
    return state, []


def _give_up_on_the_late(state: RoundState, proposal: ProposalFacts) -> RoundState:
    """After each deadline, give those that still answer more time, a bounded number of times."""
    missing = {c.peer for c in proposal.reducers if c.peer not in state.fetched} - {state.setup.me}
    silent = {peer for peer in missing if state.seen_s.get(peer, 0.0) < state.accepted_s}
    given_up = missing if state.extensions >= EXTENSIONS else silent
    return replace(state, extensions=state.extensions + 1, lost=state.lost | given_up)


def _reduce_if_possible(state: RoundState) -> list[Action]:
    """Start merging once every included commit is known; otherwise ask the leader for the missing one."""
    proposal = state.accepted
    if proposal is None or state.reduced or state.decided:
        return []
    mine = proposal.included(state.setup.me)
    if not state.setup.all_gather and (mine is None or not mine.part_span):
        return []
    missing = [commit.peer for commit in proposal.contributors if commit.peer not in state.commits]
    if missing:
        return [Complain(state.leader, missing[0], "missing_commit")]
    return [Reduce(proposal)]


def _sources(state: RoundState, span: SpanFacts) -> tuple[str, ...]:
    """Where merged parts can be had: at the reducer, and at everybody who has completed."""
    completers = sorted(peer for peer, name in state.completers.items() if name == span.proposal_hash and peer != span.reducer)
    first = () if span.reducer in state.lost else (span.reducer,)
    return tuple(peer for peer in (*first, *completers) if peer != state.setup.me) or (span.reducer,)


def _with(mapping: Mapping[str, Any], key: str, value: Any) -> Mapping[str, Any]:
    return {**mapping, key: value}
