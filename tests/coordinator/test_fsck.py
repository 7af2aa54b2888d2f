"""fsck names the first fault of a ledger, whatever it is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from coordinator import fsck
from coordinator.fsck import check
from coordinator.journal import COORDINATOR, report_key
from coordinator.snapshot import restore, write
from coordinator.store.interface import Row, Store
from coordinator.store.memory import MemoryStore
from swarm.credits import CreditState
from swarm.entries import Claim, open_entry
from swarm.errors import DatabaseCorrupt, LedgerInvalid
from swarm.merkle import leaf_hash
from swarm.rpc.v1.ledger_pb2 import LedgerEntry
from tests.world import COORDINATOR as KEY
from tests.world import ROOT, World, entry, identity

WORLD = World()
PEERS = [identity(number) for number in range(3)]
ENTRIES = WORLD.ledger(PEERS, 4)
FIRST_REPORT = 5


def row(index: int, raw: bytes) -> Row:
    """A row as the journal makes it."""
    opened = open_entry(raw, KEY.peer_id, check_signatures=False)
    key = report_key(opened.run_id, opened.round, opened.peer_id) if isinstance(opened, Claim) else None
    return Row(index, leaf_hash(raw), raw, key)


ROWS = [row(index, raw) for index, raw in enumerate(ENTRIES)]


def filled(rows: list[Row], store: Store | None = None) -> Store:
    """A coordinator's store with rows."""
    store = store or MemoryStore()
    store.set_value(COORDINATOR, KEY.peer_id.encode())
    store.append(rows)
    return store


def changed(index: int, make: Callable[[Row], Row]) -> list[Row]:
    """The rows with one of them changed."""
    return [make(each) if each.position == index else each for each in ROWS]


def forged(each: Row) -> Row:
    """The entry with another loss in its report: consistent with itself, but not what the peer signed."""
    body = LedgerEntry.FromString(each.entry)
    body.reported.signature = bytes(64)
    raw = body.SerializeToString(deterministic=True)
    return each._replace(entry=raw, leaf_hash=leaf_hash(raw))


def test_a_sound_ledger(store: Store) -> None:
    """On every store: a ledger without a fault is sound, and its balances are those of the fold."""
    sound = check(filled(ROWS, store))
    assert (len(sound.tree), sound.accounts, sound.coordinator) == (len(ENTRIES), 3, KEY.peer_id)
    assert sound.state.balance(WORLD.run_id, PEERS[0].peer_id).rounds == 4


def test_the_first_fault_is_named() -> None:
    """A hash, a signature, a key, a rule or an owner that is wrong is named with its entry."""
    cases: list[tuple[list[Row], str]] = [
        (changed(FIRST_REPORT, lambda each: each._replace(leaf_hash=bytes(32))), f"entry {FIRST_REPORT}: its hash"),
        (changed(FIRST_REPORT, forged), f"entry {FIRST_REPORT}: bad_signature"),
        (
            changed(FIRST_REPORT, lambda each: each._replace(key=b"other")),
            f"entry {FIRST_REPORT}: it is stored under a wrong key",
        ),
        (changed(FIRST_REPORT, lambda each: each._replace(key=None)), f"entry {FIRST_REPORT}: it is stored under a wrong key"),
        ([*ROWS[:2], *(each._replace(position=each.position - 1) for each in ROWS[3:])], "entry 3: not_admitted"),
        ([*ROWS, row(len(ROWS), ENTRIES[-1])._replace(key=b"again")], f"entry {len(ROWS)}: already_reported"),
    ]
    for rows, fault in cases:
        with pytest.raises(LedgerInvalid, match=fault):
            check(filled(rows))
    with pytest.raises(DatabaseCorrupt, match="whose"):
        check(MemoryStore())
    stolen = filled(ROWS)
    stolen.set_value(COORDINATOR, identity(5).peer_id.encode())
    with pytest.raises(LedgerInvalid, match="entry 1: wrong_signer"):
        check(stolen)


def test_signatures_by_several_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a long ledger processes check signatures; the first fault is still the first."""
    monkeypatch.setattr(fsck, "PARALLEL_FROM", 1)
    monkeypatch.setattr(fsck, "CHUNK_ENTRIES", 4)
    assert len(check(filled(ROWS), workers=2).tree) == len(ROWS)
    two = [forged(each) if each.position in (FIRST_REPORT, FIRST_REPORT + 4) else each for each in ROWS]
    with pytest.raises(LedgerInvalid, match=f"entry {FIRST_REPORT}: bad_signature"):
        check(filled(two), workers=2)


def test_a_snapshot_is_held_against_the_ledger(tmp_path: Path) -> None:
    """A snapshot that a restart would start from has to be what the entries amount to; a wrong balance is named."""
    path = tmp_path / "snapshot"
    tree, state = restore(filled(ROWS), KEY.peer_id)
    write(path, tree, state)
    assert check(filled(ROWS), path).snapshot_entries == len(ROWS)
    _make_richer(state)
    write(path, tree, state)
    with pytest.raises(LedgerInvalid, match=f"another balance of {PEERS[1].peer_id}"):
        check(filled(ROWS), path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(LedgerInvalid, match="damaged"):
        check(filled(ROWS), path)


def _make_richer(state: CreditState) -> None:
    state.records[WORLD.run_id].tallies[PEERS[1].peer_id].final += 1


def test_a_confirmation_without_a_majority(store: Store) -> None:
    """What the coordinator itself signed wrongly is found, too."""
    proposal, reports = WORLD.round(PEERS, 4)
    rows = list(ROWS)
    for raw in (entry(proposed=proposal), entry(reported=reports[0]), WORLD.confirmed(4, proposal, ROOT)):
        rows.append(row(len(rows), raw))
    with pytest.raises(LedgerInvalid, match="no_majority"):
        check(filled(rows, store))
