"""Real libp2p nodes on loopback, each with a key of its own, ended with the test."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from peer.network.node import Node
from peer.network.p2pd import P2pdOptions
from swarm.identity import Identity
from tests.peer_network import loopback


@dataclass(frozen=True)
class Member:
    """A node and the key behind it."""

    identity: Identity
    node: Node

    @property
    def peer(self) -> str:
        return self.node.peer_id


StartNode = Callable[..., Awaitable[Member]]


@pytest.fixture
async def start_node(tmp_path: Path) -> AsyncIterator[StartNode]:
    """Starts nodes: `await start_node(accept_inbound=False, knows=[other])`."""
    async with AsyncExitStack() as stack:
        count = 0

        async def start(knows: tuple[Member, ...] = (), kind: type[P2pdOptions] = P2pdOptions, **options: object) -> Member:
            nonlocal count
            count += 1
            identity = Identity.generate()
            path = tmp_path / f"node-{count}.key"
            identity.save(path)
            node = await Node.start(kind(**vars(loopback(path, **options))))
            stack.push_async_callback(node.close)
            for other in knows:
                node.learn(other.peer, other.node.addresses)
                await node.connect(other.peer)
            return Member(identity, node)

        yield start
