"""A client made of nothing but a wire: `python released_client.py STUBS ADDRESS CERTIFICATE RUN SEED EXTRA`.

It knows the published protocol (docs/protocol.md) and no module of this repository, whose generated code it couldn't load beside
its own. STUBS is a folder with the package `released`, compiled from that wire; EXTRA a Python dictionary of what it says in
newer fields, or empty. It prints what it was told, as JSON.
"""

from __future__ import annotations

import ast
import hashlib
import json
import sys
import time
from pathlib import Path
from typing import Any

import base58
import grpc
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

PREFIX = bytes.fromhex("002408011220")
ROOT = b"\x11" * 32


def name_of(payload: bytes) -> bytes:
    """BLAKE2b-256."""
    return hashlib.blake2b(payload, digest_size=32).digest()


def encoding(kind: str, payload: bytes) -> bytes:
    """DSSE's pre-authentication encoding."""
    return b"DSSEv1 %d %b %d %b" % (len(kind), kind.encode(), len(payload), payload)


class Client:
    """One peer."""

    def __init__(self, stubs: Any, services: Any, ledger: Any, signed: Any, channel: grpc.Channel, seed: bytes) -> None:
        self.pb, self.ledger, self.signed = stubs, ledger, signed
        self.stub = services.PeerServiceStub(channel)
        self.key = Ed25519PrivateKey.from_private_bytes(seed)
        public = self.key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)
        self.peer_id = base58.b58encode(PREFIX + public).decode()

    def seal(self, kind: str, message: Any) -> Any:
        """Sign a message."""
        kind, payload = f"application/vnd.swarm.{kind}.v1", message.SerializeToString()
        signature = self.key.sign(encoding(kind, payload))
        return self.signed.Signed(kind=kind, payload=payload, signer=self.peer_id, signature=signature)

    def opened(self, signed: Any, kind: type[Any], signer: str) -> Any:
        """Check a signature by the key in its author's peer id."""
        assert signed.signer == signer
        public = Ed25519PublicKey.from_public_bytes(base58.b58decode(signer)[len(PREFIX) :])
        public.verify(signed.signature, encoding(signed.kind, signed.payload))
        return kind.FromString(signed.payload)

    def announcement(self, run_id: bytes, extra: dict[str, Any]) -> Any:
        """That we are there, with whatever else is to be said."""
        protocol = extra.get("protocol")
        said = self.pb.Announcement(run_id=run_id, issued_at=int(time.time()), client_version="0.1.0", state="training")
        if protocol:
            said.protocol.oldest.major, said.protocol.oldest.minor = protocol[0]
            said.protocol.newest.major, said.protocol.newest.minor = protocol[1]
        if "motto" in extra:
            said.motto = extra["motto"]
        return self.seal("announcement", said)

    def report(self, run_id: bytes, motto: str = "") -> tuple[Any, Any]:
        """The report of a round that we have played alone, and its proposal."""
        commit = self.signed.Commit(run_id=run_id, weight=4, tokens=256, loss=2.5)
        if motto:
            commit.motto = motto
        commit = self.seal("commit", commit)
        reference = self.signed.CommitReference(peer_id=self.peer_id, commit_hash=name_of(commit.payload), weight=4)
        member = self.signed.Member(peer_id=self.peer_id)
        proposal = self.seal("proposal", self.signed.Proposal(run_id=run_id, commits=[reference], next_roster=[member]))
        state = self.signed.Tree(root=ROOT, size_bytes=1, chunk_bytes=1)
        result = self.signed.Result(run_id=run_id, proposal_hash=name_of(proposal.payload), state=state)
        report = self.ledger.Report(
            run_id=run_id,
            commit=commit,
            result=self.seal("result", result),
            proposal_hash=name_of(proposal.payload),
            issued_at=int(time.time()),
        )
        return self.seal("report", report), proposal

    def live(self, run_id: bytes, extra: dict[str, Any]) -> dict[str, Any]:
        """Join, report a round, read balance and ledger."""
        run = self.stub.GetRun(self.pb.GetRunRequest(run_id=run_id), timeout=20)
        assert name_of(run.manifest.payload) == run_id
        answer = self.stub.Announce(self.pb.AnnounceRequest(announcement=self.announcement(run_id, extra)), timeout=20)
        token = self.opened(answer.admission, self.signed.AdmissionToken, run.coordinator)
        report, proposal = self.report(run_id, extra.get("motto", ""))
        request = self.pb.SubmitReportRequest(report=report, proposal=proposal)
        receipt = self.opened(self.stub.SubmitReport(request, timeout=20).receipt, self.ledger.Receipt, run.coordinator)
        credited = self.stub.GetCredits(self.pb.GetCreditsRequest(run_id=run_id, peer_id=self.peer_id), timeout=20)
        batches = self.stub.ListEntries(self.pb.ListEntriesRequest(), timeout=20)
        entries = [entry for batch in batches for entry in batch.entries]
        kept = self.ledger.LedgerEntry.FromString(entries[receipt.ledger_index])
        return {
            "peer_id": self.peer_id,
            "admitted": token.peer_id,
            "run_state": answer.run_state,
            "receipt": receipt.report_hash.hex(),
            "report": name_of(report.payload).hex(),
            "kept": kept.reported.payload == report.payload and entries[receipt.ledger_index] == receipt.entry,
            "rounds": credited.balances[0].rounds,
            "pending_flops": credited.balances[0].pending_flops,
            "entries": [self.ledger.LedgerEntry.FromString(entry).WhichOneof("body") for entry in entries],
        }


def main() -> None:
    """Be that client."""
    stubs, address, certificate, run, seed, extra = sys.argv[1:]
    sys.path.insert(0, stubs)
    from released import coordinator_pb2, coordinator_pb2_grpc, ledger_pb2, signed_pb2

    credentials = grpc.ssl_channel_credentials(Path(certificate).read_bytes())
    with grpc.secure_channel(address, credentials, (("grpc.ssl_target_name_override", "swarm-coordinator"),)) as channel:
        client = Client(coordinator_pb2, coordinator_pb2_grpc, ledger_pb2, signed_pb2, channel, bytes.fromhex(seed))
        try:
            told: dict[str, Any] = client.live(bytes.fromhex(run), ast.literal_eval(extra) if extra else {})
        except grpc.RpcError as error:
            metadata = {item.key: item.value for item in error.trailing_metadata()}
            told = {"reason": metadata.get("reason"), "code": error.code().name, "details": error.details()}
    sys.stdout.write(json.dumps(told))


if __name__ == "__main__":
    main()
