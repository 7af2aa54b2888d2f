"""A small world for tests: a manifest, keys, and the messages that honest peers would sign."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from swarm.identity import Identity
from swarm.manifest import Manifest
from swarm.messages import MANIFEST_KIND, payload_hash, seal
from swarm.rpc.v1.coordinator_pb2 import Announcement, GrantRequest
from swarm.rpc.v1.ledger_pb2 import LedgerEntry, Report, RoundConfirmed, RunOpened
from swarm.rpc.v1.signed_pb2 import (
    AdmissionToken,
    AuditVerdict,
    Ballot,
    Commit,
    CommitReference,
    Evaluation,
    Member,
    Proposal,
    Result,
    Signed,
    Tree,
)

SEQUENCE_LENGTH = 64
BATCH_SAMPLES = 32
FLOPS_PER_TOKEN = 10**12
ROOT = b"\x11" * 32
OTHER_ROOT = b"\x22" * 32
NOW_S = 1_000_000.0


def identity(number: int) -> Identity:
    """The same key for the same number."""
    return Identity.from_seed(number.to_bytes(32, "big"))


OWNER = identity(1000)
COORDINATOR = identity(2000)


LLAMA = {
    "model_type": "llama",
    "vocab_size": 16,
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
}
BUILDABLE = {"config": LLAMA, "parameters": 728}
"""A model that can really be built, unlike that of `manifest`, whose number of parameters nobody looks at."""


def manifest(**changes: object) -> Manifest:
    """A tiny valid manifest."""
    row = (SEQUENCE_LENGTH + 1) * 2
    values: dict[str, object] = {
        "name": "tiny",
        "model": {"config": {"model_type": "llama"}, "parameters": 1000},
        "tokenizer": {"root": "00" * 32, "size_bytes": 10},
        "data": {
            "sequence_length": SEQUENCE_LENGTH,
            "train": [{"root": "01" * 32, "size_bytes": row * 100, "samples": 100}],
            "validation": [{"root": "02" * 32, "size_bytes": row * 10, "samples": 10}],
        },
        "strategy": {"kind": "sync", "batch_samples": BATCH_SAMPLES, "schedule": {"total_tokens": 10**6}},
        "credit": {"flops_per_token": FLOPS_PER_TOKEN, "hold_rounds": 2},
        "audit": {"rate": 0.0, "first": 0},
    }
    return Manifest.model_validate(values | changes)


def sign_manifest(value: Manifest, owner: Identity = OWNER) -> Signed:
    """The owner-signed canonical bytes."""
    raw = value.canonical_bytes
    return Signed(kind=MANIFEST_KIND, payload=raw, signer=owner.peer_id, signature=owner.sign(MANIFEST_KIND, raw))


@dataclass
class World:
    """One run, and builders for what its peers and its coordinator sign."""

    manifest: Manifest = field(default_factory=manifest)
    coordinator: Identity = COORDINATOR

    @property
    def signed_manifest(self) -> Signed:
        return sign_manifest(self.manifest)

    @property
    def run_id(self) -> bytes:
        return bytes.fromhex(self.manifest.run_id)

    def announcement(self, peer: Identity, now_s: float = NOW_S, **changes: object) -> Signed:
        values = {"run_id": self.run_id, "issued_at": int(now_s), "client_version": "0.1.0"} | changes
        return seal(peer, Announcement(**values))

    def commit(self, peer: Identity, number: int, weight: int = 4, **changes: object) -> Signed:
        values = {"run_id": self.run_id, "round": number, "weight": weight, "tokens": weight * SEQUENCE_LENGTH, "loss": 2.5}
        return seal(peer, Commit(**(values | changes)))

    def proposal(
        self,
        leader: Identity,
        number: int,
        commits: Sequence[Signed],
        roster: Sequence[Identity] = (),
        ballot: tuple[int, int] = (0, 0),
    ) -> Signed:
        ordered = sorted(commits, key=lambda signed: signed.signer)
        references = [
            CommitReference(
                peer_id=signed.signer,
                commit_hash=payload_hash(signed),
                weight=Commit.FromString(signed.payload).weight,
            )
            for signed in ordered
        ]
        members = sorted([peer.peer_id for peer in roster] or [signed.signer for signed in ordered])
        return seal(
            leader,
            Proposal(
                run_id=self.run_id,
                round=number,
                ballot=Ballot(term=ballot[0], amendment=ballot[1]),
                commits=references,
                next_roster=[Member(peer_id=peer_id) for peer_id in members],
            ),
        )

    def result(self, peer: Identity, number: int, proposal: Signed, root: bytes = ROOT) -> Signed:
        state = Tree(root=root, size_bytes=1, chunk_bytes=1)
        values = {"run_id": self.run_id, "round": number, "proposal_hash": payload_hash(proposal), "state": state}
        return seal(peer, Result(**values))

    def report(self, peer: Identity, commit: Signed, proposal: Signed, root: bytes = ROOT, **changes: object) -> Signed:
        number = Commit.FromString(commit.payload).round
        values: dict[str, object] = {
            "run_id": self.run_id,
            "round": number,
            "commit": commit,
            "result": self.result(peer, number, proposal, root),
            "proposal_hash": payload_hash(proposal),
            "issued_at": int(NOW_S),
        }
        return seal(peer, Report(**(values | changes)))

    def round(self, peers: Sequence[Identity], number: int, weight: int = 4, root: bytes = ROOT) -> tuple[Signed, list[Signed]]:
        """A whole round: its proposal and every peer's report."""
        commits = [self.commit(peer, number, weight) for peer in peers]
        proposal = self.proposal(peers[0], number, commits)
        pairs = zip(peers, commits, strict=True)
        return proposal, [self.report(peer, commit, proposal, root) for peer, commit in pairs]

    def grant_request(self, peer: Identity, number: int, roster: Sequence[Identity], **changes: object) -> Signed:
        values = {
            "run_id": self.run_id,
            "round": number,
            "base_root": ROOT,
            "roster": [member.peer_id for member in roster],
            "present": [peer.peer_id],
            "issued_at": int(NOW_S),
        }
        return seal(peer, GrantRequest(**(values | changes)))

    def opened(self) -> bytes:
        """The ledger entry that opens the run."""
        return entry(run_opened=RunOpened(run_id=self.run_id, manifest=self.signed_manifest))

    def admitted(self, peer: Identity, signer: Identity | None = None, **changes: object) -> bytes:
        values = {"run_id": self.run_id, "peer_id": peer.peer_id, "account": peer.peer_id} | changes
        return entry(admitted=seal(signer or self.coordinator, AdmissionToken(**values)))

    def confirmed(
        self, number: int, proposal: Signed, root: bytes = ROOT, signer: Identity | None = None, audit_rate: float = 0.0
    ) -> bytes:
        message = RoundConfirmed(
            run_id=self.run_id, round=number, proposal_hash=payload_hash(proposal), state_root=root, audit_rate=audit_rate
        )
        return entry(confirmed=seal(signer or self.coordinator, message))

    def audited(self, auditor: Identity, commit: Signed, finding: str = "passed", **changes: object) -> bytes:
        """The entry of what an auditor found about a commit."""
        number = Commit.FromString(commit.payload).round
        values: dict[str, object] = {"run_id": self.run_id, "round": number, "peer_id": commit.signer, "finding": finding}
        return entry(audited=seal(auditor, AuditVerdict(**(values | {"commit_hash": payload_hash(commit)} | changes))))

    def evaluation(self, peer: Identity, number: int, loss: float = 2.0, **changes: object) -> Signed:
        """What a peer says about the held-out loss after a round."""
        values: dict[str, object] = {"run_id": self.run_id, "round": number, "state_root": ROOT, "loss": loss}
        values |= {"samples": self.manifest.evaluation_samples, "issued_at": int(NOW_S)}
        return seal(peer, Evaluation(**(values | changes)))

    def ledger(self, peers: Sequence[Identity], rounds: int, weight: int = 4) -> list[bytes]:
        """A valid ledger of `rounds` complete rounds."""
        entries = [self.opened(), *(self.admitted(peer) for peer in peers)]
        for number in range(rounds):
            proposal, reports = self.round(peers, number, weight)
            majority = len(peers) // 2 + 1
            before, after = reports[:majority], reports[majority:]
            entries += [entry(proposed=proposal), *(entry(reported=report) for report in before)]
            entries += [self.confirmed(number, proposal), *(entry(reported=report) for report in after)]
        return entries


def entry(**body: object) -> bytes:
    """The bytes of one ledger entry."""
    return LedgerEntry(appended_at_us=int(NOW_S * 1e6), **body).SerializeToString(deterministic=True)
