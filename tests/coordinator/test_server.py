"""Starting, stopping and restarting."""

from __future__ import annotations

import asyncio
from ipaddress import ip_address
from pathlib import Path

import pytest

from coordinator.server import Address, Coordinator
from swarm.clock import ManualClock
from swarm.config import CoordinatorSettings
from swarm.errors import AlreadyRunning, DatabaseCorrupt, PortBusy, UsageError
from swarm.ledger import verify_receipt
from tests.coordinator.conftest import Serve, connected
from tests.world import NOW_S, World, identity

ALICE = identity(0)


async def test_restart_keeps_link_key_ledger_and_receipts(serve: Serve, world: World) -> None:
    """After a restart the link, the key, the ledger and every receipt are the same."""
    proposal, reports = world.round([ALICE], 0)
    async with serve(ManualClock(NOW_S)) as before, connected(before) as client:
        await client.announce(world.announcement(ALICE))
        receipt = await client.submit_report(reports[0], proposal)
        root = before.journal.tree.root()
    async with serve(ManualClock(NOW_S)) as after, connected(after) as client:
        assert (after.link.fingerprint, after.identity.peer_id) == (before.link.fingerprint, before.identity.peer_id)
        assert after.journal.tree.root() == root
        assert await client.submit_report(reports[0], proposal) == receipt
        verify_receipt(receipt, after.identity.peer_id)


async def test_postgres(serve: Serve, world: World, postgres: str) -> None:
    """The same coordinator runs on PostgreSQL by URL."""
    async with serve(ManualClock(NOW_S), db=postgres) as coordinator, connected(coordinator) as client:
        await client.announce(world.announcement(ALICE))
        proposal, reports = world.round([ALICE], 0)
        await client.submit_report(reports[0], proposal)
        assert (await client.progress()).confirmed_round == 0


async def test_port_busy(serve: Serve, world: World, tmp_path: Path) -> None:
    """A taken port, for peers or for the page, is an error with a hint, and leaves nothing running."""
    async with serve(metrics="127.0.0.1:0") as first:
        for busy in ({"listen": str(first.listen)}, {"metrics": str(first.metrics_address)}):
            with pytest.raises(PortBusy):
                async with serve(state_dir=tmp_path / "second", **busy):
                    pytest.fail("started on a taken port")
    async with serve(listen=str(first.listen)):
        pass


async def test_one_coordinator_per_folder(serve: Serve) -> None:
    """Two coordinators never share a folder."""
    async with serve():
        with pytest.raises(AlreadyRunning):
            async with serve():
                pytest.fail("started twice")


async def test_damaged_database(serve: Serve, tmp_path: Path) -> None:
    """A broken database stops the start with a hint, and is not overwritten."""
    async with serve():
        pass
    path = tmp_path / "state" / "coordinator.db"
    path.write_bytes(b"garbage" * 100)
    with pytest.raises(DatabaseCorrupt):
        async with serve():
            pytest.fail("started on a broken database")
    assert path.read_bytes().startswith(b"garbage")


async def test_files_are_private(serve: Serve, tmp_path: Path) -> None:
    """The folder and the keys in it are the owner's only."""
    async with serve():
        modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "state").iterdir()}
    assert (tmp_path / "state").stat().st_mode & 0o777 == 0o700
    assert modes["coordinator.key"] == modes["tls.key"] == 0o600


async def test_advertised_address(serve: Serve) -> None:
    """The link names the advertised address, or else one of this machine instead of the wildcard."""
    async with serve(advertise="swarm.example:443") as coordinator:
        assert coordinator.link.address == "swarm.example:443"
    async with serve(listen="0.0.0.0:0") as coordinator:
        assert not ip_address(coordinator.link.host).is_unspecified
    async with serve(advertise="[2001:db8::1]:443") as coordinator:
        assert coordinator.link.address == "[2001:db8::1]:443"


async def test_failure_in_the_background_ends_the_context(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the writer dies, the coordinator doesn't go on without it."""

    async def fail(_: object) -> None:
        raise RuntimeError("the writer died")

    monkeypatch.setattr("coordinator.journal.Journal.run", fail)
    settings = CoordinatorSettings(listen="127.0.0.1:0", state_dir=tmp_path, db="memory://")
    with pytest.raises(RuntimeError, match="the writer died"):
        async with Coordinator.serve([world.signed_manifest], settings):
            await asyncio.wait_for(asyncio.Event().wait(), 10)


@pytest.mark.parametrize("text", ["", "host", "host:", "host:x", "host:70000"])
def test_addresses(text: str) -> None:
    """What is no address is a usage error."""
    with pytest.raises(UsageError):
        Address.parse(text)
    assert str(Address.parse("[::1]:80")) == "[::1]:80"
