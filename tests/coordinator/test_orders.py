"""What the operator orders, as values."""

from __future__ import annotations

import pytest

from coordinator.orders import NO_ORDERS, Orders, carry_out, dump, load
from swarm.errors import DatabaseCorrupt, Rejected
from swarm.rpc.v1.coordinator_pb2 import AdminCommand
from tests.world import identity

ALICE, BOB = identity(0).peer_id, identity(1).peer_id


def after(*commands: AdminCommand) -> Orders:
    """The orders after some commands."""
    orders = NO_ORDERS
    for command in commands:
        orders = carry_out(orders, command)
    return orders


def test_keys() -> None:
    """Keys are suspended with a reason, reinstated and invited; doing it twice is like doing it once."""
    suspend = AdminCommand(action="suspend", peer_id=ALICE, reason="wrong results")
    assert after(suspend, suspend).suspended == {ALICE: "wrong results"}
    assert after(AdminCommand(action="suspend", peer_id=BOB)).suspended == {BOB: "by the operator"}
    assert after(suspend, AdminCommand(action="reinstate", peer_id=ALICE)) == NO_ORDERS
    invite = AdminCommand(action="invite", peer_id=BOB)
    assert after(invite, invite).invited == (BOB,)


def test_states() -> None:
    """A run is paused and resumed, and finished for good."""
    pause, resume, finish = (AdminCommand(action=action) for action in ("pause", "resume", "finish"))
    assert [after(pause).state, after(pause, resume).state, after(finish).state] == ["paused", "running", "finished"]
    for command in (pause, resume, finish):
        with pytest.raises(Rejected, match="run_finished"):
            after(finish, command)


@pytest.mark.parametrize("rate", [0.0, -1.0, 1.1, float("nan"), float("inf")])
def test_rates_are_shares(rate: float) -> None:
    """Only a share is a rate."""
    assert after(AdminCommand(action="audit-rate", rate=0.25)).audit_rate == 0.25
    with pytest.raises(Rejected, match="malformed"):
        after(AdminCommand(action="audit-rate", rate=rate))


def test_nonsense() -> None:
    """Unknown commands, what isn't a peer id, and novels are refused; commands that only read change nothing."""
    for command, reason in [
        (AdminCommand(action="drop"), "unknown_action"),
        (AdminCommand(action="suspend", peer_id="nobody"), "bad_peer_id"),
        (AdminCommand(action="pause", reason="x" * 201), "too_large"),
    ]:
        with pytest.raises(Rejected, match=reason):
            after(command)
    assert after(*(AdminCommand(action=action) for action in ("peers", "runs", "log"))) == NO_ORDERS


def test_written_down_and_read_back() -> None:
    """Orders survive storing; what isn't orders is refused."""
    orders = after(
        AdminCommand(action="suspend", peer_id=ALICE, reason="r"),
        AdminCommand(action="invite", peer_id=BOB),
        AdminCommand(action="pause"),
        AdminCommand(action="audit-rate", rate=0.5),
    )
    assert load(dump(orders)) == orders
    assert load(None) == NO_ORDERS
    with pytest.raises(DatabaseCorrupt):
        load(b"[]")
