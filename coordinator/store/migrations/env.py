"""Run by alembic: migrates over the connection that the caller opened. There is no offline mode."""

from __future__ import annotations

from alembic import context

from coordinator.store.schema import metadata

context.configure(connection=context.config.attributes["connection"], target_metadata=metadata)
with context.begin_transaction():
    context.run_migrations()
