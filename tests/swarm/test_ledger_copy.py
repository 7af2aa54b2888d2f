"""Ledgers in files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swarm.credits import verify_ledger
from swarm.errors import LedgerInvalid, UsageError
from swarm.ledger import Checkpoint, LedgerReader, origin_of, sign_checkpoint
from swarm.ledger_copy import LedgerCopy
from swarm.merkle import root_of
from tests.world import COORDINATOR, ROOT, World, identity

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


def test_confirmed_roots_are_those_that_the_coordinator_has_signed() -> None:
    """One for each confirmed round; none from entries that the checkpoint isn't about."""
    copy = make_copy()
    assert copy.confirmed_roots() == {0: ROOT, 1: ROOT}
    with pytest.raises(LedgerInvalid, match="root"):
        replace(copy, entries=[*copy.entries[:-1], copy.entries[0]]).confirmed_roots()


def test_cut_short(tmp_path: Path) -> None:
    """A file that ends too early names the entry at which it does."""
    make_copy().write(tmp_path / "ledger")
    content = (tmp_path / "ledger").read_bytes()
    for missing in (1, 400):
        (tmp_path / "cut").write_bytes(content[:-missing])
        with pytest.raises(LedgerInvalid, match=r"entry \d+: the file is cut short"):
            LedgerCopy.read(tmp_path / "cut")


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_any_changed_byte_is_found(data: st.DataObject) -> None:
    """Wherever it is: in the header, a length, an entry or a signature."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "ledger"
        make_copy().write(path)
        content = bytearray(path.read_bytes())
        header = content.index(b"\n") + 1
        place = data.draw(st.integers(0, header - 1) | st.integers(0, len(content) - 1))
        content[place] ^= data.draw(st.integers(1, 255))
        path.write_bytes(content)
        with pytest.raises(LedgerInvalid):
            check(path)


def check(path: Path) -> None:
    """What `swarm ledger verify --file` checks of the tree."""
    copy = LedgerCopy.read(path)
    reader = LedgerReader()
    reader.extend(copy.entries)
    reader.check_checkpoint(copy.checkpoint())
    if copy.run_id not in verify_ledger(copy.entries, copy.coordinator).run_ids or len(copy.entries) != copy.checkpoint().size:
        raise LedgerInvalid("another ledger")


def test_other_files(tmp_path: Path) -> None:
    """A file of another kind, and a missing one, are told apart."""
    (tmp_path / "other").write_bytes(b'{"format": "tar"}\n')
    with pytest.raises(LedgerInvalid, match="not an exported ledger"):
        LedgerCopy.read(tmp_path / "other")
    with pytest.raises(UsageError, match="can't read"):
        LedgerCopy.read(tmp_path / "missing")
    with pytest.raises(UsageError, match="can't write"):
        make_copy().write(tmp_path / "no" / "folder")
