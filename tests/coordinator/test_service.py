"""The eight calls over real gRPC with TLS and SQLite."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import grpc
import pytest

from coordinator.limits import Rate, RateLimiter
from coordinator.server import Coordinator
from swarm.clock import ManualClock
from swarm.credits import verify_ledger
from swarm.errors import CoordinatorUnreachable, NotAdmitted, Rejected, UnknownRun, VersionTooOld
from swarm.ledger import LedgerReader, verify_receipt
from swarm.merkle import verify_consistency
from swarm.messages import open_signed, seal
from swarm.protocol import MAX_REPORTS, Range, Version
from swarm.rpc.client import TLS_NAME, CoordinatorClient
from swarm.rpc.v1.coordinator_pb2 import TWIN_OTHER_COUNTS, TWIN_THIS_COUNTS, TWIN_UNSPECIFIED, SubmitReportRequest
from swarm.rpc.v1.coordinator_pb2_grpc import PeerServiceStub
from swarm.rpc.v1.ledger_pb2 import Receipt, Report
from swarm.rpc.v1.signed_pb2 import AdmissionToken, Grant, Signed
from tests.coordinator.conftest import Serve, connected
from tests.world import NOW_S, OTHER_ROOT, ROOT, World, identity, manifest

PEERS = [identity(number) for number in range(3)]
ALICE, BOB, CAROL = PEERS


async def announce_all(client: CoordinatorClient, world: World) -> None:
    """Admit three peers."""
    for peer in PEERS:
        await client.announce(world.announcement(peer))


async def test_a_whole_run(serve: Serve, world: World) -> None:
    """Peers join, report three rounds, get receipts, and anyone recomputes the same balances from the ledger."""
    clock = ManualClock(NOW_S)
    async with serve(clock) as coordinator, connected(coordinator) as client:
        run = await client.get_run()
        assert (run.manifest, run.coordinator) == (world.manifest, coordinator.identity.peer_id)
        await announce_all(client, world)
        receipts = []
        for number in range(3):
            proposal, reports = world.round(PEERS, number)
            receipts += [await client.submit_report(report, proposal) for report in reports]
        progress = await client.progress()
        assert (progress.confirmed_round, progress.state_root, progress.loss) == (2, ROOT, 2.5)
        assert progress.peers_alive == 3
        checkpoint, _, _ = await client.checkpoint()
        entries = [entry async for entry in client.entries(0, checkpoint.size)]
        served = {item.account: item for item in (await client.credits()).balances}
    state = verify_ledger(entries, run.coordinator)
    reader = LedgerReader()
    reader.extend(entries)
    reader.check_checkpoint(checkpoint)
    for receipt in receipts:
        reader.check_receipt(verify_receipt(receipt, run.coordinator))
    for account, balance in state.balances(world.run_id).items():
        assert int(served[account].final_flops) == balance.final_flops > 0
        assert int(served[account].verified_flops) == balance.verified_flops > 0


async def test_announce(serve: Serve, world: World) -> None:
    """An announcement gives a token, the other peers, the interval and the clock; exactly one peer starts the run."""
    clock = ManualClock(NOW_S)
    async with serve(clock) as coordinator, connected(coordinator) as client:
        first = await client.announce(world.announcement(ALICE, addresses=["/ip4/10.0.0.1"], round=3))
        second = await client.announce(world.announcement(BOB))
        again = await client.announce(world.announcement(ALICE, state="joining"))
        assert [item.genesis for item in (first, second, again)] == [True, False, True]
        assert [(item.peer_id, item.round, list(item.addresses)) for item in second.peers] == [
            (ALICE.peer_id, 3, ["/ip4/10.0.0.1"])
        ]
        token = open_signed(first.admission, AdmissionToken, coordinator.identity.peer_id, world.run_id)
        assert (token.peer_id, token.expires_at - token.issued_at) == (ALICE.peer_id, world.manifest.admission.valid_s)
        assert (first.interval_s, first.coordinator_time_s) == (10.0, NOW_S)
        assert len(coordinator.journal.tree) == 3
        clock.advance(46)
        later = await client.announce(world.announcement(BOB, NOW_S + 46))
        assert (later.genesis, len(later.peers)) == (True, 0)


async def test_a_token_says_whether_its_holder_is_new(serve: Serve) -> None:
    """Until as many contributions are confirmed as are all audited; the next announcement then gives another token."""
    world = World(manifest(audit={"rate": 0.0, "first": 2}))
    async with serve(ManualClock(NOW_S), world) as coordinator, connected(coordinator) as client:
        await announce_all(client, world)
        said = []
        for number in range(3):
            answer = await client.announce(world.announcement(ALICE, NOW_S + number + 1))
            said.append(open_signed(answer.admission, AdmissionToken, coordinator.identity.peer_id, world.run_id).newcomer)
            proposal, reports = world.round(PEERS, number)
            for report in reports:
                await client.submit_report(report, proposal)
        assert said == [True, True, False]


async def test_leaving(serve: Serve, world: World) -> None:
    """A peer that says good-bye is forgotten at once, and a replay doesn't bring it back."""
    async with serve(ManualClock(NOW_S)) as coordinator, connected(coordinator) as client:
        hello = world.announcement(ALICE)
        await client.announce(hello)
        assert not (await client.announce(world.announcement(ALICE, leaving=True))).genesis
        with pytest.raises(Rejected, match="replayed"):
            await client.announce(hello)
        answer = await client.announce(world.announcement(BOB))
        assert (answer.genesis, len(answer.peers)) == (True, 0)


