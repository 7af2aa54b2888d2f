"""Nothing that stands in the DHT is believed, and nothing that a stranger does to it stops anybody."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from hivemind.dht import DHTNode
from hivemind.dht.routing import DHTID
from hivemind.p2p import PeerID
from hivemind.proto import dht_pb2
from hivemind.utils import MSGPackSerializer, get_dht_time

from peer.network.discovery import run_key
from peer.network.node import Node, PeerFailure
from peer.tasks import cancel
from swarm.identity import Identity
from swarm.messages import seal
from swarm.rpc.v1.signed_pb2 import Presence
from swarm.scenario import Scenario, last_contribution
from tests.peer_network import loopback

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

FAR_S, SOON_S = 10 * 365 * 86_400.0, 60.0
CALL_S = 5.0
WAVE_EVERY_S = 0.2
STRANGE_KEYS = 50


async def test_joining_and_rounds_go_on_in_a_hostile_dht(scenario: Any, tmp_path: Path) -> None:
    """A stock hivemind node overwrites, pins, and fills keys with junk, oversized and undecodable records, wave after wave.

    Rounds go on, a newcomer joins in the middle of it, and the peers name what they refuse.
    """
    async with scenario(3) as swarm:
        await swarm.start(3)
        await swarm.until_round(2)
        async with hostile_node(swarm, tmp_path) as waves:
            await swarm.until(lambda: len(waves) > 2, "three waves", 60)
            newcomer = await swarm.join("n0")
            await swarm.until(lambda: last_contribution(newcomer) >= 0, "the newcomer contributes", 90)
            await swarm.until_rounds_more(4)
            assert sum(waves) > 0
        refused = "".join(peer.log() for peer in swarm.peers.values())
        assert {reason for reason in ("dht_malformed", "dht_too_large", "dht_far_expiration") if reason in refused}
        assert swarm.missing_rounds() == []
        assert swarm.differing_roots() == []


@contextlib.asynccontextmanager
async def hostile_node(swarm: Scenario, folder: Path) -> AsyncIterator[list[int]]:
    """A DHT node that checks nothing and attacks whomever it knows; one number per wave: the peers that answered."""
    identity = Identity.generate()
    identity.save(folder / "hostile.key")
    node = await Node.start(loopback(folder / "hostile.key"))
    waves: list[int] = []
    try:
        dht = await DHTNode.create(p2p=node.p2p, ensure_bootstrap_success=False, strict=False)
        attacking = asyncio.create_task(attack_for_ever(swarm, node, dht, identity, waves))
        try:
            yield waves
            if attacking.done():
                attacking.result()
        finally:
            await cancel([attacking])
            await asyncio.wait_for(dht.shutdown(), CALL_S)
    finally:
        await node.close()


async def attack_for_ever(swarm: Scenario, node: Node, dht: DHTNode, identity: Identity, waves: list[int]) -> None:
    """Wave after wave, at every peer that can be reached."""
    while True:
        victims = await meet(swarm, node, dht)
        answers = await asyncio.gather(*(attack(dht, victim, victims, swarm.link.run_id, identity) for victim in victims))
        await pin(dht, swarm.link.run_id)
        waves.append(sum(answers))
        await asyncio.sleep(WAVE_EVERY_S)


async def meet(swarm: Scenario, node: Node, dht: DHTNode) -> list[str]:
    """Connect to the peers, as a node of their DHT."""
    met = []
    for peer in swarm.live():
        status = await peer.status()
        if status.get("addresses"):
            node.learn(status["peer_id"], status["addresses"])
            with contextlib.suppress(PeerFailure):
                await node.connect(status["peer_id"])
                met.append(status["peer_id"])
    await asyncio.gather(*(dht.protocol.call_ping(PeerID.from_base58(peer), validate=True, strict=False) for peer in met))
    return met


async def pin(dht: DHTNode, run_id: bytes) -> None:
    """What a stock client can do: one value in the place of everybody's, for ten years."""
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(dht.store(run_key(run_id), b"mine", get_dht_time() + FAR_S), CALL_S)


async def attack(dht: DHTNode, victim: str, peers: list[str], run_id: bytes, identity: Identity) -> int:
    """Store everything that must not be believed, by hand and past every check of our own; 1 if the victim answered."""
    key, pack = DHTID.generate(source=run_key(run_id)).to_bytes(), MSGPackSerializer.dumps
    forged = seal(identity, Presence(run_id=run_id, addresses=["/ip4/203.0.113.6/tcp/6"])).SerializeToString()
    regular = dht.protocol.IS_REGULAR_VALUE
    records = [
        (key, regular, pack(b"overwritten"), SOON_S),
        (key, regular, pack(b"pinned"), FAR_S),
        (key, pack(victim), pack(forged), SOON_S),
        (key, pack(identity.peer_id), pack(forged), FAR_S),
        (key, pack(identity.peer_id), b"\xc1\xff\xff", SOON_S),
        (key, b"\xc1", pack(forged), SOON_S),
        (key, pack(identity.peer_id), pack(os.urandom(1 << 16)), SOON_S),
        *((key, pack(peer), pack(forged), FAR_S) for peer in peers),
        *((os.urandom(20), regular, os.urandom(4000), SOON_S) for _ in range(STRANGE_KEYS)),
    ]
    request = dht_pb2.StoreRequest(
        auth=None,
        keys=[record[0] for record in records],
        subkeys=[record[1] for record in records],
        values=[record[2] for record in records],
        expiration_time=[get_dht_time() + record[3] for record in records],
        in_cache=[False] * len(records),
        peer=dht.protocol.node_info,
    )
    stub = dht.protocol.get_stub(PeerID.from_base58(victim))
    try:
        await asyncio.wait_for(stub.rpc_store(request), CALL_S)
    except Exception:  # noqa: BLE001 - how a victim refuses is its own affair
        return 0
    return 1
