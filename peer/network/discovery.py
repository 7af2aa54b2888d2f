"""Discovery through hivemind's DHT: signed presence records that expire. Nothing is believed because it stands there.

The DHT is shared with strangers, so every record of ours is signed by the peer that it names, bounded in size and lifetime, and
checked on the way in and out; every call has a timeout; and whatever fails here, peers also know each other from the roster and
the coordinator.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import structlog
from hivemind.dht import DHTNode
from hivemind.dht.crypto import DHTRecord, RecordValidatorBase
from hivemind.dht.routing import DHTID
from hivemind.dht.storage import DHTLocalStorage, DictionaryDHTValue
from hivemind.p2p import PeerID
from hivemind.utils import MSGPackSerializer, get_dht_time

from peer.network.node import NETWORK_ERRORS, Node
from swarm.clock import Clock, SystemClock
from swarm.errors import Rejected
from swarm.identity import Identity
from swarm.messages import open_signed, parse, seal
from swarm.rpc.v1.signed_pb2 import Presence, Signed

MAX_RECORD_BYTES = 4096
MAX_LIFETIME_S = 900.0
LIFETIME_S = 120.0
CALL_TIMEOUT_S = 5.0
CLOSE_TIMEOUT_S = 1.0
MAX_PEERS = 256
MAX_STORED_KEYS = 2048
MAX_STORED_PRESENCES = 2048

log = structlog.get_logger(__name__)


def run_key(run_id: bytes) -> str:
    """The DHT key under which a run's peers announce themselves."""
    return f"swarm/1/{run_id.hex()}"


class PresenceValidator(RecordValidatorBase):
    """Lets through only records under a peer id that this peer has signed, and that expire soon.

    Records under other keys (of others who share the DHT) pass if they are small. Whatever others send, only so much is kept:
    `is_full(key, subkey)` tells when a record would be one too many.
    """

    def __init__(
        self,
        run_id: bytes,
        on_rejected: Callable[[str], None] = lambda reason: None,
        is_full: Callable[[bytes, object], bool] = lambda key, subkey: False,
    ) -> None:
        self._run_id = run_id
        self._key = _stored_key(run_key(run_id))
        self._on_rejected = on_rejected
        self.is_full = is_full

    def validate(self, record: DHTRecord) -> bool:
        """Whether a record may be stored or returned; never raises."""
        reason = self._problem(record)
        if reason:
            self._on_rejected(reason)
        return not reason

    def _problem(self, record: DHTRecord) -> str:
        if len(record.value) > MAX_RECORD_BYTES or len(record.subkey) > 256:
            return "dht_too_large"
        if record.expiration_time > get_dht_time() + MAX_LIFETIME_S:
            return "dht_far_expiration"
        if record.key != self._key:
            return "dht_full" if self.is_full(record.key, None) else ""
        try:
            name, _ = read_presence(self._run_id, MSGPackSerializer.loads(record.value), MSGPackSerializer.loads(record.subkey))
            return "dht_full" if self.is_full(record.key, name) else ""
        except Rejected as error:
            return f"dht_{error.reason}"
        except Exception:  # noqa: BLE001 - a stranger's bytes make the decoder raise anything; all of it is one rejection
            return "dht_malformed"


def read_presence(run_id: bytes, value: object, subkey: object) -> tuple[str, Presence]:
    """Peer id and presence of a stored value. Raises `Rejected`."""
    if not isinstance(value, bytes) or not isinstance(subkey, str):
        raise Rejected("malformed", "presence")
    signed = parse(Signed, value)
    presence = open_signed(signed, Presence, signer=subkey, run_id=run_id)
    return subkey, presence


def _stored_key(key: str) -> bytes:
    return bytes(DHTID.generate(source=key).to_bytes())


def _is_full(storage: DHTLocalStorage, key: bytes, subkey: object) -> bool:
    """Whether one more record has no place: a new key among very many, or a new name under a key that has very many."""
    kept = storage.get(DHTID.from_bytes(key))
    if kept is None:
        return len(storage) >= MAX_STORED_KEYS
    names = kept.value
    return isinstance(names, DictionaryDHTValue) and len(names) >= MAX_STORED_PRESENCES and subkey not in names


