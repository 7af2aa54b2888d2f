"""`swarm receipts` on folders and files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from swarm.cli.main import run
from swarm.identity import Identity
from swarm.merkle import MerkleTree, leaf_hash
from swarm.messages import payload_hash, seal
from swarm.rpc.v1.ledger_pb2 import Receipt
from tests.world import COORDINATOR, World, entry, identity

WORLD = World()
PEERS = [identity(number) for number in range(3)]


def write(folder: Path, number: int, before: int, signer: Identity = COORDINATOR, other: bytes = b"") -> Path:
    """The receipt of a peer's report in round `number`, at place `before` of a ledger that ends with it."""
    _, reports = WORLD.round(PEERS, number)
    raw = entry(reported=reports[0])
    tree = MerkleTree()
    tree.extend([leaf_hash(other + b"%d" % place) for place in range(before)] + [leaf_hash(raw)])
    receipt = Receipt(
        run_id=WORLD.run_id,
        round=number,
        peer_id=PEERS[0].peer_id,
        report_hash=payload_hash(reports[0]),
        ledger_index=before,
        ledger_size=before + 1,
        ledger_root=tree.root(),
        inclusion_proof=tree.inclusion_proof(before),
        entry=raw,
    )
    folder.mkdir(exist_ok=True)
    path = folder / f"{number:08d}.receipt"
    path.write_bytes(seal(signer, receipt).SerializeToString())
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Receipts of two rounds."""
    write(tmp_path / "receipts", 1, 4)
    write(tmp_path / "receipts", 2, 9)
    return tmp_path / "receipts"


def test_list_verify_export(home: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What is exported is what was kept, and verifies alike."""
    assert run(["receipts", "list", "--from", str(folder), "--json"]) == 0
    listed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(each["round"], each["ledger_index"]) for each in listed] == [(1, 4), (2, 9)]
    assert run(["receipts", "export", "--from", str(folder), "--to", "all", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"receipts": 2, "path": "all"}
    for place in (str(folder), "all"):
        assert run(["receipts", "verify", "--from", place, "--json"]) == 0
        said = json.loads(capsys.readouterr().out)
        assert (said["verified"], said["receipts"], said["rounds"]) == (True, 2, "1 to 2")
        assert said["coordinator"] == COORDINATOR.peer_id
    assert run(["receipts", "list", "--from", "all"]) == 0
    assert "00000002.receipt" in capsys.readouterr().out


def test_the_peers_own_folder_is_the_default(
    home: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As `swarm join` keeps them."""
    monkeypatch.setenv("SWARM_DATA_DIR", str(folder.parent))
    assert run(["receipts", "verify", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["receipts"] == 2


def test_a_damaged_receipt_is_named(home: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One changed byte, wherever it is, and one that is no message at all."""
    path = folder / "00000002.receipt"
    good = path.read_bytes()
    for place in (3, len(good) // 2, len(good) - 1):
        path.write_bytes(good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :])
        assert run(["receipts", "verify", "--from", str(folder)]) == 42
        assert "00000002.receipt" in capsys.readouterr().err
    path.write_bytes(b"\xff")
    assert run(["receipts", "list", "--from", str(folder)]) == 42
    assert "00000002.receipt is damaged" in capsys.readouterr().err


def test_a_coordinator_that_forks_its_history_is_exposed(home: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By two receipts alone, without any ledger: two roots over as many entries."""
    write(folder / "elsewhere", 3, 9, other=b"forked ")
    assert run(["receipts", "verify", "--from", str(folder)]) == 42
    assert "contradict each other: two roots over 10 entries" in capsys.readouterr().err


def test_another_coordinators_receipt(home: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It isn't believed, whoever it is."""
    write(folder, 3, 11, signer=PEERS[2])
    assert run(["receipts", "verify", "--from", str(folder)]) == 42
    assert "00000003.receipt" in capsys.readouterr().err
    assert run(["receipts", "verify", "--from", str(folder), "--coordinator", PEERS[2].peer_id]) == 42


def test_where_there_is_nothing(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An empty folder, and a file of another kind."""
    assert run(["receipts", "list", "--from", str(tmp_path)]) == 2
    assert "no receipts in" in capsys.readouterr().err
    (tmp_path / "file").write_text('{"format": "tar"}\n')
    assert run(["receipts", "verify", "--from", str(tmp_path / "file")]) == 42
    assert "no file of receipts" in capsys.readouterr().err
