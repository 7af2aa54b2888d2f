"""What a store has to do, for every implementation; `tests/coordinator/store/test_conformance.py` holds them to it.

Calls are blocking; the coordinator makes them in a thread.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import NamedTuple, Protocol


class Row(NamedTuple):
    """One entry on its way into the ledger."""

    position: int
    leaf_hash: bytes
    entry: bytes
    key: bytes | None = None
    """Under which `find` gives the entry back; unique in the ledger."""


class Found(NamedTuple):
    """An entry and its place."""

    position: int
    entry: bytes


class Note(NamedTuple):
    """A command of the operator's, as it was signed, and what became of it."""

    command_hash: bytes
    at_us: int
    command: bytes
    outcome: str


class Store(Protocol):
    """An append-only sequence of entries, and a few named values."""

    def append(self, rows: Sequence[Row]) -> None:
        """Make all rows durable, or none. Raises `StoreFailed`, also when the indices don't follow on or a key is taken."""

    def size(self) -> int:
        """Number of entries."""

    def rows(self, first: int = 0) -> Generator[Row, None, None]:
        """Every row from index `first` on, in order; close it if it isn't exhausted.

        Raises `DatabaseCorrupt` if one is missing or unreadable.
        """

    def entries(self, first: int, limit: int) -> list[bytes]:
        """Up to `limit` entries from index `first` on."""

    def find(self, key: bytes) -> Found | None:
        """The entry that was appended under `key`."""

    def positions(self, keys: Sequence[bytes]) -> dict[bytes, int]:
        """Where the entries are that were appended under some of these keys."""

    def value(self, name: str) -> bytes | None:
        """The value that was set under `name`."""

    def set_value(self, name: str, value: bytes) -> None:
        """Make a named value durable, in place of an older one."""

    def note(self, note: Note, changed: tuple[str, bytes] | None = None) -> None:
        """Make a note durable, together with the named value that the command changed.

        Raises `StoreFailed`, also when the command was noted before.
        """

    def notes(self, limit: int) -> list[Note]:
        """The newest notes, newest first."""

    def close(self) -> None:
        """Give back connections and files."""
