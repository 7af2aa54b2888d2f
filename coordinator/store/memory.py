"""The store for tests and trials: gone with the process."""

from __future__ import annotations

from collections.abc import Generator, Sequence

from coordinator.errors import StoreFailed
from coordinator.store.interface import Found, Note, Row


class MemoryStore:
    """Rows in a list."""

    def __init__(self) -> None:
        self._rows: list[Row] = []
        self._keys: dict[bytes, int] = {}
        self._values: dict[str, bytes] = {}
        self._notes: dict[bytes, Note] = {}

    def append(self, rows: Sequence[Row]) -> None:
        """Take all rows, or none. Raises `StoreFailed`."""
        keys = [row.key for row in rows if row.key is not None]
        if [row.position for row in rows] != list(range(len(self._rows), len(self._rows) + len(rows))):
            raise StoreFailed("the entries don't follow on")
        if len(set(keys)) != len(keys) or self._keys.keys() & set(keys):
            raise StoreFailed("an entry with this key exists")
        self._rows += rows
        self._keys.update((row.key, row.position) for row in rows if row.key is not None)

    def size(self) -> int:
        """Number of entries."""
        return len(self._rows)

    def rows(self, first: int = 0) -> Generator[Row, None, None]:
        """Every row from index `first` on, in order."""
        yield from self._rows[first:]

    def entries(self, first: int, limit: int) -> list[bytes]:
        """Up to `limit` entries from index `first` on."""
        return [row.entry for row in self._rows[first : first + limit]]

    def find(self, key: bytes) -> Found | None:
        """The entry that was appended under `key`."""
        index = self._keys.get(key)
        return None if index is None else Found(index, self._rows[index].entry)

    def positions(self, keys: Sequence[bytes]) -> dict[bytes, int]:
        """Where the entries are that were appended under some of these keys."""
        return {key: self._keys[key] for key in keys if key in self._keys}

    def value(self, name: str) -> bytes | None:
        """The value that was set under `name`."""
        return self._values.get(name)

    def set_value(self, name: str, value: bytes) -> None:
        """Keep a named value."""
        self._values[name] = value

    def note(self, note: Note, changed: tuple[str, bytes] | None = None) -> None:
        """Keep a note, and the named value with it. Raises `StoreFailed`."""
        if note.command_hash in self._notes:
            raise StoreFailed("the command was noted before")
        self._notes[note.command_hash] = note
        if changed is not None:
            self.set_value(*changed)

    def notes(self, limit: int) -> list[Note]:
        """The newest notes, newest first."""
        return sorted(self._notes.values(), key=lambda note: note.at_us, reverse=True)[:limit]

    def close(self) -> None:
        """Nothing to give back."""
