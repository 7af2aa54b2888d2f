"""`swarm identity`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from swarm.cli.main import run
from swarm.identity import Identity


def test_new_and_show(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A new key is made once; its peer id is shown, its secret never."""
    assert run(["identity", "new", "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert run(["identity", "show", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == made
    assert Identity.load(Path(made["path"])).peer_id == made["peer_id"]
    assert run(["identity", "new"]) == 21
    assert run(["identity", "show", "--path", "missing"]) == 21


def test_backup_and_restore(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A backup gives the same key back with the passphrase, and not without."""
    monkeypatch.setenv("SWARM_PASSPHRASE", "a long enough sentence")
    assert run(["identity", "new", "--path", "key"]) == 0
    assert run(["identity", "backup", "--path", "key", "--to", "backup.json"]) == 0
    assert (home / "backup.json").stat().st_mode & 0o777 == 0o600
    assert run(["identity", "backup", "--path", "key", "--to", "backup.json"]) == 21
    assert run(["identity", "restore", "backup.json", "--path", "again"]) == 0
    assert Identity.load(home / "again").seed == Identity.load(home / "key").seed
    assert run(["identity", "restore", "missing.json", "--path", "other"]) == 21
    monkeypatch.setenv("SWARM_PASSPHRASE", "something else")
    assert run(["identity", "restore", "backup.json", "--path", "other"]) == 21
    assert not (home / "other").exists()
