"""What the round's decisions are about: immutable values, events that happen and actions that follow.

`signed` fields carry the original messages, unread, so that they can be passed on.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, order=True)
class BallotNumber:
    """Ballots are ordered by term, then amendment. The leader of a term is fixed by the rotation."""

    term: int = 0
    amendment: int = 0


@dataclass(frozen=True)
class RosterMember:
    """A member and the work that it is given: samples (`sync`) or inner steps (`diloco`)."""

    peer: str
    quota: int


@dataclass(frozen=True)
class CommitFacts:
    """A verified commit, of work that started from the state behind `base_root`."""

    peer: str
    commit_hash: bytes
    weight: int
    part_hashes: tuple[bytes, ...] = ()
    seconds: float = 0.0
    upload_bytes_per_s: int = 0
    leaving: bool = False
    loss: float = 0.0
    evidence_root: bytes = b""
    base_root: bytes = b""
    signed: Any = field(default=None, compare=False, repr=False)


@dataclass(frozen=True)
class IncludedCommit:
    """A commit's place in a proposal; it merges parts `[first_part, first_part + part_span)`.

    `loss` is the commit's, in nats per token, where the run skips spikes.
    """

    peer: str
    commit_hash: bytes
    weight: int
    first_part: int = 0
    part_span: int = 0
    loss: float = 0.0


@dataclass(frozen=True)
class ProposalFacts:
    """A verified proposal. `grant` tells that the coordinator let a minority go on."""

    proposal_hash: bytes
    ballot: BallotNumber
    leader: str
    base_root: bytes
    commits: tuple[IncludedCommit, ...]
    next_roster: tuple[RosterMember, ...]
    grant: bool = False
    signed: Any = field(default=None, compare=False, repr=False)

    def included(self, peer: str) -> IncludedCommit | None:
        """The peer's entry, if it has one."""
        return next((commit for commit in self.commits if commit.peer == peer), None)

    @property
    def reducers(self) -> tuple[IncludedCommit, ...]:
        """Those that merge a span."""
        return tuple(commit for commit in self.commits if commit.part_span)

    @property
    def contributors(self) -> tuple[IncludedCommit, ...]:
        """Those whose update counts."""
        return tuple(commit for commit in self.commits if commit.weight)


@dataclass(frozen=True)
class SpanFacts:
    """A reducer's signed hashes of its merged parts."""

    reducer: str
    proposal_hash: bytes
    first_part: int
    part_hashes: tuple[bytes, ...]
    signed: Any = field(default=None, compare=False, repr=False)


@dataclass(frozen=True)
class SealReplyFacts:
    """A peer's promise and what it has: the accepted proposal, at which ballot it stands, and whether all of it is here."""

    peer: str
    ballot: BallotNumber
    accepted: ProposalFacts | None
    complete: bool
    commits: tuple[CommitFacts, ...] = ()
    spans: tuple[SpanFacts, ...] = ()
    holds: frozenset[str] = frozenset()
    ready: bool = False
    standing: BallotNumber = BallotNumber()
    signed: Any = field(default=None, compare=False, repr=False)


# --- events ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trained:
    """Our own commit is ready and its parts can be served."""

    commit: CommitFacts


@dataclass(frozen=True)
class CommitArrived:
    """A member's commit. One that somebody else passed on is no sign of life of its author."""

    commit: CommitFacts
    forwarded: bool = False


@dataclass(frozen=True)
class JoinArrived:
    """A peer asks to be in the next roster; `admission` is its verified token, which may say that it is a newcomer."""

    peer: str
    admission: Any = field(default=None, compare=False, repr=False)
    newcomer: bool = False


@dataclass(frozen=True)
class ProposalArrived:
    """A leader's proposal, our own included."""

    proposal: ProposalFacts


@dataclass(frozen=True)
class SealArrived:
    """A leader asks for the promise not to complete lower ballots."""

    sender: str
    ballot: BallotNumber


@dataclass(frozen=True)
class SealReplyArrived:
    """The answer to our seal, or a forwarded proof that a proposal is complete somewhere."""

    reply: SealReplyFacts


@dataclass(frozen=True)
class ComplaintArrived:
    """`sender` can't get what it needs from `about`."""

    sender: str
    about: str
    reason: str


@dataclass(frozen=True)
class Reduced:
    """We hold everything of the proposal that we must merge, and have merged it."""

    span: SpanFacts


@dataclass(frozen=True)
class SpanArrived:
    """A reducer has merged its span."""

    span: SpanFacts


@dataclass(frozen=True)
class SpanFetched:
    """All merged parts of a reducer's span are here."""

    proposal_hash: bytes
    reducer: str