async def test_two_machines_with_one_key(serve: Serve, world: World) -> None:
    """The later start counts whatever either clock says, both are told, and the other is named to nobody and ends nothing."""
    clock = ManualClock(NOW_S)

    def say(start: bytes, uptime_s: float, **changes: object) -> Signed:
        return world.announcement(ALICE, clock.wall_s() + changes.pop("error_s", 0), start=start, uptime_s=uptime_s, **changes)

    async with serve(clock) as coordinator, connected(coordinator) as client:
        assert (await client.announce(say(b"old", 0, addresses=["/ip4/10.0.0.1"], error_s=-60))).twin == TWIN_UNSPECIFIED
        clock.advance(5)
        assert (await client.announce(say(b"new", 1, addresses=["/ip4/10.0.0.2"], error_s=60))).twin == TWIN_UNSPECIFIED
        clock.advance(5)
        told = await client.announce(say(b"old", 10, error_s=-60))
        assert (told.twin, told.genesis) == (TWIN_OTHER_COUNTS, False)
        assert (await client.announce(say(b"new", 6, error_s=60))).twin == TWIN_THIS_COUNTS
        assert (await client.announce(say(b"old", 10, error_s=-60, leaving=True))).twin == TWIN_OTHER_COUNTS
        seen = await client.announce(world.announcement(BOB, clock.wall_s()))
        assert [list(peer.addresses) for peer in seen.peers] == [[]]
        clock.advance(40)
        assert (await client.announce(say(b"new", 46, error_s=60))).twin == TWIN_THIS_COUNTS
        clock.advance(6)
        assert (await client.announce(say(b"new", 52, error_s=60))).twin == TWIN_UNSPECIFIED
        clock.advance(46)
        assert (await client.announce(say(b"old", 200, error_s=-60))).twin == TWIN_UNSPECIFIED


