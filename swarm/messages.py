"""Signing and opening of messages, and the join link.

`seal` serialises a message once and signs exactly those bytes; `open_signed` is the only way to get a message back: it checks
size, kind, signature and parsability, in that order, before anything looks inside.
"""

from __future__ import annotations

import base64
import binascii
import re
from dataclasses import dataclass
from typing import TypeVar

from google.protobuf.message import DecodeError, Message

from swarm.errors import LinkError, Rejected
from swarm.identity import Identity, verify
from swarm.merkle import HASH_BYTES, blob_hash
from swarm.rpc.v1.coordinator_pb2 import AdminCommand, Announcement, GrantRequest
from swarm.rpc.v1.ledger_pb2 import Receipt, Report, RoundConfirmed
from swarm.rpc.v1.signed_pb2 import (
    AdmissionToken,
    Adoption,
    AuditVerdict,
    Commit,
    Complaint,
    Evaluation,
    EvidenceNotice,
    Grant,
    HeldCertificate,
    JoinRequest,
    KeyCertificate,
    KeyRevocation,
    MergedSpan,
    Presence,
    Proposal,
    Ready,
    Result,
    Seal,
    SealReply,
    Signed,
    Ticket,
)

KIND_PREFIX = "application/vnd.swarm."
MANIFEST_KIND = KIND_PREFIX + "manifest.v1"
LINK = re.compile(
    r"^swarm://(?P<host>\[[0-9a-fA-F:]+\]|[A-Za-z0-9._-]+):(?P<port>\d{1,5})/(?P<run>[a-z2-7]{52})#(?P<key>[a-z2-7]{52})$"
)

KINDS: dict[type[Message], str] = {
    AdminCommand: KIND_PREFIX + "admin-command.v1",
    AdmissionToken: KIND_PREFIX + "admission.v1",
    Adoption: KIND_PREFIX + "adoption.v1",
    Announcement: KIND_PREFIX + "announcement.v1",
    AuditVerdict: KIND_PREFIX + "audit-verdict.v1",
    Commit: KIND_PREFIX + "commit.v1",
    Complaint: KIND_PREFIX + "complaint.v1",
    Evaluation: KIND_PREFIX + "evaluation.v1",
    EvidenceNotice: KIND_PREFIX + "evidence-notice.v1",
    Grant: KIND_PREFIX + "grant.v1",
    GrantRequest: KIND_PREFIX + "grant-request.v1",
    HeldCertificate: KIND_PREFIX + "held-certificate.v1",
    JoinRequest: KIND_PREFIX + "join-request.v1",
    KeyCertificate: KIND_PREFIX + "key-certificate.v1",
    KeyRevocation: KIND_PREFIX + "key-revocation.v1",
    MergedSpan: KIND_PREFIX + "merged-span.v1",
    Presence: KIND_PREFIX + "presence.v1",
    Proposal: KIND_PREFIX + "proposal.v1",
    Ready: KIND_PREFIX + "ready.v1",
    Receipt: KIND_PREFIX + "receipt.v1",
    Report: KIND_PREFIX + "report.v1",
    Result: KIND_PREFIX + "result.v1",
    RoundConfirmed: KIND_PREFIX + "round-confirmed.v1",
    Seal: KIND_PREFIX + "seal.v1",
    SealReply: KIND_PREFIX + "seal-reply.v1",
    Ticket: KIND_PREFIX + "ticket.v1",
}
SIZE_LIMITS: dict[type[Message], int] = {
    Adoption: (3 << 20) + (1 << 10),
    SealReply: 3 << 20,
    Proposal: 1 << 20,
    Report: 1 << 16,
    MergedSpan: 1 << 19,
    Evaluation: 1 << 13,
}
DEFAULT_SIZE_LIMIT = 1 << 15

M = TypeVar("M", bound=Message)


