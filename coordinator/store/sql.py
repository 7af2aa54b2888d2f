"""The store in SQL: SQLite (write-ahead log, every commit synced to disk) or PostgreSQL, by URL.

Migrations run at opening. Nothing here knows what an entry means.
"""

from __future__ import annotations

import threading
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import sqlalchemy as sa
from sqlalchemy.exc import DatabaseError, IntegrityError, OperationalError, SQLAlchemyError
from sqlalchemy.pool import ConnectionPoolEntry

from coordinator.errors import StoreFailed
from coordinator.store.interface import Found, Note, Row
from coordinator.store.schema import HEAD, entries, notes, values
from swarm.errors import DatabaseCorrupt
from swarm.merkle import leaf_hash

READ_AHEAD_ROWS = 1000
CLOSE_S = 5.0
WRITES = "swarm_writes"
SEAT = int.from_bytes(b"swarm", "big")
POSTGRES_DRIVER = "postgresql+psycopg"
SQLITE_BROKEN = ("malformed", "not a database", "disk image", "file is encrypted")
CORRUPT_HINT = "restore the database from a backup; peers' receipts prove what it must contain"
OPEN_HINT = "check the --db URL, and that the database's folder or server can be reached and written to"


class SqlStore:
    """Tables `entries` and `named_values`."""

    def __init__(self, engine: sa.Engine) -> None:
        self._engine = engine
        self._writer = engine.execution_options(**{WRITES: True})
        self._insert = str(sa.insert(entries).compile(engine, column_keys=Row._fields))
        self._positional = engine.dialect.positional
        self._size: int | None = None
        self._idle = threading.Condition()
        self._in_use = 0

    @classmethod
    def open(cls, url: str) -> SqlStore:
        """Connect and bring the schema up to date. Raises `DatabaseCorrupt`."""
        try:
            engine = _engine(url)
        except (SQLAlchemyError, ImportError, ValueError) as error:
            raise DatabaseCorrupt(f"not a database URL: {_brief(error)}", OPEN_HINT) from error
        store = cls(engine)
        try:
            store._migrate()
        except SQLAlchemyError as error:
            engine.dispose()
            raise _unusable(error) from error
        return store

    def _migrate(self) -> None:
        with self._engine.begin() as connection:
            if _revision(connection) == HEAD:
                return
            from coordinator.store.migrate import upgrade  # noqa: PLC0415 - alembic takes longer to import than to do nothing

            upgrade(connection)

    def append(self, rows: Sequence[Row]) -> None:
        """Commit all rows in one transaction, or none. Raises `StoreFailed`.

        The size is asked for once: from then on a second writer shows itself by taking a position that we take.
        """
        if not rows:
            return
        first, self._size = self._size, None
        with self._writing() as connection:
            size = _size(connection) if first is None else first
            if any(row.position != expected for expected, row in enumerate(rows, size)):
                raise StoreFailed("the entries don't follow on: does another coordinator use this database?")
            connection.exec_driver_sql(self._insert, list(rows) if self._positional else [row._asdict() for row in rows])
        self._size = size + len(rows)

    def size(self) -> int:
        """Number of entries. Raises `DatabaseCorrupt`."""
        with self._reading() as connection:
            return _size(connection)

    def rows(self, first: int = 0) -> Generator[Row, None, None]:
        """Every row from index `first` on, in order.

        Raises `DatabaseCorrupt` if one is missing, unreadable or not what its hash says.
        """
        query = sa.select(entries).where(entries.c.position >= first).order_by(entries.c.position)
        query = query.execution_options(yield_per=READ_AHEAD_ROWS)
        with self._reading() as connection, connection.execute(query) as result:
            for expected, found in enumerate(result, first):
                row = Row(found.position, bytes(found.leaf_hash), bytes(found.entry), found.key)
                if row.position != expected:
                    raise DatabaseCorrupt(f"entry {expected} is missing from the database", CORRUPT_HINT)
                if leaf_hash(row.entry) != row.leaf_hash:
                    raise DatabaseCorrupt(f"entry {expected} was altered in the database", CORRUPT_HINT)
                yield row

    def entries(self, first: int, limit: int) -> list[bytes]:
        """Up to `limit` entries from index `first` on."""
        chosen = sa.and_(entries.c.position >= first, entries.c.position < first + limit)
        query = sa.select(entries.c.entry).where(chosen).order_by(entries.c.position)
        with self._reading() as connection:
            return [bytes(entry) for entry in connection.scalars(query)]

    def find(self, key: bytes) -> Found | None:
        """The entry that was appended under `key`."""
        query = sa.select(entries.c.position, entries.c.entry).where(entries.c.key == key)
        with self._reading() as connection:
            found = connection.execute(query).one_or_none()
        return None if found is None else Found(found.position, bytes(found.entry))

    def positions(self, keys: Sequence[bytes]) -> dict[bytes, int]:
        """Where the entries are that were appended under some of these keys."""
        query = sa.select(entries.c.key, entries.c.position).where(entries.c.key.in_(keys))
        with self._reading() as connection:
            return {bytes(row.key): row.position for row in connection.execute(query)}

    def value(self, name: str) -> bytes | None:
        """The value that was set under `name`."""
        with self._reading() as connection:
            found = connection.scalar(sa.select(values.c.value).where(values.c.name == name))
        return None if found is None else bytes(found)

    def set_value(self, name: str, value: bytes) -> None:
        """Commit a named value, in place of an older one. Raises `StoreFailed`."""
        with self._writing() as connection:
            _set_value(connection, name, value)

    def note(self, note: Note, changed: tuple[str, bytes] | None = None) -> None:
        """Commit a note together with the named value that the command changed. Raises `StoreFailed`."""
        with self._writing() as connection:
            connection.execute(sa.insert(notes).values(note._asdict()))
            if changed is not None:
                _set_value(connection, *changed)

    def notes(self, limit: int) -> list[Note]:
        """The newest notes, newest first."""
        query = sa.select(notes).order_by(notes.c.at_us.desc()).limit(limit)
        with self._reading() as connection:
            return [
                Note(bytes(row.command_hash), row.at_us, bytes(row.command), row.outcome) for row in connection.execute(query)
            ]

    def close(self) -> None:
        """Close the pool's connections, once the calls in other threads that use them are over."""
        with self._idle:
            self._idle.wait_for(lambda: not self._in_use, CLOSE_S)
        self._engine.dispose()

    @contextmanager
    def _reading(self) -> Iterator[sa.Connection]:
        with self._used(), _readable(), self._engine.connect() as connection:
            yield connection

    @contextmanager
    def _writing(self) -> Iterator[sa.Connection]:
        with self._used(), _writable(), self._writer.begin() as connection:
            yield connection

    @contextmanager
    def _used(self) -> Iterator[None]:
        """A thread whose caller was cancelled goes on to its end: what it gives back after `close` would stay open."""
        with self._idle:
            self._in_use += 1
        try:
            yield
        finally:
            with self._idle:
                self._in_use -= 1
                self._idle.notify_all()


