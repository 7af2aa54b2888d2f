"""Nodes for tests."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from peer.network.p2pd import P2pdOptions


def loopback(identity_path: Path, **changes: object) -> P2pdOptions:
    """Options of a node that only this machine can reach."""
    return replace(P2pdOptions(identity_path, ("/ip4/127.0.0.1/tcp/0",), map_port=False), **changes)  # type: ignore[arg-type]
