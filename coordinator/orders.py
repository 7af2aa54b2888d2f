"""What the operator has ordered: one frozen value, and commands as pure functions from one value to the next."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from pydantic import TypeAdapter, ValidationError

from swarm.errors import DatabaseCorrupt, Rejected
from swarm.identity import public_key_of
from swarm.rpc.v1.coordinator_pb2 import AdminCommand

RUNNING, PAUSED, FINISHED = "running", "paused", "finished"
MAX_REASON_CHARACTERS = 200
READS = frozenset({"peers", "runs", "log"})


@dataclass(frozen=True)
class Orders:
    """Who is suspended and why, who was invited, whether the run goes on, and how much is audited (0 = the manifest's rate)."""

    state: str = RUNNING
    suspended: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    invited: tuple[str, ...] = ()
    audit_rate: float = 0.0


NO_ORDERS = Orders()


@dataclass(frozen=True)
class _Stored:
    state: str
    suspended: dict[str, str]
    invited: tuple[str, ...]
    audit_rate: float


_FORM = TypeAdapter(_Stored)


def dump(orders: Orders) -> bytes:
    """The orders as JSON."""
    return _FORM.dump_json(_Stored(orders.state, dict(orders.suspended), orders.invited, orders.audit_rate))


def load(raw: bytes | None) -> Orders:
    """The orders that `dump` was given, or none. Raises `DatabaseCorrupt`."""
    if raw is None:
        return NO_ORDERS
    try:
        stored = _FORM.validate_json(raw)
    except ValidationError as error:
        raise DatabaseCorrupt("the operator's orders in the database can't be read", "restore it from a backup") from error
    return Orders(stored.state, MappingProxyType(stored.suspended), stored.invited, stored.audit_rate)


def carry_out(orders: Orders, command: AdminCommand) -> Orders:
    """The orders after a command; the same for one that only reads. Raises `Rejected`."""
    if len(command.reason) > MAX_REASON_CHARACTERS:
        raise Rejected("too_large", "reason")
    match command.action:
        case "suspend":
            return _changed(orders, suspended={**orders.suspended, _about(command): command.reason or "by the operator"})
        case "reinstate":
            left = {peer_id: reason for peer_id, reason in orders.suspended.items() if peer_id != _about(command)}
            return _changed(orders, suspended=left)
        case "invite":
            return _changed(orders, invited=tuple(sorted({*orders.invited, _about(command)})))
        case "pause" | "resume" | "finish":
            return _changed(orders, state=_next_state(orders.state, command.action))
        case "audit-rate":
            if not math.isfinite(command.rate) or not 0 < command.rate <= 1:
                raise Rejected("malformed", "a rate is more than 0 and at most 1")
            return _changed(orders, audit_rate=command.rate)
    if command.action in READS:
        return orders
    raise Rejected("unknown_action", command.action[:40])


def _next_state(state: str, action: str) -> str:
    if state == FINISHED:
        raise Rejected("run_finished", "for good")
    return {"pause": PAUSED, "resume": RUNNING, "finish": FINISHED}[action]


def _about(command: AdminCommand) -> str:
    public_key_of(command.peer_id)
    return command.peer_id


def _changed(
    orders: Orders,
    state: str | None = None,
    suspended: Mapping[str, str] | None = None,
    invited: tuple[str, ...] | None = None,
    audit_rate: float | None = None,
) -> Orders:
    return Orders(
        orders.state if state is None else state,
        orders.suspended if suspended is None else MappingProxyType(dict(suspended)),
        orders.invited if invited is None else invited,
        orders.audit_rate if audit_rate is None else audit_rate,
    )
