"""Every limit is run into by one address or key, while a peer at another address is served as if nothing happened."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest

from coordinator.server import Coordinator
from coordinator.tls import CERTIFICATE_FILE
from swarm.accounts import certify
from swarm.errors import CoordinatorUnreachable
from swarm.messages import seal
from swarm.protocol import MAX_REPORTS
from swarm.rpc.client import CHANNEL_OPTIONS, CoordinatorClient
from swarm.rpc.v1.coordinator_pb2 import AnnounceRequest, ListEntriesRequest, SubmitReportRequest
from swarm.rpc.v1.coordinator_pb2_grpc import PeerServiceStub
from swarm.rpc.v1.signed_pb2 import HeldCertificate
from tests.coordinator.conftest import Serve, connected
from tests.coordinator.test_kill_and_restart import start
from tests.waiting import eventually
from tests.world import World, identity

ALICE, BOB = identity(0), identity(1)
EVERYWHERE = "[::]:0"
ENTRIES = 1500


def at(coordinator: Coordinator, host: str) -> Any:
    """The link by another of this machine's addresses."""
    return replace(coordinator.link, host=host)


@asynccontextmanager
async def two_addresses(coordinator: Coordinator) -> AsyncIterator[tuple[CoordinatorClient, CoordinatorClient]]:
    """One client that comes from 127.0.0.1, and one that comes from ::1."""
    async with (
        await CoordinatorClient.connect(at(coordinator, "127.0.0.1"), timeout_s=20) as one,
        await CoordinatorClient.connect(at(coordinator, "[::1]"), timeout_s=20) as other,
    ):
        yield one, other


def channel_to(coordinator: Coordinator, *options: tuple[str, int]) -> grpc.aio.Channel:
    """A bare channel from 127.0.0.1."""
    certificate = (coordinator.state_folder / CERTIFICATE_FILE).read_bytes()
    credentials = grpc.ssl_channel_credentials(certificate)
    return grpc.aio.secure_channel(f"127.0.0.1:{coordinator.link.port}", credentials, options=(*CHANNEL_OPTIONS, *options))


async def test_calls_of_an_address(serve: Serve, world: World) -> None:
    """An address that calls too often is slowed down."""
    async with serve(listen=EVERYWHERE, calls_per_address_per_s=5.0) as coordinator, two_addresses(coordinator) as (one, other):
        with pytest.raises(CoordinatorUnreachable, match="too many requests"):
            await asyncio.gather(*(one.progress() for _ in range(50)))
        for _ in range(5):
            await other.progress()


async def test_many_reports_in_a_call_count_as_many_calls(serve: Serve, world: World) -> None:
    """Forged reports of a peer, many in each call, cost their address what as many calls would, and no other."""
    async with serve(listen=EVERYWHERE, calls_per_address_per_s=20.0) as coordinator, two_addresses(coordinator) as (one, other):
        for peer in (ALICE, BOB):
            await other.announce(world.announcement(peer, coordinator.journal.now().wall_s))
        _, reports = world.round([ALICE], 0)
        reports[0].signature = bytes(64)
        forged = [SubmitReportRequest(report=reports[0])] * MAX_REPORTS
        outcomes = await one.submit_reports(forged)
        assert {str(outcome).partition(":")[0] for outcome in outcomes} == {"bad_signature"}
        with pytest.raises(CoordinatorUnreachable, match="too many requests"):
            await one.submit_reports(forged)
        await other.progress()


async def test_messages_of_a_key(serve: Serve, world: World) -> None:
    """A key that signs too many messages is slowed down, from whatever address; other keys from there aren't."""
    async with serve(listen=EVERYWHERE, calls_per_key_per_s=0.5) as coordinator, two_addresses(coordinator) as (one, other):
        now_s = coordinator.journal.now().wall_s
        messages = [world.announcement(ALICE, now_s, round=number) for number in range(20)]
        with pytest.raises(CoordinatorUnreachable, match="too many requests"):
            await asyncio.gather(*((one if number % 2 else other).announce(each) for number, each in enumerate(messages)))
        await one.announce(world.announcement(BOB, now_s))


async def test_a_thousand_keys_of_a_network(serve: Serve, world: World) -> None:
    """So many are admitted and no more: those that are in, and new ones from elsewhere, don't notice."""
    async with (
        serve(listen=EVERYWHERE, new_keys_per_network_per_hour=3) as coordinator,
        two_addresses(coordinator) as (one, other),
    ):
        now_s = coordinator.journal.now().wall_s
        for number in range(3):
            await one.announce(world.announcement(identity(number), now_s))
        for number in range(3, 1000, 100):
            with pytest.raises(CoordinatorUnreachable, match="too many new keys from this network"):
                await one.announce(world.announcement(identity(number), now_s))
        await one.announce(world.announcement(identity(0), now_s, round=1))
        await other.announce(world.announcement(identity(3), now_s))
        assert coordinator.journal.credits.member_count(world.run_id) == 4


async def test_a_thousand_machines_of_an_account(serve: Serve, world: World) -> None:
    """An account brings so many machine keys and no more; others, of other accounts or of none, don't notice."""
    async with serve(new_keys_per_account_per_hour=2) as coordinator, connected(coordinator) as client:
        now_s = coordinator.journal.now().wall_s

        async def bring(account: int, machine: int) -> None:
            word = certify(identity(account), identity(machine).peer_id, now_s, 1)
            held = seal(identity(machine), HeldCertificate(certificate=word))
            await client.announce(world.announcement(identity(machine), now_s, held=held))

        for machine in (10, 11):
            await bring(1, machine)
        for machine in range(12, 1000, 100):
            with pytest.raises(CoordinatorUnreachable, match="too many new keys from this network or account"):
                await bring(1, machine)
        await bring(2, 12)
        await client.announce(world.announcement(identity(13), now_s))
        assert coordinator.journal.credits.member_count(world.run_id) == 4