@dataclass
class Discovery:
    """Announces us and finds others."""

    dht: DHTNode
    node: Node
    identity: Identity
    run_id: bytes
    clock: Clock = SystemClock()
    _issued: set[int] = field(default_factory=set)

    @classmethod
    async def start(
        cls,
        node: Node,
        identity: Identity,
        run_id: bytes,
        *,
        client_only: bool = False,
        on_rejected: Callable[[str], None] = lambda reason: None,
    ) -> Discovery:
        """Run a DHT node inside our own event loop."""
        validator = PresenceValidator(run_id, on_rejected)
        dht = await DHTNode.create(
            p2p=node.p2p,
            client_mode=client_only,
            record_validator=validator,
            ensure_bootstrap_success=False,
            strict=False,
            cache_refresh_before_expiry=0,
            cache_size=MAX_STORED_KEYS,
            num_workers=4,
        )
        validator.is_full = lambda key, subkey: _is_full(dht.protocol.storage, key, subkey)
        return cls(dht, node, identity, run_id)

    async def close(self) -> None:
        """Stop taking part in the DHT. With a dead network daemon there is nobody to tell: that is waited for only briefly."""
        with contextlib.suppress(TimeoutError, *NETWORK_ERRORS):
            await asyncio.wait_for(self.dht.shutdown(), CLOSE_TIMEOUT_S)

    async def meet(self, peers: Sequence[str]) -> None:
        """Get to know other DHT nodes, to which a connection is open already; what their clocks say doesn't matter."""

        async def ping(peer: str) -> None:
            call = self.dht.protocol.call_ping(PeerID.from_base58(peer), validate=False, strict=False)
            await asyncio.wait_for(call, CALL_TIMEOUT_S)

        await asyncio.gather(*(ping(peer) for peer in peers), return_exceptions=True)

    async def announce(
        self, addresses: Sequence[str], round_index: int, version: str, reachable: bool, clock_offset_s: float = 0.0
    ) -> bool:
        """Store our presence; whether some node took it. `clock_offset_s` is what our own clock lacks."""
        now = self.clock.wall_s() + clock_offset_s
        self._issued.add(int(now))
        presence = Presence(
            run_id=self.run_id,
            addresses=addresses,
            round=round_index,
            issued_at=int(now),
            expires_at=int(now + LIFETIME_S),
            reachable=reachable,
            client_version=version,
        )
        try:
            stored = await asyncio.wait_for(
                self.dht.store(
                    run_key(self.run_id),
                    seal(self.identity, presence).SerializeToString(),
                    get_dht_time() + clock_offset_s + LIFETIME_S,
                    subkey=self.identity.peer_id,
                ),
                CALL_TIMEOUT_S,
            )
        except (TimeoutError, ValueError, *NETWORK_ERRORS) as error:
            log.debug("dht_store_failed", error=str(error))
            return False
        return bool(stored)

    def is_twin(self, presence: Presence) -> bool:
        """Whether a presence under our key was signed since we began, and not by us: another machine uses the key."""
        return bool(self._issued) and presence.issued_at > min(self._issued) and presence.issued_at not in self._issued

    async def find(self) -> dict[str, Presence]:
        """Peers of the run that the DHT knows, each record signed by its peer."""
        try:
            found = await asyncio.wait_for(self.dht.get(run_key(self.run_id), latest=True), CALL_TIMEOUT_S)
        except (TimeoutError, ValueError, *NETWORK_ERRORS) as error:
            log.debug("dht_get_failed", error=str(error))
            return {}
        records = getattr(found, "value", None)
        peers: dict[str, Presence] = {}
        for subkey, item in list(records.items())[:MAX_PEERS] if isinstance(records, dict) else []:
            try:
                peer, presence = read_presence(self.run_id, item.value, subkey)
            except Rejected as error:
                log.debug("presence_rejected", reason=error.reason)
                continue
            if presence.expires_at > self.clock.wall_s() - MAX_LIFETIME_S:
                peers[peer] = presence
        return peers
