"""Snapshots of what the ledger amounts to, so that a restart reads only the entries that came after the newest one.

A snapshot is a file next to the database: one line of JSON, the credit state, and the levels of the Merkle tree. It is made by
a process of its own, which reads the database like a restart does, so that serving never stops for it. It may be missing, damaged
or of another ledger: then everything is read from the database. Nothing is lost with it, and fsck doesn't use it.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import sys
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import structlog

from coordinator.store.interface import Store
from swarm.credit_snapshot import dump, load
from swarm.credits import CreditState, apply_entry
from swarm.errors import DatabaseCorrupt, LedgerInvalid, SwarmError
from swarm.merkle import MerkleTree, leaf_hash

SNAPSHOT_FILE = "snapshot"
MAGIC = "swarm-snapshot-1"
EVERY_ENTRIES = 20_000
LOOK_EVERY_S = 5.0
DIGEST_BYTES = 32
NICENESS = 10

log = structlog.get_logger(__name__)

Ledger = tuple[MerkleTree, CreditState]


class Source(NamedTuple):
    """Of which ledger a snapshot is made, and where it goes."""

    url: str
    coordinator: str
    path: Path


def restore(store: Store, coordinator: str, path: Path | None = None) -> Ledger:
    """What the store's entries amount to; those before a usable snapshot aren't read. Raises `DatabaseCorrupt`."""
    tree, state = (None if path is None else _usable(path, store, coordinator)) or (MerkleTree(), CreditState(coordinator))
    try:
        with closing(store.rows(len(tree))) as rows:
            for row in rows:
                apply_entry(state, row.position, row.entry, check_signatures=False)
                tree.append(row.leaf_hash)
    except LedgerInvalid as error:
        raise DatabaseCorrupt(f"the database holds an invalid ledger: {error.message}", error.hint) from error
    return tree, state


def _usable(path: Path, store: Store, coordinator: str) -> Ledger | None:
    try:
        tree, state = read(path)
    except FileNotFoundError:
        return None
    except (LedgerInvalid, OSError) as error:
        log.warning("snapshot_unusable", path=str(path), reason=str(error))
        return None
    last = store.entries(len(tree) - 1, 1) if len(tree) else []
    fits = state.coordinator == coordinator and [leaf_hash(entry) for entry in last] == [tree.leaf(len(tree) - 1)]
    if not fits:
        log.warning("snapshot_unusable", path=str(path), reason="it is of another ledger")
    return (tree, state) if fits else None


def write(path: Path, tree: MerkleTree, state: CreditState) -> None:
    """Put a snapshot in the place of an older one, in one step."""
    parts = [dump(state), *map(bytes, tree.levels)]
    header = {"magic": MAGIC, "entries": len(tree), "sizes": [len(part) for part in parts], "digest": _digest(parts).hex()}
    part_file = path.with_suffix(".part")
    with part_file.open("wb") as file:
        os.fchmod(file.fileno(), 0o600)
        file.write(json.dumps(header).encode() + b"\n")
        file.writelines(parts)
        file.flush()
        os.fsync(file.fileno())
    part_file.replace(path)


def read(path: Path) -> Ledger:
    """Read a snapshot. Raises `LedgerInvalid` if it is damaged, or `OSError`."""
    with path.open("rb") as file:
        try:
            header = _header(file)
            parts = [file.read(int(size)) for size in header["sizes"]]
            if _digest(parts).hex() != header["digest"]:
                raise LedgerInvalid("the snapshot is damaged")
            tree, state = MerkleTree.of_levels(parts[1:]), load(parts[0])
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise LedgerInvalid("the snapshot is damaged") from error
    if state.size != len(tree):
        raise LedgerInvalid("the snapshot's state and tree are of different sizes")
    return tree, state


def _digest(parts: list[bytes]) -> bytes:
    digest = hashlib.blake2b(digest_size=DIGEST_BYTES)
    for part in parts:
        digest.update(part)
    return digest.digest()


async def keep_fresh(source: Source, size: Callable[[], int], every: int = EVERY_ENTRIES) -> None:
    """Make a snapshot whenever `every` entries have come since the last one, until cancelled."""
    done = await asyncio.to_thread(entries_of, source.path)
    while True:
        if size() - done >= every:
            await _make_elsewhere(source)
            done = size()
        await asyncio.sleep(LOOK_EVERY_S)


def entries_of(path: Path) -> int:
    """How many entries the snapshot says that it covers; 0 without a readable one."""
    try:
        with path.open("rb") as file:
            return int(_header(file)["entries"])
    except (LedgerInvalid, OSError, ValueError, KeyError, TypeError):
        return 0


def _header(file: BinaryIO) -> dict[str, Any]:
    header: dict[str, Any] = json.loads(file.readline(1 << 16))
    if header["magic"] != MAGIC:
        raise LedgerInvalid("the snapshot is of another version")
    return header


async def _make_elsewhere(source: Source) -> None:
    """Start a process and tell it over its stdin what to do: a database's URL may hold a password."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "coordinator.snapshot"), stdin=asyncio.subprocess.PIPE, start_new_session=True
    )
    try:
        await process.communicate(json.dumps([source.url, source.coordinator, str(source.path)]).encode())
    finally:
        if process.returncode is None:
            with suppress(ProcessLookupError):
                process.kill()
            await process.wait()
    if process.returncode:
        log.warning("snapshot_failed", exit_code=process.returncode)


def make(source: Source) -> int:
    """Bring the snapshot up to the database's end; the number of entries that it covers. Raises `DatabaseCorrupt`."""
    from coordinator.store.sql import SqlStore  # noqa: PLC0415 - the server has it open already

    store = SqlStore.open(source.url)
    try:
        tree, state = restore(store, source.coordinator, source.path)
    finally:
        store.close()
    write(source.path, tree, state)
    return len(tree)


def main() -> int:
    """Read the source from stdin and make its snapshot, after everything else that wants the processor."""
    os.nice(NICENESS)
    url, coordinator, path = json.loads(sys.stdin.read())
    try:
        make(Source(url, coordinator, Path(path)))
    except SwarmError as error:
        log.error("snapshot_failed", reason=error.message)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