class PostgresSeat:
    """The writer's seat: a session's advisory lock, freed by the server when the session ends, however it does."""

    def __init__(self, url: str) -> None:
        self._engine = _engine(url)
        self._one_at_a_time = threading.Lock()
        self._connection: sa.Connection | None = None
        self._mine = False
        self._left = False

    def try_take(self) -> bool:
        """Take the seat if it is free, or say whether it is still ours. A database that is away has no free seat."""
        with self._one_at_a_time:
            if self._left:
                return False
            try:
                self._mine = self._asked()
            except SQLAlchemyError:
                self._end_session()
            return self._mine

    def leave(self) -> None:
        """Give the seat back, for good; a call of `try_take` that is on its way doesn't take it again."""
        with self._one_at_a_time:
            self._left = True
            self._end_session()
            self._engine.dispose()

    def _asked(self) -> bool:
        if self._connection is None:
            self._connection = self._engine.connect().execution_options(isolation_level="AUTOCOMMIT")
        if self._mine:
            self._connection.execute(sa.text("SELECT 1"))
            return True
        return bool(self._connection.scalar(sa.text(f"SELECT pg_try_advisory_lock({SEAT})")))

    def _end_session(self) -> None:
        connection, self._connection, self._mine = self._connection, None, False
        if connection is not None:
            connection.invalidate()
            connection.close()


def _engine(url: str) -> sa.Engine:
    parsed = sa.make_url(url)
    if parsed.get_backend_name() == "postgresql":
        return sa.create_engine(parsed.set(drivername=POSTGRES_DRIVER), pool_pre_ping=True)
    if parsed.get_backend_name() != "sqlite":
        raise ValueError(f"{parsed.get_backend_name()} is not supported, use sqlite or postgresql")
    engine = sa.create_engine(parsed)
    sa.event.listen(engine, "connect", _make_durable)
    sa.event.listen(engine, "begin", _begin)
    return engine


def _make_durable(connection: Any, _record: ConnectionPoolEntry) -> None:
    connection.isolation_level = None  # transactions are begun by `_begin`, so that they hold schema changes, too
    cursor = connection.cursor()
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "busy_timeout=5000"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _begin(connection: sa.Connection) -> None:
    """A writer takes its lock at once and waits for it: a lock taken after a read fails instead of waiting."""
    writes = connection.get_execution_options().get(WRITES, False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


def _set_value(connection: sa.Connection, name: str, value: bytes) -> None:
    connection.execute(sa.delete(values).where(values.c.name == name))
    connection.execute(sa.insert(values).values(name=name, value=value))


def _revision(connection: sa.Connection) -> str | None:
    if not sa.inspect(connection).has_table("alembic_version"):
        return None
    revision = connection.scalar(sa.text("SELECT version_num FROM alembic_version"))
    return None if revision is None else str(revision)


def _size(connection: sa.Connection) -> int:
    last = connection.scalar(sa.select(sa.func.max(entries.c.position)))
    return 0 if last is None else last + 1


@contextmanager
def _writable() -> Iterator[None]:
    try:
        yield
    except IntegrityError as error:
        raise StoreFailed("an entry with this index or key exists") from error
    except SQLAlchemyError as error:
        raise StoreFailed(_brief(error)) from error


@contextmanager
def _readable() -> Iterator[None]:
    try:
        yield
    except SQLAlchemyError as error:
        raise _unusable(error) from error


def _unusable(error: SQLAlchemyError) -> DatabaseCorrupt:
    brief = _brief(error)
    broken = isinstance(error, DatabaseError) and any(word in brief for word in SQLITE_BROKEN)
    if isinstance(error, OperationalError) and not broken:
        return DatabaseCorrupt(f"the database can't be opened: {brief}", OPEN_HINT)
    return DatabaseCorrupt(f"the database is damaged: {brief}", CORRUPT_HINT)


def _brief(error: Exception) -> str:
    """The driver's own words in one line; never the URL, which may hold a password."""
    original = getattr(error, "orig", None)
    return " ".join(str(original or error).split())[:300]