@dataclass(frozen=True)
class FetchFailed:
    """Parts of `peer` (or merged parts of its span, if `merged`) can't be had."""

    proposal_hash: bytes
    peer: str
    merged: bool
    reason: str


@dataclass(frozen=True)
class ReadyArrived:
    """A peer holds every merged part of the proposal that stands at this ballot; `again` = it still waits for others."""

    peer: str
    ballot: BallotNumber
    proposal_hash: bytes
    again: bool = False


@dataclass(frozen=True)
class AdoptionArrived:
    """A leader proposes once more, at its own ballot, what a peer was ready for when it was sealed."""

    leader: str
    ballot: BallotNumber
    reply: SealReplyFacts


@dataclass(frozen=True)
class Completed:
    """A peer's signed result names the proposal that it completed."""

    peer: str
    proposal_hash: bytes


@dataclass(frozen=True)
class PeerLost:
    """Positive evidence that the peer is gone."""

    peer: str


@dataclass(frozen=True)
class PeerAlive:
    """The peer answered a probe."""

    peer: str


@dataclass(frozen=True)
class GrantArrived:
    """The coordinator lets those `present` go on without a quorum; empty = those that we last asked for."""

    grant: Any = field(default=None, compare=False, repr=False)
    present: tuple[str, ...] = ()


@dataclass(frozen=True)
class Tick:
    """Time has passed."""


Event = (
    Trained
    | CommitArrived
    | JoinArrived
    | ProposalArrived
    | SealArrived
    | SealReplyArrived
    | ComplaintArrived
    | Reduced
    | SpanArrived
    | SpanFetched
    | FetchFailed
    | ReadyArrived
    | AdoptionArrived
    | Completed
    | PeerLost
    | PeerAlive
    | GrantArrived
    | Tick
)

# --- actions --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SendCommit:
    """Send our commit to the roster."""

    commit: CommitFacts


@dataclass(frozen=True)
class Propose:
    """Sign this proposal, take it ourselves and send it to the roster and the joiners."""

    ballot: BallotNumber
    commits: tuple[IncludedCommit, ...]
    next_roster: tuple[RosterMember, ...]
    joiners: tuple[str, ...]
    forward: tuple[CommitFacts, ...]


@dataclass(frozen=True)
class ResendProposal:
    """Send the accepted proposal again, with the commits that the peer lacks."""

    to: str


@dataclass(frozen=True)
class SendSeal:
    """Ask the roster to stop completing lower ballots."""

    ballot: BallotNumber
    reason: str


@dataclass(frozen=True)
class SendSealReply:
    """Promise, and tell what we have."""

    to: str
    ballot: BallotNumber


@dataclass(frozen=True)
class ForwardDecision:
    """Show the roster a peer's proof that its proposal is complete."""

    reply: SealReplyFacts


@dataclass(frozen=True)
class Adopt:
    """Sign that this reply's proposal is proposed again at our ballot, and send it to the roster, or to one peer that missed it.

    No reply = our own state's.
    """

    ballot: BallotNumber
    reply: SealReplyFacts | None
    to: str = ""


@dataclass(frozen=True)
class SendReady:
    """Tell the roster that every merged part of the accepted proposal is here."""

    ballot: BallotNumber
    proposal_hash: bytes
    again: bool = False


@dataclass(frozen=True)
class Reduce:
    """Pull the contributors' parts of our span, merge them, publish the result.

    `holders` may have the parts of a contributor that can't be reached (all-gather only).
    """

    proposal: ProposalFacts
    holders: tuple[str, ...] = ()


@dataclass(frozen=True)
class FetchSpan:
    """Pull a reducer's merged parts from any of `sources`."""

    span: SpanFacts
    sources: tuple[str, ...]


@dataclass(frozen=True)
class Complain:
    """Tell the leader."""

    leader: str
    about: str
    reason: str


@dataclass(frozen=True)
class Probe:
    """Ask the peer for a sign of life; the outcome is `PeerAlive`, `PeerLost`, or silence."""

    peer: str


@dataclass(frozen=True)
class RequestGrant:
    """Ask the coordinator to let those present go on."""

    present: tuple[str, ...]


@dataclass(frozen=True)
class Complete:
    """Every merged part is here: apply it."""

    proposal: ProposalFacts


@dataclass(frozen=True)
class Refuse:
    """A message broke a rule; count it and name the sender."""

    sender: str
    reason: str


@dataclass(frozen=True)
class Expose:
    """A peer has signed two things of which an honest one signs one; both, as they came."""

    first: Any
    second: Any


Action = (
    SendCommit
    | Propose
    | ResendProposal
    | SendSeal
    | SendSealReply
    | ForwardDecision
    | Adopt
    | SendReady
    | Reduce
    | FetchSpan
    | Complain
    | Probe
    | RequestGrant
    | Complete
    | Refuse
    | Expose
)
