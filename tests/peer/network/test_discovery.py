"""Presence in a real DHT, and what strangers can't do to it."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest
from hivemind.dht.crypto import DHTRecord
from hivemind.dht.routing import DHTID
from hivemind.utils import MSGPackSerializer, get_dht_time

from peer.network import discovery
from peer.network.discovery import LIFETIME_S, MAX_LIFETIME_S, MAX_RECORD_BYTES, Discovery, PresenceValidator, run_key
from swarm.identity import Identity
from swarm.messages import seal
from swarm.rpc.v1.signed_pb2 import Presence
from tests.waiting import eventually

RUN = b"\x05" * 32
ALICE, MALLORY = Identity.from_seed(b"a" * 32), Identity.from_seed(b"m" * 32)
KEY = bytes(DHTID.generate(source=run_key(RUN)).to_bytes())


def presence(identity: Identity, **changes: object) -> bytes:
    return bytes(
        seal(identity, Presence(**({"run_id": RUN, "addresses": ["/ip4/127.0.0.1/tcp/1"]} | changes))).SerializeToString()
    )


def record(value: object, subkey: object = ALICE.peer_id, lifetime_s: float = LIFETIME_S, key: bytes = KEY) -> DHTRecord:
    packed = MSGPackSerializer.dumps
    return DHTRecord(key, packed(subkey), packed(value), get_dht_time() + lifetime_s)


HONEST = record(presence(ALICE))
REJECTED = {
    "far expiration": (record(presence(ALICE), lifetime_s=MAX_LIFETIME_S + 1e6), "dht_far_expiration"),
    "oversized": (record(b"x" * (MAX_RECORD_BYTES + 1)), "dht_too_large"),
    "oversized under another key": (record(b"x" * (MAX_RECORD_BYTES + 1), key=b"\x01" * 20), "dht_too_large"),
    "oversized subkey": (record(presence(ALICE), subkey="x" * 300), "dht_too_large"),
    "undecodable": (replace(HONEST, value=b"\xc1\xff\xff"), "dht_malformed"),
    "undecodable subkey": (replace(HONEST, subkey=b"\xc1"), "dht_malformed"),
    "no subkey": (replace(HONEST, subkey=MSGPackSerializer.dumps(None)), "dht_malformed"),
    "not a message": (record(b"\xff" * 40), "dht_malformed"),
    "not bytes": (record({"a": 1}), "dht_malformed"),
    "another's name": (record(presence(MALLORY)), "dht_wrong_signer"),
    "not a peer id": (record(presence(ALICE), subkey="mallory"), "dht_wrong_signer"),
    "another run": (record(presence(ALICE, run_id=b"\x06" * 32)), "dht_wrong_run"),
    "another kind": (record(presence(ALICE).replace(b"presence", b"proposal")), "dht_wrong_kind"),
    "changed": (record(presence(ALICE).replace(b"tcp/1", b"tcp/2")), "dht_bad_signature"),
}


@pytest.mark.parametrize("name", REJECTED)
def test_the_validator_rejects(name: str) -> None:
    """A record that breaks a rule is neither stored nor returned, and its reason is counted."""
    wrong, reason = REJECTED[name]
    reasons: list[str] = []
    assert not PresenceValidator(RUN, reasons.append).validate(wrong)
    assert reasons == [reason]


def test_the_validator_accepts_what_its_peer_signed() -> None:
    """A signed presence that expires soon passes, and so do small records under keys of others."""
    reasons: list[str] = []
    validator = PresenceValidator(RUN, reasons.append)
    assert validator.validate(HONEST)
    assert validator.validate(record(b"something else", key=b"\x01" * 20))
    assert reasons == []


@pytest.fixture
async def swarm_of_three(start_node):
    """Three nodes with their DHTs; each rejection is noted with the node's number."""
    members = [await start_node()]
    for _ in range(2):
        members.append(await start_node(knows=tuple(members)))
    reasons: list[tuple[int, str]] = []
    found = []
    for index, member in enumerate(members):

        def note(reason: str, index: int = index) -> None:
            reasons.append((index, reason))

        found.append(await Discovery.start(member.node, member.identity, RUN, on_rejected=note))
    await asyncio.gather(*(one.meet([other.peer for other in members if other.peer != one.node.peer_id]) for one in found))
    yield found, reasons
    for one in found:
        await one.close()