async def test_a_look_with_the_key_of_a_peer_that_runs(serve: Serve, world: World) -> None:
    """`swarm doctor` beside a running peer: it is answered, and the peer neither hears of it nor is forgotten."""
    async with serve(ManualClock(NOW_S)) as coordinator, connected(coordinator) as client:
        await client.announce(world.announcement(ALICE, start=b"running", addresses=["/ip4/10.0.0.1"]))
        assert (await client.announce(world.announcement(ALICE, addresses=["/ip4/10.0.0.2"]))).twin == TWIN_UNSPECIFIED
        await client.announce(world.announcement(ALICE, leaving=True))
        seen = await client.announce(world.announcement(BOB))
        assert [list(peer.addresses) for peer in seen.peers] == [["/ip4/10.0.0.1"]]
        again = await client.announce(world.announcement(ALICE, start=b"running", uptime_s=9, round=1))
        assert again.twin == TWIN_UNSPECIFIED


@pytest.mark.parametrize("changes", [{"start": bytes(17)}, {"uptime_s": float("nan")}, {"uptime_s": -1.0}, {"uptime_s": 1e10}])
async def test_starts_that_can_not_be(changes: dict[str, object], serve: Serve, world: World) -> None:
    """A name that is too long, and no number of seconds."""
    async with serve(ManualClock(NOW_S)) as coordinator, connected(coordinator) as client:
        with pytest.raises(Rejected, match="malformed"):
            await client.announce(world.announcement(ALICE, **changes))


async def test_no_genesis_after_a_confirmed_round(serve: Serve, world: World) -> None:
    """Once a round is confirmed nobody starts the run again, and a joiner learns the round and its root."""
    async with serve(ManualClock(NOW_S)) as coordinator, connected(coordinator) as client:
        await announce_all(client, world)
        proposal, reports = world.round([ALICE], 0)
        await client.submit_report(reports[0], proposal)
        answer = await client.announce(world.announcement(identity(7)))
        assert (answer.genesis, answer.confirmed_round, answer.confirmed_root) == (False, 0, ROOT)


async def test_refused_announcements(serve: Serve, world: World) -> None:
    """A stale, a foreign and a forged announcement are refused, each with its reason, and nothing is written."""
    async with serve(ManualClock(NOW_S)) as coordinator, connected(coordinator) as client:
        with pytest.raises(Rejected, match=r"stale: .*901 s behind"):
            await client.announce(world.announcement(ALICE, NOW_S - 901))
        with pytest.raises(UnknownRun):
            await client.announce(World(manifest(name="other")).announcement(ALICE))
        forged = world.announcement(ALICE)
        forged.signature = b"x" * 64
        with pytest.raises(Rejected, match="bad_signature"):
            await client.announce(forged)
        with pytest.raises(Rejected, match="bad_signature"):
            await client.announce(Signed())
        with pytest.raises(Rejected, match="wrong_kind"):
            await client.announce(world.commit(ALICE, 0))
        assert len(coordinator.journal.tree) == 1
        reasons = coordinator.metrics.calls.rejected_messages_total
        assert reasons.labels("bad_signature")._value.get() == 2


async def test_admission_rules_as_errors(serve: Serve) -> None:
    """A key that isn't on the list, and a client that is too old, get the error that the command line explains."""
    world = World(manifest(admission={"kind": "allow_list", "allow": [ALICE.peer_id]}, min_client_version="9.0.0"))
    async with serve(ManualClock(NOW_S), world) as coordinator, connected(coordinator) as client:
        with pytest.raises(VersionTooOld) as old:
            await client.announce(world.announcement(ALICE))
        assert old.value.exit_code == 15
        await client.announce(world.announcement(ALICE, client_version="9.0.0"))
        with pytest.raises(NotAdmitted) as refused:
            await client.announce(world.announcement(BOB, client_version="9.0.0"))
        assert refused.value.exit_code == 14


async def test_reports_are_idempotent(serve: Serve, world: World) -> None:
    """The same report twice gives the same receipt and is credited once; another for the same round is refused."""
    async with serve(ManualClock(NOW_S)) as coordinator, connected(coordinator) as client:
        await announce_all(client, world)
        proposal, reports = world.round([ALICE], 0)
        first = await client.submit_report(reports[0], proposal)
        size = len(coordinator.journal.tree)
        assert await client.submit_report(reports[0]) == first
        assert len(coordinator.journal.tree) == size
        other = world.report(ALICE, world.commit(ALICE, 0), proposal, OTHER_ROOT)
        with pytest.raises(Rejected, match="already_reported"):
            await client.submit_report(other, proposal)
        assert (await client.credits(ALICE.peer_id)).balances[0].rounds == 1


