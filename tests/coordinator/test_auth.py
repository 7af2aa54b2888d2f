"""The table of policies."""

from __future__ import annotations

import pytest

from coordinator.auth import SERVICE, TABLE, Policy, rule_for, signed_part
from swarm.errors import Rejected
from swarm.rpc.v1 import coordinator_pb2
from tests.world import World, identity

WORLD = World()


def test_every_method_has_a_policy() -> None:
    """The table covers the service, and names no method that doesn't exist."""
    service = coordinator_pb2.DESCRIPTOR.services_by_name["PeerService"]
    assert {SERVICE + method.name for method in service.methods} == {name for name in TABLE if name.startswith(SERVICE)}


def test_unknown_methods_are_denied() -> None:
    """What isn't in the table is denied."""
    with pytest.raises(Rejected, match="denied"):
        rule_for(SERVICE + "DropEverything")


def test_signed_methods_need_a_signature() -> None:
    """An unsigned request, or one by a key that isn't admitted, doesn't get past the gate."""
    rule = rule_for(SERVICE + "SubmitReport")
    assert rule.policy is Policy.ADMITTED
    _, reports = WORLD.round([identity(0)], 0)
    signed = coordinator_pb2.SubmitReportRequest(report=reports[0])
    assert signed_part(rule, signed, lambda _: True) == reports[0]
    with pytest.raises(Rejected, match="not_admitted"):
        signed_part(rule, signed, lambda _: False)
    with pytest.raises(Rejected, match="bad_signature"):
        signed_part(rule, coordinator_pb2.SubmitReportRequest(), lambda _: True)
    assert signed_part(rule_for(SERVICE + "GetRun"), coordinator_pb2.GetRunRequest(), lambda _: False) is None
