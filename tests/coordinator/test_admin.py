"""The operator's service over real gRPC: its own address, its own keys, and a log of what was ordered."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest

from coordinator.server import Coordinator
from swarm.errors import CoordinatorUnreachable, FingerprintMismatch, NotAdmitted, Rejected, UsageError
from swarm.messages import seal
from swarm.rpc.admin import AdminClient
from swarm.rpc.client import CoordinatorClient
from swarm.rpc.v1.coordinator_pb2 import AdminCommand, ExecuteRequest
from swarm.rpc.v1.coordinator_pb2_grpc import AdminServiceStub
from tests.coordinator.conftest import Serve, connected
from tests.world import World, identity, manifest

ADMIN, STRANGER = identity(500), identity(501)
PEERS = [identity(number) for number in range(3)]
ALICE, BOB, CAROL = PEERS
SETTINGS = {"admin_listen": "127.0.0.1:0", "admin_keys": f" {ADMIN.peer_id}, {identity(502).peer_id} "}


@asynccontextmanager
async def admin_of(coordinator: Coordinator) -> AsyncIterator[AdminClient]:
    """A client of the admin address."""
    assert coordinator.admin_link is not None
    async with await AdminClient.connect(coordinator.admin_link, timeout_s=10) as client:
        yield client


def now_s(coordinator: Coordinator) -> float:
    """The coordinator's wall clock."""
    return coordinator.journal.now().wall_s


async def announce(client: CoordinatorClient, coordinator: Coordinator, world: World) -> None:
    """All three peers announce themselves."""
    for peer in PEERS:
        await client.announce(world.announcement(peer, now_s(coordinator)))


async def test_suspended_and_reinstated(serve: Serve, world: World) -> None:
    """A suspended key can neither announce itself nor report and is named to nobody; others go on; reinstated it is back."""
    async with serve(**SETTINGS) as coordinator, admin_of(coordinator) as admin, connected(coordinator) as client:
        await announce(client, coordinator, world)
        done = await admin.execute(ADMIN, now_s(coordinator), action="suspend", peer_id=ALICE.peer_id, reason="wrong results")
        assert [(peer.peer_id, peer.suspended, peer.alive) for peer in done.peers] == [(ALICE.peer_id, "wrong results", False)]
        proposal, reports = world.round(PEERS, 0)
        with pytest.raises(Rejected, match=r"suspended.*wrong results"):
            await client.submit_report(reports[0], proposal)
        with pytest.raises(Rejected, match="suspended"):
            await client.announce(world.announcement(ALICE, now_s(coordinator), round=1))
        await client.submit_report(reports[1], proposal)
        others = (await client.announce(world.announcement(BOB, now_s(coordinator), round=1))).peers
        assert [peer.peer_id for peer in others] == [CAROL.peer_id]
        await admin.execute(ADMIN, now_s(coordinator), action="reinstate", peer_id=ALICE.peer_id)
        await client.submit_report(reports[0], proposal)


async def test_a_duplicate_still_gets_its_receipt(serve: Serve, world: World) -> None:
    """What a key had reported before it was suspended is receipted again: suspension takes nothing back."""
    async with serve(**SETTINGS) as coordinator, admin_of(coordinator) as admin, connected(coordinator) as client:
        await announce(client, coordinator, world)
        proposal, reports = world.round(PEERS, 0)
        receipt = await client.submit_report(reports[0], proposal)
        await admin.execute(ADMIN, now_s(coordinator), action="suspend", peer_id=ALICE.peer_id)
        assert await client.submit_report(reports[0], proposal) == receipt


async def test_paused_resumed_and_finished(serve: Serve, world: World) -> None:
    """A paused run admits nobody new and tells everybody so; those who are in go on reporting; finished is for good."""
    async with serve(**SETTINGS) as coordinator, admin_of(coordinator) as admin, connected(coordinator) as client:
        await announce(client, coordinator, world)
        paused = await admin.execute(ADMIN, now_s(coordinator), action="pause")
        assert [(run.state, run.peers_admitted) for run in paused.runs] == [("paused", 3)]
        with pytest.raises(Rejected, match="run_paused"):
            await client.announce(world.announcement(identity(9), now_s(coordinator)))
        assert (await client.announce(world.announcement(ALICE, now_s(coordinator), round=1))).run_state == "paused"
        proposal, reports = world.round(PEERS, 0)
        await client.submit_report(reports[0], proposal)
        await admin.execute(ADMIN, now_s(coordinator), action="resume")
        await client.announce(world.announcement(identity(9), now_s(coordinator)))
        await admin.execute(ADMIN, now_s(coordinator), action="finish")
        with pytest.raises(Rejected, match="run_finished"):
            await client.announce(world.announcement(identity(10), now_s(coordinator)))
        with pytest.raises(Rejected, match="run_finished"):
            await admin.execute(ADMIN, now_s(coordinator), action="resume")


