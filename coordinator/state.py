"""Decisions of the coordinator as pure functions of (state, event, now): `decide` reads and never writes.

What is durable changes only by ledger entries (`CreditState.apply`), what is fleeting only by `Presence`. A decision says what is
to be appended, still unsigned where the coordinator signs, and why.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import NamedTuple

from coordinator.limits import check_fresh
from coordinator.orders import NO_ORDERS, PAUSED, RUNNING, Orders
from coordinator.presence import MAX_ADDRESS_CHARACTERS, MAX_ADDRESSES, Presence
from swarm.accounts import CLOCK_SLACK_S, Certified
from swarm.credits import CreditState
from swarm.entries import Admission, Claim, Confirmation, Finding, Measurement, Nomination, Permission, Revocation
from swarm.errors import Rejected
from swarm.manifest import Manifest
from swarm.messages import START_BYTES
from swarm.protocol import OURS, Range, agree, spoken_by
from swarm.rpc.v1.coordinator_pb2 import Announcement, GrantRequest
from swarm.rpc.v1.signed_pb2 import Signed
from swarm.tickets import Invited

MAX_ROSTER = 4096
LONGEST_UPTIME_S = 1e9
RETRY_S = 1.0
VERSION = re.compile(r"^(\d+)\.(\d+)\.(\d+)")


@dataclass(frozen=True)
class State:
    """What decisions go by: one run, what its ledger says, who is alive, and the versions of the protocol that we speak."""

    run_id: bytes
    manifest: Manifest
    credits: CreditState
    presence: Presence
    orders: Orders = NO_ORDERS
    spoken: Range = OURS


@dataclass(frozen=True)
class Announced:
    """A peer says that it is there."""

    peer_id: str
    announcement: Announcement
    payload_hash: bytes
    certified: Certified | None = None
    invited: Invited | None = None


@dataclass(frozen=True)
class Reported:
    """A peer reports a round's contribution, with the proposal where it has it."""

    claim: Claim
    report: Signed
    nomination: Nomination | None
    proposal: Signed | None


@dataclass(frozen=True)
class GrantAsked:
    """A peer asks to go on without a quorum."""

    peer_id: str
    request: GrantRequest


class Now(NamedTuple):
    """The time by both clocks: the wall's for what peers sign, the steady one for how long ago something was."""

    wall_s: float
    steady_s: float


@dataclass(frozen=True)
class RevocationAsked:
    """An account doesn't vouch for a key any more."""

    revocation: Revocation
    signed: Signed


@dataclass(frozen=True)
class Audited:
    """A peer says what it found about another's contribution."""

    finding: Finding
    signed: Signed


@dataclass(frozen=True)
class Evaluated:
    """A peer says what held-out loss it has measured."""

    measured: Measurement
    signed: Signed


Event = Announced | Reported | GrantAsked | RevocationAsked | Audited | Evaluated


@dataclass(frozen=True)
class Admit:
    """Admit a key for the first time, or for an account that has certified it since."""

    peer_id: str
    account: str
    expires_at: int = 0
    invited: Invited | None = None


Append = Admit | Nomination | Claim | Confirmation | Permission | Revocation | Finding | Measurement


@dataclass(frozen=True)
class Decision:
    """What to do about an event, and why. `reason` is a short code; with `accepted` unset nothing is appended."""

    accepted: bool
    reason: str
    detail: str = ""
    append: tuple[Append, ...] = ()
    retry_after_s: float = 0.0


def decide(state: State, event: Event, now: Now) -> Decision:
    """What an event leads to. Never raises for what strangers send."""
    try:
        match event:
            case Announced():
                return _decide_announced(state, event, now)
            case Reported():
                return _decide_reported(state, event)
            case GrantAsked():
                return _decide_grant(state, event, now)
            case RevocationAsked():
                return _decide_revocation(state, event)
            case Audited():
                return _decide_audited(state, event)
            case Evaluated():
                return _decide_evaluated(state, event, now)
    except Rejected as error:
        return Decision(False, error.reason, error.detail)


