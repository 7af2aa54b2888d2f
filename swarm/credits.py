"""Credits as a pure fold over the ledger's entries: what anyone recomputes, and what the coordinator itself goes by.

    RunOpened   opens a run under an owner-signed manifest
    Admitted    a key may take part, for itself or for an account whose certificate it has
    Revoked     by that account: the key earns nothing from here on
    Proposed    by a peer of the roster: which commits make up the round
    Reported    by a peer of the proposal: its contribution is *pending*
    Confirmed   a strict majority of the proposal's peers came to one state: contributions to it are *verified*, others void;
                which of the commits are audited follows from it
    Audited     by a peer that was drawn: two bad findings void the contribution, or all of the key's that isn't final;
                or by a peer of the roster that holds proof of a fraud: so many as make a majority count like the latter
    Evaluated   by a peer that was drawn to measure the held-out loss of what a round came to; it moves no credit
    (later)     once round r + hold_rounds is confirmed, round r's credit is *final*

`apply_entry` either changes the state or raises `LedgerInvalid` with the entry's index and the broken rule, and changes nothing.
The state is owned by whoever folds; it holds no more of a settled round than is needed to recognise a replay.
"""

from __future__ import annotations

import heapq
import itertools
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

from swarm.audits import Duty
from swarm.badges import Deeds
from swarm.credit_audits import check_suspended, draw_audits, judge_finding, take_finding
from swarm.credit_evaluations import all_agreed, draw_panel, is_disputed, judge_measurement, take_measurement
from swarm.credit_records import (
    FLOPS_PER_CREDIT,
    KEPT,
    AuditTotals,
    Balance,
    Candidate,
    Member,
    Progress,
    RoundRecord,
    RoundSet,
    RunRecord,
    Tally,
    Terms,
    rank,
)
from swarm.entries import (
    Admission,
    Claim,
    Confirmation,
    Finding,
    Measurement,
    Nomination,
    Opened,
    Opening,
    Permission,
    Revocation,
    check_signature,
    open_body,
)
from swarm.errors import LedgerInvalid, ManifestInvalid, Rejected
from swarm.evaluations import Agreed, Panel
from swarm.history import History
from swarm.ledger import parse_entry
from swarm.manifest import Manifest
from swarm.merkle import MerkleTree, leaf_hash

__all__ = [
    "FLOPS_PER_CREDIT",
    "KEPT",
    "Balance",
    "CreditState",
    "Progress",
    "RoundSet",
    "Terms",
    "apply_entry",
    "first_fault",
    "fold",
    "verify_ledger",
]

PARALLEL_FROM = 4096  # entries; below it a process pool costs more than it saves
CHUNK_ENTRIES = 2048
BROKEN = "the ledger breaks its own rules from this entry on"


