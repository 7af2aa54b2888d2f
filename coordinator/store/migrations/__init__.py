"""Alembic's folder: `env` runs the `versions` on the connection that `coordinator.store.migrate` opened."""
