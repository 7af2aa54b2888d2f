"""`swarm run`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from swarm.cli.main import run
from swarm.cli.run import COMMENTS, FILL_IN, read_run
from swarm.errors import ManifestInvalid
from swarm.identity import Identity
from swarm.ledger import open_manifest
from swarm.manifest import Manifest
from tests.world import manifest


@pytest.fixture
def path(home: Path) -> Path:
    """A valid run.yaml."""
    (home / "run.yaml").write_text(yaml.safe_dump(manifest().model_dump(mode="json")))
    return home / "run.yaml"


def test_template_is_complete(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The template is commented and valid as soon as the hashes are filled in; before, every missing one is listed."""
    assert run(["run", "init", "new.yaml"]) == 0
    text = (home / "new.yaml").read_text()
    assert run(["run", "validate", "new.yaml"]) == 20
    assert capsys.readouterr().err.count("root: string should match") == text.count(FILL_IN) == 3
    filled = text.replace(FILL_IN, f"'{'a' * 64}'")
    assert Manifest.parse(filled.encode()).name == "my-run"
    assert all(comment in text for name, comment in COMMENTS.items() if f"\n{name}:" in text)
    assert set(COMMENTS) == set(Manifest.model_fields)


def test_init_overwrites_nothing(path: Path) -> None:
    """An existing file stays."""
    before = path.read_text()
    assert run(["run", "init", "run.yaml"]) == 2
    assert path.read_text() == before


def test_validate_lists_all_problems(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All problems come at once, as text and as JSON, with exit code 20."""
    values = manifest().model_dump(mode="json") | {"name": "UPPER", "typo": 1}
    (home / "bad.yaml").write_text(yaml.safe_dump(values))
    assert run(["run", "validate", "bad.yaml", "--json"]) == 20
    printed = capsys.readouterr()
    assert len(json.loads(printed.out)["problems"]) == 2
    assert "bad.yaml has 2 problems" in printed.err
    assert run(["run", "validate", "missing.yaml"]) == 20


def test_sign_and_show(path: Path, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Signing makes the owner's key at first use and gives a file that opens as the same run."""
    assert run(["run", "sign", "run.yaml", "--json"]) == 0
    fields = json.loads(capsys.readouterr().out)
    assert fields["run_id"] == manifest().run_id
    assert fields["owner"] == Identity.load(home / ".local/share/swarm/owner.key").peer_id
    assert run(["run", "validate", "run.signed", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"valid": True, "run_id": manifest().run_id}
    assert run(["run", "show", "run.signed", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["manifest"] == manifest().model_dump(mode="json")
    assert run(["run", "show", "run.yaml"]) == 0
    assert yaml.safe_load(capsys.readouterr().out) == manifest().model_dump(mode="json")


def test_read_run(path: Path, home: Path) -> None:
    """A coordinator takes both forms; the signed one keeps its owner."""
    key = Identity.load_or_create(home / "me.key")
    signed = read_run(path, home / "me.key")
    (home / "run.signed").write_bytes(signed.SerializeToString())
    again = read_run(home / "run.signed", None)
    assert again.signer == key.peer_id
    assert open_manifest(again) == manifest()
    again.signature = b"x" * 64
    (home / "forged").write_bytes(again.SerializeToString())
    with pytest.raises(ManifestInvalid, match="signature"):
        read_run(home / "forged", None)
