"""The stateless half of reading a ledger: from an entry's bytes to a small frozen value.

`open_entry` checks what an entry says by itself: shapes, signatures, and that its parts belong together. Whether it may stand
where it stands depends on the entries before it, which is `swarm.credits`. Checking signatures can be left out where that was
done already, or is done by other processes with `check_signature`.
"""

from __future__ import annotations

import math
from typing import NamedTuple, TypeVar

from google.protobuf.message import Message

from swarm.accounts import CLOCK_SLACK_S, open_held
from swarm.audits import FINDINGS, beacon_of
from swarm.errors import Rejected
from swarm.evaluations import LARGEST_LOSS, MOST_PROMPTS, MOST_TEXT_BYTES, cleaned
from swarm.identity import public_key_of
from swarm.ledger import open_manifest, parse_entry
from swarm.manifest import Manifest
from swarm.merkle import HASH_BYTES
from swarm.messages import DEFAULT_SIZE_LIMIT, KINDS, SIZE_LIMITS, check_signed, open_signed, parse, payload_hash
from swarm.rpc.v1.ledger_pb2 import LedgerEntry, Report, RoundConfirmed, RunOpened
from swarm.rpc.v1.signed_pb2 import (
    AdmissionToken,
    AuditVerdict,
    Commit,
    Evaluation,
    Grant,
    KeyRevocation,
    Proposal,
    Result,
    Signed,
)
from swarm.tickets import Invited, open_ticket

MAX_ROUND = 1 << 48
MAX_REASON = 32
SIGNED_BODIES: dict[str, tuple[type[Message], bool]] = {  # the message, and whether a peer signs it or the coordinator
    "reported": (Report, True),
    "proposed": (Proposal, True),
    "confirmed": (RoundConfirmed, False),
    "admitted": (AdmissionToken, False),
    "granted": (Grant, False),
    "revoked": (KeyRevocation, True),
    "audited": (AuditVerdict, True),
    "evaluated": (Evaluation, True),
}

M = TypeVar("M", bound=Message)


class Opening(NamedTuple):
    """A run begins under this manifest, which its owner has signed."""

    run_id: bytes
    manifest: Manifest
    owner: str = ""


class Admission(NamedTuple):
    """A key may take part; what it earns goes to `account`, by a certificate until `expires_at`, or to itself (then 0)."""

    run_id: bytes
    peer_id: str
    account: str
    weight_limit: int
    expires_at: int = 0
    invited: Invited | None = None


class Commitment(NamedTuple):
    """What a proposal says about one peer's commit."""

    commit_hash: bytes
    weight: int


class Nomination(NamedTuple):
    """A leader's proposal: the commits that make up the round and the roster of the next one."""

    run_id: bytes
    round: int
    proposal_hash: bytes
    ballot: tuple[int, int]
    leader: str
    commits: dict[str, Commitment]
    next_roster: frozenset[str]


class Claim(NamedTuple):
    """A peer's report: its commit, the proposal that it followed and the state that it came to."""

    run_id: bytes
    round: int
    peer_id: str
    proposal_hash: bytes
    state_root: bytes
    commit_hash: bytes
    weight: int
    tokens: int
    loss: float


class Confirmation(NamedTuple):
    """The state that the majority of a round's reports came to; from `beacon` follows which commits are audited.

    `audit_rate` is their share where the operator wants another than the manifest's; 0 otherwise.
    """

    run_id: bytes
    round: int
    proposal_hash: bytes
    state_root: bytes
    beacon: bytes = b""
    audit_rate: float = 0.0


class Revocation(NamedTuple):
    """An account doesn't vouch for a key any more."""

    run_id: bytes
    account: str
    peer_id: str


class Finding(NamedTuple):
    """What an auditor found about a commit."""

    run_id: bytes
    round: int
    peer_id: str
    commit_hash: bytes
    auditor: str
    finding: str
    reason: str


class Measurement(NamedTuple):
    """The held-out loss of a state, as an evaluator measured it, and what the model wrote."""

    run_id: bytes
    round: int
    peer_id: str
    state_root: bytes
    samples: int
    loss: float
    texts: tuple[str, ...]
    issued_at: int


class Permission(NamedTuple):
    """A coordinator's grant to go on without a quorum."""

    run_id: bytes
    round: int
    peer_id: str
    base_root: bytes
    present: tuple[str, ...]


Opened = Opening | Admission | Nomination | Claim | Confirmation | Permission | Revocation | Finding | Measurement


def open_entry(entry: bytes, coordinator: str, check_signatures: bool = True) -> Opened:
    """Read one entry. Raises `Rejected` or `ManifestInvalid`."""
    return open_body(parse_entry(entry), coordinator, check_signatures)


