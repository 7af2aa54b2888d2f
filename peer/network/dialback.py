"""Whether others can dial us: a peer that is asked to tries, at the address from which it sees us and nowhere else.

So nobody can be made to knock at a stranger's door. The dial is a new TCP connection that waits for libp2p's greeting, no more.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from peer.network.node import Node
from swarm.errors import Rejected
from swarm.messages import parse
from swarm.rpc.v1.peer_pb2 import RelayReply, RelayRequest
from swarm.rpc.v1.signed_pb2 import Signed

DIAL = "swarm/1/dial"
DIAL_TIMEOUT_S = 5.0
EVERY_S = 10.0
MAX_ASKED = 1024
GREETING = b"\x13/multistream/1.0.0\n"


@dataclass
class DialBack:
    """Answers admitted peers."""

    node: Node
    is_admitted: Callable[[str, Signed | None], bool]
    _asked_s: dict[str, float] = field(default_factory=dict)

    async def answer(self, peer: str, raw: bytes) -> bytes:
        """Dial the port that the peer names, at the addresses from which it is connected. Raises `Rejected`."""
        request = parse(RelayRequest, raw, peer)
        port = int.from_bytes(request.payload, "big")
        if request.call != DIAL or len(request.payload) != 2 or not port or not self.is_admitted(peer, request.admission):
            raise Rejected("not_admitted", "dial", peer)
        now_s = time.monotonic()
        if now_s - self._asked_s.get(peer, -EVERY_S) < EVERY_S or len(self._asked_s) >= MAX_ASKED:
            self._asked_s = {name: asked_s for name, asked_s in self._asked_s.items() if now_s - asked_s < EVERY_S}
            raise Rejected("busy", "dial", peer)
        self._asked_s[peer] = now_s
        hosts = await self._seen_at(peer)
        reached = any([await greets(host, port) for host in hosts[:2]])
        return RelayReply(failed="" if reached else "unreachable").SerializeToString()

    async def _seen_at(self, peer: str) -> list[str]:
        """The network addresses from which a peer is connected to us now."""
        found = []
        for info in await asyncio.wait_for(self.node.p2p.list_peers(), DIAL_TIMEOUT_S):
            if info.peer_id.to_base58() == peer:
                found += [host_of(str(address)) for address in info.addrs]
        return [host for host in dict.fromkeys(found) if host]


def host_of(address: str) -> str:
    """The IP address in a multiaddress such as `/ip4/192.0.2.1/tcp/4000`; empty if there is none."""
    parts = address.split("/")
    return parts[2] if len(parts) > 2 and parts[1] in ("ip4", "ip6") else ""


def port_of(address: str) -> int:
    """The TCP port in a multiaddress; 0 if there is none."""
    parts = address.split("/")
    return int(parts[4]) if len(parts) > 4 and parts[3] == "tcp" and parts[4].isdigit() else 0


async def greets(host: str, port: int) -> bool:
    """Whether a libp2p node greets whoever connects."""
    try:
        reader, writer = await asyncio.wait_for(asyncio.open_connection(host, port), DIAL_TIMEOUT_S)
    except (OSError, TimeoutError):
        return False
    try:
        writer.write(GREETING)
        return await asyncio.wait_for(reader.readexactly(len(GREETING)), DIAL_TIMEOUT_S) == GREETING
    except (OSError, EOFError, TimeoutError):
        return False
    finally:
        writer.close()
