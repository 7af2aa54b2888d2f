"""What an admitted but hostile peer, and a stranger, can't do over real P2P."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from peer.network.node import Node, PeerFailure
from peer.network.p2pd import P2pdOptions
from peer.network.transfer import FETCH_STREAM
from peer.rounds.post import DELIVER, SYNC
from swarm.errors import Rejected
from swarm.identity import Identity
from swarm.messages import JoinLink, seal
from swarm.rpc.client import CoordinatorClient
from swarm.rpc.v1.coordinator_pb2 import Announcement
from swarm.rpc.v1.peer_pb2 import Ack, Delivery, FetchRequest, SyncReply, SyncRequest
from swarm.rpc.v1.signed_pb2 import AnnouncedCommit, Ballot, Commit, EvidenceNotice, JoinRequest, Result, Seal, Signed, Tree
from tests.peer_network import loopback
from tests.runs import LiveRun, agreed_roots
from tests.waiting import eventually

pytestmark = pytest.mark.timeout(300)

MIB = 1 << 20
ROOT = b"\x01" * 32


class Unlimited(P2pdOptions):
    """A libp2p daemon that sends messages of any size."""

    def arguments(self, binary: Path, control: str) -> list[str]:
        kept = [item for item in super().arguments(binary, control) if not item.startswith("-persistentConnMaxMsgSize")]
        return [*kept, f"-persistentConnMaxMsgSize={64 * MIB}"]


@dataclass(frozen=True)
class Attacker:
    """A key, a node, and the honest peers that it has connected to."""

    identity: Identity
    node: Node
    run_id: bytes
    admission: Signed | None
    victims: tuple[str, ...]

    async def deliver(self, raw: bytes) -> str:
        """Deliver bytes to the first victim; the reason of its refusal, empty if it took them."""
        return Ack.FromString(await self.node.call(self.victims[0], DELIVER, raw, 20)).rejected

    async def sync(self) -> SyncReply:
        """Ask the first victim where the run stands."""
        request = SyncRequest(run_id=self.run_id, admission=self.admission)
        return SyncReply.FromString(await self.node.call(self.victims[0], SYNC, request.SerializeToString(), 20))

    def notice(self, round_index: int, size_bytes: int = 1000) -> Delivery:
        """A claim to have evidence against a victim."""
        accused = self.victims[1]
        body = EvidenceNotice(run_id=self.run_id, round=round_index, hash=ROOT, size_bytes=size_bytes, accused=accused)
        return Delivery(evidence=seal(self.identity, body))

    def commit(self, number: int, signer: Identity | None = None, **changes: object) -> Delivery:
        """A commit that breaks no rule, with changes that may."""
        values = {"run_id": self.run_id, "round": number, "base_root": ROOT, "codec": "fp16", "loss": 2.0} | changes
        return Delivery(commit=AnnouncedCommit(commit=seal(signer or self.identity, Commit(**values))))


@pytest.fixture
async def attackers(two_peer_run: LiveRun, tmp_path: Path) -> AsyncIterator[Callable[..., object]]:
    """Makes attackers, admitted by the coordinator or not, connected to the honest peers."""
    async with AsyncExitStack() as stack:

        async def make(*, admitted: bool = True, unlimited: bool = False) -> Attacker:
            identity = Identity.generate()
            path = tmp_path / f"{identity.peer_id}.key"
            identity.save(path)
            options = loopback(path)
            node = await Node.start(Unlimited(**vars(options)) if unlimited else options)
            stack.push_async_callback(node.close)
            link = JoinLink.parse(two_peer_run.link)
            told = Announcement(
                run_id=link.run_id, addresses=node.addresses, issued_at=int(time.time()), client_version="0.1.0", reachable=True
            )
            async with await CoordinatorClient.connect(link) as client:
                answer = await client.announce(seal(identity if admitted else Identity.generate(), told))
            honest = [status["peer_id"] for status in await two_peer_run.statuses()]
            for peer in answer.peers:
                node.learn(peer.peer_id, peer.addresses)
            for peer_id in honest:
                await node.connect(peer_id)
            return Attacker(identity, node, link.run_id, answer.admission if admitted else None, tuple(honest))

        yield make


async def rejected(two_peer_run: LiveRun) -> dict[str, float]:
    """The victim's counters of rejected messages by reason."""
    async with httpx.AsyncClient() as client:
        text = (await client.get(f"http://{two_peer_run.metrics_urls[1]}/metrics", timeout=20)).text
    families = {family.name: family for family in text_string_to_metric_families(text)}
    samples = families["swarm_peer_rejected_messages"].samples
    return {sample.labels["reason"]: sample.value for sample in samples if sample.name.endswith("_total")}


