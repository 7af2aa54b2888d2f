"""Traces of a real coordinator and a real client, as a collector receives them by OTLP."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import pytest

from coordinator.errors import CATALOGUE
from coordinator.guard import FOLLOWED
from swarm.clock import ManualClock
from swarm.errors import Rejected
from swarm.rpc.client import CoordinatorClient
from swarm.rpc.v1.coordinator_pb2 import AnnounceRequest, GetProgressRequest, GetRunRequest
from swarm.rpc.v1.signed_pb2 import Signed
from swarm.tracing import carried, span, started
from tests.collector import Collector, collecting
from tests.coordinator.conftest import Serve, connected
from tests.world import NOW_S, World, identity

PEERS = [identity(number) for number in range(3)]
ALICE, BOB, _ = PEERS
SAMPLED = "00-" + "ab" * 16 + "-" + "cd" * 8 + "-01"
NEVER = {"OTEL_TRACES_SAMPLER": "parentbased_always_off"}  # what is recorded nevertheless, somebody else has decided


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    """A collector to which every tracer that begins now sends everything."""
    with collecting() as made:
        for name, value in made.environment.items():
            monkeypatch.setenv(name, value)
        yield made


async def ask(client: CoordinatorClient, traceparent: str) -> None:
    """An anonymous question with some trace context in its metadata."""
    await client._stub.GetProgress(GetProgressRequest(), timeout=10, metadata=(("traceparent", traceparent),))


async def announce(client: CoordinatorClient, announcement: Signed, traceparent: str = SAMPLED) -> None:
    """An announcement likewise."""
    request = AnnounceRequest(announcement=announcement)
    await client._stub.Announce(request, timeout=10, metadata=(("traceparent", traceparent),))


async def test_a_round_is_one_trace_from_the_peer_to_the_commit(serve: Serve, world: World, collector: Collector) -> None:
    """The report of a peer that the operator has named contains the coordinator's call, and that its checks and its commit."""
    named = ",".join(peer.peer_id for peer in PEERS)
    with started(True, "swarm-peer"):
        async with serve(ManualClock(NOW_S), traces=True, traces_of=named) as coordinator, connected(coordinator) as client:
            for peer in PEERS:
                await client.announce(world.announcement(peer))
            proposal, reports = world.round(PEERS, 0)
            with span("report", {"swarm.round": 0}):
                await client.submit_report(reports[0], proposal)
    (report,) = collector.named("report", "swarm-peer")
    (call,) = collector.named("SubmitReport", "swarm-coordinator")
    assert report.attributes == {"swarm.round": 0}
    assert call.inside(report)
    assert call.span.kind == call.span.SPAN_KIND_SERVER
    assert (call.attributes["rpc.method"], call.attributes["rpc.grpc.status_code"]) == ("SubmitReport", 0)
    checks, commits = (
        [each for each in collector.named(name, "swarm-coordinator") if each.inside(call)]
        for name in ("check_signatures", "group_commit")
    )
    assert [each.attributes["swarm.signatures"] for each in checks] == [3, 1]
    assert [each.attributes for each in commits] == [{"swarm.group_events": 1, "swarm.entries": 2}]
    assert all(
        call.span.start_time_unix_nano <= each.span.start_time_unix_nano <= each.span.end_time_unix_nano
        for each in (*checks, *commits)
    )


async def test_refusals_are_told_by_code_and_reason(serve: Serve, world: World, collector: Collector) -> None:
    """A span says with which status and why a call was refused, and nothing of who asked."""
    async with serve(ManualClock(NOW_S), traces=True) as coordinator, connected(coordinator) as client:
        with pytest.raises(Rejected):
            await client.announce(world.announcement(ALICE, NOW_S - 10_000))
        async for _ in client.entries():
            pass
    (refused,), (streamed, *_) = collector.named("Announce"), collector.named("ListEntries")
    status = CATALOGUE["stale"].status.value[0]
    assert (refused.attributes["swarm.reason"], refused.attributes["rpc.grpc.status_code"]) == ("stale", status)
    assert streamed.attributes["rpc.grpc.status_code"] == 0
    told = "".join(str(each.span) for each in collector.spans)
    assert ALICE.peer_id not in told
    assert "127.0.0.1" not in told


