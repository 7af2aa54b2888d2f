"""The catalogue: a domain error becomes a public message, a gRPC status and a reason code; anything else stays private.

`answer_to` is the only place where an exception turns into what a caller sees. The reason travels in the trailing metadata under
`reason`; `swarm.rpc.client` turns it back into an exception.
"""

from __future__ import annotations

from typing import NamedTuple

from grpc import StatusCode

from swarm.errors import ManifestInvalid, Rejected, SwarmError


class StoreFailed(SwarmError):
    """The store didn't take the entries; nothing was receipted."""

    exit_code = 41


class Answer(NamedTuple):
    """What the caller is told."""

    status: StatusCode
    reason: str
    message: str
    private: bool = False
    """The cause isn't told and has to be logged."""


class _Line(NamedTuple):
    status: StatusCode
    message: str


_INVALID = StatusCode.INVALID_ARGUMENT
_FORBIDDEN = StatusCode.PERMISSION_DENIED
_CONFLICT = StatusCode.FAILED_PRECONDITION

CATALOGUE: dict[str, _Line] = {
    "already_done": _Line(_CONFLICT, "the command was carried out already"),
    "already_evaluated": _Line(_CONFLICT, "the ledger has this peer's loss for this round"),
    "already_granted": _Line(_CONFLICT, "another part of the roster was permitted to go on with this round"),
    "already_proposed": _Line(_CONFLICT, "the proposal is in the ledger already"),
    "already_reported": _Line(_CONFLICT, "another report of this peer for this round is in the ledger"),
    "bad_certificate": _Line(_FORBIDDEN, "the certificate isn't for this key, this account or this time"),
    "bad_peer_id": _Line(_INVALID, "the signer is not an Ed25519 peer id"),
    "bad_signature": _Line(StatusCode.UNAUTHENTICATED, "the signature is not valid"),
    "bad_ticket": _Line(_FORBIDDEN, "the ticket is not one of this run's owner"),
    "certificate_expired": _Line(_FORBIDDEN, "the account's certificate has expired"),
    "denied": _Line(_FORBIDDEN, "this method is not open to you"),
    "malformed": _Line(_INVALID, "the message can't be read"),
    "no_audit": _Line(_CONFLICT, "there is no such audit, or it is over"),
    "no_evaluation": _Line(_CONFLICT, "the round isn't evaluated, or not any more"),
    "not_admitted": _Line(_FORBIDDEN, "this key is not admitted; announce first"),
    "not_an_auditor": _Line(_FORBIDDEN, "the audit is another peer's, or was answered"),
    "not_an_evaluator": _Line(_FORBIDDEN, "this key isn't drawn to evaluate the round"),
    "not_finite": _Line(_INVALID, "a number is not finite"),
    "not_in_proposal": _Line(_INVALID, "the named proposal doesn't list this commit"),
    "not_in_roster": _Line(_FORBIDDEN, "the peer is not in the round's roster"),
    "not_a_witness": _Line(_FORBIDDEN, "the run's operator hasn't named this key as a witness"),
    "not_invited": _Line(_FORBIDDEN, "the run is by invitation; ask its owner for a ticket"),
    "not_on_allow_list": _Line(_FORBIDDEN, "the run admits listed keys only; give yours to the run's owner"),
    "other_account": _Line(_CONFLICT, "the key earns for another account"),
    "overloaded": _Line(StatusCode.UNAVAILABLE, "too much to do; try again"),
    "protocol_too_new": _Line(_CONFLICT, "the coordinator doesn't speak a protocol as new as this client's"),
    "protocol_too_old": _Line(_CONFLICT, "this client's protocol is older than the coordinator still speaks"),
    "rate_limited": _Line(StatusCode.RESOURCE_EXHAUSTED, "too many requests; slow down"),
    "replayed": _Line(_CONFLICT, "a newer message of this peer is known"),
    "revoked": _Line(_FORBIDDEN, "the account has revoked this key"),
    "run_finished": _Line(_FORBIDDEN, "the run is finished"),
    "run_paused": _Line(_FORBIDDEN, "the run is paused by its operator"),
    "round_closed": _Line(_CONFLICT, "the round is settled"),
    "stale": _Line(_CONFLICT, "the message's time is too far from the coordinator's clock; set your clock"),
    "store_failed": _Line(StatusCode.UNAVAILABLE, "the ledger can't be written now; try again"),
    "suspended": _Line(_FORBIDDEN, "this key is suspended"),
    "ticket_expired": _Line(_FORBIDDEN, "the ticket has expired"),
    "ticket_used_up": _Line(_FORBIDDEN, "the ticket was used as often as its owner allowed"),
    "timeout": _Line(StatusCode.DEADLINE_EXCEEDED, "took too long; try again"),
    "too_heavy": _Line(_INVALID, "the weight exceeds the limit"),
    "too_large": _Line(_INVALID, "the message is too large"),
    "too_many_new_keys": _Line(StatusCode.RESOURCE_EXHAUSTED, "too many new keys from this network or account; try again later"),
    "two_proposals": _Line(_CONFLICT, "the leader signed another proposal for this ballot"),
    "uncertified": _Line(_FORBIDDEN, "the account hasn't certified this key"),
    "unknown_action": _Line(_INVALID, "there is no such command"),
    "unknown_proposal": _Line(_CONFLICT, "the proposal is not known; send it along"),
    "unknown_run": _Line(StatusCode.NOT_FOUND, "this coordinator doesn't know the run"),
    "version_too_old": _Line(_CONFLICT, "the run needs a newer client"),
    "wrong_kind": _Line(_INVALID, "the message is of another kind"),
    "wrong_proposal": _Line(_INVALID, "the result follows another proposal"),
    "wrong_roster": _Line(_CONFLICT, "the ledger knows another roster for this round"),
    "wrong_round": _Line(_INVALID, "the message belongs to another round"),
    "wrong_run": _Line(StatusCode.NOT_FOUND, "this coordinator serves another run"),
    "wrong_signer": _Line(StatusCode.UNAUTHENTICATED, "somebody else signed"),
    "wrong_state": _Line(_CONFLICT, "the round came to another state"),
    "wrong_tokens": _Line(_INVALID, "the tokens don't follow from the weight"),
    "wrong_weight": _Line(_INVALID, "the weight is not the proposed one"),
}
UNLISTED = _Line(_INVALID, "the request breaks a rule")


def answer_to(error: Exception) -> Answer:
    """What to tell the caller about `error`."""
    if isinstance(error, Rejected):
        line = CATALOGUE.get(error.reason, UNLISTED)
        detail = f" ({error.detail})" if error.detail else ""
        return Answer(line.status, error.reason, line.message + detail)
    if isinstance(error, StoreFailed):
        return Answer(*_named("store_failed"), private=True)
    if isinstance(error, TimeoutError):
        return Answer(*_named("timeout"))
    if isinstance(error, ManifestInvalid):
        return Answer(_INVALID, "malformed", CATALOGUE["malformed"].message)
    return Answer(StatusCode.INTERNAL, "internal", "the coordinator failed; its log says why", private=True)


def _named(reason: str) -> tuple[StatusCode, str, str]:
    line = CATALOGUE[reason]
    return line.status, reason, line.message
