"""What the operator has ordered, command by command."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    """Create the table."""
    op.create_table(
        "admin_notes",
        sa.Column("command_hash", sa.LargeBinary, primary_key=True),
        sa.Column("at_us", sa.BigInteger, nullable=False),
        sa.Column("command", sa.LargeBinary, nullable=False),
        sa.Column("outcome", sa.String(100), nullable=False),
    )
    op.create_index("ix_admin_notes_at_us", "admin_notes", ["at_us"])


def downgrade() -> None:
    """Remove the table; the ledger doesn't need it."""
    op.drop_index("ix_admin_notes_at_us", "admin_notes")
    op.drop_table("admin_notes")
