"""Peers that speak other versions of the protocol meet over real libp2p: nobody gets into a round that it couldn't play."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, cast

import pytest

from peer.admissions import Admissions
from peer.rounds.engine import Engine, Place
from peer.rounds.entering import Entry, Whereabouts
from peer.rounds.inbox import Inbox
from peer.rounds.post import SYNC, Post
from peer.rounds.values import RosterMember
from swarm.clock import SystemClock
from swarm.errors import Rejected
from swarm.identity import Identity
from swarm.messages import seal
from swarm.protocol import SILENT, Range, Version
from swarm.rpc.v1.signed_pb2 import AdmissionToken, JoinRequest, Signed
from tests.peer.network.conftest import Member, StartNode, start_node
from tests.waiting import eventually
from tests.world import COORDINATOR, ROOT, World, identity

__all__ = ["start_node"]

RUN = World().run_id
FIRST = Range(Version(1, 0), Version(1, 1))
SECOND = Range(Version(2, 0), Version(2, 1))
BOTH = Range(Version(1, 1), Version(2, 0))
KNOWS_NO_VERSIONS = Range(Version(1, 0), Version(99, 0))  # what a peer of before this was asked lets in


@dataclass
class Observer:
    """What a peer shows of itself."""

    states: list[str] = field(default_factory=list)
    refusals: list[str] = field(default_factory=list)

    def state(self, code: str) -> None:
        self.states.append(code)

    def refused(self, peer: str, reason: str) -> None:
        self.refusals.append(reason)


def token(member: Member, spoken: Range) -> Signed:
    """The coordinator's word for what a peer speaks."""
    protocol = None if spoken == SILENT else spoken.message
    return seal(COORDINATOR, AdmissionToken(run_id=RUN, peer_id=member.peer, expires_at=1 << 40, protocol=protocol))


def services(member: Member, spoken: Range, lets_in: Range) -> Any:
    """As much of a peer as it takes to enter, or to let others in."""
    admissions = Admissions(RUN, COORDINATOR.peer_id, spoken=lets_in)
    admissions.admit(token(member, spoken))
    return SimpleNamespace(
        admissions=admissions,
        checker=SimpleNamespace(run_id=RUN),
        clock=SystemClock(),
        identity=member.identity,
        observer=Observer(),
        post=Post(member.node),
    )


class Rostered(Engine):
    """A member of the roster that answers others, and doesn't train."""

    def __init__(self, member: Member, spoken: Range, lets_in: Range) -> None:
        self.services = services(member, spoken, lets_in)
        self.place = Place(3, (RosterMember(member.peer, 1),), ROOT)
        self.inbox, self.last_proposal, self.joiners, self.current = Inbox(), None, {}, None

    @property
    def _barred(self) -> frozenset[str]:
        return frozenset()


async def meeting(start_node: StartNode, member: Range, joiner: Range, lets_in: Range | None = None) -> tuple[Rostered, Entry]:
    """A member that answers, and a joiner that knows where it is."""
    host = await start_node()
    guest = await start_node(knows=(host,))
    engine = Rostered(host, member, lets_in or member)

    async def answer(peer: str, raw: bytes) -> bytes:
        return await engine.answer_sync(peer, raw, lambda root: ())

    async def find() -> Whereabouts:
        return Whereabouts((host.peer,))

    await host.node.serve_calls(SYNC, answer)
    never = cast("Any", None)
    return engine, Entry(services(guest, joiner, joiner), never, find, never, never, never)


@pytest.mark.parametrize(
    ("member", "joiner", "lets_in"),
    [(SECOND, FIRST, SECOND), (SECOND, SILENT, SECOND), (FIRST, SECOND, FIRST), (SILENT, SECOND, KNOWS_NO_VERSIONS)],
    ids=["an older joiner", "a joiner of before", "a newer joiner", "a member of before"],
)
async def test_a_joiner_without_a_common_protocol_waits_and_says_why(
    start_node: StartNode, member: Range, joiner: Range, lets_in: Range
) -> None:
    """Refused by the member, or by itself where the member doesn't know of versions: its state has a reason of its own."""
    _, entry = await meeting(start_node, member, joiner, lets_in)
    entering = asyncio.create_task(entry.enter(Inbox()))
    observer = entry.services.observer
    try:
        await eventually(lambda: observer.states, "a state")  # type: ignore[attr-defined]
        assert set(observer.states) == {"protocol_mismatch"}  # type: ignore[attr-defined]
        assert not entering.done()
    finally:
        entering.cancel()
        await asyncio.gather(entering, return_exceptions=True)


@pytest.mark.parametrize(("member", "joiner"), [(FIRST, SILENT), (BOTH, SECOND), (FIRST, BOTH)])
async def test_peers_with_a_common_protocol_answer_each_other(start_node: StartNode, member: Range, joiner: Range) -> None:
    """They needn't be of the same version."""
    engine, entry = await meeting(start_node, member, joiner)
    replies = await entry._ask((engine.services.identity.peer_id,))
    assert [reply.round for reply in replies.values()] == [3]


async def test_a_request_to_join_is_refused_by_its_reason(start_node: StartNode) -> None:
    """A leader gives no place to whom a member couldn't understand, and asks nobody else about it."""
    engine, entry = await meeting(start_node, FIRST, SECOND)

    def asked(spoken: Range) -> Signed:
        guest = entry.services.identity
        admission = seal(
            COORDINATOR, AdmissionToken(run_id=RUN, peer_id=guest.peer_id, expires_at=1 << 40, protocol=spoken.message)
        )
        return seal(guest, JoinRequest(run_id=RUN, round=3, admission=admission))

    with pytest.raises(Rejected, match="protocol_too_new"):
        engine._on_join(asked(SECOND))
    assert engine.joiners == {}
    engine._on_join(asked(BOTH))
    assert list(engine.joiners) == [entry.services.identity.peer_id]


async def test_two_who_ask_at_the_same_time_have_to_get_on(start_node: StartNode) -> None:
    """Of two joiners without a common protocol the first gets the place; the other none, also where another leader chose it."""
    engine, _ = await meeting(start_node, Range(Version(1, 0), Version(2, 1)), SECOND)
    admissions, guests = engine.services.admissions, [identity(number) for number in range(2)]

    def ask(guest: Identity, spoken: Range) -> None:
        admission = seal(
            COORDINATOR, AdmissionToken(run_id=RUN, peer_id=guest.peer_id, expires_at=1 << 40, protocol=spoken.message)
        )
        engine._on_join(seal(guest, JoinRequest(run_id=RUN, round=3, admission=admission)))

    ask(guests[0], FIRST)
    with pytest.raises(Rejected, match="protocol_too_new"):
        ask(guests[1], SECOND)
    assert list(engine.joiners) == [guests[0].peer_id]
    elsewhere = Place(4, (RosterMember(guests[1].peer_id, 1),), ROOT)
    assert admissions.is_admitted(guests[1].peer_id)
    engine._drop_misfits(elsewhere)
    assert engine.joiners == {}
    assert engine.services.observer.refusals == ["protocol_too_old"]  # type: ignore[attr-defined]
