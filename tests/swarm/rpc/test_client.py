"""The client against servers that are absent, false, or lie."""

from __future__ import annotations

import asyncio
import datetime
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

import grpc
import pytest

from coordinator.tls import Certificate, create
from swarm.errors import (
    CoordinatorUnreachable,
    FingerprintMismatch,
    LedgerInvalid,
    ManifestInvalid,
    ProtocolMismatch,
    Rejected,
)
from swarm.ledger import Checkpoint, origin_of, sign_checkpoint
from swarm.messages import JoinLink, seal
from swarm.protocol import MANY_REPORTS, Range, Version
from swarm.rpc.client import CoordinatorClient
from swarm.rpc.v1 import coordinator_pb2 as pb
from swarm.rpc.v1.coordinator_pb2_grpc import PeerServiceServicer, add_PeerServiceServicer_to_server
from swarm.rpc.v1.ledger_pb2 import Receipt
from swarm.rpc.v1.signed_pb2 import AdmissionToken, Grant
from tests.world import COORDINATOR, World, identity, manifest

WORLD = World()
ALICE, MALLORY = identity(0), identity(66)
CERTIFICATE = create(datetime.datetime.now(datetime.UTC))


class Liar(PeerServiceServicer):
    """A coordinator that sends what it shouldn't."""

    async def GetRun(self, request: pb.GetRunRequest, context: object) -> pb.GetRunResponse:  # noqa: N802
        return pb.GetRunResponse(run_id=WORLD.run_id, manifest=self.manifest(), coordinator=COORDINATOR.peer_id)

    def manifest(self) -> object:
        return WORLD.signed_manifest

    async def Announce(self, request: pb.AnnounceRequest, context: object) -> pb.AnnounceResponse:  # noqa: N802
        return pb.AnnounceResponse(admission=seal(MALLORY, AdmissionToken(run_id=WORLD.run_id)))

    async def SubmitReport(self, request: pb.SubmitReportRequest, context: object) -> pb.SubmitReportResponse:  # noqa: N802
        return pb.SubmitReportResponse(receipt=seal(COORDINATOR, Receipt(run_id=WORLD.run_id)))

    async def SubmitReports(self, request: pb.SubmitReportsRequest, context: object) -> pb.SubmitReportsResponse:  # noqa: N802
        false = pb.ReportOutcome(receipt=seal(COORDINATOR, Receipt(run_id=WORLD.run_id)))
        busy, refused = pb.ReportOutcome(reason="overloaded"), pb.ReportOutcome(reason="round_closed")
        return pb.SubmitReportsResponse(outcomes=[refused, false, busy, refused][: len(request.reports) or 1])

    async def RequestGrant(self, request: pb.RequestGrantRequest, context: object) -> pb.RequestGrantResponse:  # noqa: N802
        return pb.RequestGrantResponse(grant=seal(COORDINATOR, Grant(run_id=b"\0" * 32)))

    async def GetCredits(self, request: pb.GetCreditsRequest, context: object) -> pb.GetCreditsResponse:  # noqa: N802
        await asyncio.sleep(60)
        return pb.GetCreditsResponse()

    async def GetProgress(self, request: pb.GetProgressRequest, context: object) -> pb.GetProgressResponse:  # noqa: N802
        raise RuntimeError

    async def ListEntries(self, request: pb.ListEntriesRequest, context: object) -> AsyncIterator[pb.ListEntriesResponse]:  # noqa: N802
        yield pb.ListEntriesResponse(first=request.first + 1, entries=[b"x"])

    async def GetCheckpoint(self, request: pb.GetCheckpointRequest, context: object) -> pb.GetCheckpointResponse:  # noqa: N802
        return pb.GetCheckpointResponse(note=sign_checkpoint(MALLORY, Checkpoint(origin_of(WORLD.run_id), 1, b"\0" * 32)))


class Ahead(Liar):
    """Takes the client for one that speaks another protocol."""

    async def GetRun(self, request: pb.GetRunRequest, context: object) -> pb.GetRunResponse:  # noqa: N802
        answer = await super().GetRun(request, context)
        answer.protocol.major = 7
        return answer


class Swapper(Liar):
    """Serves another manifest than the link names."""

    def manifest(self) -> object:
        return World(manifest(name="other")).signed_manifest


@asynccontextmanager
async def lying(servicer: PeerServiceServicer, certificate: Certificate = CERTIFICATE, port: int = 0) -> AsyncIterator[JoinLink]:
    """A server over TLS, and the link that names it."""
    server = grpc.aio.server()
    add_PeerServiceServicer_to_server(servicer, server)
    port = server.add_secure_port(f"127.0.0.1:{port}", grpc.ssl_server_credentials([(certificate.key, certificate.certificate)]))
    await server.start()
    yield JoinLink("127.0.0.1", port, WORLD.run_id, certificate.fingerprint)
    await server.stop(0)


@asynccontextmanager
async def client_of(servicer: PeerServiceServicer, timeout_s: float = 10.0) -> AsyncIterator[CoordinatorClient]:
    """A client of a lying server."""
    async with lying(servicer) as link, await CoordinatorClient.connect(link, timeout_s) as client:
        yield client


async def test_fingerprint_mismatch() -> None:
    """A server with another key than the link pins is not talked to."""
    async with lying(Liar()) as link:
        with pytest.raises(FingerprintMismatch) as caught:
            await CoordinatorClient.connect(replace(link, fingerprint=b"\0" * 32))
        assert caught.value.exit_code == 12