class CreditState:
    """What the entries so far amount to, judged for a coordinator's key."""

    def __init__(self, coordinator: str) -> None:
        self.coordinator = coordinator
        self.size = 0
        self._runs: dict[bytes, RunRecord] = {}

    @classmethod
    def restored(cls, coordinator: str, size: int, runs: dict[bytes, RunRecord]) -> CreditState:
        """The state that the records were taken from."""
        state = cls(coordinator)
        state.size, state._runs = size, runs
        return state

    @property
    def records(self) -> dict[bytes, RunRecord]:
        """What there is to write down."""
        return self._runs

    @property
    def run_ids(self) -> tuple[bytes, ...]:
        """The runs that were opened."""
        return tuple(self._runs)

    def manifest(self, run_id: bytes) -> Manifest:
        """The manifest of a run. Raises `Rejected`."""
        return self._run(run_id).manifest

    def is_admitted(self, run_id: bytes, peer_id: str) -> bool:
        """Whether the key was ever admitted."""
        run = self._runs.get(run_id)
        return run is not None and peer_id in run.members

    def account(self, run_id: bytes, peer_id: str) -> tuple[str, int]:
        """Whom an admitted key earns for, and until when (0 = for ever).

        Raises `Rejected` for others, and for those that are revoked or suspended.
        """
        run = self._run(run_id)
        member = self._member(run, peer_id)
        check_suspended(run, peer_id)
        if member.revoked:
            raise Rejected("revoked", "the account has revoked this key", peer_id)
        return member.tally.account, member.expires_at

    def is_newcomer(self, run_id: bytes, peer_id: str) -> bool:
        """Whether all that a key contributes is still audited; so for one that isn't admitted yet."""
        run = self._run(run_id)
        member = run.members.get(peer_id)
        return (0 if member is None else member.contributions) < run.terms.audit_first

    def member_count(self, run_id: bytes) -> int:
        """Number of keys that were admitted."""
        return len(self._run(run_id).members)

    def has_reported(self, run_id: bytes, number: int, peer_id: str) -> bool:
        """Whether the peer's report for the round is in the ledger."""
        member = self._run(run_id).members.get(peer_id)
        return member is not None and number in member.reported

    def knows_proposal(self, run_id: bytes, number: int, proposal_hash: bytes) -> bool:
        """Whether reports that name this proposal can be judged."""
        current = self._run(run_id).rounds.get(number)
        return current is not None and proposal_hash in current.proposals

    def rosters(self, run_id: bytes, number: int) -> list[frozenset[str]]:
        """The rosters that round `number` may have: the confirmed one, or those of all proposals of the round before."""
        before = self._run(run_id).rounds.get(number - 1)
        if before is None:
            return []
        roster = before.next_roster
        if roster is not None:
            return [roster]
        return [proposal.nomination.next_roster for proposal in before.proposals.values()]

    def grant(self, run_id: bytes, number: int) -> Permission | None:
        """The grant that was given for the round."""
        return self._run(run_id).grants.get(number)

    def is_confirmed(self, run_id: bytes, number: int) -> bool:
        """Whether the round is confirmed."""
        return number in self._run(run_id).confirmed

    def duties(self, run_id: bytes, peer_id: str) -> list[Duty]:
        """The audits that a peer is asked for now, the oldest first."""
        run = self._run(run_id)
        newest = run.newest or 0
        cases = itertools.chain.from_iterable(current.cases.values() for current in run.rounds.values())
        return [case.duty for case in cases if case.has_turn(peer_id, newest)]

    def drawn_audits(self, run_id: bytes, number: int) -> int:
        """How many audits of a round aren't decided: right after its confirmation, all that were drawn."""
        current = self._run(run_id).rounds.get(number)
        return 0 if current is None else len(current.cases)

    def open_audits(self, run_id: bytes) -> tuple[int, int]:
        """How many audits aren't decided, and for how many of these nobody spoke while their first auditor's turn lasted."""
        run = self._run(run_id)
        cases = [case for number in run.unsettled for case in run.rounds[number].cases.values()]
        return len(cases), sum(case.is_overdue(run.newest or 0) for case in cases)

    def is_void(self, run_id: bytes, number: int, peer_id: str) -> bool:
        """Whether audits took what the peer earned, or will have earned, in a round that isn't forgotten yet."""
        current = self._run(run_id).rounds.get(number)
        return current is not None and peer_id in current.void

    def suspended(self, run_id: bytes) -> dict[str, str]:
        """The keys that audits have suspended, and what they found."""
        return self._run(run_id).suspended

    def audit_totals(self, run_id: bytes) -> AuditTotals:
        """What became of the run's audits."""
        return self._run(run_id).audits

    def panels(self, run_id: bytes) -> list[Panel]:
        """The panels of evaluators that are still heard, in the order of their rounds."""
        return [panel for _, panel in sorted(self._run(run_id).evaluations.open.items())]

    def evaluations_due(self, run_id: bytes, peer_id: str) -> list[Panel]:
        """Of these, those that a peer is drawn for and has not told its loss."""
        return [each for each in self.panels(run_id) if peer_id in each.evaluators and peer_id not in each.statements]

    def agreed_evaluations(self, run_id: bytes) -> list[Agreed]:
        """What quorums agreed on, in the order of the rounds; of very many every other one is forgotten."""
        return all_agreed(self._run(run_id))

    def is_disputed(self, run_id: bytes, number: int) -> bool:
        """Whether all evaluators of a round have spoken, and don't agree."""
        panel = self._run(run_id).evaluations.open.get(number)
        return panel is not None and is_disputed(self._run(run_id), panel)

    def disputed_evaluations(self, run_id: bytes) -> int:
        """How many panels didn't agree though all had spoken."""
        run = self._run(run_id)
        return run.evaluations.disputed + sum(is_disputed(run, panel) for panel in run.evaluations.open.values())

    def history(self, run_id: bytes) -> History:
        """The course of the run over its confirmed rounds."""
        return self._run(run_id).history

    def keys(self, run_id: bytes, account: str) -> list[str]:
        """The keys that earn for an account."""
        return self._run(run_id).keys(account)

    def newest_reports(self, run_id: bytes, peer_id: str, limit: int, before: int | None = None) -> list[int]:
        """The last rounds that a key has reported, below `before` where there is one; the newest first."""
        member = self._run(run_id).members.get(peer_id)
        return [] if member is None else member.reported.newest(limit, before)

    def deeds(self, run_id: bytes, account: str) -> Deeds:
        """What badges go by."""
        run = self._run(run_id)
        tally = run.tallies.get(account)
        if tally is None:
            return Deeds()
        earned = (tally.verified + tally.final) * run.terms.flops_per_token
        suspended = bool(run.suspended) and any(key in run.suspended for key in run.keys(account))
        return Deeds(earned, tally.rounds, tally.first, tally.audits, tally.caught, tally.vouched, suspended)

    def account_count(self, run_id: bytes) -> int:
        """Number of accounts."""
        return len(self._run(run_id).tallies)

    def progress(self, run_id: bytes) -> Progress:
        """The newest confirmed round; its loss is the mean over the verified commits, by weight."""
        run = self._run(run_id)
        newest = None if run.newest is None else run.rounds[run.newest]
        if newest is None or newest.confirmed is None:
            return Progress()
        loss = newest.weighted_loss / newest.weight if newest.weight else 0.0
        return Progress(newest.confirmed.round, newest.confirmed.state_root, run.tokens, loss)

    def balance(self, run_id: bytes, peer_id: str) -> Balance:
        """What the peer's account has, or the account itself; nothing if it was never admitted."""
        run = self._run(run_id)
        member = run.members.get(peer_id)
        tally = run.tallies.get(peer_id) if member is None else member.tally
        return Balance(peer_id, peer_id) if tally is None else _balance(run, peer_id, tally)

    def leaderboard(self, run_id: bytes, limit: int, first: int = 0) -> list[Balance]:
        """The accounts that earned most, best first; from place `first` on. Cheap as far as `KEPT` places."""
        run, end = self._run(run_id), first + limit
        best = run.standings.first(end) if end <= KEPT else heapq.nsmallest(end, run.tallies.values(), key=rank)
        return [_balance(run, tally.account, tally) for tally in best[first:]]

    def balances(self, run_id: bytes) -> dict[str, Balance]:
        """Every account's balance."""
        run = self._run(run_id)
        return {account: _balance(run, account, tally) for account, tally in sorted(run.tallies.items())}

    def judge(self, opened: Opened) -> None:
        """Whether `opened` may be the next entry. Raises `Rejected` with the broken rule; changes nothing."""
        match opened:
            case Claim():
                self._judge_claim(opened)
            case Nomination():
                self._judge_nomination(opened)
            case Confirmation():
                self._judge_confirmation(opened)
            case Admission():
                self._judge_admission(opened)
            case Revocation():
                self._judge_revocation(opened)
            case Finding():
                judge_finding(self._run(opened.run_id), opened)
            case Measurement():
                judge_measurement(self._run(opened.run_id), opened)
            case Permission():
                if opened.round in self._run(opened.run_id).grants:
                    raise Rejected("already_granted", f"round {opened.round}", opened.peer_id)
            case Opening():
                if opened.run_id in self._runs:
                    raise Rejected("already_open", "a run is opened once")

    def judge_with(self, nomination: Nomination, claim: Claim) -> None:
        """Whether `claim` may follow right after `nomination`, which it names. Raises `Rejected`."""
        self._judge_nomination(nomination)
        self._judge_listed(self._judge_claimant(claim), nomination, claim)

    def apply(self, opened: Opened, at_us: int = 0) -> None:
        """Take in the next entry, appended at `at_us`. Raises `Rejected` and changes nothing if it breaks a rule."""
        self.judge(opened)
        match opened:
            case Claim():
                self._take_claim(self._runs[opened.run_id], opened)
            case Nomination():
                current = self._runs[opened.run_id].rounds.setdefault(opened.round, RoundRecord())
                current.ballots.add((opened.ballot, opened.leader))
                current.proposals[opened.proposal_hash] = Candidate(opened)
            case Confirmation():
                _confirm(self._runs[opened.run_id], opened, at_us)
            case Admission():
                _admit(self._runs[opened.run_id], opened)
            case Permission():
                self._runs[opened.run_id].grants[opened.round] = opened
            case Revocation():
                self._runs[opened.run_id].members[opened.peer_id].revoked = True
            case Finding():
                take_finding(self._runs[opened.run_id], opened)
            case Measurement():
                take_measurement(self._runs[opened.run_id], opened, self.size)
            case Opening():
                self._runs[opened.run_id] = RunRecord(opened.manifest, Terms.of(opened.manifest), opened.owner)
        self.size += 1

    def confirms(self, claim: Claim, nomination: Nomination | None = None) -> Confirmation | None:
        """The confirmation that becomes due once `claim` (and, before it, `nomination`) is taken in."""
        if claim.round in self._run(claim.run_id).confirmed:
            return None
        current = self._run(claim.run_id).rounds.get(claim.round, RoundRecord())
        proposal = current.proposals.get(claim.proposal_hash)
        if proposal is None and nomination is not None:
            proposal = Candidate(nomination)
        if proposal is None or not proposal.has_majority(claim.state_root, extra=1):
            return None
        return Confirmation(claim.run_id, claim.round, claim.proposal_hash, claim.state_root)

    def _run(self, run_id: bytes) -> RunRecord:
        run = self._runs.get(run_id)
        if run is None:
            raise Rejected("unknown_run", run_id.hex()[:16])
        return run

    def _member(self, run: RunRecord, peer_id: str) -> Member:
        member = run.members.get(peer_id)
        if member is None:
            raise Rejected("not_admitted", "the key was never admitted", peer_id)
        return member

    def _open_round(self, run: RunRecord, number: int, sender: str) -> RoundRecord | None:
        current = run.rounds.get(number)
        if current is None and number in run.confirmed:
            raise Rejected("round_closed", f"round {number} is settled", sender)
        return current

    def _judge_admission(self, admission: Admission) -> None:
        """A key is admitted once; after that only a certificate that lasts longer, or its first one, changes anything."""
        run = self._run(admission.run_id)
        member = run.members.get(admission.peer_id)
        if member is None:
            if run.manifest.admission.kind == "invitation":
                _judge_ticket(run, admission)
            return
        if member.revoked:
            raise Rejected("revoked", "the account has revoked this key", admission.peer_id)
        if member.tally.account not in (admission.peer_id, admission.account):
            raise Rejected("other_account", "the key earns for another account", admission.peer_id)
        if admission.expires_at <= member.expires_at:
            raise Rejected("already_admitted", "a key is admitted once", admission.peer_id)

    def _judge_revocation(self, revocation: Revocation) -> None:
        account, _ = self.account(revocation.run_id, revocation.peer_id)
        if account != revocation.account or account == revocation.peer_id:
            raise Rejected("other_account", "only the account that certified a key revokes it", revocation.account)

    def _judge_claimant(self, claim: Claim) -> Member:
        run = self._run(claim.run_id)
        member = self._member(run, claim.peer_id)
        check_suspended(run, claim.peer_id)
        if member.revoked:
            raise Rejected("revoked", "the account has revoked this key", claim.peer_id)
        if claim.round in member.reported:
            raise Rejected("already_reported", f"round {claim.round}", claim.peer_id)
        return member

    def _judge_claim(self, claim: Claim) -> None:
        member = self._judge_claimant(claim)
        current = self._open_round(self._run(claim.run_id), claim.round, claim.peer_id)
        proposal = None if current is None else current.proposals.get(claim.proposal_hash)
        if proposal is None:
            raise Rejected("unknown_proposal", f"round {claim.round}", claim.peer_id)
        self._judge_listed(member, proposal.nomination, claim)

    def _judge_listed(self, member: Member, nomination: Nomination, claim: Claim) -> None:
        if (nomination.run_id, nomination.round) != (claim.run_id, claim.round):
            raise Rejected("wrong_round", "the proposal is of another round", claim.peer_id)
        listed = nomination.commits.get(claim.peer_id)
        if listed is None or listed.commit_hash != claim.commit_hash:
            raise Rejected("not_in_proposal", "the proposal doesn't list this commit", claim.peer_id)
        if listed.weight != claim.weight:
            raise Rejected("wrong_weight", f"{claim.weight}, the proposal says {listed.weight}", claim.peer_id)
        self._judge_amount(member, claim)

    def _judge_amount(self, member: Member, claim: Claim) -> None:
        terms = self._run(claim.run_id).terms
        limit = min(terms.max_weight, member.weight_limit or terms.max_weight)
        if claim.weight > limit:
            raise Rejected("too_heavy", f"weight {claim.weight}, at most {limit}", claim.peer_id)
        if claim.tokens != claim.weight * terms.tokens_per_weight:
            raise Rejected("wrong_tokens", f"{claim.tokens} tokens for weight {claim.weight}", claim.peer_id)

    def _judge_nomination(self, nomination: Nomination) -> None:
        run = self._run(nomination.run_id)
        self._member(run, nomination.leader)
        current = self._open_round(run, nomination.round, nomination.leader) or RoundRecord()
        if nomination.proposal_hash in current.proposals:
            raise Rejected("already_proposed", f"round {nomination.round}", nomination.leader)
        if (nomination.ballot, nomination.leader) in current.ballots:
            raise Rejected("two_proposals", f"round {nomination.round}, ballot {nomination.ballot}", nomination.leader)
        for peer_id in nomination.commits:
            self._member(run, peer_id)
        _judge_roster(run, nomination)

    def _judge_confirmation(self, confirmation: Confirmation) -> None:
        run = self._run(confirmation.run_id)
        if confirmation.round in run.confirmed:
            raise Rejected("already_confirmed", f"round {confirmation.round}")
        current = run.rounds.get(confirmation.round, RoundRecord())
        proposal = current.proposals.get(confirmation.proposal_hash)
        if proposal is None:
            raise Rejected("unknown_proposal", f"round {confirmation.round}")
        if not proposal.has_majority(confirmation.state_root):
            raise Rejected("no_majority", f"round {confirmation.round}")

    def _take_claim(self, run: RunRecord, claim: Claim) -> None:
        current = run.rounds[claim.round]
        member = run.members[claim.peer_id]
        member.reported.add(claim.round)
        if current.confirmed is None:
            votes = current.proposals[claim.proposal_hash].votes
            votes[claim.state_root] = votes.get(claim.state_root, 0) + 1
            current.claims.append((member.tally, claim))
            member.tally.pending += claim.tokens
            return
        if current.matches(claim):
            _verify(run, current, member.tally, claim)
        _prune(run, claim.round)


