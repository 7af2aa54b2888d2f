"""One entry of the ledger with its inclusion proof and a signed checkpoint, as JSON: what the coordinator's page serves about it.

Whoever has the coordinator's peer id checks it offline, with `ProvenEntry.verify` or `swarm ledger check`.
"""

from __future__ import annotations

import base64
import binascii
import json
from dataclasses import dataclass

from swarm.entries import Opened, open_entry
from swarm.errors import LedgerInvalid, ManifestInvalid, Rejected
from swarm.ledger import HINT, MAX_ENTRY_BYTES, MAX_NOTE_BYTES, Checkpoint, origin_of, verify_checkpoint
from swarm.merkle import HASH_BYTES, leaf_hash, verify_inclusion

FORMAT = "swarm-entry-1"
MOST_SIBLINGS = 64
MAX_JSON_BYTES = 2 * (MAX_ENTRY_BYTES + MAX_NOTE_BYTES)


@dataclass(frozen=True)
class ProvenEntry:
    """The exact bytes of an entry, its place, and what is said to prove it; nothing is checked before `verify`."""

    run_id: bytes
    coordinator: str
    index: int
    entry: bytes
    proof: tuple[bytes, ...]
    note: str

    def values(self) -> dict[str, object]:
        """What stands in the JSON."""
        return {
            "format": FORMAT,
            "run_id": self.run_id.hex(),
            "coordinator": self.coordinator,
            "index": self.index,
            "entry": base64.b64encode(self.entry).decode(),
            "proof": [base64.b64encode(sibling).decode() for sibling in self.proof],
            "checkpoint": self.note,
        }

    @classmethod
    def parse(cls, raw: bytes) -> ProvenEntry:
        """Read the JSON. Raises `LedgerInvalid` for anything that isn't of this format and size."""
        try:
            values = json.loads(raw if len(raw) <= MAX_JSON_BYTES else b"")
            read = cls(
                bytes.fromhex(values["run_id"]),
                str(values["coordinator"]),
                int(values["index"]),
                base64.b64decode(values["entry"], validate=True),
                tuple(base64.b64decode(sibling, validate=True) for sibling in values["proof"]),
                str(values["checkpoint"]),
            )
            if read.values() != values or len(read.proof) > MOST_SIBLINGS:
                raise ValueError("not as it is written")
        except (ValueError, KeyError, TypeError, RecursionError, binascii.Error) as error:
            raise LedgerInvalid(
                "this is no entry with its proof", "take it from /api/ledger/N of the coordinator's page"
            ) from error
        return read

    def verify(self, coordinator: str) -> tuple[Checkpoint, Opened]:
        """Check the checkpoint's signature by `coordinator`, the inclusion proof, and the signatures inside the entry.

        Raises `LedgerInvalid` with the fault.
        """
        try:
            checkpoint = verify_checkpoint(self.note, origin_of(self.run_id), coordinator)
        except Rejected as error:
            raise LedgerInvalid(f"not a coordinator's peer id: {error}", "it begins with 12D3KooW") from error
        if any(len(sibling) != HASH_BYTES for sibling in self.proof):
            raise LedgerInvalid("the inclusion proof isn't made of hashes", HINT)
        if not verify_inclusion(leaf_hash(self.entry), self.index, checkpoint.size, self.proof, checkpoint.root):
            raise LedgerInvalid("the inclusion proof doesn't lead from this entry to the signed root", HINT)
        try:
            return checkpoint, open_entry(self.entry, coordinator)
        except (Rejected, ManifestInvalid) as error:
            raise LedgerInvalid(f"the entry is in the ledger, but isn't valid: {error}", HINT) from error
