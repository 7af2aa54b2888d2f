"""What one peer knows about a round: the values that are fixed for it, and everything that has happened so far."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

from peer.rounds.planning import leader_of, quorum_of
from peer.rounds.values import (
    BallotNumber,
    CommitFacts,
    ProposalFacts,
    RosterMember,
    SealReplyFacts,
    SpanFacts,
)

EMPTY: Mapping[Any, Any] = MappingProxyType({})
SILENCE_FLOOR_S = 2.5
NEVER_S = float("-inf")


def _nothing() -> Mapping[Any, Any]:
    return EMPTY


@dataclass(frozen=True)
class RoundSetup:
    """What is fixed for a round. All durations are seconds; they come from recent rounds, never from a constant.

    We give no place in the next roster to those who are `barred`, and less work to `newcomers`. `quota_samples` is the samples
    in a unit of quota: more than its quota nobody may commit to; 0 = as many as anybody likes. A proposal `quotes_losses` where
    a round's loss decides whether it changes anything.
    """

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
    barred: frozenset[str] = frozenset()
    newcomers: frozenset[str] = frozenset()
    new_weight: float = 1.0
    quota_samples: int = 0
    quotes_losses: bool = False

    def is_too_heavy(self, peer: str, weight: int) -> bool:
        """Whether a member commits to more samples than its quota."""
        quota = next((member.quota for member in self.roster if member.peer == peer), 0)
        return 0 < quota * self.quota_samples < weight

    @property
    def peers(self) -> tuple[str, ...]:
        """The roster's peer ids, sorted."""
        return tuple(member.peer for member in self.roster)

    @property
    def others(self) -> tuple[str, ...]:
        """Everybody in the roster but us."""
        return tuple(peer for peer in self.peers if peer != self.me)

    @property
    def quorum(self) -> int:
        """How many make a majority of the roster."""
        return quorum_of(len(self.roster))

    @property
    def silence_s(self) -> float:
        """How long a peer may leave probes unanswered before a proposal goes on without it."""
        return max(self.grace_s, self.patience_s, SILENCE_FLOOR_S)

    @property
    def seal_s(self) -> float:
        """How long a seal's answer is waited for; a large answer of a peer that is alive gets more."""
        return max(self.patience_s, SILENCE_FLOOR_S)

    def leader(self, term: int) -> str:
        """The leader of a term."""
        return leader_of(self.run_id, self.round_index, self.peers, term)


Stage = Literal["idle", "sealing", "collecting", "proposed"]