class Held:
    """Readers that hold calls open without taking what they are sent."""

    def __init__(self, coordinator: Coordinator, calls: int) -> None:
        self._channels = [
            channel_to(
                coordinator,
                ("grpc.use_local_subchannel_pool", 1),
                ("grpc.http2.bdp_probe", 0),
                ("grpc.http2.lookahead_bytes", 65536),
            )
            for _ in range(calls)
        ]
        self._calls: list[Any] = []

    async def __aenter__(self) -> Held:
        for channel in self._channels:
            call = PeerServiceStub(channel).ListEntries(ListEntriesRequest())
            await call.read()
            self._calls.append(call)
        return self

    async def __aexit__(self, *_: object) -> None:
        for channel in self._channels:
            await channel.close(None)


@pytest.fixture(scope="module")
def long_ledger() -> list[bytes]:
    """More entries than the network takes in without a reader."""
    world = World()
    return world.ledger([ALICE, BOB], 3) + [world.admitted(identity(number)) for number in range(10, ENTRIES)]


@pytest.fixture
def prepared(long_ledger: list[bytes], tmp_path: Path) -> dict[str, object]:
    """Settings of a coordinator that has the long ledger."""
    from coordinator.journal import COORDINATOR
    from coordinator.store.interface import Row
    from coordinator.store.sql import SqlStore
    from swarm.merkle import leaf_hash
    from tests.world import COORDINATOR as KEY

    folder = tmp_path / "prepared"
    KEY.save(folder / "coordinator.key")
    store = SqlStore.open(f"sqlite:///{folder / 'coordinator.db'}")
    store.set_value(COORDINATOR, KEY.peer_id.encode())
    store.append([Row(index, leaf_hash(entry), entry) for index, entry in enumerate(long_ledger)])
    store.close()
    return {"state_dir": folder, "listen": EVERYWHERE}


async def test_calls_in_progress(serve: Serve, prepared: dict[str, object], monkeypatch: pytest.MonkeyPatch) -> None:
    """An address with too many calls in progress is sent away; another one is answered. The same for all addresses together."""
    monkeypatch.setattr("coordinator.service.ENTRIES_PER_MESSAGE_BYTES", 4096)
    async with serve(**prepared, max_calls_per_address=2, max_calls=3) as coordinator, two_addresses(coordinator) as (one, other):
        async with Held(coordinator, 2):
            with pytest.raises(CoordinatorUnreachable, match="2 calls of one address"):
                await one.progress()
            await other.progress()
        await eventually(lambda: _answers(one), "the address is served again")


async def _answers(client: CoordinatorClient) -> bool:
    try:
        await client.progress()
    except CoordinatorUnreachable:
        return False
    return True


async def test_slow_readers(serve: Serve, prepared: dict[str, object], monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader that takes nothing of a stream is cut off after a while; another one gets the whole ledger meanwhile."""
    monkeypatch.setattr("coordinator.service.ENTRIES_PER_MESSAGE_BYTES", 4096)
    async with (
        serve(**prepared, slow_call_s=0.5) as coordinator,
        two_addresses(coordinator) as (_, other),
        Held(coordinator, 2),
    ):
        assert len([entry async for entry in other.entries()]) == len(coordinator.journal.tree)
        await eventually(lambda: _too_slow(coordinator) == 2, "both are cut off")
        await eventually(lambda: coordinator.guard.calls_in_progress == 0, "their places are free")
        await other.progress()
        labels = {"method": "ListEntries", "code": "CANCELLED"}
        assert coordinator.metrics.registry.get_sample_value("swarm_coordinator_calls_total", labels) == 2


async def test_slow_senders(serve: Serve, world: World) -> None:
    """A caller that never sends its request is cut off, and its connection closed in the end; others are served meanwhile."""
    async with (
        serve(listen=EVERYWHERE, slow_call_s=0.5, connection_age_s=1) as coordinator,
        two_addresses(coordinator) as (one, other),
    ):
        async with channel_to(coordinator) as channel:
            silent = channel.stream_unary("/swarm.v1.PeerService/Announce", AnnounceRequest.SerializeToString)(_nothing())
            await other.announce(world.announcement(ALICE, coordinator.journal.now().wall_s))
            await eventually(lambda: _too_slow(coordinator) == 1, "the silent caller is cut off")
            assert await asyncio.wait_for(silent.code(), 20) is not grpc.StatusCode.OK
        await one.progress()


async def _nothing() -> AsyncIterator[AnnounceRequest]:
    await asyncio.Event().wait()
    yield AnnounceRequest()


def _too_slow(coordinator: Coordinator) -> float:
    labels = {"reason": "too_slow"}
    return coordinator.metrics.registry.get_sample_value("swarm_coordinator_rejected_messages_total", labels) or 0.0


async def test_tls_1_3_only(tmp_path: Path, world: World) -> None:
    """The coordinator speaks TLS 1.3 and nothing older."""
    (tmp_path / "run.signed").write_bytes(world.signed_manifest.SerializeToString())
    process, link = await start(tmp_path, "127.0.0.1:0")
    try:
        assert await _handshake(link.port, ssl.TLSVersion.TLSv1_3) == "TLSv1.3"
        with pytest.raises((ssl.SSLError, ConnectionError)):
            await _handshake(link.port, ssl.TLSVersion.TLSv1_2)
    finally:
        process.terminate()
        await process.communicate()


async def _handshake(port: int, version: ssl.TLSVersion) -> str:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.maximum_version = version
    context.set_alpn_protocols(["h2"])
    _, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context)
    try:
        return str(writer.get_extra_info("ssl_object").version())
    finally:
        writer.transport.abort()