async def test_peers_find_each_other(swarm_of_three) -> None:
    """What one peer announces the others find, with its addresses, round and signature."""
    (one, two, three), reasons = swarm_of_three
    assert await one.announce(["/ip4/127.0.0.1/tcp/1"], 7, "0.1.0", True)
    assert await two.announce([], 8, "0.1.0", False)

    async def both() -> dict[str, Presence] | None:
        peers = await three.find()
        return peers if len(peers) == 2 else None

    peers = await eventually(both, "finding both", 30)
    assert peers is not None
    assert peers[one.identity.peer_id].addresses == ["/ip4/127.0.0.1/tcp/1"]
    assert peers[one.identity.peer_id].round == 7
    assert not peers[two.identity.peer_id].reachable
    assert reasons == []


async def test_a_stranger_can_neither_pin_nor_overwrite_a_presence(swarm_of_three) -> None:
    """Records that a stranger stores past its own checks are refused by the others, who still find the honest one."""
    (one, two, mallory), reasons = swarm_of_three
    assert await one.announce(["/ip4/127.0.0.1/tcp/1"], 1, "0.1.0", True)
    mallory.dht.protocol.record_validator = None
    name, soon = one.identity.peer_id, get_dht_time() + LIFETIME_S + 60
    forged = seal(mallory.identity, Presence(run_id=RUN, addresses=["/ip4/6.6.6.6/tcp/6"])).SerializeToString()
    await asyncio.wait_for(mallory.dht.store(run_key(RUN), forged, soon, subkey=name), 10)
    await asyncio.wait_for(mallory.dht.store(run_key(RUN), forged, get_dht_time() + 1e6, subkey=mallory.identity.peer_id), 10)
    await asyncio.wait_for(mallory.dht.store(run_key(RUN), b"regular value", soon), 10)
    for reason in ("dht_wrong_signer", "dht_far_expiration", "dht_malformed"):
        await eventually(lambda reason=reason: {index for index, found in reasons if found == reason} & {0, 1}, reason, 20)
    peers = await asyncio.wait_for(two.find(), 10)
    assert peers[name].addresses == ["/ip4/127.0.0.1/tcp/1"]
    assert mallory.identity.peer_id not in peers


async def test_strangers_can_not_fill_the_memory(swarm_of_three, monkeypatch: pytest.MonkeyPatch) -> None:
    """With as many keys and names as may be kept, further ones are refused, and those that are there can still be renewed."""
    (one, _, _), reasons = swarm_of_three
    monkeypatch.setattr(discovery, "MAX_STORED_KEYS", 3)
    monkeypatch.setattr(discovery, "MAX_STORED_PRESENCES", 2)
    storage, validator = one.dht.protocol.storage, one.dht.protocol.record_validator
    for name in (ALICE, MALLORY):
        storage.store_subkey(DHTID.from_bytes(KEY), name.peer_id, presence(name), get_dht_time() + LIFETIME_S)
    assert validator.validate(HONEST)
    late = Identity.from_seed(b"l" * 32)
    assert not validator.validate(record(presence(late), subkey=late.peer_id))
    others = [bytes([index]) * 20 for index in range(1, 5)]
    for key in others[: 3 - len(storage)]:
        storage.store(DHTID.from_bytes(key), b"x", get_dht_time() + LIFETIME_S)
    assert validator.validate(record(b"x", key=others[0]))
    assert not validator.validate(record(b"x", key=others[3]))
    assert reasons.count((0, "dht_full")) >= 2


async def test_a_dht_of_one_answers_in_time(start_node) -> None:
    """Alone, announcing and finding end soon, without an error."""
    member = await start_node()
    discovery = await Discovery.start(member.node, member.identity, RUN)
    await discovery.announce(["/ip4/127.0.0.1/tcp/1"], 1, "0.1.0", True)
    assert set(await discovery.find()) <= {member.peer}
    await discovery.close()


async def test_a_key_that_two_machines_use_is_noticed(swarm_of_three) -> None:
    """Somebody else's newer presence under our own key is a twin's; our own and those of an earlier start are not."""
    (one, two, _), _ = swarm_of_three
    before = Presence(run_id=RUN, issued_at=int(one.clock.wall_s()) - 100)
    assert await one.announce([], 1, "0.1.0", True)
    mine = (await asyncio.wait_for(one.find(), 10))[one.identity.peer_id]
    assert not one.is_twin(mine)
    assert not one.is_twin(before)
    twin = Discovery(two.dht, two.node, one.identity, RUN)
    assert await twin.announce(["/ip4/127.0.0.1/tcp/2"], 1, "0.1.0", True, clock_offset_s=5.0)

    async def noticed() -> bool:
        found = (await one.find()).get(one.identity.peer_id)
        return found is not None and one.is_twin(found)

    await eventually(noticed, "the twin", 30)
