"""The public ledger as anyone reads it: entries, signed checkpoints, receipts and the tree over raw entries.

Checkpoints are C2SP signed notes (https://c2sp.org/tlog-checkpoint, https://c2sp.org/signed-note) with one Ed25519 signature by
the coordinator and any number of witnesses' cosignatures. What entries are worth is decided in `swarm.credits`.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

from pydantic import ValidationError

from swarm.errors import LedgerInvalid, ManifestInvalid, Rejected
from swarm.identity import Identity, is_valid, public_key_of
from swarm.manifest import MAX_MANIFEST_BYTES, Manifest
from swarm.merkle import HASH_BYTES, MerkleTree, leaf_hash, verify_inclusion
from swarm.messages import MANIFEST_KIND, base32, check_signed, open_signed, parse, payload_hash
from swarm.rpc.v1.ledger_pb2 import LedgerEntry, Receipt, Report
from swarm.rpc.v1.signed_pb2 import Signed

MAX_ENTRY_BYTES = 2 << 20
MAX_NOTE_BYTES = 1 << 16
ED25519_NOTE_SIGNATURE = 0x01
KEY_HASH_BYTES = 4
SIGNATURE_PREFIX = "\u2014 "
HINT = "keep your receipts and tell the run's owner: they prove what was promised"


@dataclass(frozen=True)
class Checkpoint:
    """The ledger's size and root at one moment, under the name of the log."""

    origin: str
    size: int
    root: bytes

    @property
    def text(self) -> str:
        """The note's text, which is what gets signed."""
        return f"{self.origin}\n{self.size}\n{base64.b64encode(self.root).decode()}\n"


def origin_of(run_id: bytes) -> str:
    """The name of the run's log, and of the coordinator's key in its notes."""
    return f"swarm/{base32(run_id)}"


def note_key_hash(name: str, public_key: bytes) -> bytes:
    """The signed-note key id: first 4 bytes of SHA-256(name || LF || 0x01 || key)."""
    return hashlib.sha256(name.encode() + b"\n" + bytes([ED25519_NOTE_SIGNATURE]) + public_key).digest()[:KEY_HASH_BYTES]


def sign_checkpoint(identity: Identity, checkpoint: Checkpoint) -> str:
    """The signed note over `checkpoint`, with the key named after its origin."""
    signature = identity.private_key.sign(checkpoint.text.encode())
    marked = note_key_hash(checkpoint.origin, public_key_of(identity.peer_id)) + signature
    return f"{checkpoint.text}\n{SIGNATURE_PREFIX}{checkpoint.origin} {base64.b64encode(marked).decode()}\n"


def verify_checkpoint(note: str, origin: str, peer_id: str) -> Checkpoint:
    """Check a note's signature by `peer_id` and read it. Raises `LedgerInvalid`; other keys' signatures are ignored."""
    if len(note) > MAX_NOTE_BYTES:
        raise _fault("the checkpoint is too large")
    text, separator, signatures = note.rpartition("\n\n")
    if not separator or not signatures.endswith("\n"):
        raise _fault("the checkpoint is not a signed note")
    checkpoint = _parse_text(text + "\n")
    if checkpoint.origin != origin:
        raise _fault(f"the checkpoint is of {checkpoint.origin!r}, not of {origin!r}")
    signature = _signature_by(signatures, origin, public_key_of(peer_id))
    if not is_valid(public_key_of(peer_id), signature, checkpoint.text.encode()):
        raise _fault("the checkpoint's signature is not valid")
    return checkpoint


def _parse_text(text: str) -> Checkpoint:
    lines = text.split("\n")
    if len(lines) < 4 or not lines[1].isascii() or not lines[1].isdigit():
        raise _fault("the checkpoint's text is malformed")
    try:
        checkpoint = Checkpoint(lines[0], int(lines[1]), base64.b64decode(lines[2], validate=True))
    except (binascii.Error, ValueError) as error:
        raise _fault("the checkpoint's root is malformed") from error
    if checkpoint.text != text or len(checkpoint.root) != HASH_BYTES:
        raise _fault("the checkpoint's text is malformed")
    return checkpoint


def _signature_by(lines: str, name: str, public_key: bytes) -> bytes:
    wanted = note_key_hash(name, public_key)
    for line in lines.removesuffix("\n").split("\n"):
        if not line.startswith(SIGNATURE_PREFIX):
            raise _fault("the checkpoint has a malformed signature line")
        signer, _, encoded = line.removeprefix(SIGNATURE_PREFIX).partition(" ")
        try:
            marked = base64.b64decode(encoded, validate=True)
        except binascii.Error as error:
            raise _fault("the checkpoint has a malformed signature line") from error
        if base64.b64encode(marked).decode() != encoded:
            raise _fault("the checkpoint has a malformed signature line")
        if signer == name and marked[:KEY_HASH_BYTES] == wanted:
            return marked[KEY_HASH_BYTES:]
    raise _fault("the checkpoint is not signed by the coordinator's key")


