"""Several coordinators over one PostgreSQL database: one of them writes, all of them answer.

The writer is whoever holds the database's advisory lock; the lock goes with its connection, so a killed writer frees it. It says
under `leader` where it is. The others follow the ledger, answer what can be read from it, and pass on what is written, or what
only the writer knows: who is alive. That two of them never write beside each other doesn't hang on the lock: an entry's position
is the table's primary key, so the slower one's group fails, nobody gets a receipt for it, and it reads the ledger again.

Replicas have the same keys. A passed-on call is marked with a secret that follows from the coordinator's key, so that it counts
against the address of its peer, not of the replica.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, Protocol, TypeVar

import grpc
import structlog
from google.protobuf.message import Message

from coordinator.errors import StoreFailed
from coordinator.guard import CALLER_KEY, address_of, metadata_of
from coordinator.journal import Journal
from coordinator.service import PeerService
from coordinator.store.interface import Store
from swarm.errors import DatabaseCorrupt, Rejected
from swarm.identity import Identity
from swarm.rpc.client import MAX_MESSAGE_BYTES, REASON_KEY, RUN_KEY, TLS_NAME
from swarm.rpc.v1 import coordinator_pb2 as pb
from swarm.rpc.v1.coordinator_pb2_grpc import PeerServiceStub
from swarm.tracing import carried

LEADER = "leader"
PASSED_ON_KEY = "swarm-replica"
LOOK_EVERY_S = 0.25
CALL_TIMEOUT_S = 20.0

log = structlog.get_logger(__name__)

M = TypeVar("M", bound=Message)


class Seat(Protocol):
    """The one writer's seat."""

    def try_take(self) -> bool:
        """Take the seat if it is free, or say whether it is still ours."""

    def leave(self) -> None:
        """Give it back."""


def replica_secret(identity: Identity) -> str:
    """What only a holder of the coordinator's key can name."""
    return hashlib.blake2b(b"swarm replica", key=identity.seed, digest_size=32).hexdigest()


def is_passed_on(context: Any, secret: str) -> bool:
    """Whether a call comes from another replica."""
    return hmac.compare_digest(metadata_of(context, PASSED_ON_KEY), secret)


class Replica:
    """This coordinator's role among the replicas: writer, or follower of the writer at `leader`."""

    def __init__(self, journal: Journal, store: Store, seat: Seat, address: str) -> None:
        self._journal = journal
        self._store = store
        self._seat = seat
        self._address = address
        self.leader = ""
        self.ready = asyncio.Event()
        journal.is_writer = False

    @property
    def is_writer(self) -> bool:
        """Whether this one writes."""
        return self._journal.is_writer

    async def run(self) -> None:
        """Follow the ledger and try for the seat, or hold it, until cancelled; then give it back."""
        try:
            while True:
                await self._step()
                await asyncio.sleep(LOOK_EVERY_S)
        finally:
            self._journal.is_writer = False
            await asyncio.to_thread(self._seat.leave)

    async def _step(self) -> None:
        seated = await asyncio.to_thread(self._seat.try_take)
        if self.is_writer and not seated:
            log.warning("writer_lost_its_seat")
            self._journal.is_writer = False
            self._journal.reload()
        try:
            if seated and not self.is_writer:
                await self._begin_to_write()
            elif not seated:
                await self._journal.follow()
                self.leader = (await asyncio.to_thread(self._store.value, LEADER) or b"").decode()
            if self._journal.run_id in self._journal.credits.run_ids:
                self.ready.set()
        except (DatabaseCorrupt, StoreFailed) as error:
            log.error("replica_step_failed", reason=error.message)

    async def _begin_to_write(self) -> None:
        """Read what the writer before has left, say where we are, and write from now on."""
        await self._journal.take_over()
        await asyncio.to_thread(self._store.set_value, LEADER, self._address.encode())
        self.leader, self._journal.is_writer = self._address, True
        log.info("writes_from_now_on", entries=len(self._journal.tree))