def seal(identity: Identity, message: Message) -> Signed:
    """Serialise `message` and sign the bytes."""
    kind = KINDS[type(message)]
    payload = message.SerializeToString(deterministic=True)
    return Signed(kind=kind, payload=payload, signer=identity.peer_id, signature=identity.sign(kind, payload))


def open_signed(signed: Signed, expected: type[M], signer: str | None = None, run_id: bytes | None = None) -> M:
    """Check and parse a signed message.

    `signer` is who must have signed it (anybody if None); `run_id` the run that it must belong to. Raises `Rejected`.
    """
    check_signed(signed, KINDS[expected], SIZE_LIMITS.get(expected, DEFAULT_SIZE_LIMIT), signer)
    message = parse(expected, signed.payload, signed.signer)
    if run_id is not None and message.run_id != run_id:  # type: ignore[attr-defined]
        raise Rejected("wrong_run", KINDS[expected], signed.signer)
    return message


def check_signed(signed: Signed, kind: str, size_limit: int, signer: str | None = None) -> None:
    """Check size, kind, author and signature of exact bytes. Raises `Rejected`."""
    if len(signed.payload) > size_limit:
        raise Rejected("too_large", kind, signed.signer)
    if signed.kind != kind:
        raise Rejected("wrong_kind", f"expected {kind}", signed.signer)
    if signer is not None and signed.signer != signer:
        raise Rejected("wrong_signer", kind, signed.signer)
    verify(signed.signer, signed.kind, signed.payload, signed.signature)


def parse(expected: type[M], payload: bytes, sender: str = "") -> M:
    """Parse a message. Raises `Rejected` instead of protobuf's own errors."""
    message = expected()
    try:
        message.ParseFromString(payload)
    except DecodeError as error:
        raise Rejected("malformed", expected.__name__, sender) from error
    return message


def payload_hash(signed: Signed) -> bytes:
    """The name of a signed message: BLAKE2b-256 of its exact payload."""
    return blob_hash(signed.payload)


def split_hashes(joined: bytes) -> list[bytes]:
    """Cut concatenated 32-byte hashes apart. Raises `Rejected` if they don't come out even."""
    if len(joined) % HASH_BYTES:
        raise Rejected("malformed", "hash list")
    return [joined[start : start + HASH_BYTES] for start in range(0, len(joined), HASH_BYTES)]


def base32(value: bytes) -> str:
    """Lower-case base32 without padding: 52 characters for 32 bytes."""
    return base64.b32encode(value).decode().rstrip("=").lower()


def from_base32(text: str) -> bytes:
    """The bytes of `base32`'s output."""
    return base64.b32decode(text.upper() + "=" * (-len(text) % 8))


START_BYTES = 16  # of the name of one start of a peer's program


@dataclass(frozen=True)
class JoinLink:
    """`swarm://host:port/<run id>#<fingerprint>`; the fingerprint is the SHA-256 of the TLS key (SubjectPublicKeyInfo)."""

    host: str
    port: int
    run_id: bytes
    fingerprint: bytes

    @property
    def address(self) -> str:
        """`host:port`."""
        return f"{self.host}:{self.port}"

    def __str__(self) -> str:
        return f"swarm://{self.address}/{base32(self.run_id)}#{base32(self.fingerprint)}"

    @classmethod
    def parse(cls, text: str) -> JoinLink:
        """Read a link. Raises `LinkError` with what is wrong."""
        match = LINK.match(text.strip())
        if match is None:
            raise LinkError(
                f"not a join link: {text.strip()[:120]!r}",
                "a link looks like swarm://host:port/<52 characters>#<52 characters>; copy it whole",
            )
        port = int(match["port"])
        if not 0 < port < 65536:
            raise LinkError(f"not a port: {port}", "copy the link again from whoever runs the coordinator")
        try:
            return cls(match["host"], port, from_base32(match["run"]), from_base32(match["key"]))
        except binascii.Error as error:
            raise LinkError("the link's run or fingerprint is damaged", "copy the link whole") from error
