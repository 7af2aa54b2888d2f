"""A backup of a coordinator: a folder with a copy of the database as SQLite, the keys, and a signed checkpoint over the copy.

It is taken through the store's own interface, so from any database, while the coordinator serves; it holds the ledger up to the
moment at which it began. What it holds is checked when it is made and again when it is restored.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from coordinator.errors import StoreFailed
from coordinator.journal import COORDINATOR, GENESIS, ORDERS
from coordinator.store.interface import Row, Store
from coordinator.store.sql import SqlStore
from coordinator.tls import CERTIFICATE_FILE
from coordinator.tls import KEY_FILE as TLS_KEY_FILE
from swarm.errors import AlreadyRunning, DatabaseCorrupt, LedgerInvalid, UsageError
from swarm.identity import Identity
from swarm.ledger import Checkpoint, sign_checkpoint, verify_checkpoint
from swarm.merkle import MerkleTree

KEY_FILE = "coordinator.key"
LEDGER_FILE = "ledger.sqlite"
MANIFEST_FILE = "backup.json"
FORMAT = "swarm-coordinator-backup-1"
ORIGIN = "swarm/backup"
KEY_FILES = (KEY_FILE, TLS_KEY_FILE, CERTIFICATE_FILE)
VALUES = (COORDINATOR, GENESIS, ORDERS)
GROUP_ROWS = 2000
HINT = "take the newest backup that is whole; receipts prove what it has to contain"


class Copied(NamedTuple):
    """What a backup holds."""

    coordinator: str
    entries: int
    root: bytes


def back_up(store: Store, keys: Path, to: Path) -> Copied:
    """Write a backup into the new folder `to`. Raises `UsageError`, `KeyFileError` or `DatabaseCorrupt`."""
    if to.exists():
        raise UsageError(f"{to} exists already", "a backup is never overwritten; choose another name")
    identity = Identity.load(keys / KEY_FILE)
    part = to.with_name(to.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True, mode=0o700)
    with _ledger(part) as copy:
        tree = _copy(store, copy, store.size())
    for name in KEY_FILES:
        _copy_file(keys / name, part / name)
    note = sign_checkpoint(identity, Checkpoint(ORIGIN, len(tree), tree.root()))
    _write(part / MANIFEST_FILE, json.dumps({"format": FORMAT, "coordinator": identity.peer_id, "checkpoint": note}).encode())
    part.replace(to)
    return Copied(identity.peer_id, len(tree), tree.root())


def restore(source: Path, store: Store, keys: Path) -> Copied:
    """Bring a backup back into an empty database and a folder without other keys.

    Raises `UsageError`, `AlreadyRunning`, `LedgerInvalid` or `DatabaseCorrupt`; then nothing was taken over.
    """
    coordinator, checkpoint = _read_manifest(source)
    if store.size():
        raise AlreadyRunning("the database has entries already", "restore into an empty database, and keep the old one")
    _check_keys(source, keys)
    with _ledger(source) as copy:
        tree = MerkleTree()
        with closing(copy.rows()) as rows:
            tree.extend(row.leaf_hash for row in rows)
        if (len(tree), tree.root()) != (checkpoint.size, checkpoint.root):
            raise LedgerInvalid("the backup's ledger is not the one that its checkpoint names", HINT)
        _copy(copy, store, len(tree))
    for name in KEY_FILES:
        _copy_file(source / name, keys / name)
    return Copied(coordinator, len(tree), tree.root())


@contextmanager
def _ledger(folder: Path) -> Iterator[SqlStore]:
    store = SqlStore.open(f"sqlite:///{folder / LEDGER_FILE}")
    try:
        yield store
    finally:
        store.close()


def _copy(source: Store, target: Store, size: int) -> MerkleTree:
    """Copy values and the first `size` entries; the tree over them."""
    tree = MerkleTree()
    for name in VALUES:
        value = source.value(name)
        if value is not None:
            target.set_value(name, value)
    with closing(source.rows()) as rows:
        for group in _groups(islice(rows, size)):
            target.append(group)
            tree.extend(row.leaf_hash for row in group)
    if len(tree) != size:
        raise StoreFailed("the database has shrunk while it was copied")
    return tree


def _groups(rows: Iterable[Row]) -> Iterator[list[Row]]:
    source = iter(rows)
    while group := list(islice(source, GROUP_ROWS)):
        yield group


def _read_manifest(folder: Path) -> tuple[str, Checkpoint]:
    try:
        values = json.loads((folder / MANIFEST_FILE).read_bytes())
        if values["format"] != FORMAT:
            raise UsageError(f"{folder} is a backup of another version", "use the version that made it")
        coordinator, note = str(values["coordinator"]), str(values["checkpoint"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{folder} is not a backup", "name the folder that `swarm coordinator backup` wrote") from error
    if Identity.load(folder / KEY_FILE).peer_id != coordinator:
        raise DatabaseCorrupt("the backup's key is not the coordinator's", HINT)
    return coordinator, verify_checkpoint(note, ORIGIN, coordinator)


def _check_keys(source: Path, keys: Path) -> None:
    for name in KEY_FILES:
        if (keys / name).exists() and (keys / name).read_bytes() != (source / name).read_bytes():
            raise AlreadyRunning(f"{keys} has another {name}", "restore into an empty --state-dir")


def _copy_file(source: Path, target: Path) -> None:
    try:
        content = source.read_bytes()
    except OSError as error:
        raise UsageError(f"can't read {source}: {error.strerror}", "name the coordinator's state folder") from error
    if not target.exists():
        _write(target, content)


def _write(path: Path, content: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
