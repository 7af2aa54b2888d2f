"""The single writer: durable before answered, grouped, and restored from any store."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress

import pytest
from prometheus_client import CollectorRegistry

from coordinator.errors import StoreFailed
from coordinator.journal import GATHER_S, Journal, Outcome
from coordinator.metrics import Metrics
from coordinator.state import Announced, GrantAsked, Reported
from coordinator.store.interface import Row, Store
from coordinator.store.memory import MemoryStore
from swarm.clock import ManualClock
from swarm.credits import verify_ledger
from swarm.entries import open_proposal, open_report
from swarm.errors import DatabaseCorrupt, Rejected
from swarm.identity import Identity
from swarm.ledger import LedgerReader, verify_receipt
from swarm.merkle import leaf_hash
from swarm.messages import open_signed, payload_hash
from swarm.rpc.v1.coordinator_pb2 import Announcement, GrantRequest
from swarm.rpc.v1.signed_pb2 import Grant, Signed
from tests.world import COORDINATOR, NOW_S, World, identity, manifest

WORLD = World()
PEERS = [identity(number) for number in range(3)]


def new_journal(store: Store, clock: ManualClock | None = None, key: Identity = COORDINATOR, world: World = WORLD) -> Journal:
    """A journal over a store, loaded."""
    metrics = Metrics(CollectorRegistry())
    journal = Journal(store, key, world.signed_manifest, clock or ManualClock(NOW_S), metrics, 45.0)
    journal.load()
    return journal


@asynccontextmanager
async def running(store: Store, clock: ManualClock | None = None) -> AsyncIterator[Journal]:
    """A journal that writes."""
    journal = new_journal(store, clock)
    task = asyncio.create_task(journal.run())
    yield journal
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task


def announced(peer: Identity) -> Announced:
    """A first announcement."""
    signed = WORLD.announcement(peer)
    return Announced(peer.peer_id, Announcement.FromString(signed.payload), payload_hash(signed))


def reported(report: Signed, proposal: Signed | None) -> Reported:
    """A report as an event."""
    return Reported(open_report(report), report, open_proposal(proposal) if proposal else None, proposal)


async def admit_all(journal: Journal) -> None:
    """Admit three peers."""
    await asyncio.gather(*(journal.submit(announced(peer)) for peer in PEERS))


async def submit_round(journal: Journal, number: int) -> list[Outcome]:
    """A whole round, all reports at once."""
    proposal, reports = WORLD.round(PEERS, number)
    return await asyncio.gather(*(journal.submit(reported(report, proposal)) for report in reports))


async def test_receipts_hold_and_the_ledger_verifies(store: Store) -> None:
    """On every store: receipts verify offline, the ledger verifies as a whole, and both agree after a restart."""
    async with running(store) as journal:
        await admit_all(journal)
        outcomes = [outcome for number in range(3) for outcome in await submit_round(journal, number)]
        root = journal.tree.root()
    assert [outcome.decision.reason for outcome in outcomes] == ["accepted", "confirmed", "accepted"] * 3
    entries = store.entries(0, 100)
    state = verify_ledger(entries, COORDINATOR.peer_id)
    reader = LedgerReader()
    reader.extend(entries)
    for outcome in outcomes:
        reader.check_receipt(verify_receipt(outcome.answer or Signed(), COORDINATOR.peer_id))
    again = new_journal(store)
    assert again.tree.root() == root
    assert again.credits.balances(WORLD.run_id) == state.balances(WORLD.run_id)


async def test_same_report_same_receipt(store: Store) -> None:
    """The same report gives the same receipt: within a group, later, and after a restart; credit counts once."""
    proposal, reports = WORLD.round(PEERS, 0)
    event = reported(reports[0], proposal)
    async with running(store) as journal:
        await admit_all(journal)
        first, second = await asyncio.gather(journal.submit(event), journal.submit(event))
        await submit_round(journal, 0)
        third = await journal.submit(event)
        size = len(journal.tree)
    async with running(store) as journal:
        fourth = await journal.submit(event)
        assert len(journal.tree) == size
    assert first.answer == second.answer == third.answer == fourth.answer
    assert [item.decision.reason for item in (second, third, fourth)] == ["duplicate"] * 3
    assert journal.credits.balance(WORLD.run_id, PEERS[0].peer_id).rounds == 1


async def test_another_report_for_the_same_round(store: Store) -> None:
    """A second, different report of a peer for a round gets no receipt."""
    proposal, reports = WORLD.round(PEERS, 0)
    other = WORLD.report(PEERS[0], WORLD.commit(PEERS[0], 0), proposal, issued_at=7)
    async with running(store) as journal:
        await admit_all(journal)
        await journal.submit(reported(reports[0], proposal))
        with pytest.raises(Rejected, match="already_reported"):
            await journal.submit(reported(other, proposal))


async def test_grant_is_given_again(store: Store) -> None:
    """The same grant comes back to whoever asks for the same, also after a restart."""
    signed = WORLD.grant_request(PEERS[0], 0, PEERS)
    event = GrantAsked(PEERS[0].peer_id, GrantRequest.FromString(signed.payload))
    clock = ManualClock(NOW_S)
    async with running(store, clock) as journal:
        await admit_all(journal)
        clock.advance(20)
        first = await journal.submit(event)
    async with running(store, clock) as journal:
        second = await journal.submit(event)
    assert first.answer == second.answer
    assert open_signed(first.answer or Signed(), Grant, COORDINATOR.peer_id).present == [PEERS[0].peer_id]


class FailingStore(MemoryStore):
    """Fails when told to, before anything is kept."""

    failing = False
    groups = 0

    def append(self, rows: Sequence[Row]) -> None:
        """Fail, or count the group."""
        if self.failing:
            raise StoreFailed("disk full")
        self.groups += 1
        super().append(rows)


async def test_no_receipt_without_a_commit() -> None:
    """If the store fails nobody gets a receipt, nothing is credited, and everything goes on once the store works again."""
    store = FailingStore()
    proposal, reports = WORLD.round(PEERS, 0)
    async with running(store) as journal:
        await admit_all(journal)
        size = len(journal.tree)
        store.failing = True
        for _ in range(2):
            with pytest.raises(StoreFailed):
                await journal.submit(reported(reports[0], proposal))
        assert not journal.is_healthy
        assert len(journal.tree) == size
        store.failing = False
        outcome = await journal.submit(reported(reports[0], proposal))
        assert outcome.decision.reason == "accepted"
        assert journal.is_healthy
    assert new_journal(store).tree.root() == journal.tree.root()


async def test_reports_are_committed_in_groups() -> None:
    """Reports that arrive together share a transaction."""
    store = FailingStore()
    async with running(store) as journal:
        await admit_all(journal)
        before = store.groups
        await submit_round(journal, 0)
        assert store.groups == before + 1


async def test_while_many_come_a_group_grows_before_it_is_committed() -> None:
    """What follows a group of several shares a commit with what comes a moment later; a single event isn't kept waiting."""
    store = FailingStore()
    async with running(store) as journal:
        await admit_all(journal)
        proposal, reports = WORLD.round(PEERS, 1)
        before = store.groups
        first = asyncio.create_task(journal.submit(reported(reports[0], proposal)))
        await asyncio.sleep(GATHER_S / 3)
        later = [journal.submit(reported(report, None)) for report in reports[1:]]
        await asyncio.gather(first, *later)
        assert store.groups == before + 1
        for number in (2, 3):
            proposal, (report,) = WORLD.round(PEERS[:1], number)
            await journal.submit(reported(report, proposal))
        assert store.groups == before + 3


