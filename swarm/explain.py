"""Why a key earned what it did in one round, from the ledger alone: the same answer for everybody who asks."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from swarm.credits import CreditState
from swarm.entries import Admission, Claim, Confirmation, Finding, Nomination, Opened, Revocation, open_entry
from swarm.errors import LedgerInvalid, ManifestInvalid, Rejected

REASONS: dict[str, str] = {
    "final": "It earned, and the credit is final.",
    "verified": "It earned; the credit becomes final once {hold} more rounds are confirmed.",
    "pending": "It reported its work; the round is confirmed once a majority of its peers have reported the same state.",
    "never_admitted": "This key was never admitted to the run: has it joined with this key?",
    "revoked": "The account had revoked this key before it reported.",
    "not_yet": "The ledger doesn't know this round: it isn't over, or nobody has reported it yet.",
    "not_in_roster": "It wasn't in the round's roster: it joined later, had left, or was left out after it went silent.",
    "not_included": "It was in the roster, but its contribution isn't in the proposal that made the round: the commit came too "
    "late, its parts couldn't be fetched, or it was paused. Its log of that time says which.",
    "no_work": "It took part without work of its own: in its first round, while following, or with nothing finished in time.",
    "not_reported": "Its contribution is in the round, but its report has not come. A peer keeps reports while it can't reach "
    "the coordinator, and sends them later: `swarm status` shows how many wait.",
    "other_proposal": "It reported a proposal that didn't make the round.",
    "withheld": "It was drawn for an audit, and two auditors in turn couldn't get what it had committed to, so it earns nothing: "
    "a peer has to be reachable for some rounds after its work.",
    "failed_audit": "Its work was found wrong ({audit}): what the key had and wasn't final was taken, and it is suspended.",
    "suspended": "The key had been suspended before it reported, as its work was found wrong ({audit}).",
    "other_state": "The state that it came to isn't the majority's, so its contribution is void: memory or disk may be faulty.",
}


@dataclass(frozen=True)
class Explanation:
    """What is known of one key in one round.

    `tokens` are those that it was credited for, or will be; `audits` has a line for each auditor that looked at it.
    """

    peer_id: str
    account: str
    round: int
    reason: str
    why: str
    tokens: int = 0
    flops: int = 0
    audits: tuple[str, ...] = ()


@dataclass
class _Seen:
    """What the ledger has about the round and the key."""

    admitted: bool = False
    revoked_at: int | None = None
    reported_at: int | None = None
    proposals: dict[bytes, Nomination] = field(default_factory=dict)
    before: dict[bytes, Nomination] = field(default_factory=dict)
    confirmed: Confirmation | None = None
    confirmed_before: Confirmation | None = None
    claim: Claim | None = None
    void: bool = False
    findings: list[Finding] = field(default_factory=list)


def explain(entries: Iterable[bytes], coordinator: str, run_id: bytes, peer_id: str, number: int) -> Explanation:
    """Fold the ledger and say what came of round `number` for a key. Signatures are left to `swarm ledger verify`.

    Raises `LedgerInvalid` for a ledger that breaks its rules.
    """
    state, seen = CreditState(coordinator), _Seen()
    for index, raw in enumerate(entries):
        try:
            opened = open_entry(raw, coordinator, check_signatures=False)
            state.apply(opened)
        except (Rejected, ManifestInvalid) as error:
            raise LedgerInvalid(f"entry {index}: {error}", "check it with: swarm ledger verify") from error
        if opened.run_id == run_id:
            _note(seen, index, opened, peer_id, number)
            seen.void = seen.void or state.is_void(run_id, number, peer_id)
    reason = _reason(state, seen, run_id, peer_id, number)
    earns = reason in ("final", "verified", "pending") and seen.claim is not None
    tokens = seen.claim.tokens if earns and seen.claim is not None else 0
    credit = state.manifest(run_id).credit
    account = state.balance(run_id, peer_id).account
    found_wrong = state.suspended(run_id).get(peer_id, "")
    why = REASONS[reason].format(hold=state.manifest(run_id).hold_rounds, audit=found_wrong)
    audits = tuple(f"{item.auditor}: {item.finding}{item.reason and f' ({item.reason})'}" for item in seen.findings)
    return Explanation(peer_id, account, number, reason, why, tokens, tokens * credit.flops_per_token, audits)


def _note(seen: _Seen, index: int, opened: Opened, peer_id: str, number: int) -> None:
    match opened:
        case Admission() if opened.peer_id == peer_id:
            seen.admitted = True
        case Revocation() if opened.peer_id == peer_id:
            seen.revoked_at = index
        case Finding() if (opened.round, opened.peer_id) == (number, peer_id):
            seen.findings.append(opened)
        case Nomination() if opened.round == number:
            seen.proposals[opened.proposal_hash] = opened
        case Nomination() if opened.round == number - 1:
            seen.before[opened.proposal_hash] = opened
        case Confirmation() if opened.round == number:
            seen.confirmed = opened
        case Confirmation() if opened.round == number - 1:
            seen.confirmed_before = opened
        case Claim() if (opened.round, opened.peer_id) == (number, peer_id):
            seen.claim, seen.reported_at = opened, index


def _reason(state: CreditState, seen: _Seen, run_id: bytes, peer_id: str, number: int) -> str:
    if not seen.admitted:
        return "never_admitted"
    if not seen.proposals:
        return "not_yet"
    if seen.claim is not None:
        return _of_claim(state, seen, seen.claim, run_id, number)
    if peer_id in state.suspended(run_id):
        return "suspended"
    if seen.revoked_at is not None:
        return "revoked"
    made = seen.proposals.get(seen.confirmed.proposal_hash) if seen.confirmed is not None else None
    candidates = [made] if made is not None else list(seen.proposals.values())
    listed = next((item.commits[peer_id] for item in candidates if peer_id in item.commits), None)
    if listed is None:
        return "not_included" if _was_in_roster(seen, peer_id) else "not_in_roster"
    return "not_reported" if listed.weight else "no_work"


def _of_claim(state: CreditState, seen: _Seen, claim: Claim, run_id: bytes, number: int) -> str:
    confirmed = seen.confirmed
    if not claim.weight:
        return "no_work"
    if confirmed is None:
        return "pending"
    if claim.proposal_hash != confirmed.proposal_hash:
        return "other_proposal"
    if claim.state_root != confirmed.state_root:
        return "other_state"
    if seen.void:
        return "failed_audit" if claim.peer_id in state.suspended(run_id) else "withheld"
    newest = state.progress(run_id).confirmed_round
    return "final" if newest >= number + state.manifest(run_id).hold_rounds else "verified"


def _was_in_roster(seen: _Seen, peer_id: str) -> bool:
    decided = seen.before.get(seen.confirmed_before.proposal_hash) if seen.confirmed_before is not None else None
    rosters = [decided] if decided is not None else list(seen.before.values())
    return any(peer_id in nomination.next_roster for nomination in rosters)