def apply_entry(state: CreditState, index: int, entry: bytes, check_signatures: bool = True) -> Opened:
    """Fold one entry into the state. Raises `LedgerInvalid` naming the index and the fault, and then changes nothing."""
    if index != state.size:
        raise LedgerInvalid(f"entry {index}: out of order, expected entry {state.size}")
    try:
        parsed = parse_entry(entry)
        opened = open_body(parsed, state.coordinator, check_signatures)
        state.apply(opened, parsed.appended_at_us)
    except (Rejected, ManifestInvalid) as error:
        raise _fault(index, error) from error
    return opened


def fold(entries: Iterable[bytes], coordinator: str, check_signatures: bool = True) -> CreditState:
    """The state after `entries`. Raises `LedgerInvalid`."""
    state = CreditState(coordinator)
    for index, entry in enumerate(entries):
        apply_entry(state, index, entry, check_signatures)
    return state


def verify_ledger(
    entries: Sequence[bytes],
    coordinator: str,
    workers: int = 0,
    *,
    every_signature: bool = False,
    tree: MerkleTree | None = None,
) -> CreditState:
    """Check every entry's signature and every rule, and return the balances. Raises `LedgerInvalid` naming the first fault.

    Signatures are checked by `workers` processes (0 = one per processor) where the ledger is long enough to gain by it;
    `every_signature` also checks those of commits and results, which the reports that they are in are signed over. Where there is
    a `tree`, the entries are added to it.
    """
    workers = workers or os.cpu_count() or 1
    chunks = _chunks(entries, coordinator, every_signature)
    if workers == 1 or len(entries) < PARALLEL_FROM:
        return _folded(entries, coordinator, itertools.starmap(first_fault, chunks), tree)
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        return _folded(entries, coordinator, pool.map(first_fault, *zip(*chunks, strict=True)), tree)