async def test_queue_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """When too much waits, callers are told to come back instead of filling the memory."""
    monkeypatch.setattr("coordinator.journal.QUEUE_EVENTS", 2)
    journal = new_journal(MemoryStore())
    tasks = [asyncio.create_task(journal.submit(announced(peer))) for peer in PEERS]
    done, waiting = await asyncio.wait(tasks, timeout=0.05)
    assert [str(task.exception()) for task in done] == ["overloaded: too many requests wait for the ledger"]
    for task in waiting:
        task.cancel()
    await asyncio.wait(waiting)


def test_database_of_another_key_or_with_an_invalid_ledger(store: Store) -> None:
    """A database is used only by the key that wrote it, and only if its ledger keeps the rules."""
    new_journal(store)
    with pytest.raises(DatabaseCorrupt, match="belongs to"):
        new_journal(store, key=identity(5))
    entry = WORLD.opened()
    store.append([Row(1, leaf_hash(entry), entry)])
    with pytest.raises(DatabaseCorrupt, match="entry 1: already_open"):
        new_journal(store)


def test_second_run_in_the_same_ledger(store: Store) -> None:
    """A changed manifest is another run: it is opened in the same ledger and starts at nothing."""
    new_journal(store)
    other = World(manifest(name="other"))
    journal = new_journal(store, world=other)
    assert journal.credits.run_ids == (WORLD.run_id, other.run_id)
    assert len(journal.tree) == 2


async def test_genesis_is_remembered(store: Store) -> None:
    """Who starts the run is the same after a restart."""
    journal = new_journal(store)
    assert journal.presence.choose_genesis("a")
    await journal.save_genesis()
    await journal.save_genesis()
    assert not new_journal(store).presence.choose_genesis("b")