@dataclass(frozen=True)
class RoundState:
    """Everything that a peer knows about the round in progress.

    `lost` peers are gone or silent as far as we can tell, and come back with any sign of life; `dropped` ones answer, but the
    round goes on without them; `bad` ones have committed to parts that nobody can decode; `two_faced` ones have proposed two
    things at one ballot. Those in `asked_s` haven't answered since; `tried_s` is when anybody was asked last. The accepted
    proposal stands at ballot `standing`: its own, or the one whose leader found it complete; it has been `shown` to those who
    seemed to work on another one.
    """

    setup: RoundSetup
    started_s: float
    commits: Mapping[str, CommitFacts] = field(default_factory=_nothing)
    arrived_s: Mapping[str, float] = field(default_factory=_nothing)
    quorum_s: float | None = None
    joiners: Mapping[str, Any] = field(default_factory=_nothing)
    newcomers: frozenset[str] = frozenset()
    lost: frozenset[str] = frozenset()
    dropped: frozenset[str] = frozenset()
    seen_s: Mapping[str, float] = field(default_factory=_nothing)
    asked_s: Mapping[str, float] = field(default_factory=_nothing)
    tried_s: Mapping[str, float] = field(default_factory=_nothing)
    probed_s: float = NEVER_S
    lost_probed_s: float = NEVER_S
    term: int = 0
    promised: BallotNumber = BallotNumber()
    overdue_s: float | None = None
    suspicions: int = 0
    accepted: ProposalFacts | None = None
    standing: BallotNumber = BallotNumber()
    accepted_s: float = 0.0
    reducing: bool = False
    reduced: bool = False
    spans: Mapping[str, SpanFacts] = field(default_factory=_nothing)
    early: tuple[SpanFacts, ...] = ()
    fetched: frozenset[str] = frozenset()
    failed: frozenset[str] = frozenset()
    completers: Mapping[str, bytes] = field(default_factory=_nothing)
    readies: Mapping[str, tuple[BallotNumber, bytes]] = field(default_factory=_nothing)
    ready_sent_s: float = NEVER_S
    help_asked_s: float = NEVER_S
    helps: int = 0
    complete: bool = False
    stage: Stage = "idle"
    ballot: BallotNumber = BallotNumber()
    sealed_s: float = 0.0
    sealed_to: frozenset[str] = frozenset()
    seals: int = 0
    replies: Mapping[str, SealReplyFacts] = field(default_factory=_nothing)
    complaints: Mapping[str, frozenset[str]] = field(default_factory=_nothing)
    unobtainable: frozenset[str] = frozenset()
    bad: frozenset[str] = frozenset()
    rotten: frozenset[SpanFacts] = frozenset()
    two_faced: frozenset[str] = frozenset()
    shown: frozenset[str] = frozenset()
    extensions: int = 0
    grant: Any = None
    granted_to: frozenset[str] = frozenset()
    grant_asked_s: float = NEVER_S
    grant_asked_for: frozenset[str] = frozenset()
    waiting_for: str = ""

    @property
    def leader(self) -> str:
        """Whom we take for the leader now."""
        return self.setup.leader(self.term)

    @property
    def leads(self) -> bool:
        """Whether that's us."""
        return self.leader == self.setup.me

    @property
    def gone(self) -> frozenset[str]:
        """Those that the round goes on without."""
        return self.lost | self.dropped

    @property
    def alive(self) -> tuple[str, ...]:
        """The roster without those that are gone."""
        return tuple(peer for peer in self.setup.peers if peer not in self.gone)

    @property
    def reachable(self) -> frozenset[str]:
        """Everybody, ourselves included, who may still have completed something: the roster without the lost."""
        return frozenset(self.setup.peers) - self.lost

    @property
    def held(self) -> frozenset[str]:
        """All-gather: peers whose parts somebody else says to hold."""
        if not self.setup.all_gather:
            return frozenset()
        return frozenset().union(*(reply.holds for reply in self.replies.values())) - self.unobtainable

    @property
    def usable(self) -> tuple[str, ...]:
        """Whose commits a proposal can include now, sorted; without a quorum, only those for whom the coordinator's grant is."""
        fit = self.commits.keys() - self.bad
        names = tuple(sorted(peer for peer in fit if peer not in self.gone or peer in self.held))
        if len(names) >= self.setup.quorum or self.grant is None:
            return names
        return tuple(peer for peer in names if peer in self.granted_to)

    @property
    def has_quorum(self) -> bool:
        """Whether enough of the roster has committed, or the coordinator has let us go on."""
        return len(self.usable) >= self.setup.quorum or (self.grant is not None and bool(self.usable))

    @property
    def sealed(self) -> bool:
        """Whether we promised not to become ready for what we have accepted, or have nothing accepted."""
        return self.accepted is None or self.standing < self.promised

    @property
    def gathered(self) -> bool:
        """Whether every merged part of the accepted proposal is here."""
        proposal = self.accepted
        if proposal is None or not {item.peer for item in proposal.reducers} <= self.fetched:
            return False
        return not self.setup.all_gather or self.reduced or not proposal.contributors

    @property
    def votes(self) -> frozenset[str]:
        """Who is ready for the accepted proposal, at the ballot at which most are."""
        return self.votes_for(self.accepted.proposal_hash) if self.accepted is not None else frozenset()

    @property
    def votes_now(self) -> frozenset[str]:
        """Who is ready for the accepted proposal at the ballot at which it stands."""
        mine = (self.standing, self.accepted.proposal_hash) if self.accepted is not None else None
        return frozenset(peer for peer, vote in self.readies.items() if vote == mine)

    def votes_for(self, proposal_hash: bytes) -> frozenset[str]:
        """Who is ready for a proposal, at the ballot at which most are."""
        by_ballot: dict[BallotNumber, set[str]] = {BallotNumber(): set()}
        for peer, (ballot, name) in self.readies.items():
            if name == proposal_hash:
                by_ballot.setdefault(ballot, set()).add(peer)
        most = max(by_ballot.values(), key=len)
        return frozenset(most)

    @property
    def votes_needed(self) -> int:
        """How many must be ready: a quorum of the roster, or of those still there whom the coordinator lets go on."""
        present = self.granted_to if self.grant is not None else frozenset[str]()
        if not present and self.accepted is not None and self.accepted.grant:
            present = frozenset(item.peer for item in self.accepted.commits)
        return min(self.setup.quorum, quorum_of(len(present - self.lost))) if present else self.setup.quorum