class ReplicaService(PeerService):
    """`PeerService` that passes on what only the writer can do."""

    channels: Channels
    _replica: Replica | None = None

    def join(self, seat: Seat, address: str) -> Replica:
        """Take part among the replicas, under an address at which they reach this one."""
        self._replica = Replica(self._journal, self._store, seat, address)
        return self._replica

    async def Announce(self, request: pb.AnnounceRequest, context: Any) -> pb.AnnounceResponse:  # noqa: N802
        """Admission and presence are the writer's."""
        return await self._by_writer("Announce", request, context, super().Announce)

    async def SubmitReport(self, request: pb.SubmitReportRequest, context: Any) -> pb.SubmitReportResponse:  # noqa: N802
        """Reports are written by the writer."""
        return await self._by_writer("SubmitReport", request, context, super().SubmitReport)

    async def SubmitReports(self, request: pb.SubmitReportsRequest, context: Any) -> pb.SubmitReportsResponse:  # noqa: N802
        """Likewise."""
        return await self._by_writer("SubmitReports", request, context, super().SubmitReports)

    async def RequestGrant(self, request: pb.RequestGrantRequest, context: Any) -> pb.RequestGrantResponse:  # noqa: N802
        """Grants are the writer's."""
        return await self._by_writer("RequestGrant", request, context, super().RequestGrant)

    async def RevokeKey(self, request: pb.RevokeKeyRequest, context: Any) -> pb.RevokeKeyResponse:  # noqa: N802
        """Revocations are written by the writer."""
        return await self._by_writer("RevokeKey", request, context, super().RevokeKey)

    async def SubmitAudit(self, request: pb.SubmitAuditRequest, context: Any) -> pb.SubmitAuditResponse:  # noqa: N802
        """Findings are written by the writer."""
        return await self._by_writer("SubmitAudit", request, context, super().SubmitAudit)

    async def SubmitEvaluation(  # noqa: N802
        self, request: pb.SubmitEvaluationRequest, context: Any
    ) -> pb.SubmitEvaluationResponse:
        """Held-out losses are written by the writer."""
        return await self._by_writer("SubmitEvaluation", request, context, super().SubmitEvaluation)

    async def AddCosignature(self, request: pb.AddCosignatureRequest, context: Any) -> pb.AddCosignatureResponse:  # noqa: N802
        """Cosignatures come together at the writer."""
        return await self._by_writer("AddCosignature", request, context, super().AddCosignature)

    async def GetCheckpoint(self, request: pb.GetCheckpointRequest, context: Any) -> pb.GetCheckpointResponse:  # noqa: N802
        """The checkpoint that witnesses sign is the writer's; any other is answered here."""
        if request.to_cosign or request.cosigned:
            return await self._by_writer("GetCheckpoint", request, context, super().GetCheckpoint)
        return await super().GetCheckpoint(request, context)

    async def GetProgress(self, request: pb.GetProgressRequest, context: Any) -> pb.GetProgressResponse:  # noqa: N802
        """The writer knows who is alive; without one, the ledger as far as it is known here."""
        try:
            return await self._by_writer("GetProgress", request, context, super().GetProgress)
        except Rejected:
            return await super().GetProgress(request, context)

    async def _by_writer(self, method: str, request: Message, context: Any, here: Callable[[Any, Any], Awaitable[M]]) -> M:
        replica, secret = self._replica, replica_secret(self._identity)
        if replica is not None and replica.is_writer:
            return await here(request, context)
        if replica is None or not replica.leader or is_passed_on(context, secret):
            raise Rejected("overloaded", "no replica writes at the moment")
        call = getattr(self.channels.stub(replica.leader), method)
        try:
            run = self._journal.run_id.hex()
            told = ((RUN_KEY, run), (PASSED_ON_KEY, secret), (CALLER_KEY, address_of(context)), *carried())
            answer: M = await call(request, timeout=CALL_TIMEOUT_S, metadata=told)
        except grpc.aio.AioRpcError as error:
            raise _refusal(error) from error
        return answer


class Channels:
    """A channel to the writer; replicas have the same certificate."""

    def __init__(self, certificate: bytes) -> None:
        self._certificate = certificate
        self._open: dict[str, tuple[grpc.aio.Channel, Any]] = {}

    def stub(self, address: str) -> Any:
        """The calls of the replica at `address`."""
        if address not in self._open:
            options = (("grpc.ssl_target_name_override", TLS_NAME), ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES))
            channel = grpc.aio.secure_channel(address, grpc.ssl_channel_credentials(self._certificate), options=options)
            self._open[address] = channel, PeerServiceStub(channel)
        return self._open[address][1]

    async def close(self) -> None:
        """Close what was opened."""
        for channel, _ in self._open.values():
            await channel.close(None)


@asynccontextmanager
async def channels(certificate: bytes) -> AsyncIterator[Channels]:
    """Channels that are closed in the end."""
    made = Channels(certificate)
    try:
        yield made
    finally:
        await made.close()


def _refusal(error: grpc.aio.AioRpcError) -> Rejected:
    """The writer's own refusal, or that it can't be reached."""
    metadata: Any = error.trailing_metadata() or {}
    reason = str(metadata.get(REASON_KEY, ""))
    if not reason:
        return Rejected("overloaded", "the replica that writes can't be reached")
    return Rejected(reason, "said by the replica that writes")