def parse_entry(entry: bytes) -> LedgerEntry:
    """Parse the bytes of one leaf. Raises `Rejected`."""
    if len(entry) > MAX_ENTRY_BYTES:
        raise Rejected("too_large", f"an entry of {len(entry)} bytes")
    return parse(LedgerEntry, entry)


def open_manifest(signed: Signed, run_id: bytes | None = None) -> Manifest:
    """Check an owner-signed manifest: signature, canonical bytes, and that their hash is the run id.

    Raises `Rejected` for what is forged, `ManifestInvalid` for what is signed but not a manifest.
    """
    check_signed(signed, MANIFEST_KIND, MAX_MANIFEST_BYTES)
    if run_id is not None and payload_hash(signed) != run_id:
        raise Rejected("wrong_run", "the manifest's hash is not the run id", signed.signer)
    try:
        manifest = Manifest.model_validate_json(signed.payload)
    except ValidationError as error:
        problems = [f"{'.'.join(map(str, item['loc'])) or 'manifest'}: {item['msg']}" for item in error.errors()]
        raise ManifestInvalid(problems, "signed manifest") from error
    if manifest.canonical_bytes != signed.payload:
        raise ManifestInvalid(["not in canonical form"], "signed manifest")
    return manifest


def verify_receipt(signed_receipt: Signed, coordinator_peer_id: str) -> Receipt:
    """Check a receipt offline: countersignature, the peer's own report inside, inclusion under the signed root.

    Raises `LedgerInvalid` with the fault.
    """
    try:
        receipt = open_signed(signed_receipt, Receipt, signer=coordinator_peer_id)
        entry = parse_entry(receipt.entry)
        _check_reported(receipt, entry)
    except Rejected as error:
        raise LedgerInvalid(f"the receipt is not valid: {error}", HINT) from error
    leaf = leaf_hash(receipt.entry)
    proof = list(receipt.inclusion_proof)
    if not verify_inclusion(leaf, receipt.ledger_index, receipt.ledger_size, proof, receipt.ledger_root):
        raise _fault("the receipt is not valid: the inclusion proof doesn't lead to its root")
    return receipt


def _check_reported(receipt: Receipt, entry: LedgerEntry) -> None:
    if entry.WhichOneof("body") != "reported":
        raise Rejected("malformed", "the entry is not a report")
    report = open_signed(entry.reported, Report, signer=receipt.peer_id, run_id=receipt.run_id)
    if report.round != receipt.round:
        raise Rejected("wrong_round", "the report is of another round", receipt.peer_id)
    if payload_hash(entry.reported) != receipt.report_hash:
        raise Rejected("wrong_hash", "the entry holds another report", receipt.peer_id)


class LedgerReader:
    """Builds the tree from raw entries and holds it against checkpoints and receipts."""

    def __init__(self) -> None:
        self.tree = MerkleTree()

    def extend(self, entries: Iterable[bytes]) -> None:
        """Take in entries in their order."""
        self.tree.extend(leaf_hash(entry) for entry in entries)

    def check_checkpoint(self, checkpoint: Checkpoint) -> None:
        """Compare the first `checkpoint.size` entries with the signed root. Raises `LedgerInvalid`."""
        if checkpoint.size > len(self.tree):
            raise _fault(f"the checkpoint promises {checkpoint.size} entries, there are {len(self.tree)}")
        if self.tree.root(checkpoint.size) != checkpoint.root:
            raise _fault(f"the root over {checkpoint.size} entries is not the signed one")

    def check_receipt(self, receipt: Receipt) -> None:
        """Whether what the (verified) receipt promises is in this ledger. Raises `LedgerInvalid`."""
        place = f"receipt of {receipt.peer_id} for round {receipt.round}"
        if receipt.ledger_size > len(self.tree):
            raise _fault(f"{place}: the ledger has lost entries, {len(self.tree)} of at least {receipt.ledger_size} remain")
        if self.tree.leaf(receipt.ledger_index) != leaf_hash(receipt.entry):
            raise _fault(f"{place}: entry {receipt.ledger_index} is not the one that was receipted")
        if self.tree.root(receipt.ledger_size) != receipt.ledger_root:
            raise _fault(f"{place}: the ledger's first {receipt.ledger_size} entries are not those that were receipted")


def _fault(message: str) -> LedgerInvalid:
    return LedgerInvalid(message, HINT)
