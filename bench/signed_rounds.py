"""What peers sign, without training: a tiny manifest, and rounds of commits, proposals, results and reports."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from google.protobuf.message import Message

from swarm.identity import SIGNATURE_BYTES, Identity
from swarm.manifest import Manifest
from swarm.merkle import HASH_BYTES, blob_hash
from swarm.messages import KINDS, MANIFEST_KIND, payload_hash, seal
from swarm.rpc.v1.coordinator_pb2 import Announcement
from swarm.rpc.v1.ledger_pb2 import Report
from swarm.rpc.v1.signed_pb2 import Ballot, Commit, CommitReference, Member, Proposal, Result, Signed, Tree

SEQUENCE_LENGTH = 64
WEIGHT = 4
NOBODY = b"\x5a" * SIGNATURE_BYTES

Sealer = Callable[[str, Any], Signed]


def identity(number: int) -> Identity:
    """The same key for the same number."""
    return Identity.from_seed(blob_hash(b"benchmark %d" % number))


def tiny_manifest() -> Manifest:
    """A valid manifest of a model of 1000 parameters, whose data nobody needs."""
    row = (SEQUENCE_LENGTH + 1) * 2
    return Manifest.model_validate(
        {
            "name": "benchmark",
            "model": {"config": {"model_type": "llama"}, "parameters": 1000},
            "tokenizer": {"root": "00" * HASH_BYTES, "size_bytes": 10},
            "data": {
                "sequence_length": SEQUENCE_LENGTH,
                "train": [{"root": "01" * HASH_BYTES, "size_bytes": row * 100, "samples": 100}],
                "validation": [{"root": "02" * HASH_BYTES, "size_bytes": row * 10, "samples": 10}],
            },
            "strategy": {"kind": "sync", "batch_samples": 32, "schedule": {"total_tokens": 10**9}},
            "credit": {"flops_per_token": 10**12, "hold_rounds": 2},
        }
    )


def sign_manifest(manifest: Manifest, owner: Identity) -> Signed:
    """The owner-signed canonical bytes."""
    raw = manifest.canonical_bytes
    return Signed(kind=MANIFEST_KIND, payload=raw, signer=owner.peer_id, signature=owner.sign(MANIFEST_KIND, raw))


def sealer(peers: Sequence[Identity]) -> Sealer:
    """Signs with the peers' keys."""
    keys = {peer.peer_id: peer for peer in peers}
    return lambda peer_id, message: seal(keys[peer_id], message)


def unsigned(peer_id: str, message: Message) -> Signed:
    """Looks signed; for bulk that nobody checks."""
    return Signed(kind=KINDS[type(message)], payload=message.SerializeToString(), signer=peer_id, signature=NOBODY)


def announcement(run_id: bytes, peer: Identity, now_s: float) -> Signed:
    """A peer says that it trains."""
    values: dict[str, Any] = {
        "state": "training",
        "client_version": "0.1.0",
        "addresses": ["/ip4/192.0.2.7/tcp/7701"],
        "reachable": True,
    }
    return seal(peer, Announcement(run_id=run_id, issued_at=int(now_s), **values))


def state_root(number: int) -> bytes:
    """The root that everybody comes to in a round."""
    return blob_hash(b"state %d" % number)


def round_of(
    run_id: bytes, number: int, peers: Sequence[str], next_roster: Sequence[str], sign: Sealer
) -> tuple[Signed, list[Signed]]:
    """A round's proposal, led by the first peer, and the reports of `peers` (sorted by peer id)."""
    values: dict[str, Any] = {
        "run_id": run_id,
        "round": number,
        "weight": WEIGHT,
        "tokens": WEIGHT * SEQUENCE_LENGTH,
        "loss": 2.5,
    }
    root = state_root(number)
    more: dict[str, Any] = {"base_root": root, "codec": "int4", "parts_root": root, "part_count": 7, "payload_bytes": 1 << 20}
    commits = [sign(peer, Commit(**values, **more, train_seconds=10.0, upload_bytes_per_s=2_500_000)) for peer in peers]
    references = [
        CommitReference(peer_id=each.signer, commit_hash=payload_hash(each), weight=WEIGHT, first_part=0, part_span=1)
        for each in commits
    ]
    members = [Member(peer_id=peer, quota=20) for peer in next_roster]
    ballot = Ballot(term=0, amendment=0)
    proposal = sign(
        peers[0],
        Proposal(run_id=run_id, round=number, ballot=ballot, base_root=root, commits=references, next_roster=members),
    )
    name = payload_hash(proposal)
    state = Tree(root=root, size_bytes=1 << 22, chunk_bytes=1 << 20)
    pairs = zip(peers, commits, strict=True)
    return proposal, [_report(run_id, number, peer, commit, name, state, sign) for peer, commit in pairs]


def _report(run_id: bytes, number: int, peer: str, commit: Signed, proposal: bytes, state: Tree, sign: Sealer) -> Signed:
    result = Result(run_id=run_id, round=number, proposal_hash=proposal, state=state, tokens_total=1_720_320)
    report = Report(
        run_id=run_id, round=number, commit=commit, result=sign(peer, result), proposal_hash=proposal, issued_at=1_763_900_000
    )
    return sign(peer, report)