def _folded(
    entries: Sequence[bytes], coordinator: str, faults: Iterator[tuple[int, str] | None], tree: MerkleTree | None
) -> CreditState:
    """The state after all entries, of which each chunk's first fault is found elsewhere."""
    state, fault = CreditState(coordinator), None
    for index, entry in enumerate(entries):
        if index % CHUNK_ENTRIES == 0:
            if tree is not None:  # while the processes are busy with signatures
                tree.extend(map(leaf_hash, entries[index : index + CHUNK_ENTRIES]))
            fault = next(faults)
        if fault is not None and fault[0] == index:
            raise LedgerInvalid(fault[1], BROKEN)
        apply_entry(state, index, entry, check_signatures=False)
    return state


def _chunks(entries: Sequence[bytes], coordinator: str, every_signature: bool) -> Iterator[tuple[int, list[bytes], str, bool]]:
    for first in range(0, len(entries), CHUNK_ENTRIES):
        yield first, list(entries[first : first + CHUNK_ENTRIES]), coordinator, every_signature


def first_fault(first: int, entries: list[bytes], coordinator: str, every_signature: bool = True) -> tuple[int, str] | None:
    """The first of some entries whose signature isn't valid, and why; their indices start at `first`."""
    check = open_body if every_signature else check_signature
    for index, entry in enumerate(entries, first):
        try:
            check(parse_entry(entry), coordinator)
        except (Rejected, ManifestInvalid) as error:
            return index, _fault(index, error).message
    return None