def open_body(entry: LedgerEntry, coordinator: str, check_signatures: bool = True) -> Opened:
    """Read one parsed entry. Raises `Rejected` or `ManifestInvalid`."""
    match entry.WhichOneof("body"):
        case "reported":
            return open_report(entry.reported, check_signatures)
        case "proposed":
            return open_proposal(entry.proposed, check_signatures)
        case "confirmed":
            return _open_confirmed(entry.confirmed, coordinator, check_signatures)
        case "admitted":
            return _open_admitted(entry.admitted, coordinator, check_signatures)
        case "granted":
            return _open_granted(entry.granted, coordinator, check_signatures)
        case "revoked":
            return open_revocation(entry.revoked, check_signatures)
        case "audited":
            return open_verdict(entry.audited, check_signatures)
        case "evaluated":
            return open_evaluation(entry.evaluated, check_signatures)
        case "run_opened":
            return _open_run(entry.run_opened)
    raise Rejected("malformed", "an entry without a body")


def check_signature(entry: LedgerEntry, coordinator: str) -> None:
    """Check an entry's own signature and nothing else. Raises `Rejected` or `ManifestInvalid`.

    A report's covers the commit and the result inside, byte for byte. Theirs, by the same key, matter to whoever gets a commit or
    a result without the report.
    """
    body = entry.WhichOneof("body")
    if body == "run_opened":
        _open_run(entry.run_opened)
        return
    if body not in SIGNED_BODIES:
        raise Rejected("malformed", "an entry without a body")
    expected, by_peer = SIGNED_BODIES[body]
    limit = SIZE_LIMITS.get(expected, DEFAULT_SIZE_LIMIT)
    check_signed(getattr(entry, body), KINDS[expected], limit, None if by_peer else coordinator)


def open_report(signed: Signed, check_signatures: bool = True) -> Claim:
    """Read a peer's report with the commit and the result inside. Raises `Rejected`."""
    return _read_report(signed, check_signatures)[0]


def take_report_apart(signed: Signed) -> tuple[Claim, tuple[Signed, Signed, Signed]]:
    """Read a report of which no signature was checked, and the three messages whose signatures have to be. Raises `Rejected`."""
    claim, report = _read_report(signed, check_signatures=False)
    return claim, (signed, report.commit, report.result)


def _read_report(signed: Signed, check_signatures: bool) -> tuple[Claim, Report]:
    peer_id = signed.signer
    report = _open(signed, Report, None, check_signatures)
    commit = _open(report.commit, Commit, peer_id, check_signatures)
    result = _open(report.result, Result, peer_id, check_signatures)
    _check_together(report, commit, result, peer_id)
    claim = Claim(
        report.run_id,
        report.round,
        peer_id,
        report.proposal_hash,
        result.state.root,
        payload_hash(report.commit),
        commit.weight,
        commit.tokens,
        commit.loss,
    )
    return claim, report


def open_proposal(signed: Signed, check_signatures: bool = True) -> Nomination:
    """Read a leader's proposal. Raises `Rejected`."""
    proposal = _open(signed, Proposal, None, check_signatures)
    commits = {item.peer_id: Commitment(item.commit_hash, item.weight) for item in proposal.commits}
    roster = frozenset(member.peer_id for member in proposal.next_roster)
    if not commits or len(commits) != len(proposal.commits) or len(roster) != len(proposal.next_roster):
        raise Rejected("malformed", "a proposal without commits or with a peer named twice", signed.signer)
    _check_round(proposal.round, signed.signer)
    ballot = (proposal.ballot.term, proposal.ballot.amendment)
    return Nomination(proposal.run_id, proposal.round, payload_hash(signed), ballot, signed.signer, commits, roster)


def _check_together(report: Report, commit: Commit, result: Result, peer_id: str) -> None:
    if not report.run_id == commit.run_id == result.run_id:
        raise Rejected("wrong_run", "the commit or the result belongs to another run", peer_id)
    if not report.round == commit.round == result.round:
        raise Rejected("wrong_round", "the commit or the result belongs to another round", peer_id)
    if result.proposal_hash != report.proposal_hash:
        raise Rejected("wrong_proposal", "the result follows another proposal", peer_id)
    if len(result.state.root) != HASH_BYTES:
        raise Rejected("malformed", "the state root is not a hash", peer_id)
    if not math.isfinite(commit.loss):
        raise Rejected("not_finite", "the loss is not a number", peer_id)
    _check_round(report.round, peer_id)


def _check_round(number: int, sender: str) -> None:
    if number >= MAX_ROUND:
        raise Rejected("malformed", "the round's number is too large", sender)


