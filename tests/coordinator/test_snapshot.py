"""Snapshots save reading, and never change what is read."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from coordinator.snapshot import Source, entries_of, keep_fresh, make, read, restore, write
from coordinator.store.interface import Row
from coordinator.store.memory import MemoryStore
from coordinator.store.sql import SqlStore
from swarm.credit_snapshot import dump
from swarm.errors import DatabaseCorrupt, LedgerInvalid
from swarm.merkle import leaf_hash
from tests.coordinator.conftest import Serve, connected
from tests.waiting import eventually
from tests.world import COORDINATOR, World, identity

PEERS = [identity(number) for number in range(3)]
ENTRIES = World().ledger(PEERS, 4)
NAME = COORDINATOR.peer_id


class CountingStore(MemoryStore):
    """Counts what is read."""

    read = 0

    def rows(self, first: int = 0) -> Iterator[Row]:  # type: ignore[override]
        """Count and give every row."""
        for row in super().rows(first):
            self.read += 1
            yield row


def filled(entries: list[bytes]) -> CountingStore:
    """A store with entries."""
    store = CountingStore()
    store.append([Row(index, leaf_hash(entry), entry) for index, entry in enumerate(entries)])
    return store


def test_only_the_tail_is_read(tmp_path: Path) -> None:
    """With a snapshot only later entries are read, and tree and state are the same as without."""
    path = tmp_path / "snapshot"
    write(path, *restore(filled(ENTRIES[:10]), NAME))
    assert entries_of(path) == 10
    store = filled(ENTRIES)
    tree, state = restore(store, NAME, path)
    assert store.read == len(ENTRIES) - 10
    straight = restore(filled(ENTRIES), NAME)
    assert (tree.root(), dump(state)) == (straight[0].root(), dump(straight[1]))


def test_unusable_snapshots_are_ignored(tmp_path: Path) -> None:
    """A snapshot that is cut off, altered, of another ledger, of another key or ahead of the database changes nothing."""
    path = tmp_path / "snapshot"
    write(path, *restore(filled(ENTRIES[:10]), NAME))
    good = path.read_bytes()
    ahead, other = filled(ENTRIES[:9]), filled([*ENTRIES[:9], World().admitted(identity(8))])
    for content, store, key in [
        (b"", filled(ENTRIES), NAME),
        (good[:-1], filled(ENTRIES), NAME),
        (good[:200] + b"x" + good[201:], filled(ENTRIES), NAME),
        (b'{"magic": "swarm-snapshot-9"}\n', filled(ENTRIES), NAME),
        (good, ahead, NAME),
        (good, other, NAME),
    ]:
        path.write_bytes(content)
        tree, _ = restore(store, key, path)
        assert store.read == store.size() == len(tree)
    path.write_bytes(good)
    with pytest.raises(DatabaseCorrupt, match="wrong_signer"):
        restore(filled(ENTRIES), identity(5).peer_id, path)


def test_made_from_the_database(tmp_path: Path) -> None:
    """`make` brings a snapshot up to the database's end, starting from the one before."""
    url = f"sqlite:///{tmp_path / 'db'}"
    store = SqlStore.open(url)
    rows = [Row(index, leaf_hash(entry), entry) for index, entry in enumerate(ENTRIES)]
    source = Source(url, NAME, tmp_path / "snapshot")
    for part in (rows[:12], rows[12:]):
        store.append(part)
        assert make(source) == store.size()
    store.close()
    assert read(source.path)[0].root() == restore(filled(ENTRIES), NAME)[0].root()
    source.path.write_bytes(b"{}\n")
    with pytest.raises(LedgerInvalid):
        read(source.path)


async def test_kept_fresh_by_another_process(serve: Serve, world: World, tmp_path: Path) -> None:
    """While the coordinator serves, another process makes the snapshot; a restart takes it up."""
    path = tmp_path / "state" / "snapshot"
    async with serve() as coordinator, connected(coordinator) as client:
        for peer in PEERS:
            await client.announce(world.announcement(peer, coordinator.journal.now().wall_s))
        source = Source(f"sqlite:///{tmp_path / 'state' / 'coordinator.db'}", coordinator.identity.peer_id, path)
        task = asyncio.create_task(keep_fresh(source, lambda: len(coordinator.journal.tree), every=2))
        await eventually(lambda: entries_of(path) == 4, "the snapshot is made")
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
        root = coordinator.journal.tree.root()
    async with serve() as again:
        assert again.journal.tree.root() == root
        assert again.journal.credits.member_count(world.run_id) == 3
