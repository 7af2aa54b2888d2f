"""What every store has to do: run on memory, SQLite and PostgreSQL."""

from __future__ import annotations

import pytest

from coordinator.errors import StoreFailed
from coordinator.store.interface import Found, Note, Row, Store
from swarm.merkle import leaf_hash


def row(position: int, key: bytes | None = None, entry: bytes | None = None) -> Row:
    """A row whose hash fits."""
    entry = b"entry %d\x00\xff" % position if entry is None else entry
    return Row(position, leaf_hash(entry), entry, key)


def test_empty(store: Store) -> None:
    """A new store has nothing."""
    assert store.size() == 0
    assert list(store.rows()) == []
    assert store.entries(0, 10) == []
    assert store.find(b"key") is None
    assert store.value("name") is None
    store.append([])
    assert store.size() == 0


def test_rows_come_back_in_order(store: Store) -> None:
    """What was appended in several groups comes back whole and in order."""
    rows = [row(number, b"k%d" % number if number % 2 else None) for number in range(7)]
    store.append(rows[:3])
    store.append(rows[3:])
    assert store.size() == 7
    assert list(store.rows()) == rows
    assert list(store.rows(4)) == rows[4:]
    assert list(store.rows(7)) == []
    assert store.entries(2, 3) == [item.entry for item in rows[2:5]]
    assert store.entries(5, 100) == [item.entry for item in rows[5:]]
    assert store.entries(7, 1) == []


def test_find_by_key(store: Store) -> None:
    """An entry is found under its key."""
    store.append([row(0), row(1, b"one"), row(2, b"two")])
    assert store.find(b"one") == Found(1, row(1).entry)
    assert store.find(b"three") is None
    assert store.positions([b"two", b"three", b"one"]) == {b"one": 1, b"two": 2}
    assert store.positions([]) == {}


@pytest.mark.parametrize("positions", [[1], [0, 2], [1, 0], [0, 0]])
def test_gaps_are_refused(store: Store, positions: list[int]) -> None:
    """Entries that don't follow on are refused, all of them."""
    with pytest.raises(StoreFailed):
        store.append([row(position) for position in positions])
    assert store.size() == 0


def test_keys_are_unique(store: Store) -> None:
    """A group with a key that is taken, before or within the group, leaves nothing behind."""
    store.append([row(0, b"one")])
    for group in ([row(1), row(2, b"one")], [row(1, b"two"), row(2, b"two")]):
        with pytest.raises(StoreFailed):
            store.append(group)
    assert store.size() == 1
    store.append([row(1, b"two")])


def test_two_writers_can_not_fork(store: Store) -> None:
    """The same position is never taken twice."""
    store.append([row(0)])
    with pytest.raises(StoreFailed):
        store.append([row(0, entry=b"another")])
    assert store.entries(0, 5) == [row(0).entry]


def test_large_entry(store: Store) -> None:
    """An entry of a megabyte comes back unharmed."""
    store.append([row(0, entry=b"\x00" * (1 << 20))])
    assert len(store.entries(0, 1)[0]) == 1 << 20


def test_values_are_replaced(store: Store) -> None:
    """A named value is what it was set to last."""
    store.set_value("genesis", b"a")
    store.set_value("genesis", b"\x00b")
    store.set_value("other", b"")
    assert store.value("genesis") == b"\x00b"
    assert store.value("other") == b""


def test_notes_and_what_they_changed(store: Store) -> None:
    """Notes come back newest first; a command is noted once, and changes nothing the second time."""
    first, second = Note(b"a", 1, b"command a\x00", "done"), Note(b"b", 2, b"command b", "unknown_action")
    store.note(first, ("orders", b"1"))
    store.note(second)
    assert store.notes(10) == [second, first]
    assert store.notes(1) == [second]
    with pytest.raises(StoreFailed):
        store.note(first._replace(at_us=3), ("orders", b"2"))
    assert store.value("orders") == b"1"
    assert len(store.notes(10)) == 2