async def test_refused_reports(serve: Serve, world: World) -> None:
    """Reports by strangers, of other runs, with others' commits, without proposal or too large are refused; late ones are not."""
    async with serve(ManualClock(NOW_S + 1e7)) as coordinator, connected(coordinator) as client:
        for peer in PEERS:
            await client.announce(world.announcement(peer, NOW_S + 1e7))
        stranger = identity(50)
        proposal, reports = world.round([stranger], 0)
        with pytest.raises(NotAdmitted):
            await client.submit_report(reports[0], proposal)
        proposal, reports = world.round(PEERS, 0)
        with pytest.raises(Rejected, match="unknown_proposal"):
            await client.submit_report(reports[0])
        other = World(manifest(name="other"))
        foreign, foreign_reports = other.round([ALICE], 0)
        with pytest.raises(UnknownRun):
            await client.submit_report(foreign_reports[0], foreign)
        stolen = seal(ALICE, Report.FromString(reports[1].payload))
        with pytest.raises(Rejected, match="wrong_signer"):
            await client.submit_report(stolen, proposal)
        huge = world.report(ALICE, world.commit(ALICE, 0), proposal, proposal_hash=b"x" * 30_000)
        with pytest.raises(Rejected, match="too_large"):
            await client.submit_report(huge, proposal)
        size = len(coordinator.journal.tree)
        await client.submit_report(reports[0], proposal)
        assert len(coordinator.journal.tree) == size + 2


async def test_many_reports_in_one_call(serve: Serve, world: World) -> None:
    """Each of one peer's reports has its own outcome, in order: a receipt, the same once more, or why it is refused."""
    async with serve(ManualClock(NOW_S)) as coordinator, connected(coordinator) as client:
        await announce_all(client, world)
        asked = []
        for number in range(4):
            proposal, reports = world.round([ALICE], number)
            asked.append(SubmitReportRequest(report=reports[0], proposal=proposal))
        proposal, _ = world.round([ALICE], 1)
        other = world.report(ALICE, world.commit(ALICE, 1), proposal, OTHER_ROOT)
        forged = Signed.FromString(asked[2].report.SerializeToString())
        forged.signature = bytes(64)
        unheard = SubmitReportRequest(report=asked[3].report)
        wanted = [asked[0], asked[1], SubmitReportRequest(report=other), SubmitReportRequest(report=forged), asked[2], unheard]
        outcomes = await client.submit_reports(wanted)
        assert [str(each) if isinstance(each, Rejected) else "receipt" for each in outcomes] == [
            "receipt",
            "receipt",
            "already_reported: round 1",
            "bad_signature: application/vnd.swarm.report.v1",
            "receipt",
            "unknown_proposal: round 3",
        ]
        assert await client.submit_reports(asked[:3]) == [outcomes[0], outcomes[1], outcomes[4]]
        indices = [Receipt.FromString(each.payload).ledger_index for each in outcomes if isinstance(each, Signed)]
        assert indices == sorted(indices)
        assert (await client.credits(ALICE.peer_id)).balances[0].rounds == 3


async def test_many_reports_are_of_one_admitted_peer(serve: Serve, world: World) -> None:
    """A call with nothing in it, with too much, with two peers' reports or with a stranger's is refused whole."""
    async with serve(ManualClock(NOW_S)) as coordinator, connected(coordinator) as client:
        await announce_all(client, world)
        size = len(coordinator.journal.tree)
        proposal, reports = world.round(PEERS, 0)
        requests = [SubmitReportRequest(report=report, proposal=proposal) for report in reports]
        with pytest.raises(Rejected, match="wrong_signer"):
            await client.submit_reports(requests)
        with pytest.raises(Rejected, match="bad_signature"):
            await client.submit_reports([])
        with pytest.raises(Rejected, match="at most 64"):
            await client.submit_reports(requests[:1] * (MAX_REPORTS + 1))
        _, strange = world.round([identity(50)], 0)
        with pytest.raises(NotAdmitted):
            await client.submit_reports([SubmitReportRequest(report=strange[0])] * 2)
        assert len(coordinator.journal.tree) == size


