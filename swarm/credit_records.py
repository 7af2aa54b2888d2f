"""What a fold over the ledger remembers: balances, and the records of runs, rounds, members and their tallies.

`swarm.credits` changes the records; `swarm.credit_snapshot` writes them down and reads them back.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from swarm.audits import Case
from swarm.entries import Claim, Confirmation, Nomination, Permission
from swarm.evaluations import Agreed, Panel
from swarm.history import History
from swarm.manifest import DiLoCo, Manifest

FLOPS_PER_CREDIT = 10**15
KEPT = 1000  # how many of the best accounts are known without looking at all
SPEED_SCALE = 4  # the most inner steps that a fast peer may take, relative to the manifest's


class Balance(NamedTuple):
    """What one account has, in exact FLOPs."""

    peer_id: str
    account: str
    pending_flops: int = 0
    verified_flops: int = 0
    final_flops: int = 0
    rounds: int = 0
    tokens: int = 0

    @property
    def earned_flops(self) -> int:
        """Verified and final together."""
        return self.verified_flops + self.final_flops


class Progress(NamedTuple):
    """Where a run stands: its newest confirmed round. `state_root` is empty before the first one."""

    confirmed_round: int = 0
    state_root: bytes = b""
    tokens: int = 0
    loss: float = 0.0


class Terms(NamedTuple):
    """What a manifest says about credit."""

    tokens_per_weight: int
    max_weight: int
    flops_per_token: int
    hold_rounds: int
    audit_rate: float
    audit_first: int

    @classmethod
    def of(cls, manifest: Manifest) -> Terms:
        """The terms of a manifest; `diloco` lets a fast peer take up to four times the inner steps."""
        strategy = manifest.strategy
        steps = manifest.most_inner_steps * SPEED_SCALE if isinstance(strategy, DiLoCo) else 1
        return cls(
            manifest.tokens_per_weight,
            steps * manifest.most_round_weight,
            manifest.credit.flops_per_token,
            manifest.hold_rounds,
            manifest.audit.rate if manifest.is_audited else 0.0,
            manifest.audit.first if manifest.is_audited else 0,
        )


class RoundSet:
    """A set of round numbers as disjoint intervals: a few bytes for a peer that never missed one."""

    __slots__ = ("_bounds",)

    def __init__(self, bounds: Iterable[int] = ()) -> None:
        self._bounds = list(bounds)

    @property
    def bounds(self) -> list[int]:
        """Where the intervals start and end, in turn and in order."""
        return self._bounds

    def __contains__(self, number: int) -> bool:
        return bisect_right(self._bounds, number) % 2 == 1

    def newest(self, limit: int, before: int | None = None) -> list[int]:
        """The largest numbers, those below `before` where there is one; the largest first."""
        found: list[int] = []
        for place in range(len(self._bounds) - 2, -1, -2):
            start, end = self._bounds[place : place + 2]
            end = end if before is None else min(end, before)
            found += range(end - 1, max(start, end - limit + len(found)) - 1, -1)
            if len(found) >= limit:
                break
        return found

    def add(self, number: int) -> None:
        """Put `number` into the set."""
        place = bisect_right(self._bounds, number)
        if place % 2:
            return
        joins_left = place > 0 and self._bounds[place - 1] == number
        joins_right = place < len(self._bounds) and self._bounds[place] == number + 1
        start, end = place - joins_left, place + joins_right
        edges = ([] if joins_left else [number]) + ([] if joins_right else [number + 1])
        self._bounds[start:end] = edges


@dataclass(slots=True)
class Tally:
    """One account's tokens by state, and what else it is remembered for: see `swarm.badges.Deeds`."""

    account: str
    pending: int = 0
    verified: int = 0
    final: int = 0
    rounds: int = 0
    first: int | None = None
    audits: int = 0
    caught: int = 0
    vouched: int = 0


def rank(tally: Tally) -> tuple[int, str]:
    """By which accounts are ordered, best first."""
    return -tally.verified - tally.final, tally.account


class Standings:
    """The accounts that earned most, without looking at all of them. Made anew when what an account has earned shrinks."""

    __slots__ = ("_bar", "_best")

    def __init__(self, tallies: Iterable[Tally] = ()) -> None:
        self._best: dict[str, Tally] = {}
        self._bar: tuple[int, str] | None = None
        for tally in tallies:
            self.offer(tally)

    def offer(self, tally: Tally) -> None:
        """A tally is new or has grown."""
        if self._bar is None or rank(tally) < self._bar:
            self._best[tally.account] = tally
            if len(self._best) > 2 * KEPT:
                best = self.first(KEPT)
                self._best = {each.account: each for each in best}
                self._bar = rank(best[-1])

    def first(self, limit: int) -> list[Tally]:
        """The best, at most `KEPT`."""
        return sorted(self._best.values(), key=rank)[:limit]


