"""Several coordinators over one PostgreSQL database: one writes, all answer, and none of them is missed."""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest
import sqlalchemy as sa

from coordinator.replicas import PASSED_ON_KEY, is_passed_on
from coordinator.server import Coordinator
from coordinator.store.sql import PostgresSeat
from coordinator.tls import CERTIFICATE_FILE, KEY_FILE
from swarm.credits import verify_ledger
from swarm.errors import CoordinatorUnreachable, NotAdmitted, Rejected
from swarm.identity import Identity
from swarm.ledger import LedgerReader, verify_receipt
from swarm.messages import seal
from swarm.rpc.client import CoordinatorClient
from swarm.rpc.v1.signed_pb2 import AuditVerdict, Signed
from tests.coordinator.conftest import Serve, connected
from tests.waiting import eventually
from tests.world import World, identity, manifest

PEERS = [identity(number) for number in range(3)]
Start = Callable[..., AbstractAsyncContextManager[Coordinator]]


@pytest.fixture
def replica(serve: Serve, postgres: str, tmp_path: Path) -> Start:
    """Starts replicas by name; all have the keys that the first one made."""

    @asynccontextmanager
    async def start(name: str, served: World | None = None) -> AsyncIterator[Coordinator]:
        folder, first = tmp_path / name, tmp_path / "first"
        folder.mkdir(exist_ok=True)
        for key in ("coordinator.key", KEY_FILE, CERTIFICATE_FILE):
            if first.is_dir() and (first / key).exists() and not (folder / key).exists():
                shutil.copy(first / key, folder / key)
        async with serve(served=served or World(), state_dir=folder, db=postgres) as coordinator:
            yield coordinator

    return start


async def announce_all(client: CoordinatorClient, coordinator: Coordinator, world: World) -> None:
    """Admit three peers."""
    for peer in PEERS:
        await client.announce(world.announcement(peer, coordinator.journal.now().wall_s))


async def report_round(clients: list[CoordinatorClient], world: World, number: int) -> list[Signed]:
    """Three reports, each handed to another replica; the receipts."""
    proposal, reports = world.round(PEERS, number)
    return [await clients[place % len(clients)].submit_report(report, proposal) for place, report in enumerate(reports)]


async def caught_up(follower: Coordinator, size: int) -> None:
    """Wait until a follower has read that many entries."""
    await eventually(lambda: len(follower.journal.tree) >= size, "the follower reads what was written")


async def test_one_writes_and_all_answer(replica: Start, world: World) -> None:
    """Whatever replica a peer talks to, there is one ledger: reads from every replica agree, receipts hold everywhere."""
    async with replica("first") as first, replica("second") as second, connected(first) as one, connected(second) as two:
        assert [first.journal.is_writer, second.journal.is_writer] == [True, False]
        assert [each.metrics.registry.get_sample_value("swarm_coordinator_writer") for each in (first, second)] == [1, 0]
        assert first.link.fingerprint == second.link.fingerprint
        await announce_all(two, first, world)
        receipts = [receipt for number in range(3) for receipt in await report_round([two, one], world, number)]
        assert (await two.progress()).peers_alive == 3
        await caught_up(second, len(first.journal.tree))
        checkpoint, _, _ = await two.checkpoint()
        assert checkpoint.root == first.journal.tree.root()
        assert (await two.credits()).balances == (await one.credits()).balances
        entries = [entry async for entry in two.entries(0, checkpoint.size)]
        reader = LedgerReader()
        reader.extend(entries)
        for receipt in receipts:
            reader.check_receipt(verify_receipt(receipt, first.identity.peer_id))
        assert verify_ledger(entries, first.identity.peer_id).balance(world.run_id, PEERS[0].peer_id).rounds == 3


async def test_refusals_come_through(replica: Start, world: World) -> None:
    """What the writer refuses is refused by the same reason through another replica."""
    async with replica("first") as first, replica("second") as second, connected(second) as two:
        proposal, reports = world.round(PEERS, 0)
        with pytest.raises(NotAdmitted, match="by the replica that writes"):
            await two.submit_report(reports[0], proposal)
        assert len(first.journal.tree) == 1


