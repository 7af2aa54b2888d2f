"""Finding the others: the coordinator's list and the DHT, either of which may be away or lie."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

import structlog

from peer.coordination import Coordination, Standing
from peer.network.discovery import Discovery
from peer.network.node import Node, PeerFailure
from peer.rounds.entering import Whereabouts
from swarm import __version__
from swarm.errors import Rejected, SwarmError
from swarm.identity import Identity

DHT_EVERY_S = 30.0

log = structlog.get_logger(__name__)


@dataclass
class Finder:
    """Knows where to look for peers of the run, and tells them where we are."""

    node: Node
    identity: Identity
    run_id: bytes
    coordination: Coordination
    standing: Callable[[], Standing]
    inbound: bool
    on_rejected: Callable[[str], None]
    on_twin: Callable[[], None] = lambda: None
    discovery: Discovery | None = None

    async def start(self) -> None:
        """Join the DHT."""
        self.discovery = await Discovery.start(
            self.node, self.identity, self.run_id, client_only=not self.inbound, on_rejected=self.on_rejected
        )

    async def close(self) -> None:
        """Leave the DHT."""
        if self.discovery is not None:
            await self.discovery.close()
            self.discovery = None

    async def find(self) -> Whereabouts:
        """Everybody whom the coordinator or the DHT knows."""
        first = False
        try:
            first = (await self.coordination.announce(self.node, self.standing())).genesis
        except (SwarmError, Rejected) as error:
            log.info("announce_failed", error=str(error))
        await self.meet()
        if (discovery := self.discovery) is not None:
            for peer, presence in (await discovery.find()).items():
                self.node.learn(peer, presence.addresses)
                self.node.learn_reachability(peer, presence.reachable)
        known = [peer.peer_id for peer in self.coordination.last.peers] if self.coordination.last else []
        return Whereabouts(tuple(dict.fromkeys([*known, *self.node.known_peers()])), first)

    async def meet(self) -> None:
        """Connect to the peers that the coordinator knows, and get to know their DHT nodes; nobody while our network is away."""
        last = self.coordination.last
        if last is None:
            return
        for peer in last.peers:
            self.node.learn_reachability(peer.peer_id, peer.reachable)
        try:
            connected = await self.node.connected()
        except PeerFailure as error:
            log.info("network_away", error=str(error))
            return
        new = [peer.peer_id for peer in last.peers if peer.peer_id not in connected and peer.peer_id != self.node.peer_id]
        await asyncio.gather(*(self.node.connect(peer) for peer in new), return_exceptions=True)
        if (discovery := self.discovery) is not None:
            await discovery.meet(new)

    async def announce_for_ever(self) -> None:
        """Keep our presence in the DHT alive, and go on with another DHT node when the network has been rebuilt meanwhile."""
        while True:
            if (discovery := self.discovery) is not None:
                await self.meet()
                offset_s = self.coordination.clock_offset_s
                round_index = self.standing().round_index
                mine = (await discovery.find()).get(self.identity.peer_id)
                if mine is not None and discovery.is_twin(mine):
                    self.on_twin()
                await discovery.announce(self.node.addresses, round_index, __version__, self.inbound, offset_s)
            await asyncio.sleep(DHT_EVERY_S)
