"""`swarm coordinator` and `swarm config`."""

from __future__ import annotations

import json
import sqlite3
from datetime import UTC, datetime
from pathlib import Path

import pytest
import yaml

from coordinator.store.sql import SqlStore
from coordinator.tls import Certificate
from swarm.cli.main import run
from swarm.config import data_path
from tests.coordinator.test_fsck import ROWS, filled
from tests.world import COORDINATOR, manifest


def test_start_problems(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A missing or invalid manifest, a wrong address and an unusable database each have their exit code."""
    (home / "run.yaml").write_text(yaml.safe_dump(manifest().model_dump(mode="json")))
    assert run(["coordinator", "--run", "missing.yaml"]) == 20
    assert run(["coordinator", "--run", "run.yaml", "--listen", "nonsense"]) == 2
    assert run(["coordinator", "--run", "run.yaml", "--db", "mysql://x/y"]) == 41
    assert run(["coordinator", "--run", "run.yaml", "--log-level", "loud"]) == 2
    assert run(["coordinator"]) == 2


def test_config_show(home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Every value is shown with where it comes from."""
    path = home / "config.toml"
    path.write_text('[peer]\ngpu = "1"\n')
    monkeypatch.setenv("SWARM_CONFIG", str(path))
    monkeypatch.setenv("SWARM_COORDINATOR_DB", "sqlite:///x")
    assert run(["config", "show", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    found = {(item["component"], item["name"]): (item["value"], item["origin"]) for item in shown["values"]}
    assert found[("peer", "gpu")] == ("1", str(path))
    assert found[("coordinator", "db")] == ("sqlite:///x", "SWARM_COORDINATOR_DB")
    assert found[("coordinator", "listen")] == ("0.0.0.0:4300", "default")
    assert run(["config", "show"]) == 0
    assert "SWARM_COORDINATOR_DB" in capsys.readouterr().out
    assert run(["config", "path"]) == 0
    assert capsys.readouterr().out == f"{path}\n"


def made(home: Path) -> Path:
    """A coordinator's folder with a ledger."""
    folder = home / "state"
    COORDINATOR.save(folder / "coordinator.key")
    Certificate.load_or_create(folder, datetime.now(UTC))
    store = SqlStore.open(f"sqlite:///{folder / 'coordinator.db'}")
    filled(ROWS, store)
    store.close()
    return folder


def test_backup_restore_and_fsck(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A folder is backed up, restored elsewhere and found sound, with the same root; damage has its exit code and is named."""
    state = made(home)
    assert run(["coordinator", "backup", "--to", "copy", "--state-dir", str(state), "--json"]) == 0
    copied = json.loads(capsys.readouterr().out)
    assert run(["coordinator", "restore", "--from", "copy", "--state-dir", "new", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["root"] == copied["root"]
    assert run(["coordinator", "fsck", "--state-dir", "new", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["sound"], found["entries"], found["accounts"]) == (True, len(ROWS), 3)
    assert found["root"] == copied["root"]
    assert run(["coordinator", "restore", "--from", "copy", "--state-dir", "new"]) == 51
    with sqlite3.connect("new/coordinator.db") as connection:
        connection.execute("UPDATE entries SET key = x'00' WHERE position = 5")
    connection.close()
    assert run(["coordinator", "fsck", "--state-dir", "new"]) == 42
    assert "error: entry 5: it is stored under a wrong key" in capsys.readouterr().err


def test_which_coordinator(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without --state-dir the only folder is taken; where there are several or none, one has to be named, behind the command."""
    assert run(["coordinator", "fsck"]) == 2
    assert "0 coordinators" in capsys.readouterr().err
    folder = data_path() / "coordinator" / "a"
    made(home).rename(_parent(folder))
    assert run(["coordinator", "fsck"]) == 0
    (folder.parent / "b").mkdir()
    assert run(["coordinator", "fsck"]) == 2
    assert run(["coordinator", "--state-dir", str(folder), "fsck"]) == 2
    assert "write them behind" in capsys.readouterr().err
    assert run(["coordinator", "fsck", "--state-dir", "nowhere"]) == 2


def _parent(path: Path) -> Path:
    path.parent.mkdir(parents=True)
    return path
