"""Ledgers in files."""

from __future__ import annotations

from pathlib import Path

import pytest

from swarm.errors import LedgerInvalid, UsageError
from swarm.ledger import Checkpoint, origin_of, sign_checkpoint
from swarm.ledger_copy import LedgerCopy
from swarm.merkle import root_of
from tests.world import COORDINATOR, World, identity

WORLD = World()


def make_copy() -> LedgerCopy:
    """A small exported ledger."""
    entries = WORLD.ledger([identity(0)], 2)
    note = sign_checkpoint(COORDINATOR, Checkpoint(origin_of(WORLD.run_id), len(entries), root_of(entries)))
    return LedgerCopy(WORLD.run_id, COORDINATOR.peer_id, note, entries)


def test_round_trip(tmp_path: Path) -> None:
    """What is written reads back the same, with its checkpoint."""
    copy = make_copy()
    copy.write(tmp_path / "ledger")
    again = LedgerCopy.read(tmp_path / "ledger")
    assert again == copy
    assert again.checkpoint().size == len(copy.entries)


def test_cut_short(tmp_path: Path) -> None:
    """A file that ends too early names the entry at which it does."""
    make_copy().write(tmp_path / "ledger")
    content = (tmp_path / "ledger").read_bytes()
    for missing in (1, 400):
        (tmp_path / "cut").write_bytes(content[:-missing])
        with pytest.raises(LedgerInvalid, match=r"entry \d+: the file is cut short"):
            LedgerCopy.read(tmp_path / "cut")


def test_other_files(tmp_path: Path) -> None:
    """A file of another kind, and a missing one, are told apart."""
    (tmp_path / "other").write_bytes(b'{"format": "tar"}\n')
    with pytest.raises(LedgerInvalid, match="not an exported ledger"):
        LedgerCopy.read(tmp_path / "other")
    with pytest.raises(UsageError, match="can't read"):
        LedgerCopy.read(tmp_path / "missing")
    with pytest.raises(UsageError, match="can't write"):
        make_copy().write(tmp_path / "no" / "folder")