async def test_a_strangers_context_decides_nothing(
    serve: Serve, world: World, collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever a caller says that it records, or however long it is, the coordinator answers, and records by its own choice."""
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", NEVER["OTEL_TRACES_SAMPLER"])
    forged = world.announcement(BOB)
    forged.signer = ALICE.peer_id
    async with (
        serve(ManualClock(NOW_S), traces=True, traces_of=ALICE.peer_id) as coordinator,
        connected(coordinator) as client,
    ):
        for context in (SAMPLED, SAMPLED * 40, "", "00-" + "0" * 32 + "-" + "0" * 16 + "-01", "ff" + SAMPLED[2:], SAMPLED + "-x"):
            await ask(client, context)
        await announce(client, world.announcement(BOB))
        with pytest.raises(Exception, match="signature"):
            await announce(client, forged)
        await announce(client, world.announcement(ALICE))
    (followed,) = collector.named("Announce")
    assert {each.span.trace_id for each in collector.spans} == {b"\xab" * 16}
    assert [each.name for each in collector.spans if each.inside(followed)] == ["check_signatures", "group_commit"]
    assert collector.named("GetProgress") == []


async def test_a_strangers_trace_is_linked_to(serve: Serve, collector: Collector) -> None:
    """A call of somebody whom the operator hasn't named has a trace of its own, which names the caller's."""
    async with serve(ManualClock(NOW_S), traces=True) as coordinator, connected(coordinator) as client:
        await ask(client, SAMPLED)
        await ask(client, SAMPLED[:-1])
    call, broken = collector.named("GetProgress")
    assert (call.span.parent_span_id, call.span.trace_id == b"\xab" * 16) == (b"", False)
    assert [link.trace_id for link in call.span.links] == [b"\xab" * 16]
    assert not broken.span.links


async def test_what_a_named_peer_has_signed_records_only_so_much(
    serve: Serve, world: World, collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Others can send it again; so many traces of one peer are gone on with at once, and then none for a while."""
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", NEVER["OTEL_TRACES_SAMPLER"])
    async with (
        serve(ManualClock(NOW_S), traces=True, traces_of=ALICE.peer_id) as coordinator,
        connected(coordinator) as client,
    ):
        again = world.announcement(ALICE)
        for _ in range(FOLLOWED.burst + 10):
            await announce(client, again)
    assert len(collector.named("Announce")) == FOLLOWED.burst


async def test_a_collector_that_is_away_costs_nothing(
    serve: Serve, world: World, monkeypatch: pytest.MonkeyPatch, collector: Collector
) -> None:
    """Calls are answered as ever, and spans are lost."""
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1")
    async with serve(ManualClock(NOW_S), traces=True) as coordinator, connected(coordinator) as client:
        await client.announce(world.announcement(ALICE))
        assert (await client.progress()).peers_alive == 1
    assert collector.spans == []


async def test_nothing_is_traced_unless_asked_for(serve: Serve, world: World, collector: Collector) -> None:
    """The variables alone change nothing, and calls carry no context."""
    async with serve(ManualClock(NOW_S)) as coordinator, connected(coordinator) as client:
        with span("report"):
            assert carried() == ()
            await client.announce(world.announcement(ALICE))
            await client._stub.GetRun(GetRunRequest(), timeout=10)
    assert collector.spans == []


def test_nothing_is_imported_unless_asked_for() -> None:
    """Neither the command line nor coordinator or client load OpenTelemetry."""
    modules = "coordinator.server, swarm.rpc.client, swarm.cli.main, swarm.tracing"
    code = f"import sys, {modules}; print([name for name in sys.modules if name.startswith('opentelemetry')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == "[]"


async def test_one_in_a_hundred_by_default(collector: Collector, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless the variables say otherwise; what belongs to a trace shares its fate."""
    monkeypatch.delenv("OTEL_TRACES_SAMPLER")
    chosen, fates = 0, set()
    with started(True, "swarm-peer"):
        for _ in range(3000):
            with span("round"):
                name = carried()
                with span("training"):
                    inner = carried()
                assert name is not None
                assert inner is not None
                sampled, same = (bool(int(told[0][1][-2:], 16) & 1) for told in (name, inner))
                fates.add((sampled, same))
                chosen += sampled
    assert fates == {(False, False), (True, True)}
    assert len(collector.named("round")) == len(collector.named("training")) == chosen
    assert 3 <= chosen <= 90