async def test_an_older_coordinator_gets_reports_one_by_one(serve: Serve, world: World) -> None:
    """Without the newer call in common the reports go as before."""
    async with serve(ManualClock(NOW_S)) as coordinator:
        coordinator.journal.spoken = Range(Version(1, 0), Version(1, 1))
        async with connected(coordinator) as client:
            await announce_all(client, world)
            rounds = [world.round([ALICE], number) for number in range(2)]
            outcomes = await client.submit_reports(
                [SubmitReportRequest(report=reports[0], proposal=proposal) for proposal, reports in rounds]
            )
            assert all(isinstance(outcome, Signed) for outcome in outcomes)
            labels = {"method": "SubmitReport", "code": "OK"}
            assert coordinator.metrics.registry.get_sample_value("swarm_coordinator_calls_total", labels) == 2


async def test_message_limit(serve: Serve, world: World) -> None:
    """A message above 4 MiB is cut off before it is read."""
    async with serve(ManualClock(NOW_S)) as coordinator, connected(coordinator) as client:
        await client.get_run()
        huge = Signed(kind="x", payload=b"\0" * (5 << 20), signer=ALICE.peer_id, signature=b"s" * 64)
        with pytest.raises(Rejected, match="larger than max"):
            await client.announce(huge)


async def test_grants(serve: Serve, world: World) -> None:
    """A minority goes on only when the rest of the roster is silent, and only one minority does."""
    clock = ManualClock(NOW_S)
    async with serve(clock) as coordinator, connected(coordinator) as client:
        await announce_all(client, world)
        asked = world.grant_request(ALICE, 0, PEERS)
        refused = await client.request_grant(asked)
        assert not refused.HasField("grant")
        assert refused.retry_after_s > 0
        assert refused.reason.startswith("others_alive")
        clock.advance(16)
        granted = await client.request_grant(asked)
        assert open_signed(granted.grant, Grant, coordinator.identity.peer_id).present == [ALICE.peer_id]
        assert (await client.request_grant(asked)).grant == granted.grant
        with pytest.raises(Rejected, match="already_granted"):
            await client.request_grant(world.grant_request(BOB, 0, PEERS))
        with pytest.raises(NotAdmitted):
            await client.request_grant(world.grant_request(identity(8), 0, PEERS))


