"""The page for people and their browsers, the JSON behind it, `/metrics` for Prometheus and `/healthz` for supervisors."""

from __future__ import annotations

from coordinator.web.app import Site, serve

__all__ = ["Site", "serve"]