async def test_only_the_writer_writes_what_auditors_and_evaluators_say(replica: Start) -> None:
    """Handed to another replica, a loss is in the one ledger; a finding is refused by the writer."""
    world = World(manifest(evaluation={"every": 1, "evaluators": 3}))
    async with (
        replica("first", world) as first,
        replica("second", world) as second,
        connected(first) as one,
        connected(second) as two,
    ):
        await announce_all(one, first, world)
        await report_round([one], world, 0)
        said = world.evaluation(PEERS[0], 0, issued_at=int(first.journal.now().wall_s))
        await two.submit_evaluation(said)
        await caught_up(second, len(first.journal.tree))
        assert [list(panel.statements) for panel in second.journal.credits.panels(world.run_id)] == [[PEERS[0].peer_id]]
        verdict = AuditVerdict(run_id=world.run_id, peer_id=PEERS[1].peer_id, finding="passed")
        with pytest.raises(Rejected, match="by the replica that writes"):
            await two.submit_audit(seal(PEERS[0], verdict))


async def test_another_takes_over(replica: Start, world: World) -> None:
    """When the writer is gone another one goes on where it stopped; every receipt's entry is there, and new ones follow."""
    async with AsyncExitStack() as stack:
        first = await stack.enter_async_context(replica("first"))
        second_stack = AsyncExitStack()
        async with second_stack:
            second = await second_stack.enter_async_context(replica("second"))
            async with connected(first) as one, connected(second) as two:
                await announce_all(one, first, world)
                receipts = await report_round([one, two], world, 0)
                await stack.aclose()
                await eventually(lambda: second.journal.is_writer, "the second takes over")
                receipts += await report_round([two], world, 1)
                assert await report_round([two], world, 0) == receipts[:3]
                reader = LedgerReader()
                reader.extend([entry async for entry in two.entries()])
                for receipt in receipts:
                    reader.check_receipt(verify_receipt(receipt, second.identity.peer_id))


async def test_a_writer_that_loses_its_session(replica: Start, world: World, postgres: str) -> None:
    """A writer whose session the database ends stops writing until it has the seat again, and nothing is forked."""
    async with replica("first") as first, connected(first) as one:
        await announce_all(one, first, world)
        engine = sa.create_engine(postgres.replace("postgresql:", "postgresql+psycopg:"))
        with engine.connect() as connection:
            holders = "SELECT pg_terminate_backend(pid) FROM pg_locks WHERE locktype = 'advisory' AND granted"
            assert len(connection.execute(sa.text(holders)).all()) == 1
        engine.dispose()
        receipts = await eventually(lambda: _reported(one, world), "it writes again")
        reader = LedgerReader()
        reader.extend([entry async for entry in one.entries()])
        for receipt in receipts:
            reader.check_receipt(verify_receipt(receipt, first.identity.peer_id))


async def _reported(client: CoordinatorClient, world: World) -> list[Signed]:
    try:
        return await report_round([client], world, 0)
    except CoordinatorUnreachable:
        return []


async def test_one_seat(postgres: str) -> None:
    """The seat is taken by one and kept, and free again once it is left; who left doesn't come back."""
    one, two = PostgresSeat(postgres), PostgresSeat(postgres)
    await eventually(one.try_take, "the seat is free")
    assert [two.try_take(), one.try_take()] == [False, True]
    one.leave()
    await eventually(two.try_take, "the seat is free again")
    assert not one.try_take()
    two.leave()


def test_no_seat_in_a_database_that_is_away(tmp_path: Path) -> None:
    """Without a database nobody writes."""
    seat = PostgresSeat(f"postgresql://x@/x?host={tmp_path}")
    assert not seat.try_take()
    seat.leave()


def test_only_replicas_know_the_secret() -> None:
    """A call counts as passed on only with the secret of the coordinator's own key."""

    class Context:
        def __init__(self, *metadata: tuple[str, str]) -> None:
            self._metadata = metadata

        def invocation_metadata(self) -> tuple[tuple[str, str], ...]:
            return self._metadata

    from coordinator.replicas import replica_secret

    secret, other = replica_secret(identity(1)), replica_secret(Identity.generate())
    assert is_passed_on(Context((PASSED_ON_KEY, secret)), secret)
    assert not is_passed_on(Context((PASSED_ON_KEY, other)), secret)
    assert not is_passed_on(Context(("other", secret)), secret)
    assert not is_passed_on(Context(), secret)


async def test_memory_and_sqlite_have_one_writer(serve: Serve) -> None:
    """With a database of its own a coordinator writes from the start."""
    async with serve() as coordinator:
        assert coordinator.journal.is_writer
