"""Verifies a ledger from raw storage: every entry's place, hash, key, signature and rule, and every balance that follows.

Nothing that the coordinator keeps for speed is believed: a snapshot next to the database is itself compared with what the entries
amount to. The first fault is named with the entry that has it.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import ExitStack, closing
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

from coordinator.journal import COORDINATOR, grant_key, report_key
from coordinator.snapshot import entries_of, read
from coordinator.store.interface import Row, Store
from swarm.credit_snapshot import dump
from swarm.credits import CHUNK_ENTRIES, PARALLEL_FROM, CreditState, apply_entry, first_fault
from swarm.entries import Claim, Opened, Permission
from swarm.errors import DatabaseCorrupt, LedgerInvalid
from swarm.merkle import MerkleTree, leaf_hash

CHUNKS_AHEAD = 4


class Sound(NamedTuple):
    """What a ledger without a fault amounts to."""

    coordinator: str
    tree: MerkleTree
    state: CreditState
    snapshot_entries: int

    @property
    def accounts(self) -> int:
        """Number of accounts in all runs."""
        return sum(len(self.state.balances(run_id)) for run_id in self.state.run_ids)


def check(store: Store, snapshot: Path | None = None, workers: int = 0) -> Sound:
    """Verify everything. Raises `LedgerInvalid` or `DatabaseCorrupt` with the first fault."""
    owner = store.value(COORDINATOR)
    if owner is None:
        raise DatabaseCorrupt("the database doesn't say whose it is", "is it a coordinator's? restore it from a backup")
    coordinator = owner.decode()
    tree, state = MerkleTree(), CreditState(coordinator)
    written = entries_of(snapshot) if snapshot is not None else 0
    with closing(store.rows()) as rows:
        for row in _with_signatures_checked(rows, coordinator, store.size(), workers):
            if leaf_hash(row.entry) != row.leaf_hash:
                raise LedgerInvalid(f"entry {row.position}: its hash is not the stored one")
            _check_key(row, apply_entry(state, row.position, row.entry, check_signatures=False))
            tree.append(row.leaf_hash)
            if snapshot is not None and len(tree) == written:
                _check_snapshot(snapshot, tree, state)
    return Sound(coordinator, tree, state, written)


def _with_signatures_checked(rows: Iterable[Row], coordinator: str, size: int, workers: int) -> Iterator[Row]:
    """The rows again, chunk by chunk, each chunk after its signatures were checked. Raises `LedgerInvalid`."""
    workers = workers or os.cpu_count() or 1
    ahead: deque[tuple[list[Row], Future[tuple[int, str] | None] | None]] = deque()
    with ExitStack() as stack:
        parallel = workers > 1 and size >= PARALLEL_FROM
        pool = stack.enter_context(ProcessPoolExecutor(workers, mp_context=get_context("spawn"))) if parallel else None
        for chunk in _chunks(rows):
            ahead.append((chunk, None if pool is None else pool.submit(first_fault, *_asked(chunk, coordinator))))
            if len(ahead) > CHUNKS_AHEAD * workers:
                yield from _checked(*ahead.popleft(), coordinator)
        while ahead:
            yield from _checked(*ahead.popleft(), coordinator)


def _chunks(rows: Iterable[Row]) -> Iterator[list[Row]]:
    source = iter(rows)
    while chunk := list(islice(source, CHUNK_ENTRIES)):
        yield chunk


def _checked(chunk: list[Row], later: Future[tuple[int, str] | None] | None, coordinator: str) -> Iterator[Row]:
    fault = first_fault(*_asked(chunk, coordinator)) if later is None else later.result()
    for row in chunk:
        if fault is not None and fault[0] == row.position:
            raise LedgerInvalid(fault[1])
        yield row


def _asked(chunk: list[Row], coordinator: str) -> tuple[int, list[bytes], str]:
    return chunk[0].position, [row.entry for row in chunk], coordinator


def _check_key(row: Row, opened: Opened) -> None:
    match opened:
        case Claim():
            expected: bytes | None = report_key(opened.run_id, opened.round, opened.peer_id)
        case Permission():
            expected = grant_key(opened.run_id, opened.round)
        case _:
            expected = None
    if row.key != expected:
        raise LedgerInvalid(f"entry {row.position}: it is stored under a wrong key", "restore the database from a backup")


def _check_snapshot(path: Path, tree: MerkleTree, state: CreditState) -> None:
    """Every balance that a restart would start from is the one that the entries give."""
    hint = f"stop the coordinator and remove {path}: it is made again"
    try:
        written_tree, written = read(path)
    except LedgerInvalid as error:
        raise LedgerInvalid(error.message, hint) from error
    for run_id in state.run_ids:
        theirs = written.balances(run_id) if run_id in written.run_ids else {}
        for account, balance in state.balances(run_id).items():
            if theirs.get(account) != balance:
                raise LedgerInvalid(f"the snapshot has another balance of {account} than the ledger", hint)
    if dump(written) != dump(state) or written_tree.levels != tree.levels:
        raise LedgerInvalid("the snapshot is not what the ledger amounts to", hint)
