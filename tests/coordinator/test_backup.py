"""A backup brings back the same ledger under the same keys, from any database into any other."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

from coordinator.backup import LEDGER_FILE, MANIFEST_FILE, back_up, restore
from coordinator.fsck import check
from coordinator.journal import GENESIS
from coordinator.store.interface import Store
from coordinator.store.memory import MemoryStore
from coordinator.tls import Certificate
from swarm.errors import AlreadyRunning, DatabaseCorrupt, LedgerInvalid, UsageError
from tests.coordinator.conftest import Serve, connected
from tests.coordinator.test_fsck import ROWS, filled
from tests.world import COORDINATOR, World, identity


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    """A coordinator's state folder."""
    from datetime import UTC, datetime

    folder = tmp_path / "state"
    COORDINATOR.save(folder / "coordinator.key")
    Certificate.load_or_create(folder, datetime.now(UTC))
    return folder


def test_there_and_back(store: Store, keys: Path, tmp_path: Path) -> None:
    """Entries, named values and keys come back; the restored ledger is sound."""
    filled(ROWS, store)
    store.set_value(GENESIS, b"somebody")
    copied = back_up(store, keys, tmp_path / "backup")
    again, elsewhere = MemoryStore(), tmp_path / "elsewhere"
    elsewhere.mkdir()
    assert restore(tmp_path / "backup", again, elsewhere) == copied
    assert list(again.rows()) == list(store.rows())
    assert again.value(GENESIS) == b"somebody"
    assert check(again).tree.root() == copied.root
    assert {path.name: path.read_bytes() for path in elsewhere.iterdir()} == {
        path.name: path.read_bytes() for path in keys.iterdir()
    }
    assert all(path.stat().st_mode & 0o077 == 0 for path in (tmp_path / "backup").iterdir() if path.name != LEDGER_FILE)


def test_nothing_is_overwritten(keys: Path, tmp_path: Path) -> None:
    """An existing backup, a database with entries and other keys stay as they are."""
    back_up(filled(ROWS), keys, tmp_path / "backup")
    with pytest.raises(UsageError, match="exists already"):
        back_up(filled(ROWS), keys, tmp_path / "backup")
    with pytest.raises(AlreadyRunning, match="entries already"):
        restore(tmp_path / "backup", filled(ROWS), tmp_path / "new")
    identity(5).save(tmp_path / "other" / "coordinator.key")
    with pytest.raises(AlreadyRunning, match=r"another coordinator\.key"):
        restore(tmp_path / "backup", MemoryStore(), tmp_path / "other")


def test_damaged_backups(keys: Path, tmp_path: Path) -> None:
    """A backup with fewer entries, an altered entry, another key or no checkpoint is not taken over."""
    damages = {
        "short": ("DELETE FROM entries WHERE position > 9", LedgerInvalid, "not the one"),
        "altered": ("UPDATE entries SET entry = x'00' WHERE position = 3", DatabaseCorrupt, "entry 3"),
    }
    for name, (statement, error, words) in damages.items():
        back_up(filled(ROWS), keys, tmp_path / name)
        with sqlite3.connect(tmp_path / name / LEDGER_FILE) as connection:
            connection.execute(statement)
        connection.close()
        target = MemoryStore()
        with pytest.raises(error, match=words):
            restore(tmp_path / name, target, tmp_path / "new")
        assert target.size() == 0
    back_up(filled(ROWS), keys, tmp_path / "swapped")
    (tmp_path / "swapped" / "coordinator.key").unlink()
    identity(5).save(tmp_path / "swapped" / "coordinator.key")
    with pytest.raises(DatabaseCorrupt, match="not the coordinator's"):
        restore(tmp_path / "swapped", MemoryStore(), tmp_path / "new")
    (tmp_path / "swapped" / MANIFEST_FILE).write_text("[]")
    with pytest.raises(UsageError, match="not a backup"):
        restore(tmp_path / "swapped", MemoryStore(), tmp_path / "new")


async def test_while_it_serves(serve: Serve, world: World, tmp_path: Path) -> None:
    """A backup of a running coordinator's database, restored elsewhere, serves the same run under the same link."""
    from coordinator.store.sql import SqlStore

    async with serve() as coordinator, connected(coordinator) as client:
        await client.announce(world.announcement(identity(1), coordinator.journal.now().wall_s))
        store = SqlStore.open(f"sqlite:///{coordinator.state_folder / 'coordinator.db'}")
        back_up(store, coordinator.state_folder, tmp_path / "backup")
        store.close()
        fingerprint, root = coordinator.link.fingerprint, coordinator.journal.tree.root()
    target = tmp_path / "restored"
    target.mkdir()
    store = SqlStore.open(f"sqlite:///{target / 'coordinator.db'}")
    restore(tmp_path / "backup", store, target)
    store.close()
    async with serve(state_dir=target) as again:
        assert (again.link.fingerprint, again.journal.tree.root()) == (fingerprint, root)
        assert again.journal.credits.is_admitted(world.run_id, identity(1).peer_id)
