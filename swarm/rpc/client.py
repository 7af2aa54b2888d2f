"""The coordinator as a peer or a command sees it: pinned TLS, a timeout on every call, and errors as exceptions.

`CoordinatorUnreachable` (also: overloaded, slowed down, store out of order) means try again later; `Rejected` means that the same
request will be refused again. What the coordinator signs is checked before it is returned.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar

import grpc
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from swarm.errors import (
    CoordinatorUnreachable,
    FingerprintMismatch,
    LedgerInvalid,
    ManifestInvalid,
    NotAdmitted,
    ProtocolMismatch,
    Rejected,
    SwarmError,
    UnknownRun,
    VersionTooOld,
)
from swarm.ledger import Checkpoint, open_manifest, origin_of, verify_checkpoint, verify_receipt
from swarm.manifest import Manifest
from swarm.messages import JoinLink, open_signed, payload_hash
from swarm.protocol import MANY_REPORTS, OURS, SILENT, Range, Version, used_in
from swarm.rpc.v1.coordinator_pb2 import (
    AddCosignatureRequest,
    AnnounceRequest,
    AnnounceResponse,
    GetCheckpointRequest,
    GetCreditsRequest,
    GetCreditsResponse,
    GetProgressRequest,
    GetProgressResponse,
    GetRunRequest,
    GetRunResponse,
    ListAuditsRequest,
    ListAuditsResponse,
    ListEntriesRequest,
    ListEvaluationsRequest,
    ListEvaluationsResponse,
    ReportOutcome,
    RequestGrantRequest,
    RequestGrantResponse,
    RevokeKeyRequest,
    SubmitAuditRequest,
    SubmitEvaluationRequest,
    SubmitReportRequest,
    SubmitReportsRequest,
)
from swarm.rpc.v1.coordinator_pb2_grpc import PeerServiceStub
from swarm.rpc.v1.signed_pb2 import AdmissionToken, Grant, Signed
from swarm.tracing import carried

if TYPE_CHECKING:
    from swarm.rpc.v1.coordinator_pb2_grpc import PeerServiceAsyncStub

TLS_NAME = "swarm-coordinator"
REASON_KEY = "reason"
RUN_KEY = "swarm-run"
TIMEOUT_S = 15.0
MAX_MESSAGE_BYTES = 4 << 20
LATER = frozenset({"overloaded", "rate_limited", "too_many_new_keys", "store_failed", "timeout", "internal"})
TRANSIENT = frozenset(
    {
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.CANCELLED,
        grpc.StatusCode.INTERNAL,
        grpc.StatusCode.UNKNOWN,
    }
)
CHANNEL_OPTIONS = (
    ("grpc.ssl_target_name_override", TLS_NAME),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.enable_http_proxy", 0),
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 5000),
    ("grpc.keepalive_time_ms", 60_000),
)

T = TypeVar("T")


@dataclass(frozen=True)
class RunInfo:
    """What the coordinator says about its run, after the manifest was checked against the run id."""

    run_id: bytes
    manifest: Manifest
    signed_manifest: Signed
    coordinator: str
    version: str
    protocol: Version = SILENT.newest

    @property
    def owner(self) -> str:
        """Peer id of the run's owner."""
        return self.signed_manifest.signer