async def expect_counted(two_peer_run: LiveRun, before: dict[str, float], *reasons: str) -> None:
    """Each reason has been counted since, and named in the log with its sender."""

    async def counted() -> bool:
        now = await rejected(two_peer_run)
        return all(now.get(reason, 0) > before.get(reason, 0) for reason in reasons)

    await eventually(counted, f"counting {reasons}", 30)


async def expect_training(two_peer_run: LiveRun) -> None:
    """The victims are the same processes, finish further rounds with contributions of both, and agree."""
    before = await two_peer_run.statuses()

    async def further() -> bool:
        now = await two_peer_run.statuses()
        return all(there["rounds"] >= here["rounds"] + 2 for here, there in zip(before, now, strict=True))

    await eventually(further, "further rounds", 90)
    assert [status["pid"] for status in await two_peer_run.statuses()] == two_peer_run.pids
    agreed_roots(two_peer_run.histories)


async def answer_of(reader: asyncio.StreamReader, timeout_s: float = 20) -> bytes:
    """What comes before the other side closes or resets the stream."""
    try:
        return await asyncio.wait_for(reader.read(), timeout_s)
    except ConnectionResetError:
        return b""


async def test_deliveries_that_break_a_rule_are_rejected_by_name(two_peer_run: LiveRun, attackers) -> None:
    """Malformed, oversized, forged, foreign, stale and early messages get their reason, are counted, and change nothing."""
    mallory: Attacker = await attackers()
    before = await rejected(two_peer_run)
    present = (await mallory.sync()).round
    forged = mallory.commit(present)
    forged.commit.commit.signature = bytes(64)
    borrowed = mallory.commit(present)
    borrowed.commit.commit.signer = mallory.victims[1]
    in_their_name = mallory.notice(present).evidence
    in_their_name.signer = mallory.victims[1]
    kind, name = "application/vnd.swarm.result.v1", mallory.identity.peer_id
    huge = Signed(kind=kind, payload=bytes(1 << 17), signer=name, signature=bytes(64))
    parts = {"weight": 4, "tokens": 4 * 32, "part_count": 1, "parts_root": ROOT}
    sent = [
        ("malformed", b"\xff\xff\xff"),
        ("malformed", b""),
        ("too_large", Delivery(result=huge)),
        ("wrong_kind", Delivery(result=mallory.commit(present).commit.commit)),
        ("bad_signature", forged),
        ("bad_signature", borrowed),
        ("bad_peer_id", Delivery(seal=Signed(kind="application/vnd.swarm.seal.v1", signer="nobody", signature=bytes(64)))),
        ("not_admitted", mallory.commit(present, signer=Identity.generate())),
        ("wrong_run", mallory.commit(present, run_id=b"\x09" * 32)),
        ("stale", mallory.commit(0)),
        ("too_early", mallory.commit(present + 1000)),
        ("bad_weight", mallory.commit(present, **parts | {"weight": 1 << 40, "tokens": 32 << 40})),
        ("bad_tokens", mallory.commit(present, **parts | {"tokens": 7})),
        ("bad_numbers", mallory.commit(present, loss=float("nan"))),
        ("wrong_codec", mallory.commit(present, codec="gzip")),
        ("wrong_parts", mallory.commit(present, **parts)),
        ("wrong_base", mallory.commit(present, base_root=b"short")),
        ("not_in_roster", mallory.notice(present)),
        ("malformed", mallory.notice(present, size_bytes=1 << 40)),
        ("bad_signature", Delivery(evidence=in_their_name)),
    ]
    answers = []
    for reason, message in sent:
        raw = message if isinstance(message, bytes) else message.SerializeToString()
        answers.append((reason, await mallory.deliver(raw)))
    assert [given for _, given in answers] == [reason for reason, _ in answers]
    await expect_counted(two_peer_run, before, *{reason for reason, _ in sent})
    assert mallory.identity.peer_id in (two_peer_run.peer_folders[0] / "log").read_text()
    await expect_training(two_peer_run)


async def test_replayed_messages_change_nothing(two_peer_run: LiveRun, attackers) -> None:
    """Honest peers' own messages of earlier rounds are stale when somebody else sends them again."""
    mallory: Attacker = await attackers()

    async def with_proposal() -> SyncReply | None:
        answer = await mallory.sync()
        return answer if answer.HasField("proposal") and answer.results else None

    reply = await eventually(with_proposal, "a proposal", 30)
    assert reply is not None
    old_proposal, old_result = Delivery(), Delivery(result=reply.results[0])
    old_proposal.proposal.proposal.CopyFrom(reply.proposal)
    assert await mallory.deliver(old_result.SerializeToString()) in ("", "stale")

    async def gone() -> bool:
        return (await mallory.sync()).round > reply.round + 10

    await eventually(gone, "ten more rounds", 120)
    before = await rejected(two_peer_run)
    for _ in range(3):
        assert await mallory.deliver(old_proposal.SerializeToString()) == "stale"
        assert await mallory.deliver(old_result.SerializeToString()) == "stale"
    await expect_counted(two_peer_run, before, "stale")
    await expect_training(two_peer_run)


