"""`swarm export --round`: what can't be had is told, with what can."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from peer.history import HISTORY, checkpoint_path
from swarm.cli.main import run
from swarm.control import RUN_NAME
from swarm.ledger import Checkpoint, origin_of, sign_checkpoint
from swarm.ledger_copy import LedgerCopy
from swarm.merkle import root_of
from swarm.rpc.v1.coordinator_pb2 import GetRunResponse
from tests.world import COORDINATOR, World, identity, manifest, sign_manifest

WORLD = World()


@pytest.fixture
def folder(home: Path) -> Path:
    """The folder of a peer that has kept, by the name of its file, the state after 30 rounds."""
    path = home / "peer"
    checkpoint = checkpoint_path(path / HISTORY, 30)
    checkpoint.parent.mkdir(parents=True)
    checkpoint.write_text(json.dumps({"root": "ab" * 32}))
    answer = GetRunResponse(run_id=WORLD.run_id, manifest=sign_manifest(manifest()), coordinator=COORDINATOR.peer_id)
    (path / RUN_NAME).write_bytes(answer.SerializeToString())
    return path


def export(folder: Path, *arguments: str) -> int:
    return run(["export", "--to", str(folder.parent / "model"), "--dir", str(folder), *arguments])


def ledger(path: Path, coordinator: int = 0) -> Path:
    """An exported ledger of two rounds, of our run's coordinator or of another one."""
    key = identity(coordinator) if coordinator else COORDINATOR
    entries = WORLD.ledger([identity(0)], 2)
    note = sign_checkpoint(key, Checkpoint(origin_of(WORLD.run_id), len(entries), root_of(entries)))
    LedgerCopy(WORLD.run_id, key.peer_id, note, entries).write(path)
    return path


def test_a_round_that_is_not_kept_is_told_with_those_that_are(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing is written, and the exit code is that of a missing checkpoint."""
    assert export(folder, "--round", "7") == 40
    assert "round 7 isn't kept" in (told := capsys.readouterr().err)
    assert "there are rounds 29" in told
    assert not (folder.parent / "model").exists()


def test_a_damaged_checkpoint_is_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Where no other leads to the round."""
    assert export(folder, "--round", "29") == 40
    assert "round-000000000030.json: the header or its file can't be read" in capsys.readouterr().err


def test_a_ledger_must_be_the_runs_and_have_the_round(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its run, its coordinator's key, and a confirmation; and it says nothing about the newest weights."""
    right, other = ledger(folder.parent / "ledger"), ledger(folder.parent / "other", coordinator=7)
    assert export(folder, "--round", "29", "--ledger", str(right)) == 42
    assert "round 29 isn't confirmed" in capsys.readouterr().err
    assert export(folder, "--round", "1", "--ledger", str(other)) == 42
    assert "another run" in capsys.readouterr().err
    assert export(folder, "--round", "1", "--ledger", str(right)) == 40
    assert export(folder, "--ledger", str(right)) == 2
    assert "--round" in capsys.readouterr().err


def test_nothing_is_rebuilt_for_a_folder_that_is_in_use(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """That is told before any work is done."""
    (folder.parent / "model").mkdir()
    (folder.parent / "model" / "mine").touch()
    assert export(folder, "--round", "29") == 2
    assert "isn't empty" in capsys.readouterr().err