class CoordinatorClient:
    """One channel to the coordinator that a join link names. Use as `async with await CoordinatorClient.connect(link)`.

    `spoken` are the versions of the protocol that the caller speaks.
    """

    def __init__(self, link: JoinLink, channel: grpc.aio.Channel, timeout_s: float, spoken: Range = OURS) -> None:
        self.link = link
        self._spoken = spoken
        self._channel = channel
        self._stub: PeerServiceAsyncStub = PeerServiceStub(channel)
        self._timeout_s = timeout_s
        self._run: RunInfo | None = None
        self._closed = False
        self._metadata = ((RUN_KEY, link.run_id.hex()),)

    @classmethod
    async def connect(cls, link: JoinLink, timeout_s: float = TIMEOUT_S, spoken: Range = OURS) -> Self:
        """Fetch the server's certificate, compare its key with the link, and open a channel that accepts no other.

        Raises `CoordinatorUnreachable` or `FingerprintMismatch`.
        """
        certificate = await _fetch_certificate(link, timeout_s)
        credentials = grpc.ssl_channel_credentials(root_certificates=certificate)
        channel = grpc.aio.secure_channel(link.address, credentials, options=CHANNEL_OPTIONS)
        return cls(link, channel, timeout_s, spoken)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the channel; calls under way end with `CoordinatorUnreachable`."""
        self._closed = True
        await self._channel.close(None)

    async def get_run(self) -> RunInfo:
        """The run's manifest, checked against the link's run id and its owner's signature; asked once, then remembered.

        Raises `UnknownRun`, `ProtocolMismatch`, or `ManifestInvalid` for another manifest than the link names.
        """
        if self._run is None:
            request = GetRunRequest(run_id=self.link.run_id, protocol=self._spoken.message)
            answer = await self._call(self._stub.GetRun, request)
            self._check_protocol(used_in(answer))
            self._run = _check_run(answer, self.link.run_id)
        return self._run

    async def announce(self, announcement: Signed) -> AnnounceResponse:
        """Ask for admission or renew it. Raises `NotAdmitted`, `VersionTooOld`, `ProtocolMismatch` or `Rejected`."""
        run = await self.get_run()
        request = AnnounceRequest(announcement=announcement)
        answer = await self._call(self._stub.Announce, request)
        self._check_protocol(used_in(answer))
        if answer.HasField("admission"):
            _promise(AdmissionToken, answer.admission, run)
        return answer

    async def submit_report(self, report: Signed, proposal: Signed | None = None) -> Signed:
        """Hand in a report; returns the checked receipt. Raises `Rejected`, or `LedgerInvalid` for a bad receipt."""
        run = await self.get_run()
        request = SubmitReportRequest(report=report, proposal=proposal)
        answer = await self._call(self._stub.SubmitReport, request)
        return _receipt_of(report, answer.receipt, run.coordinator)

    async def submit_reports(self, requests: Sequence[SubmitReportRequest]) -> list[Signed | Rejected | LedgerInvalid]:
        """Hand in up to `MAX_REPORTS` reports of one peer: for each the checked receipt, or why there is none.

        Where the coordinator becomes busy on the way, only the first ones are answered. One that doesn't know the call gets the
        reports one by one.
        """
        run = await self.get_run()
        if len(requests) == 1 or run.protocol < MANY_REPORTS:
            return [await _or_refusal(self.submit_report(each.report, each.proposal)) for each in requests]
        answer = await self._call(self._stub.SubmitReports, SubmitReportsRequest(reports=requests))
        if len(answer.outcomes) != len(requests):
            raise LedgerInvalid(f"the coordinator answered {len(answer.outcomes)} of {len(requests)} reports")
        decided = itertools.takewhile(lambda pair: pair[1].reason not in LATER, zip(requests, answer.outcomes, strict=True))
        return [_settled_report(each.report, outcome, run.coordinator) for each, outcome in decided]

    async def request_grant(self, request: Signed) -> RequestGrantResponse:
        """Ask to go on without a quorum; the answer holds a checked grant, or when to ask again and why."""
        run = await self.get_run()
        message = RequestGrantRequest(request=request)
        answer = await self._call(self._stub.RequestGrant, message)
        if answer.HasField("grant"):
            _promise(Grant, answer.grant, run)
        return answer

    async def credits(self, peer_id: str = "", limit: int = 20) -> GetCreditsResponse:
        """One peer's balance, or the leaderboard."""
        request = GetCreditsRequest(run_id=self.link.run_id, peer_id=peer_id, limit=limit)
        return await self._call(self._stub.GetCredits, request)

    async def progress(self) -> GetProgressResponse:
        """Where the run stands."""
        request = GetProgressRequest(run_id=self.link.run_id)
        return await self._call(self._stub.GetProgress, request)

    async def entries(self, first: int = 0, end: int | None = None) -> AsyncIterator[bytes]:
        """The ledger's raw entries from `first` on, up to `end` or the present end."""
        position = first
        while end is None or position < end:
            started = position
            async for batch in self._entries_once(position, 0 if end is None else end - position):
                for entry in batch:
                    yield entry
                position += len(batch)
            if position == started:
                return

    async def _entries_once(self, first: int, limit: int) -> AsyncIterator[list[bytes]]:
        call = self._stub.ListEntries(ListEntriesRequest(first=first, limit=limit), metadata=(*self._metadata, *carried()))
        answers, expected = aiter(call), first
        while (answer := await self._settled(asyncio.wait_for(anext(answers, None), self._timeout_s))) is not None:
            if answer.first != expected or not answer.entries:
                raise LedgerInvalid(f"the coordinator sent entry {answer.first} instead of {expected}")
            expected += len(answer.entries)
            yield list(answer.entries)

    async def checkpoint(
        self, old_size: int = 0, *, to_cosign: bool = False, cosigned: bool = False
    ) -> tuple[Checkpoint, str, list[bytes]]:
        """The newest checkpoint (checked), its signed note, and the consistency proof from `old_size`.

        `to_cosign`: the one that witnesses sign at present; `cosigned`: the one with the most cosignatures, unchecked.
        """
        run = await self.get_run()
        request = GetCheckpointRequest(old_size=old_size, to_cosign=to_cosign, cosigned=cosigned)
        answer = await self._call(self._stub.GetCheckpoint, request)
        checkpoint = verify_checkpoint(answer.note, origin_of(run.run_id), run.coordinator)
        return checkpoint, answer.note, list(answer.consistency_proof)

    async def revoke_key(self, revocation: Signed) -> bool:
        """Hand in an account's revocation of a key; whether it was revoked before. Raises `Rejected`."""
        return bool((await self._call(self._stub.RevokeKey, RevokeKeyRequest(revocation=revocation))).repeated)

    async def list_audits(self, peer_id: str) -> ListAuditsResponse:
        """The audits that a peer is asked for, and who is suspended."""
        return await self._call(self._stub.ListAudits, ListAuditsRequest(run_id=self.link.run_id, peer_id=peer_id))

    async def submit_audit(self, verdict: Signed) -> None:
        """Hand in what an auditor found. Raises `Rejected`."""
        await self._call(self._stub.SubmitAudit, SubmitAuditRequest(verdict=verdict))

    async def list_evaluations(self, peer_id: str, limit: int = 0) -> ListEvaluationsResponse:
        """The evaluations that a peer is asked for, and the newest that quorums have agreed on."""
        request = ListEvaluationsRequest(run_id=self.link.run_id, peer_id=peer_id, limit=limit)
        return await self._call(self._stub.ListEvaluations, request)

    async def submit_evaluation(self, evaluation: Signed) -> None:
        """Hand in a held-out loss. Raises `Rejected`."""
        await self._call(self._stub.SubmitEvaluation, SubmitEvaluationRequest(evaluation=evaluation))

    async def add_cosignature(self, line: str) -> int:
        """Hand in a witness's line; how many have cosigned the checkpoint. Raises `Rejected`."""
        return int((await self._call(self._stub.AddCosignature, AddCosignatureRequest(line=line))).cosignatures)

    def _check_protocol(self, used: Version) -> None:
        """Go on only in a version that we speak, whatever the coordinator took us for."""
        if used not in self._spoken:
            raise ProtocolMismatch(
                f"the coordinator speaks protocol {used}, this client {self._spoken}",
                UPDATE if used > self._spoken.newest else WAIT,
            )

    async def _call(self, method: Callable[..., Awaitable[T]], request: object) -> T:
        try:
            call = method(request, timeout=self._timeout_s, metadata=(*self._metadata, *carried()))
        except grpc.aio.UsageError as error:
            raise CoordinatorUnreachable("the connection was given up by another call", RETRY_HINT) from error
        return await self._settled(call)

    async def _settled(self, call: Awaitable[T]) -> T:
        """The answer. A channel that is closed meanwhile cancels its calls, which must not look as if we were cancelled."""
        try:
            return await call
        except grpc.aio.AioRpcError as error:
            raise translate(error, self.link.address) from error
        except TimeoutError as error:
            raise CoordinatorUnreachable(f"{self.link.address} doesn't answer in time", RETRY_HINT) from error
        except asyncio.CancelledError as error:
            task = asyncio.current_task()
            if not self._closed or (task is not None and task.cancelling()):
                raise
            raise CoordinatorUnreachable("the connection was given up by another call", RETRY_HINT) from error


