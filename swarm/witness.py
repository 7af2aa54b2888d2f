"""Witnesses: third parties that watch a coordinator's ledger grow, and sign that they have seen one history only.

A cosignature is a line of the checkpoint's note, by a key that is the witness's peer id, over the note's text and the time
(C2SP tlog-cosignature, version 1: https://c2sp.org/tlog-cosignature). A coordinator that shows two ledgers to different people
can't have both cosigned by the same honest witness.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import struct
from dataclasses import dataclass
from pathlib import Path

from swarm.errors import LedgerInvalid, Rejected, UsageError
from swarm.identity import SIGNATURE_BYTES, Identity, is_valid, public_key_of
from swarm.ledger import KEY_HASH_BYTES, SIGNATURE_PREFIX, Checkpoint, origin_of, verify_checkpoint
from swarm.merkle import verify_consistency
from swarm.rpc.client import CoordinatorClient

COSIGNATURE = 0x04
NAME_PREFIX = "swarm-witness/"
MAX_LINE = 512
TIME = struct.Struct(">Q")
MARKED_BYTES = KEY_HASH_BYTES + TIME.size + SIGNATURE_BYTES
HINT = "keep the file: it shows two histories that the coordinator has signed"


def cosignature(witness: Identity, text: str, time_s: int) -> str:
    """The line that a witness adds to a note of this text; `time_s` is Unix time."""
    name = NAME_PREFIX + witness.peer_id
    signature = witness.private_key.sign(_signed_bytes(text, time_s))
    marked = _key_hash(witness.peer_id) + TIME.pack(time_s) + signature
    return f"{SIGNATURE_PREFIX}{name} {base64.b64encode(marked).decode()}\n"


def witness_of(line: str) -> str:
    """The peer id that a cosignature line names. Raises `Rejected` for anything but one such line."""
    head = SIGNATURE_PREFIX + NAME_PREFIX
    if len(line) > MAX_LINE or line.count("\n") != 1 or not line.endswith("\n") or not line.startswith(head):
        raise Rejected("malformed", "not a witness's line")
    return line.removeprefix(head).partition(" ")[0]


def cosigners(note: str) -> dict[str, int]:
    """Which witnesses have cosigned a note, and when. Raises `LedgerInvalid` for a cosignature that isn't valid."""
    text, _, lines = note.rpartition("\n\n")
    found = {}
    for line in lines.splitlines():
        name, _, encoded = line.removeprefix(SIGNATURE_PREFIX).partition(" ")
        if name.startswith(NAME_PREFIX):
            peer_id = name.removeprefix(NAME_PREFIX)
            found[peer_id] = _check(peer_id, encoded, text + "\n")
    return found


def _check(peer_id: str, encoded: str, text: str) -> int:
    try:
        marked = base64.b64decode(encoded, validate=True)
        key = public_key_of(peer_id)
        if len(marked) != MARKED_BYTES or marked[:KEY_HASH_BYTES] != _key_hash(peer_id):
            raise LedgerInvalid(f"the cosignature of {peer_id} is malformed")
        (time_s,) = TIME.unpack_from(marked, KEY_HASH_BYTES)
    except (binascii.Error, Rejected) as error:
        raise LedgerInvalid(f"the cosignature of {peer_id[:64]} is malformed") from error
    if not is_valid(key, marked[-SIGNATURE_BYTES:], _signed_bytes(text, time_s)):
        raise LedgerInvalid(f"the cosignature of {peer_id} is not valid")
    return int(time_s)


def _signed_bytes(text: str, time_s: int) -> bytes:
    return f"cosignature/v1\ntime {time_s}\n{text}".encode()


def _key_hash(peer_id: str) -> bytes:
    name = (NAME_PREFIX + peer_id).encode()
    return hashlib.sha256(name + b"\n" + bytes([COSIGNATURE]) + public_key_of(peer_id)).digest()[:KEY_HASH_BYTES]


@dataclass(frozen=True)
class Witness:
    """Remembers, in a file, the newest checkpoint of one run that it has seen, and cosigns only what extends it."""

    identity: Identity
    path: Path

    async def look(self, client: CoordinatorClient, now_s: float) -> tuple[Checkpoint, int]:
        """Ask for a checkpoint, hold it against the last one, remember it, and hand in the cosignature.

        The checkpoint, and how many witnesses have cosigned it. Raises `LedgerInvalid`, after writing down both notes, where the
        ledger isn't an extension of what was seen before.
        """
        run = await client.get_run()
        before = self._remembered(run.run_id, run.coordinator)
        size = before[0].size if before is not None else 0
        try:
            checkpoint, note, proof = await client.checkpoint(size, to_cosign=True)
        except Rejected as error:
            checkpoint, note, _ = await client.checkpoint(to_cosign=True)
            if before is None or checkpoint.size >= size:
                raise LedgerInvalid(f"the coordinator shows no proof: {error}", "try again") from error
            raise self._conflict(before[1], note, f"the ledger has shrunk from {size} to {checkpoint.size} entries") from error
        if before is not None and not verify_consistency(size, before[0].root, checkpoint.size, checkpoint.root, proof):
            raise self._conflict(before[1], note, f"{checkpoint.size} entries don't extend the {size} that were seen before")
        self._remember(note)
        return checkpoint, await client.add_cosignature(cosignature(self.identity, checkpoint.text, int(now_s)))

    def _remembered(self, run_id: bytes, coordinator: str) -> tuple[Checkpoint, str] | None:
        try:
            note = str(json.loads(self.path.read_text())["note"])
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UsageError(f"{self.path} is no witness's memory", "choose another path with --state") from error
        return verify_checkpoint(note, origin_of(run_id), coordinator), note

    def _remember(self, note: str) -> None:
        """Before anything is signed: a witness that forgets could be shown another history."""
        temporary = self.path.with_name(f".{self.path.name}.tmp")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(json.dumps({"note": note}))
            temporary.replace(self.path)
        except OSError as error:
            raise UsageError(f"can't write {self.path}: {error.strerror}", "choose another path with --state") from error

    def _conflict(self, before: str, note: str, what: str) -> LedgerInvalid:
        path = self.path.with_name(f"{self.path.name}.conflict")
        path.write_text(json.dumps({"before": before, "after": note}, indent=1))
        return LedgerInvalid(f"{what}; both signed checkpoints are in {path}", HINT)
