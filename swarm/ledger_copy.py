"""A ledger in one file, to be checked offline: a line of JSON, then length-prefixed entries."""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

from swarm.entries import Confirmation, open_body
from swarm.errors import LedgerInvalid, Rejected, UsageError
from swarm.ledger import (
    MAX_ENTRY_BYTES,
    MAX_NOTE_BYTES,
    Checkpoint,
    LedgerReader,
    origin_of,
    parse_entry,
    verify_checkpoint,
)

FORMAT = "swarm-ledger-1"
LENGTH = struct.Struct(">I")
MAX_HEADER_BYTES = MAX_NOTE_BYTES * 2


@dataclass(frozen=True)
class LedgerCopy:
    """The raw entries of a run's ledger with the checkpoint that a coordinator signed over them."""

    run_id: bytes
    coordinator: str
    note: str
    entries: list[bytes]

    def checkpoint(self) -> Checkpoint:
        """The checkpoint, if the coordinator signed it. Raises `LedgerInvalid`."""
        try:
            return verify_checkpoint(self.note, origin_of(self.run_id), self.coordinator)
        except Rejected as error:
            raise LedgerInvalid(f"the coordinator's id is none: {error}", "take the ledger from the coordinator again") from error

    def confirmed_roots(self) -> dict[int, bytes]:
        """The state root after each round that the coordinator has confirmed; of a round that was played again the last.

        Raises `LedgerInvalid` unless these are the entries that it has signed. Rules and balances aren't checked.
        """
        reader = LedgerReader()
        reader.extend(self.entries)
        reader.check_checkpoint(self.checkpoint())
        try:
            bodies = [entry for entry in map(parse_entry, self.entries) if entry.HasField("confirmed")]
            opened = [open_body(entry, self.coordinator) for entry in bodies]
        except Rejected as error:
            raise LedgerInvalid(f"an entry can't be read: {error}", "take the ledger from the coordinator again") from error
        return {item.round: item.state_root for item in opened if isinstance(item, Confirmation) and item.run_id == self.run_id}

    def write(self, path: Path) -> None:
        """Write the file. Raises `UsageError` if that fails."""
        try:
            with path.open("wb") as file:
                file.write(self._header())
                for entry in self.entries:
                    file.write(LENGTH.pack(len(entry)) + entry)
        except OSError as error:
            raise UsageError(f"can't write {path}: {error.strerror}", "choose another path") from error

    def _header(self) -> bytes:
        fields = {"format": FORMAT, "run_id": self.run_id.hex(), "coordinator": self.coordinator, "note": self.note}
        return json.dumps(fields).encode() + b"\n"

    @classmethod
    def read(cls, path: Path) -> LedgerCopy:
        """Read the file. Raises `LedgerInvalid` if it is none, or cut short."""
        try:
            with path.open("rb") as file:
                line = file.readline(MAX_HEADER_BYTES)
                header = json.loads(line)
                copy = cls(bytes.fromhex(header["run_id"]), str(header["coordinator"]), str(header["note"]), [])
                if line != copy._header():
                    raise ValueError("not as `write` writes it")
                return replace(copy, entries=_read_entries(file))
        except OSError as error:
            raise UsageError(f"can't read {path}: {error.strerror}", "check the path") from error
        except (ValueError, KeyError, TypeError) as error:
            raise LedgerInvalid(f"{path} is not an exported ledger", "write one with: swarm ledger export") from error


def _read_entries(file: BinaryIO) -> list[bytes]:
    entries: list[bytes] = []
    while head := file.read(LENGTH.size):
        if len(head) < LENGTH.size or (size := LENGTH.unpack(head)[0]) > MAX_ENTRY_BYTES:
            raise LedgerInvalid(f"entry {len(entries)}: the file is cut short or damaged")
        entry = file.read(size)
        if len(entry) < size:
            raise LedgerInvalid(f"entry {len(entries)}: the file is cut short")
        entries.append(entry)
    return entries