UPDATE = "update with: pip install --upgrade swarm-train"
WAIT = "the coordinator is older: ask its operator to update it, or install the version that it runs"
RETRY_HINT = "training goes on meanwhile; reports are kept and sent later"


def translate(error: grpc.aio.AioRpcError, address: str) -> SwarmError | Rejected:
    """The exception that a gRPC error stands for."""
    metadata: Any = error.trailing_metadata() or {}
    reason = str(metadata.get(REASON_KEY, ""))
    details = error.details() or "no details"
    if reason in LATER or (not reason and error.code() in TRANSIENT):
        return CoordinatorUnreachable(f"the coordinator at {address} can't be reached: {details}", RETRY_HINT)
    return _refusal(reason or error.code().name.lower(), details)


def _refusal(reason: str, details: str) -> SwarmError | Rejected:
    match reason:
        case "unknown_run" | "wrong_run":
            return UnknownRun(details, "ask the run's owner for the present join link")
        case "not_admitted" | "not_on_allow_list":
            return NotAdmitted(details, "show your peer id with: swarm identity show")
        case "certificate_expired" | "bad_certificate" | "other_account" | "revoked":
            return NotAdmitted(details, "certify the key anew, or make another: swarm identity certify")
        case "not_invited" | "bad_ticket" | "ticket_expired" | "ticket_used_up":
            return NotAdmitted(details, "join with a ticket of the run's owner: swarm join LINK --ticket swarm-ticket-...")
        case "version_too_old":
            return VersionTooOld(details, UPDATE)
        case "protocol_too_old":
            return ProtocolMismatch(details, UPDATE)
        case "protocol_too_new":
            return ProtocolMismatch(details, WAIT)
    return Rejected(reason, details)


