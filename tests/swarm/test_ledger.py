"""Checkpoints, receipts and the tree over raw entries."""

from __future__ import annotations

import base64

import pytest

from swarm.errors import LedgerInvalid, ManifestInvalid, Rejected
from swarm.identity import Identity
from swarm.ledger import (
    Checkpoint,
    LedgerReader,
    note_key_hash,
    open_manifest,
    origin_of,
    sign_checkpoint,
    verify_checkpoint,
    verify_receipt,
)
from swarm.merkle import MerkleTree, leaf_hash, root_of
from swarm.messages import MANIFEST_KIND, payload_hash, seal
from swarm.rpc.v1.ledger_pb2 import LedgerEntry, Receipt
from swarm.rpc.v1.signed_pb2 import Signed
from tests.world import COORDINATOR, OWNER, World, entry, identity, sign_manifest

ALICE = Identity.from_seed(bytes(range(32)))
SEVEN = Checkpoint("swarm/test", 7, root_of([b"%d" % number for number in range(7)]))
NOTE = (
    "swarm/test\n7\no+I7Msy2v5bQktFl2KpUbgmCnejwOw6JV1gdHha5K98=\n\n"
    "\u2014 swarm/test IaecawCQfP26jQu3MMWLt509pTuMgJcn6VBPb1eS0H0BOMIZ78kFxNZwzm49BsGNZcs+zCRKqPAgsTcWLviB2A4FkgI=\n"
)
WORLD = World()
PEERS = [identity(number) for number in range(3)]


def test_golden_checkpoint() -> None:
    """A checkpoint is a C2SP signed note, byte for byte."""
    assert sign_checkpoint(ALICE, SEVEN) == NOTE
    assert verify_checkpoint(NOTE, "swarm/test", ALICE.peer_id) == SEVEN


def test_checkpoint_ignores_witnesses() -> None:
    """Signatures by other keys, before or after, don't matter."""
    head, _, own = NOTE.rpartition("\n\n")
    marked = note_key_hash("witness.example", b"w" * 32) + b"s" * 64
    witness = f"\u2014 witness.example {base64.b64encode(marked).decode()}\n"
    assert verify_checkpoint(f"{head}\n\n{witness}{own}{witness}", "swarm/test", ALICE.peer_id) == SEVEN


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("\n7\n", "\n8\n"),
        ("\n7\n", "\n07\n"),
        ("\n7\n", "\n-7\n"),
        ("o+I7", "o+I8"),
        ("o+I7", "####"),
        ("\n\n", "\n"),
        ("FkgI=\n", "FkgI="),
        ("\u2014 swarm", "- swarm"),
        ("IaecawCQ", "IaecawCR"),
        ("IaecawCQ", "AaecawCQ"),
        ("swarm/test\n7", "swarm/other\n7"),
        ("K98=\n\n", "K98=\nextension\n\n"),
    ],
)
def test_altered_checkpoints_are_refused(old: str, new: str) -> None:
    """Any change to a note makes it invalid."""
    with pytest.raises(LedgerInvalid):
        verify_checkpoint(NOTE.replace(old, new, 1), "swarm/test", ALICE.peer_id)


def test_checkpoint_of_another_key_is_refused() -> None:
    """A note proves nothing for a key that didn't sign it."""
    with pytest.raises(LedgerInvalid, match="not signed by"):
        verify_checkpoint(NOTE, "swarm/test", COORDINATOR.peer_id)


def test_golden_entry() -> None:
    """An entry's bytes and leaf hash are fixed."""
    signed = Signed(kind="k", payload=b"p", signer="s", signature=b"g")
    raw = LedgerEntry(appended_at_us=1, reported=signed).SerializeToString(deterministic=True)
    assert raw.hex() == "08012a0c0a016b1201701a0173220167"
    assert leaf_hash(raw).hex() == "a5e63f2332b84bf69f5dfe0ff3e3758d3e2ccb927776cb71c22f331b09baa749"


def test_golden_ledger() -> None:
    """Two rounds of three peers give the same run id and root for ever."""
    entries = WORLD.ledger(PEERS, 2)
    assert WORLD.run_id.hex() == "9674d0244d97e58b95afd5eff38e3e56b5b905d7896622fe16845b25c4cb6f53"
    assert root_of(entries).hex() == "8613c1181e9400ce55ff85470cf115f3b35dbc430aaa906fba294baffc8270fa"


