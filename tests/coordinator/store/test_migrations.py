"""Migrations lead up and down on both databases, and end in the schema that the code has."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory

from coordinator.store.interface import Row
from coordinator.store.migrate import MIGRATIONS, downgrade, upgrade
from coordinator.store.schema import HEAD, metadata
from coordinator.store.sql import SqlStore, _engine
from swarm.merkle import leaf_hash

REVISIONS = [script.revision for script in ScriptDirectory(str(MIGRATIONS)).walk_revisions()][::-1]


@pytest.fixture(params=["sqlite", "postgres"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty database of either kind."""
    return f"sqlite:///{tmp_path / 'db'}" if request.param == "sqlite" else request.getfixturevalue("postgres")


@pytest.fixture
def engine(url: str) -> Iterator[sa.Engine]:
    """The database's engine, as the store uses it."""
    made = _engine(url)
    yield made
    made.dispose()


def tables(engine: sa.Engine) -> set[str]:
    """What tables there are, apart from alembic's own."""
    return set(sa.inspect(engine).get_table_names()) - {"alembic_version"}


def test_no_drift(engine: sa.Engine) -> None:
    """After all migrations the database has exactly the tables, columns and indexes of the code."""
    with engine.begin() as connection:
        upgrade(connection)
        context = MigrationContext.configure(connection, opts={"compare_type": True, "compare_server_default": True})
        assert context.get_current_revision() == HEAD == REVISIONS[-1]
        assert compare_metadata(context, metadata) == []


def test_drift_would_be_found(engine: sa.Engine) -> None:
    """A column that no migration makes is noticed."""
    with engine.begin() as connection:
        upgrade(connection)
        connection.execute(sa.text("ALTER TABLE entries ADD COLUMN more INTEGER"))
        assert compare_metadata(MigrationContext.configure(connection), metadata)


def test_step_by_step_up_and_down(engine: sa.Engine) -> None:
    """Every migration can be done, undone and done again, one by one; in the end nothing is left, then everything is there."""
    with engine.begin() as connection:
        for revision in REVISIONS:
            upgrade(connection, revision)
            downgrade(connection, "-1")
            upgrade(connection, revision)
        for _ in REVISIONS:
            downgrade(connection, "-1")
    assert tables(engine) == set()
    with engine.begin() as connection:
        upgrade(connection)
    assert tables(engine) == set(metadata.tables)


def test_a_ledger_is_never_dropped(url: str, engine: sa.Engine) -> None:
    """Going back before the first migration is refused while there are entries, which stay."""
    store = SqlStore.open(url)
    store.append([Row(0, leaf_hash(b"entry"), b"entry")])
    with pytest.raises(RuntimeError, match="never dropped"), engine.begin() as connection:
        downgrade(connection, "base")
    assert store.entries(0, 1) == [b"entry"]
    store.close()


def test_one_line_of_revisions() -> None:
    """Migrations follow each other in one line."""
    assert len(ScriptDirectory.from_config(_config()).get_heads()) == 1


def _config() -> Config:
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    return config