async def _or_refusal(receipt: Awaitable[Signed]) -> Signed | Rejected | LedgerInvalid:
    try:
        return await receipt
    except (Rejected, LedgerInvalid) as error:
        return error


def _settled_report(report: Signed, outcome: ReportOutcome, coordinator: str) -> Signed | Rejected | LedgerInvalid:
    """One report's receipt or refusal. Raises what concerns them all, as where the run is another one."""
    if not outcome.HasField("receipt"):
        refusal = _refusal(outcome.reason, outcome.detail)
        if isinstance(refusal, SwarmError):
            raise refusal
        return refusal
    try:
        return _receipt_of(report, outcome.receipt, coordinator)
    except LedgerInvalid as error:
        return error


def _receipt_of(report: Signed, signed: Signed, coordinator: str) -> Signed:
    """The receipt, if it is the report's. Raises `LedgerInvalid`."""
    receipt = verify_receipt(signed, coordinator)
    if receipt.report_hash != payload_hash(report) or receipt.peer_id != report.signer:
        raise LedgerInvalid("the coordinator sent the receipt of another report")
    return signed


def _check_run(answer: GetRunResponse, run_id: bytes) -> RunInfo:
    try:
        manifest = open_manifest(answer.manifest, run_id)
    except Rejected as error:
        raise ManifestInvalid([str(error)], "the coordinator's manifest") from error
    return RunInfo(run_id, manifest, answer.manifest, answer.coordinator, answer.version, used_in(answer))


def _promise(kind: type[AdmissionToken] | type[Grant], signed: Signed, run: RunInfo) -> None:
    open_signed(signed, kind, signer=run.coordinator, run_id=run.run_id)


async def _fetch_certificate(link: JoinLink, timeout_s: float) -> bytes:
    """The server's certificate (PEM), if its key is the pinned one."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE  # the key is compared with the link's fingerprint below
    context.set_alpn_protocols(["h2"])
    try:
        async with asyncio.timeout(timeout_s):
            host = link.host.strip("[]")
            _, writer = await asyncio.open_connection(host, link.port, ssl=context, server_hostname=TLS_NAME)
    except (OSError, TimeoutError) as error:
        raise CoordinatorUnreachable(
            f"nothing answers at {link.address}: {str(error) or 'timeout'}",
            "check the address and your firewall, or try again later",
        ) from error
    try:
        encoded = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
    finally:
        writer.transport.abort()
    certificate = x509.load_der_x509_certificate(encoded)
    if fingerprint_of(certificate) != link.fingerprint:
        raise FingerprintMismatch(
            f"the server at {link.address} is not the coordinator that the link names",
            "somebody may be in between, or the coordinator got a new key: ask its owner for the present link",
        )
    return certificate.public_bytes(Encoding.PEM)


def fingerprint_of(certificate: x509.Certificate) -> bytes:
    """SHA-256 of the certificate's SubjectPublicKeyInfo."""
    encoded = certificate.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(encoded).digest()