def _open_run(opened: RunOpened) -> Opening:
    return Opening(opened.run_id, open_manifest(opened.manifest, opened.run_id), opened.manifest.signer)


def _open_admitted(signed: Signed, coordinator: str, check_signatures: bool) -> Admission:
    token = _open(signed, AdmissionToken, coordinator, check_signatures)
    public_key_of(token.peer_id)
    account = token.account or token.peer_id
    invited = open_ticket(token.ticket, token.run_id) if token.HasField("ticket") else None
    if invited is not None and token.issued_at > invited.expires_at + CLOCK_SLACK_S:
        raise Rejected("ticket_expired", "before it was used", token.peer_id)
    if not token.HasField("held"):
        if account != token.peer_id:
            raise Rejected("uncertified", f"nobody certified the key for the account {account[:64]}", token.peer_id)
        return Admission(token.run_id, token.peer_id, account, token.weight_limit, invited=invited)
    certified = open_held(token.held, token.peer_id)  # by other keys than the entry: checked in any case
    if certified.account != account or not certified.holds_at(token.issued_at):
        raise Rejected("bad_certificate", "for another account or another time", token.peer_id)
    return Admission(token.run_id, token.peer_id, account, token.weight_limit, certified.expires_at, invited)


def open_revocation(signed: Signed, check_signatures: bool = True) -> Revocation:
    """Read an account's revocation. Raises `Rejected`."""
    revocation = _open(signed, KeyRevocation, None, check_signatures)
    if revocation.account != signed.signer:
        raise Rejected("wrong_signer", "only the account that certified a key revokes it", signed.signer)
    return Revocation(revocation.run_id, revocation.account, revocation.peer_id)


def _open_confirmed(signed: Signed, coordinator: str, check_signatures: bool) -> Confirmation:
    confirmed = _open(signed, RoundConfirmed, coordinator, check_signatures)
    rate = confirmed.audit_rate
    if not 0 <= rate <= 1:
        raise Rejected("malformed", "a rate is between 0 and 1", signed.signer)
    return Confirmation(confirmed.run_id, confirmed.round, confirmed.proposal_hash, confirmed.state_root, beacon_of(signed), rate)


def open_verdict(signed: Signed, check_signatures: bool = True) -> Finding:
    """Read what an auditor has found. Raises `Rejected`."""
    verdict = _open(signed, AuditVerdict, None, check_signatures)
    if verdict.finding not in FINDINGS or len(verdict.reason) > MAX_REASON:
        raise Rejected("malformed", "an audit's finding", signed.signer)
    _check_round(verdict.round, signed.signer)
    return Finding(
        verdict.run_id, verdict.round, verdict.peer_id, verdict.commit_hash, signed.signer, verdict.finding, verdict.reason
    )


def open_evaluation(signed: Signed, check_signatures: bool = True) -> Measurement:
    """Read what an evaluator has measured. Raises `Rejected`."""
    said = _open(signed, Evaluation, None, check_signatures)
    _check_round(said.round, signed.signer)
    if not 0 <= said.loss <= LARGEST_LOSS:  # false for what is no number
        raise Rejected("not_finite", "the loss is not one that a model could have", signed.signer)
    if len(said.texts) > MOST_PROMPTS or any(len(text.encode()) > MOST_TEXT_BYTES for text in said.texts):
        raise Rejected("too_large", "an evaluation's texts", signed.signer)
    if any(cleaned(text) != text for text in said.texts):
        raise Rejected("malformed", "an evaluation's texts have characters that can't be shown", signed.signer)
    return Measurement(
        said.run_id, said.round, signed.signer, said.state_root, said.samples, said.loss, tuple(said.texts), said.issued_at
    )


def _open_granted(signed: Signed, coordinator: str, check_signatures: bool) -> Permission:
    grant = _open(signed, Grant, coordinator, check_signatures)
    _check_round(grant.round, signed.signer)
    return Permission(grant.run_id, grant.round, grant.peer_id, grant.base_root, tuple(grant.present))


def _open(signed: Signed, expected: type[M], signer: str | None, check_signatures: bool) -> M:
    if check_signatures:
        return open_signed(signed, expected, signer)
    if signed.kind != KINDS[expected]:
        raise Rejected("wrong_kind", f"expected {KINDS[expected]}", signed.signer)
    if signer is not None and signed.signer != signer:
        raise Rejected("wrong_signer", KINDS[expected], signed.signer)
    if len(signed.payload) > SIZE_LIMITS.get(expected, DEFAULT_SIZE_LIMIT):
        raise Rejected("too_large", KINDS[expected], signed.signer)
    return parse(expected, signed.payload, signed.signer)
