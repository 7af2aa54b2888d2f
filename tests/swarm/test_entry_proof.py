"""One entry with its proof: what a stranger's server says about it is believed only as far as the signed root goes."""

from __future__ import annotations

import base64
import json
from dataclasses import replace
from pathlib import Path

import pytest

from swarm.cli.main import run
from swarm.entries import Claim
from swarm.entry_proof import MAX_JSON_BYTES, ProvenEntry
from swarm.errors import LedgerInvalid
from swarm.ledger import Checkpoint, origin_of, sign_checkpoint
from swarm.merkle import MerkleTree, leaf_hash
from swarm.rpc.v1.ledger_pb2 import LedgerEntry
from tests.world import COORDINATOR, World, entry, identity

WORLD = World()
PEERS = [identity(number) for number in range(3)]
ENTRIES = WORLD.ledger(PEERS, 2)
REPORT = 5


def proven(index: int = REPORT, entries: list[bytes] = ENTRIES) -> ProvenEntry:
    """What an honest coordinator says."""
    tree = MerkleTree()
    tree.extend(map(leaf_hash, entries))
    note = sign_checkpoint(COORDINATOR, Checkpoint(origin_of(WORLD.run_id), len(tree), tree.root()))
    return ProvenEntry(WORLD.run_id, COORDINATOR.peer_id, index, entries[index], tuple(tree.inclusion_proof(index)), note)


def raw(said: ProvenEntry) -> bytes:
    return json.dumps(said.values()).encode()


@pytest.mark.parametrize("index", range(len(ENTRIES)))
def test_every_entry_is_proven(index: int) -> None:
    """Written as JSON, read back and checked."""
    said = proven(index)
    assert ProvenEntry.parse(raw(said)) == said
    checkpoint, opened = said.verify(COORDINATOR.peer_id)
    assert checkpoint.size == len(ENTRIES)
    assert isinstance(opened, Claim) == (LedgerEntry.FromString(ENTRIES[index]).WhichOneof("body") == "reported")


def flipped(value: bytes) -> bytes:
    return value[:-1] + bytes([value[-1] ^ 1])


@pytest.mark.parametrize(
    ("said", "fault"),
    [
        (replace(proven(), index=REPORT + 1), "doesn't lead"),
        (replace(proven(), entry=ENTRIES[REPORT + 1]), "doesn't lead"),
        (replace(proven(), entry=flipped(ENTRIES[REPORT])), "doesn't lead"),
        (replace(proven(), proof=proven().proof[:-1]), "doesn't lead"),
        (replace(proven(), proof=(*proven().proof, bytes(32))), "doesn't lead"),
        (replace(proven(), proof=(flipped(proven().proof[0]), *proven().proof[1:])), "doesn't lead"),
        (replace(proven(), proof=(b"short",)), "isn't made of hashes"),
        (replace(proven(), index=10**9), "doesn't lead"),
        (replace(proven(), index=-1), "doesn't lead"),
        (replace(proven(), note=proven(5, ENTRIES[:-1]).note), "doesn't lead"),
        (replace(proven(), note=proven().note.replace("\n14\n", "\n15\n")), "signature is not valid"),
        (replace(proven(), note="nonsense"), "not a signed note"),
        (replace(proven(), run_id=bytes(32)), "is of"),
    ],
)
def test_what_was_tampered_with_is_refused(said: ProvenEntry, fault: str) -> None:
    """The entry, its place, the proof, the checkpoint and the run."""
    with pytest.raises(LedgerInvalid, match=fault):
        said.verify(COORDINATOR.peer_id)


def test_another_key_than_the_one_that_is_trusted() -> None:
    """What the JSON itself says about the coordinator counts for nothing."""
    with pytest.raises(LedgerInvalid, match="not signed by the coordinator"):
        proven().verify(identity(9).peer_id)
    with pytest.raises(LedgerInvalid, match="not a coordinator's peer id"):
        proven().verify("nobody")


def test_an_entry_that_is_in_the_ledger_but_not_valid() -> None:
    """A coordinator that logs what nobody signed is found out by the entry itself."""
    commit = WORLD.commit(PEERS[0], 0)
    report = WORLD.report(PEERS[0], commit, WORLD.proposal(PEERS[0], 0, [commit]))
    report.signature = bytes(64)
    with pytest.raises(LedgerInvalid, match="in the ledger, but isn't valid"):
        proven(1, [*ENTRIES[:1], entry(reported=report)]).verify(COORDINATOR.peer_id)


@pytest.mark.parametrize(
    "damage",
    [
        b"",
        b"[]",
        b"null",
        b"{}",
        b"[" * 100_000,
        raw(proven()).replace(b"swarm-entry-1", b"swarm-entry-2"),
        raw(proven()).replace(b'"index": 5', b'"index": "5"'),
        raw(proven()).replace(b'"index": 5', b'"more": 1, "index": 5'),
        json.dumps({**proven().values(), "proof": [base64.b64encode(bytes(32)).decode()] * 65}).encode(),
        json.dumps({**proven().values(), "entry": "not base64"}).encode(),
        b" " * MAX_JSON_BYTES + raw(proven()),
    ],
)
def test_what_is_no_such_json(damage: bytes) -> None:
    """Anything else than what is written is refused before anything is checked."""
    with pytest.raises(LedgerInvalid, match="no entry with its proof"):
        ProvenEntry.parse(damage)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`swarm ledger check` says what it has checked, and ends with an error for what isn't so."""
    path = tmp_path / "entry.json"
    path.write_bytes(raw(proven()))
    command = ["ledger", "check", str(path), "--coordinator"]
    assert run([*command, COORDINATOR.peer_id, "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["verified"], shown["entry"], shown["what"], shown["entries"]) == (True, REPORT, "claim", len(ENTRIES))
    assert run([*command, identity(9).peer_id]) == LedgerInvalid.exit_code
    assert run(["ledger", "check", str(tmp_path / "none"), "--coordinator", COORDINATOR.peer_id]) != 0
