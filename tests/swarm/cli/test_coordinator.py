"""`swarm coordinator` and `swarm config`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from swarm.cli.main import run
from tests.world import manifest


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
