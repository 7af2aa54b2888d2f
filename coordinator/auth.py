"""Who may call what: a table from method to policy. A method that isn't in the table is denied."""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from typing import Any, NamedTuple

from swarm.errors import Rejected
from swarm.rpc.v1.signed_pb2 import Signed

SERVICE = "/swarm.v1.PeerService/"
ADMIN = "/swarm.v1.AdminService/"
HEALTH = "/grpc.health.v1.Health/"


class Policy(Enum):
    """What a caller has to show."""

    PUBLIC = "public"
    SIGNED_BY_PEER = "signed_by_peer"
    ADMITTED = "admitted"


class Rule(NamedTuple):
    """A method's policy, and the field that holds the signed message; where a request has many, the field that holds them."""

    policy: Policy
    field: str = ""
    many: str = ""


TABLE: dict[str, Rule] = {
    SERVICE + "GetRun": Rule(Policy.PUBLIC),
    SERVICE + "GetCredits": Rule(Policy.PUBLIC),
    SERVICE + "GetProgress": Rule(Policy.PUBLIC),
    SERVICE + "ListEntries": Rule(Policy.PUBLIC),
    SERVICE + "GetCheckpoint": Rule(Policy.PUBLIC),
    SERVICE + "AddCosignature": Rule(Policy.PUBLIC),  # signed in a format of its own, by keys that the operator names
    SERVICE + "ListAudits": Rule(Policy.PUBLIC),
    SERVICE + "ListEvaluations": Rule(Policy.PUBLIC),
    SERVICE + "Announce": Rule(Policy.SIGNED_BY_PEER, "announcement"),
    SERVICE + "SubmitReport": Rule(Policy.ADMITTED, "report"),
    SERVICE + "SubmitReports": Rule(Policy.ADMITTED, "report", many="reports"),
    SERVICE + "SubmitAudit": Rule(Policy.ADMITTED, "verdict"),
    SERVICE + "SubmitEvaluation": Rule(Policy.ADMITTED, "evaluation"),
    SERVICE + "RevokeKey": Rule(Policy.SIGNED_BY_PEER, "revocation"),
    SERVICE + "RequestGrant": Rule(Policy.ADMITTED, "request"),
    ADMIN + "Execute": Rule(Policy.ADMITTED, "command"),  # by a guard of its own, which admits the admins' keys
    HEALTH + "Check": Rule(Policy.PUBLIC),
    HEALTH + "Watch": Rule(Policy.PUBLIC),
    HEALTH + "List": Rule(Policy.PUBLIC),
}


def rule_for(method: str) -> Rule:
    """The rule of a method. Raises `Rejected` for whatever the table doesn't name."""
    rule = TABLE.get(method)
    if rule is None:
        raise Rejected("denied", method)
    return rule


def signed_part(rule: Rule, request: Any, is_admitted: Callable[[str], bool]) -> Signed | None:
    """The signed message that the policy asks for, or the first of many by one signer. Raises `Rejected`.

    Signatures are checked by whoever opens the messages.
    """
    if rule.policy is Policy.PUBLIC:
        return None
    each = [getattr(part, rule.field) for part in getattr(request, rule.many)] if rule.many else [getattr(request, rule.field)]
    if not each or not all(isinstance(signed, Signed) and signed.signer and signed.signature for signed in each):
        raise Rejected("bad_signature", "the request is not signed")
    signed: Signed = each[0]
    if any(other.signer != signed.signer for other in each):
        raise Rejected("wrong_signer", "one peer's messages at a time", signed.signer)
    if rule.policy is Policy.ADMITTED and not is_admitted(signed.signer):
        raise Rejected("not_admitted", "", signed.signer)
    return signed