@dataclass(slots=True)
class AuditTotals:
    """What became of a run's audits. Every contribution that is drawn opens a case; those of no other kind are still open.

    A case lapses when its round's credit becomes final, and is moot once its author is suspended for something else.
    """

    contributions: int = 0
    drawn: int = 0
    passed: int = 0
    failed: int = 0
    withheld: int = 0
    undecided: int = 0
    lapsed: int = 0
    moot: int = 0

    @property
    def done(self) -> int:
        """Audits that came to something."""
        return self.passed + self.failed + self.withheld

    @property
    def open(self) -> int:
        """Audits that go on."""
        return self.drawn - self.done - self.undecided - self.lapsed - self.moot


@dataclass(slots=True)
class Evaluations:
    """A run's panels of evaluators that are still heard, by round; what earlier ones agreed on, and how many others there were.

    A panel is disputed if all have spoken without an agreement; it has lapsed if some never spoke, and the others had no quorum.
    """

    open: dict[int, Panel] = field(default_factory=dict)
    agreed: list[Agreed] = field(default_factory=list)
    disputed: int = 0
    lapsed: int = 0


@dataclass(slots=True)
class Member:
    """An admitted key; with a certificate, what it earns goes to an account until it expires or is revoked.

    `contributions` counts the confirmed rounds that it had a part in, up to where they are all audited.
    """

    tally: Tally
    weight_limit: int
    reported: RoundSet = field(default_factory=RoundSet)
    expires_at: int = 0
    revoked: bool = False
    contributions: int = 0
    wrong_audits: int = 0


@dataclass(slots=True)
class Candidate:
    """A proposal and the votes for the states that its peers came to."""

    nomination: Nomination
    votes: dict[bytes, int] = field(default_factory=dict)

    def has_majority(self, state_root: bytes, extra: int = 0) -> bool:
        return 2 * (self.votes.get(state_root, 0) + extra) > len(self.nomination.commits)


@dataclass(slots=True)
class RoundRecord:
    """A round that isn't settled; once it is confirmed, `place` is its place among the confirmed ones."""

    proposals: dict[bytes, Candidate] = field(default_factory=dict)
    ballots: set[tuple[tuple[int, int], str]] = field(default_factory=set)
    claims: list[tuple[Tally, Claim]] = field(default_factory=list)
    confirmed: Confirmation | None = None
    final: bool = False
    held: list[tuple[Tally, int, str]] = field(default_factory=list)
    weighted_loss: float = 0.0
    weight: int = 0
    void: set[str] = field(default_factory=set)
    cases: dict[str, Case] = field(default_factory=dict)
    place: int = 0

    @property
    def next_roster(self) -> frozenset[str] | None:
        """Who takes part after the round; None before it is confirmed."""
        return None if self.confirmed is None else self.proposals[self.confirmed.proposal_hash].nomination.next_roster

    def matches(self, claim: Claim) -> bool:
        confirmed = self.confirmed
        return (
            confirmed is not None and claim.proposal_hash == confirmed.proposal_hash and claim.state_root == confirmed.state_root
        )


@dataclass(slots=True)
class RunRecord:
    """Everything that is known of one run."""

    manifest: Manifest
    terms: Terms
    owner: str = ""
    tickets: dict[bytes, int] = field(default_factory=dict)
    members: dict[str, Member] = field(default_factory=dict)
    tallies: dict[str, Tally] = field(default_factory=dict)
    standings: Standings = field(default_factory=Standings)
    rounds: dict[int, RoundRecord] = field(default_factory=dict)
    confirmed: RoundSet = field(default_factory=RoundSet)
    newest: int | None = None
    unsettled: list[int] = field(default_factory=list)
    grants: dict[int, Permission] = field(default_factory=dict)
    tokens: int = 0
    suspended: dict[str, str] = field(default_factory=dict)
    accusers: dict[str, set[str]] = field(default_factory=dict)
    history: History = field(default_factory=History)
    audits: AuditTotals = field(default_factory=AuditTotals)
    evaluations: Evaluations = field(default_factory=Evaluations)
    certified: dict[str, list[str]] = field(default_factory=dict)

    def keys(self, account: str) -> list[str]:
        """The keys that earn for an account."""
        own = self.members.get(account)
        mine = [account] if own is not None and own.tally.account == account else []
        return [*mine, *self.certified.get(account, ())]