def _fault(index: int, error: Rejected | ManifestInvalid) -> LedgerInvalid:
    who = f" ({error.sender})" if isinstance(error, Rejected) and error.sender else ""
    return LedgerInvalid(f"entry {index}: {error}{who}", BROKEN)


def _judge_roster(run: RunRecord, nomination: Nomination) -> None:
    before = run.rounds.get(nomination.round - 1)
    roster = None if before is None else before.next_roster
    if roster is None:
        return
    if nomination.leader not in roster:
        raise Rejected("not_in_roster", f"round {nomination.round}", nomination.leader)
    strangers = nomination.commits.keys() - roster
    if strangers:
        raise Rejected("not_in_roster", f"{min(strangers)} in round {nomination.round}", nomination.leader)


def _judge_ticket(run: RunRecord, admission: Admission) -> None:
    invited = admission.invited
    if invited is None:
        raise Rejected("not_invited", "the run is by invitation", admission.peer_id)
    if invited.owner != run.owner:
        raise Rejected("bad_ticket", "not of the run's owner", admission.peer_id)
    if run.tickets.get(invited.ticket, 0) >= invited.uses:
        raise Rejected("ticket_used_up", f"{invited.uses} keys have used it", admission.peer_id)


def _admit(run: RunRecord, admission: Admission) -> None:
    if admission.peer_id not in run.members and admission.invited is not None:
        ticket = admission.invited.ticket
        run.tickets[ticket] = run.tickets.get(ticket, 0) + 1
    tally = run.tallies.setdefault(admission.account, Tally(admission.account))
    before = run.members.get(admission.peer_id)
    if admission.account != admission.peer_id and (before is None or before.tally is not tally):
        run.certified.setdefault(admission.account, []).append(admission.peer_id)
    member = run.members.setdefault(admission.peer_id, Member(tally, admission.weight_limit))
    member.tally, member.weight_limit, member.expires_at = tally, admission.weight_limit, admission.expires_at
    run.standings.offer(tally)


