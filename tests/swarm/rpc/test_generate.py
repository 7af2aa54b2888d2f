"""Generated code."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from swarm.rpc.generate import stale


def test_generated_code_is_fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """The committed modules are what the protocol's sources give now."""
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    assert stale() == []
