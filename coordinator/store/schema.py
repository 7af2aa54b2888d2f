"""The tables, as the newest migration leaves them."""

from __future__ import annotations

import sqlalchemy as sa

HEAD = "0002"

metadata = sa.MetaData()
entries = sa.Table(
    "entries",
    metadata,
    sa.Column("position", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("leaf_hash", sa.LargeBinary, nullable=False),
    sa.Column("entry", sa.LargeBinary, nullable=False),
    sa.Column("key", sa.LargeBinary, nullable=True, unique=True),
)
values = sa.Table(
    "named_values",
    metadata,
    sa.Column("name", sa.String(100), primary_key=True),
    sa.Column("value", sa.LargeBinary, nullable=False),
)
notes = sa.Table(
    "admin_notes",
    metadata,
    sa.Column("command_hash", sa.LargeBinary, primary_key=True),
    sa.Column("at_us", sa.BigInteger, nullable=False, index=True),
    sa.Column("command", sa.LargeBinary, nullable=False),
    sa.Column("outcome", sa.String(100), nullable=False),
)