async def test_invited(serve: Serve) -> None:
    """An invited key is admitted to a run whose allow-list doesn't name it."""
    world = World(manifest(admission={"kind": "allow_list", "allow": [ALICE.peer_id]}))
    async with serve(served=world, **SETTINGS) as coordinator, admin_of(coordinator) as admin, connected(coordinator) as client:
        with pytest.raises(NotAdmitted):
            await client.announce(world.announcement(BOB, now_s(coordinator)))
        await admin.execute(ADMIN, now_s(coordinator), action="invite", peer_id=BOB.peer_id)
        await client.announce(world.announcement(BOB, now_s(coordinator), round=1))


async def test_orders_and_log_survive_a_restart(serve: Serve, world: World) -> None:
    """Orders hold after a restart; the log has every order with who, why and the outcome, refused ones too, newest first."""
    async with serve(**SETTINGS) as coordinator, admin_of(coordinator) as admin:
        await admin.execute(ADMIN, now_s(coordinator), action="suspend", peer_id=ALICE.peer_id, reason="r")
        await admin.execute(ADMIN, now_s(coordinator), action="audit-rate", rate=0.25)
        with pytest.raises(Rejected, match="unknown_action"):
            await admin.execute(ADMIN, now_s(coordinator), action="drop")
    async with serve(**SETTINGS) as coordinator, admin_of(coordinator) as admin, connected(coordinator) as client:
        with pytest.raises(Rejected, match="suspended"):
            await client.announce(world.announcement(ALICE, now_s(coordinator)))
        log = (await admin.execute(ADMIN, now_s(coordinator), action="log")).log
        assert [(line.action, line.about, line.outcome) for line in log] == [
            ("drop", "", "unknown_action"),
            ("audit-rate", "", "done"),
            ("suspend", ALICE.peer_id, "done"),
        ]
        assert {line.admin for line in log} == {ADMIN.peer_id}
        assert (await admin.execute(ADMIN, now_s(coordinator), action="runs")).runs[0].audit_rate == 0.25
        peers = (await admin.execute(ADMIN, now_s(coordinator), action="peers")).peers
        assert [(peer.peer_id, peer.suspended) for peer in peers] == [(ALICE.peer_id, "r")]


async def test_only_admins_and_only_there(serve: Serve, world: World) -> None:
    """Other keys are refused and change nothing; the peers' address has no such service, the admin address no other, and each has
    a TLS key of its own."""
    async with serve(**SETTINGS) as coordinator, admin_of(coordinator) as admin, connected(coordinator) as client:
        await announce(client, coordinator, world)
        for key in (STRANGER, ALICE, coordinator.identity):
            with pytest.raises(NotAdmitted):
                await admin.execute(key, now_s(coordinator), action="suspend", peer_id=BOB.peer_id)
        assert coordinator.journal.orders.suspended == {}
        assert (await admin.execute(ADMIN, now_s(coordinator), action="log")).log == []
        with pytest.raises(Rejected, match="unimplemented"):
            await admin.progress()
        assert coordinator.admin_link is not None
        swapped = replace(coordinator.admin_link, fingerprint=coordinator.link.fingerprint)
        with pytest.raises(FingerprintMismatch):
            await AdminClient.connect(swapped, timeout_s=10)
        async with await AdminClient.connect(coordinator.link, timeout_s=10) as wrong:
            with pytest.raises(Rejected, match="unimplemented"):
                await wrong.execute(ADMIN, now_s(coordinator), action="runs")


async def test_a_command_counts_once(serve: Serve, world: World) -> None:
    """A command that is sent again is refused, also after a restart; one for another run, or an old one, as well."""
    async with serve(**SETTINGS) as coordinator:
        command = AdminCommand(run_id=world.run_id, issued_at=int(now_s(coordinator)), nonce=b"1", action="pause")
        async with admin_of(coordinator) as admin:
            stub = AdminServiceStub(admin._channel)
            await stub.Execute(ExecuteRequest(command=seal(ADMIN, command)))
            await admin.execute(ADMIN, now_s(coordinator), action="resume")
    async with serve(**SETTINGS) as coordinator, admin_of(coordinator) as admin:
        call = AdminServiceStub(admin._channel).Execute
        with pytest.raises(Rejected, match="already_done"):
            await admin._call(call, ExecuteRequest(command=seal(ADMIN, command)))
        assert coordinator.journal.orders.state == "running"
        old = AdminCommand(run_id=world.run_id, issued_at=int(now_s(coordinator)) - 3600, action="pause")
        with pytest.raises(Rejected, match="stale"):
            await admin._call(call, ExecuteRequest(command=seal(ADMIN, old)))


async def test_no_admin_address_without_admins(serve: Serve) -> None:
    """Without an address there is no service; an address without a key, or with something that is none, doesn't start."""
    async with serve() as coordinator:
        assert coordinator.admin_link is None
    for keys in ("", " , ", "nobody"):
        with pytest.raises(UsageError, match="admin"):
            async with serve(admin_listen="127.0.0.1:0", admin_keys=keys):
                raise AssertionError("it must not start")


async def test_a_gone_coordinator(serve: Serve) -> None:
    """When nothing answers, that is what is said."""
    async with serve(**SETTINGS) as coordinator:
        link = coordinator.admin_link
    assert link is not None
    with pytest.raises(CoordinatorUnreachable):
        await AdminClient.connect(link, timeout_s=5)