def test_manifest_is_checked() -> None:
    """A manifest opens only if its owner signed the canonical bytes whose hash is the run id."""
    signed = WORLD.signed_manifest
    assert open_manifest(signed, WORLD.run_id) == WORLD.manifest
    with pytest.raises(Rejected, match="wrong_run"):
        open_manifest(signed, b"\0" * 32)
    forged = Signed(kind=signed.kind, payload=signed.payload, signer=ALICE.peer_id, signature=signed.signature)
    with pytest.raises(Rejected, match="bad_signature"):
        open_manifest(forged)
    spaced = WORLD.manifest.canonical_bytes.replace(b",", b", ")
    with pytest.raises(ManifestInvalid, match="canonical"):
        open_manifest(
            Signed(kind=MANIFEST_KIND, payload=spaced, signer=OWNER.peer_id, signature=OWNER.sign(MANIFEST_KIND, spaced))
        )
    with pytest.raises(ManifestInvalid):
        open_manifest(Signed(kind=MANIFEST_KIND, payload=b"{", signer=OWNER.peer_id, signature=OWNER.sign(MANIFEST_KIND, b"{")))
    assert sign_manifest(WORLD.manifest) == signed


def make_receipt(signer: Identity = COORDINATOR, **changes: object) -> Signed:
    """An honest receipt over a ledger of five entries, or one with changed fields."""
    _, reports = WORLD.round(PEERS, 3)
    raw = entry(reported=reports[0])
    tree = MerkleTree()
    tree.extend([leaf_hash(b"%d" % number) for number in range(4)] + [leaf_hash(raw)])
    values: dict[str, object] = {
        "run_id": WORLD.run_id,
        "round": 3,
        "peer_id": PEERS[0].peer_id,
        "report_hash": payload_hash(reports[0]),
        "ledger_index": 4,
        "ledger_size": 5,
        "ledger_root": tree.root(),
        "inclusion_proof": tree.inclusion_proof(4),
        "entry": raw,
    }
    return seal(signer, Receipt(**(values | changes)))


def test_receipt_verifies_offline() -> None:
    """A receipt, the coordinator's peer id and nothing else prove the report's place."""
    assert verify_receipt(make_receipt(), COORDINATOR.peer_id).ledger_index == 4


@pytest.mark.parametrize(
    "changes",
    [
        {"round": 4},
        {"peer_id": PEERS[1].peer_id},
        {"run_id": b"\0" * 32},
        {"report_hash": b"\0" * 32},
        {"ledger_index": 3},
        {"ledger_size": 4},
        {"ledger_root": b"\0" * 32},
        {"inclusion_proof": []},
        {"entry": b"\xff"},
        {"entry": b""},
        {"signer": ALICE},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_altered_receipts_are_refused(changes: dict[str, object]) -> None:
    """A receipt in which anything doesn't fit is invalid, whoever signed it."""
    with pytest.raises(LedgerInvalid, match="receipt"):
        verify_receipt(make_receipt(**changes), COORDINATOR.peer_id)


def test_reader_holds_ledger_against_promises() -> None:
    """The reader accepts what was promised, and names lost, exchanged and rewritten entries."""
    entries = [b"%d" % number for number in range(4)]
    receipt = verify_receipt(make_receipt(), COORDINATOR.peer_id)
    reader = LedgerReader()
    reader.extend([*entries, receipt.entry, b"more"])
    reader.check_receipt(receipt)
    reader.check_checkpoint(Checkpoint(origin_of(WORLD.run_id), 5, receipt.ledger_root))
    for altered, fault in (
        (entries, "lost entries"),
        ([*entries, b"other"], "not the one"),
        ([b"x", *entries[1:], receipt.entry], "not those"),
    ):
        reader = LedgerReader()
        reader.extend(altered)
        with pytest.raises(LedgerInvalid, match=fault):
            reader.check_receipt(receipt)
    with pytest.raises(LedgerInvalid, match="promises 9 entries"):
        reader.check_checkpoint(Checkpoint("x", 9, receipt.ledger_root))
    with pytest.raises(LedgerInvalid, match="not the signed one"):
        reader.check_checkpoint(Checkpoint("x", 2, receipt.ledger_root))
