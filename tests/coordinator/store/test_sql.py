"""SQL in particular: durability settings, reopening, and damage."""

from __future__ import annotations

import sqlite3
import threading
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext

from coordinator.store.interface import Row
from coordinator.store.schema import HEAD, metadata
from coordinator.store.sql import SqlStore
from swarm.errors import DatabaseCorrupt
from swarm.merkle import leaf_hash


def url(path: Path) -> str:
    """The URL of a SQLite file."""
    return f"sqlite:///{path}"


def filled(path: Path, entries: int = 3) -> SqlStore:
    """A store with a few entries."""
    store = SqlStore.open(url(path))
    store.append([Row(number, leaf_hash(b"%d" % number), b"%d" % number) for number in range(entries)])
    return store


def test_every_commit_is_synced(tmp_path: Path) -> None:
    """SQLite writes ahead and syncs at every commit."""
    store = filled(tmp_path / "db")
    with store._engine.connect() as connection:
        assert connection.scalar(sa.text("PRAGMA journal_mode")) == "wal"
        assert connection.scalar(sa.text("PRAGMA synchronous")) == 2
    store.close()


def test_reopening_keeps_everything(tmp_path: Path) -> None:
    """A database that was closed opens again with its entries, without migrating twice."""
    filled(tmp_path / "db").close()
    again = SqlStore.open(url(tmp_path / "db"))
    assert again.size() == 3
    again.close()


def test_schema_is_what_the_migrations_make(tmp_path: Path) -> None:
    """The tables in code and those of the newest migration are the same."""
    store = filled(tmp_path / "db")
    with store._engine.connect() as connection:
        context = MigrationContext.configure(connection)
        assert context.get_current_revision() == HEAD
        assert compare_metadata(context, metadata) == []
    store.close()


def test_not_a_database(tmp_path: Path) -> None:
    """A file that is no database is named damaged, with a hint."""
    (tmp_path / "db").write_bytes(b"garbage " * 1000)
    with pytest.raises(DatabaseCorrupt, match="damaged") as caught:
        SqlStore.open(url(tmp_path / "db"))
    assert caught.value.hint


def test_unreachable(tmp_path: Path) -> None:
    """A folder that doesn't exist, a server that isn't there and a URL that is none are told apart from damage."""
    for broken in (url(tmp_path / "no" / "db"), f"postgresql://x:secret@/x?host={tmp_path}"):
        with pytest.raises(DatabaseCorrupt, match="can't be opened") as caught:
            SqlStore.open(broken)
        assert "secret" not in caught.value.message
    for broken in ("nonsense", "mysql://host/db", "oracle+x://y"):
        with pytest.raises(DatabaseCorrupt, match="not a database URL"):
            SqlStore.open(broken)


@pytest.mark.parametrize(
    ("statement", "fault"),
    [
        ("UPDATE entries SET entry = x'00' WHERE position = 1", "entry 1 was altered"),
        ("DELETE FROM entries WHERE position = 1", "entry 1 is missing"),
        ("DELETE FROM entries WHERE position = 0", "entry 0 is missing"),
    ],
)
def test_altered_entries_are_noticed(tmp_path: Path, statement: str, fault: str) -> None:
    """Entries that were changed or removed behind the coordinator's back are named."""
    store = filled(tmp_path / "db")
    with sqlite3.connect(tmp_path / "db") as connection:
        connection.execute(statement)
    connection.close()
    with pytest.raises(DatabaseCorrupt, match=fault):
        list(store.rows())
    store.close()


def test_broken_pages(tmp_path: Path) -> None:
    """A database with overwritten pages is damaged, not a crash."""
    path = tmp_path / "db"
    store = filled(path, 2000)
    store.close()
    content = bytearray(path.read_bytes())
    content[4096 * 3 :] = b"\xaa" * (len(content) - 4096 * 3)
    path.write_bytes(content)
    store = SqlStore.open(url(path))
    with pytest.raises(DatabaseCorrupt):
        list(store.rows())
    store.close()


def test_closing_waits_for_a_call_that_is_on_its_way(tmp_path: Path) -> None:
    """A thread outlives the task that waited for it: its connection has to be back before the pool is closed."""
    store = filled(tmp_path / "ledger.db")
    rows = store.rows()
    next(rows)
    closing = threading.Thread(target=store.close)
    closing.start()
    closing.join(0.2)
    assert closing.is_alive()
    rows.close()
    closing.join(10)
    assert not closing.is_alive()