def _decide_announced(state: State, event: Announced, now: Now) -> Decision:
    announcement = event.announcement
    check_fresh(announcement.issued_at, now.wall_s, event.peer_id)
    _check_addresses(announcement, event.peer_id)
    _check_start(announcement, event.peer_id)
    _check_suspended(state, event.peer_id)
    _check_version(announcement.client_version, state.manifest.min_client_version)
    agree(spoken_by(announcement, event.peer_id), state.spoken, event.peer_id)
    if state.presence.is_repeat(event.peer_id, announcement.issued_at, event.payload_hash, announcement.start):
        return Decision(True, "repeated")
    certified = event.certified
    if certified is not None and not certified.holds_at(now.wall_s):
        raise Rejected("certificate_expired", "certify the key anew: swarm identity certify", event.peer_id)
    account, expires_at = (certified.account, certified.expires_at) if certified is not None else (event.peer_id, 0)
    admit = Admit(event.peer_id, account, expires_at)
    if state.credits.is_admitted(state.run_id, event.peer_id):
        return _decide_renewal(state, admit, now)
    _check_running(state, event.peer_id)
    admission = state.manifest.admission
    if admission.kind == "allow_list" and event.peer_id not in (*admission.allow, *state.orders.invited):
        return Decision(False, "not_on_allow_list", event.peer_id)
    if admission.kind == "invitation":
        admit = _with_ticket(state, admit, event.invited, now)
    return Decision(True, "admitted", append=(admit,))


def _with_ticket(state: State, admit: Admit, invited: Invited | None, now: Now) -> Admit:
    if invited is not None and now.wall_s > invited.expires_at:
        raise Rejected("ticket_expired", "", admit.peer_id)
    state.credits.judge(Admission(state.run_id, admit.peer_id, admit.account, 0, admit.expires_at, invited))
    return replace(admit, invited=invited)


def _decide_renewal(state: State, admit: Admit, now: Now) -> Decision:
    """A key that is admitted stays so while its certificate holds; a newer one goes into the ledger."""
    _, until = state.credits.account(state.run_id, admit.peer_id)
    if admit.expires_at > until:
        state.credits.judge(Admission(state.run_id, admit.peer_id, admit.account, 0, admit.expires_at))
        return Decision(True, "certified", append=(admit,))
    if until and now.wall_s > until + CLOCK_SLACK_S:
        raise Rejected("certificate_expired", "certify the key anew: swarm identity certify", admit.peer_id)
    return Decision(True, "renewed")


def _decide_revocation(state: State, event: RevocationAsked) -> Decision:
    try:
        state.credits.judge(event.revocation)
    except Rejected as error:
        return Decision(error.reason == "revoked", error.reason, error.detail)
    return Decision(True, "revoked_now", append=(event.revocation,))


def _decide_audited(state: State, event: Audited) -> Decision:
    _check_suspended(state, event.finding.auditor)
    state.credits.judge(event.finding)
    return Decision(True, event.finding.finding, append=(event.finding,))


def _decide_evaluated(state: State, event: Evaluated, now: Now) -> Decision:
    measured = event.measured
    check_fresh(measured.issued_at, now.wall_s, measured.peer_id)
    _check_suspended(state, measured.peer_id)
    state.credits.judge(measured)
    return Decision(True, "accepted", append=(measured,))


def _check_suspended(state: State, peer_id: str) -> None:
    reason = state.orders.suspended.get(peer_id)
    if reason is not None:
        raise Rejected("suspended", reason, peer_id)


def _check_running(state: State, peer_id: str) -> None:
    if state.orders.state != RUNNING:
        raise Rejected("run_paused" if state.orders.state == PAUSED else "run_finished", "", peer_id)


def _check_start(announcement: Announcement, peer_id: str) -> None:
    if len(announcement.start) > START_BYTES or not 0 <= announcement.uptime_s <= LONGEST_UPTIME_S:
        raise Rejected("malformed", "start", peer_id)