async def test_key_changes_after_the_connection() -> None:
    """An open channel accepts the pinned certificate only, also when another server takes the address later."""
    async with lying(Liar()) as link:
        client = await CoordinatorClient.connect(link, timeout_s=3)
        await client.get_run()
    async with client, lying(Liar(), create(datetime.datetime.now(datetime.UTC)), link.port):
        with pytest.raises(CoordinatorUnreachable, match="CERTIFICATE_VERIFY_FAILED"):
            await client.checkpoint()


async def test_nothing_there(unused_tcp_port: int) -> None:
    """An address at which nothing listens is unreachable at once."""
    with pytest.raises(CoordinatorUnreachable) as caught:
        await CoordinatorClient.connect(JoinLink("127.0.0.1", unused_tcp_port, WORLD.run_id, b"\0" * 32))
    assert caught.value.exit_code == 11


async def test_silence_and_plain_text() -> None:
    """A server that never answers, or doesn't speak TLS, is unreachable within the timeout."""

    writers = []

    async def greet(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"220 mail\r\n")
        writers.append(writer)

    async def ignore(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers.append(writer)

    for handler in (greet, ignore):
        async with await asyncio.start_server(handler, "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            with pytest.raises(CoordinatorUnreachable):
                await CoordinatorClient.connect(JoinLink("127.0.0.1", port, WORLD.run_id, b"\0" * 32), timeout_s=0.3)
            writers.pop().transport.abort()


async def test_swapped_manifest() -> None:
    """A manifest whose hash is not the link's run id is refused."""
    async with client_of(Swapper()) as client:
        with pytest.raises(ManifestInvalid, match="not the run id"):
            await client.get_run()


async def test_false_promises() -> None:
    """A token, a receipt, a grant, a checkpoint or entries that don't hold are refused by the client itself."""
    async with client_of(Liar()) as client:
        with pytest.raises(Rejected, match="wrong_signer"):
            await client.announce(WORLD.announcement(ALICE))
        with pytest.raises(LedgerInvalid, match="receipt"):
            await client.submit_report(WORLD.round([ALICE], 0)[1][0])
        with pytest.raises(Rejected, match="wrong_run"):
            await client.request_grant(WORLD.grant_request(ALICE, 0, [ALICE]))
        with pytest.raises(LedgerInvalid, match="not signed by"):
            await client.checkpoint()
        with pytest.raises(LedgerInvalid, match="instead of 0"):
            [entry async for entry in client.entries()]


class Newer(Liar):
    """Lies about many reports at a time."""

    async def GetRun(self, request: pb.GetRunRequest, context: object) -> pb.GetRunResponse:  # noqa: N802
        answer = await super().GetRun(request, context)
        answer.protocol.CopyFrom(MANY_REPORTS.message)
        return answer


async def test_outcomes_of_many_reports_are_checked() -> None:
    """A false receipt is found among others, what comes after "busy" is to be sent again, a missing outcome is a lie."""
    requests = [pb.SubmitReportRequest(report=report) for report in WORLD.round([ALICE], 0)[1] * 4]
    async with client_of(Newer()) as client:
        refused, false = await client.submit_reports(requests)
        assert isinstance(refused, Rejected)
        assert refused.reason == "round_closed"
        assert isinstance(false, LedgerInvalid)
        with pytest.raises(LedgerInvalid, match="answered 4 of 5"):
            await client.submit_reports([*requests, requests[0]])


async def test_slow_and_broken_calls() -> None:
    """A call that takes too long or fails inside the server means: try again later."""
    async with client_of(Liar(), timeout_s=0.3) as client:
        with pytest.raises(CoordinatorUnreachable):
            await client.credits()
        with pytest.raises(CoordinatorUnreachable):
            await client.progress()


async def test_a_connection_that_is_given_up_by_another_call() -> None:
    """A call under way and one made later end with the error for a coordinator that is away, not cancelled or with gRPC's own."""
    async with lying(Liar()) as link:
        client = await CoordinatorClient.connect(link)
        waiting = asyncio.create_task(client.credits())
        await client.get_run()
        await client.close()
        with pytest.raises(CoordinatorUnreachable):
            await waiting
        with pytest.raises(CoordinatorUnreachable):
            await client.progress()


async def test_a_cancelled_call_is_cancelled() -> None:
    """Cancelling the caller is no failure of the coordinator."""
    async with lying(Liar()) as link, await CoordinatorClient.connect(link) as client:
        waiting = asyncio.create_task(client.credits())
        await client.get_run()
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting


async def test_a_coordinator_that_uses_another_protocol_is_not_followed() -> None:
    """The client goes by what it speaks itself, and says who has to be updated."""
    async with client_of(Ahead()) as client:
        with pytest.raises(ProtocolMismatch, match=r"speaks protocol 7\.0") as newer:
            await client.get_run()
        assert (newer.value.exit_code, "update with" in newer.value.hint) == (16, True)
    later = Range(Version(2, 0), Version(2, 1))
    async with lying(Liar()) as link, await CoordinatorClient.connect(link, spoken=later) as client:
        with pytest.raises(ProtocolMismatch, match=r"speaks protocol 1\.0") as older:
            await client.get_run()
        assert "operator" in older.value.hint