async def test_an_outsider_can_not_steer_a_round(two_peer_run: LiveRun, attackers) -> None:
    """Commits, seals and results of an admitted peer that isn't in the roster never get into a round."""
    mallory: Attacker = await attackers()
    for _ in range(5):
        reply = await mallory.sync()
        base = reply.results[0] and Result.FromString(reply.results[0].payload).state.root
        for ahead in range(3):
            number = reply.round + ahead
            await mallory.deliver(mallory.commit(number, base_root=base).SerializeToString())
            message = Seal(run_id=mallory.run_id, round=number, ballot=Ballot(term=50, amendment=50), reason="leader_silent")
            await mallory.deliver(Delivery(seal=seal(mallory.identity, message)).SerializeToString())
            claim = Result(run_id=mallory.run_id, round=number, proposal_hash=ROOT, state=Tree(root=ROOT, size_bytes=1))
            await mallory.deliver(Delivery(result=seal(mallory.identity, claim)).SerializeToString())
    await expect_training(two_peer_run)
    reply = await mallory.sync()
    assert mallory.identity.peer_id not in {member.peer_id for member in reply.roster}


async def test_a_joiner_with_a_borrowed_admission_stays_outside(two_peer_run: LiveRun, attackers) -> None:
    """An admission opens the door only for the key that it names."""
    mallory: Attacker = await attackers()
    before = await rejected(two_peer_run)
    thief = Identity.generate()
    request = JoinRequest(run_id=mallory.run_id, admission=mallory.admission, addresses=["/ip4/127.0.0.1/tcp/1"])
    assert await mallory.deliver(Delivery(join_request=seal(thief, request)).SerializeToString()) == "wrong_signer"
    forged = seal(thief, JoinRequest(run_id=mallory.run_id, admission=seal(thief, JoinRequest(run_id=mallory.run_id))))
    assert await mallory.deliver(Delivery(join_request=forged).SerializeToString()) == "wrong_kind"
    await expect_counted(two_peer_run, before, "wrong_signer", "wrong_kind")


async def test_strangers_are_served_nothing(two_peer_run: LiveRun, attackers) -> None:
    """Without an admission neither the run's whereabouts nor a blob is given away, and both attempts are counted."""
    stranger: Attacker = await attackers(admitted=False)
    before = await rejected(two_peer_run)
    with pytest.raises(Rejected, match="not_admitted"):
        await stranger.sync()
    reader, writer = await stranger.node.open_stream(stranger.victims[0], FETCH_STREAM, 20)
    raw = FetchRequest(run_id=stranger.run_id, hashes=[ROOT]).SerializeToString()
    writer.write(len(raw).to_bytes(4, "big") + raw)
    assert await answer_of(reader) == b""
    writer.close()
    await expect_counted(two_peer_run, before, "not_admitted")
    assert (await rejected(two_peer_run))["not_admitted"] >= before.get("not_admitted", 0) + 2
    await expect_training(two_peer_run)


async def test_oversized_frames_do_not_stop_anybody(two_peer_run: LiveRun, attackers) -> None:
    """A stream that announces gigabytes and calls of tens of megabytes cost the victim neither memory nor its other calls."""
    mallory: Attacker = await attackers(unlimited=True)
    mallory.node.p2p._client.control.persistent_conn_max_msg_size = 64 * MIB
    before = await rejected(two_peer_run)
    reader, writer = await mallory.node.open_stream(mallory.victims[0], FETCH_STREAM, 20)
    writer.write(b"\xff\xff\xff\xff" + bytes(MIB))
    assert await answer_of(reader) == b""
    writer.close()
    for size in (5 * MIB, 40 * MIB):
        with pytest.raises((PeerFailure, Rejected)):
            Ack.FromString(await mallory.node.call(mallory.victims[0], DELIVER, bytes(size), 5))
    await expect_counted(two_peer_run, before, "too_large")
    await expect_training(two_peer_run)
    assert await mallory.sync()


async def test_half_open_streams_are_closed(two_peer_run: LiveRun, attackers) -> None:
    """A peer that opens as many streams as it can and says nothing is cut off, and others are served meanwhile."""
    mallory: Attacker = await attackers()
    streams = await asyncio.gather(
        *(mallory.node.open_stream(mallory.victims[0], FETCH_STREAM, 20) for _ in range(60)), return_exceptions=True
    )
    opened = [item for item in streams if not isinstance(item, BaseException)]
    assert len(opened) > 30
    await expect_training(two_peer_run)
    assert await asyncio.gather(*(answer_of(reader, 60) for reader, _ in opened)) == [b""] * len(opened)
    for _, writer in opened:
        writer.close()