def _check_addresses(announcement: Announcement, sender: str) -> None:
    addresses = announcement.addresses
    if len(addresses) > MAX_ADDRESSES or any(len(address) > MAX_ADDRESS_CHARACTERS for address in addresses):
        raise Rejected("too_large", "addresses", sender)


def _check_version(version: str, minimum: str) -> None:
    if parse_version(version) < parse_version(minimum):
        raise Rejected("version_too_old", f"{version or 'none'} is older than {minimum}")


def parse_version(text: str) -> tuple[int, ...]:
    """The three leading numbers of a version; zeros for anything else."""
    match = VERSION.match(text)
    return tuple(int(part) for part in match.groups()) if match else (0, 0, 0)


def _decide_reported(state: State, event: Reported) -> Decision:
    claim, ledger = event.claim, state.credits
    if ledger.has_reported(claim.run_id, claim.round, claim.peer_id):
        return Decision(True, "duplicate")
    _check_suspended(state, claim.peer_id)
    nomination = _new_nomination(state, event)
    if nomination is None:
        ledger.judge(claim)
    else:
        ledger.judge_with(nomination, claim)
    confirmation = ledger.confirms(claim, nomination)
    appended: list[Append] = [] if nomination is None else [nomination]
    appended.append(claim)
    if confirmation is not None:
        appended.append(confirmation._replace(audit_rate=state.orders.audit_rate))
    return Decision(True, "confirmed" if confirmation else "accepted", append=tuple(appended))


def _new_nomination(state: State, event: Reported) -> Nomination | None:
    claim = event.claim
    if state.credits.knows_proposal(claim.run_id, claim.round, claim.proposal_hash):
        return None
    if event.nomination is None or event.nomination.proposal_hash != claim.proposal_hash:
        return None
    return event.nomination


def _decide_grant(state: State, event: GrantAsked, now: Now) -> Decision:
    request = event.request
    check_fresh(request.issued_at, now.wall_s, event.peer_id)
    _check_request(request, event.peer_id)
    given = state.credits.grant(state.run_id, request.round)
    _check_suspended(state, event.peer_id)
    if given is not None:
        same = given.base_root == request.base_root and set(request.present) <= set(given.present)
        return Decision(True, "duplicate") if same else Decision(False, "already_granted")
    if state.credits.is_confirmed(state.run_id, request.round) or state.credits.rosters(state.run_id, request.round + 1):
        return Decision(False, "round_closed", "somebody has finished it already")
    _check_running(state, event.peer_id)
    unsure = _roster_doubt(state, request)
    if unsure is not None:
        return unsure
    alive = state.presence.recently_heard(set(request.roster) - set(request.present), now.steady_s)
    if alive:
        return Decision(False, "others_alive", ", ".join(sorted(alive)[:3]), retry_after_s=RETRY_S)
    present = tuple(sorted(request.present))
    permission = Permission(state.run_id, request.round, event.peer_id, request.base_root, present)
    return Decision(True, "granted", append=(permission,))


def _check_request(request: GrantRequest, sender: str) -> None:
    if len(request.roster) > MAX_ROSTER or len(request.present) > len(request.roster):
        raise Rejected("too_large", "roster", sender)
    if sender not in request.present or not set(request.present) <= set(request.roster):
        raise Rejected("not_in_roster", "the asking peer and all present peers belong to the roster", sender)


def _roster_doubt(state: State, request: GrantRequest) -> Decision | None:
    """A stranger can't name a roster of its own: it has to be the one that a reported proposal set."""
    if request.round == 0:
        return None
    known = state.credits.rosters(state.run_id, request.round)
    if not known:
        return Decision(False, "roster_unknown", "report the round before first", retry_after_s=RETRY_S)
    if frozenset(request.roster) not in known:
        return Decision(False, "wrong_roster", retry_after_s=RETRY_S)
    return None
