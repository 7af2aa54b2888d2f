"""`swarm publish`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from swarm.cli.main import run


@pytest.fixture
def model(home: Path) -> Path:
    """What an export looks like, with a file that is no part of it."""
    folder = home / "model"
    folder.mkdir()
    for name in ("README.md", "adapter_config.json", "adapter_model.safetensors", "notes.txt"):
        (folder / name).write_text("x" * 1500)
    return folder


def test_a_dry_run_lists_what_would_be_sent(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Files and sizes, as text and as JSON; it needs no token and no hub."""
    assert run(["publish", "model", "--to", "owner/name", "--dry-run"]) == 0
    told = capsys.readouterr()
    assert "adapter_model.safetensors" in told.out
    assert "1.5 kB" in told.out
    assert "notes.txt" not in told.out
    assert "left out notes.txt" in told.err
    assert run(["publish", "model", "--to", "owner/name", "--dry-run", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["files"]["README.md"] == 1500
    assert (answer["sent"], answer["public"]) == (None, False)


def test_a_folder_without_a_model(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Is refused, and says how one is made."""
    assert run(["publish", str(home), "--to", "owner/name"]) == 2
    assert "swarm export" in capsys.readouterr().err