def _confirm(run: RunRecord, confirmation: Confirmation, at_us: int) -> None:
    current = run.rounds[confirmation.round]
    current.confirmed = confirmation
    current.place = run.history.confirmed(at_us, len(current.proposals[confirmation.proposal_hash].nomination.commits))
    run.confirmed.add(confirmation.round)
    for tally, claim in current.claims:
        tally.pending -= claim.tokens
        if current.matches(claim):
            _verify(run, current, tally, claim)
    current.claims = []
    run.newest = confirmation.round if run.newest is None else max(run.newest, confirmation.round)
    heapq.heappush(run.unsettled, confirmation.round)
    draw_audits(run, confirmation, current)
    draw_panel(run, confirmation, current, at_us)
    while run.unsettled and run.unsettled[0] + run.terms.hold_rounds <= run.newest:
        _finalise(run, heapq.heappop(run.unsettled))
    _prune(run, confirmation.round - 1)


def _verify(run: RunRecord, current: RoundRecord, tally: Tally, claim: Claim) -> None:
    run.tokens += claim.tokens
    current.weighted_loss += claim.weight * claim.loss
    current.weight += claim.weight
    run.history.contributed(current.place, claim.weight, claim.tokens, claim.loss)
    if claim.peer_id in current.void:
        return
    tally.rounds += claim.weight > 0
    if claim.weight and (tally.first is None or current.place < tally.first):
        tally.first = current.place
    if current.final:
        tally.final += claim.tokens
    else:
        tally.verified += claim.tokens
        current.held.append((tally, claim.tokens, claim.peer_id))
    run.standings.offer(tally)


def _finalise(run: RunRecord, number: int) -> None:
    current = run.rounds[number]
    current.final = True
    run.audits.lapsed += len(current.cases)
    current.cases = {}
    for tally, tokens, _ in current.held:
        tally.verified -= tokens
        tally.final += tokens
    current.held = []
    _prune(run, number)


def _prune(run: RunRecord, number: int) -> None:
    """Forget a final round that no proposal can follow and no report can come for."""
    current = run.rounds.get(number)
    if current is None or current.confirmed is None or not current.final or number + 1 not in run.confirmed:
        return
    commits = current.proposals[current.confirmed.proposal_hash].nomination.commits
    if all(number in run.members[peer_id].reported for peer_id in commits):
        del run.rounds[number]


def _balance(run: RunRecord, peer_id: str, tally: Tally) -> Balance:
    rate = run.terms.flops_per_token
    return Balance(
        peer_id,
        tally.account,
        tally.pending * rate,
        tally.verified * rate,
        tally.final * rate,
        tally.rounds,
        tally.verified + tally.final,
    )