async def test_entries_are_streamed_in_pieces(serve: Serve, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the bounds per call and message, the client gets every entry once and in order."""
    monkeypatch.setattr("coordinator.service.ENTRIES_PER_CALL", 5)
    monkeypatch.setattr("coordinator.service.ENTRIES_PER_MESSAGE_BYTES", 1500)
    async with serve(ManualClock(NOW_S)) as coordinator, connected(coordinator) as client:
        await announce_all(client, world)
        for number in range(3):
            proposal, reports = world.round([ALICE], number)
            await client.submit_report(reports[0], proposal)
        entries = [entry async for entry in client.entries()]
        assert len(entries) == len(coordinator.journal.tree) == 13
        assert [entry async for entry in client.entries(3, 9)] == entries[3:9]
        assert [entry async for entry in client.entries(99)] == []
        verify_ledger(entries, coordinator.identity.peer_id)


async def test_checkpoints_are_consistent(serve: Serve, world: World) -> None:
    """A later checkpoint proves that it extends an earlier one."""
    async with serve(ManualClock(NOW_S)) as coordinator, connected(coordinator) as client:
        await client.announce(world.announcement(ALICE))
        old, _, none = await client.checkpoint()
        await client.announce(world.announcement(BOB))
        new, _, proof = await client.checkpoint(old.size)
        assert none == []
        assert verify_consistency(old.size, old.root, new.size, new.root, proof)
        with pytest.raises(Rejected, match="malformed"):
            await client.checkpoint(99)


async def test_rate_limits(serve: Serve, world: World) -> None:
    """A key that asks too often is told to slow down; others are not slowed."""
    async with serve(ManualClock(NOW_S)) as coordinator, connected(coordinator) as client:
        await announce_all(client, world)
        proposal, reports = world.round(PEERS, 0)
        guard = coordinator.guard
        guard._keys = RateLimiter(Rate(per_s=1, burst=2))
        for _ in range(2):
            await client.submit_report(reports[0], proposal)
        with pytest.raises(CoordinatorUnreachable, match="slow down"):
            await client.submit_report(reports[0], proposal)
        await client.submit_report(reports[1], proposal)
        guard._addresses = RateLimiter(Rate(per_s=1, burst=1))
        await client.progress()
        with pytest.raises(CoordinatorUnreachable, match="slow down"):
            await client.progress()


async def raw_channel(coordinator: Coordinator) -> grpc.aio.Channel:
    """A channel without our client."""
    certificate = (Path(coordinator.state_folder) / "tls.crt").read_bytes()
    options = (("grpc.ssl_target_name_override", TLS_NAME),)
    return grpc.aio.secure_channel(coordinator.link.address, grpc.ssl_channel_credentials(certificate), options=options)


async def test_methods_outside_the_table(serve: Serve) -> None:
    """A method that the service doesn't have is not implemented, whatever it is called."""
    async with serve(ManualClock(NOW_S)) as coordinator:
        channel = await raw_channel(coordinator)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await channel.unary_unary("/swarm.v1.AdminService/Drop")(b"")
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
        await channel.close()


async def test_health(serve: Serve) -> None:
    """The standard health service answers."""
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    async with serve(ManualClock(NOW_S)) as coordinator:
        channel = await raw_channel(coordinator)
        answer = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
        await channel.close()


async def test_private_details_are_not_told(serve: Serve, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """An unexpected failure is answered generically."""
    async with serve(ManualClock(NOW_S)) as coordinator:

        def fail(*_: object) -> None:
            raise RuntimeError("secret")

        monkeypatch.setattr(coordinator.journal.credits, "progress", fail)
        channel = await raw_channel(coordinator)
        from swarm.rpc.v1.coordinator_pb2 import GetProgressRequest

        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await PeerServiceStub(channel).GetProgress(GetProgressRequest())
        assert caught.value.code() is grpc.StatusCode.INTERNAL
        assert "secret" not in (caught.value.details() or "")
        await channel.close()


async def test_unsigned_writes_are_refused(serve: Serve) -> None:
    """A write without a signature doesn't get past the gate."""
    async with serve(ManualClock(NOW_S)) as coordinator:
        channel = await raw_channel(coordinator)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await PeerServiceStub(channel).SubmitReport(SubmitReportRequest())
        assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
        await channel.close()


async def test_many_at_once(serve: Serve, world: World) -> None:
    """A hundred reports at once are all receipted, each once."""
    async with serve(ManualClock(NOW_S)) as coordinator, connected(coordinator) as client:
        await announce_all(client, world)
        started_s = time.monotonic()
        rounds = [world.round(PEERS, number) for number in range(34)]
        calls = [client.submit_report(report, proposal) for proposal, reports in rounds for report in reports]
        receipts = await asyncio.gather(*calls)
        places = {verify_receipt(receipt, coordinator.identity.peer_id).ledger_index for receipt in receipts}
        assert len(places) == 102
        assert time.monotonic() - started_s < 30
        assert coordinator.journal.credits.progress(world.run_id).confirmed_round == 33
