"""Finding others while the network's daemon dies and comes back."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
from pathlib import Path

import pytest

from coordinator.server import Coordinator
from peer import finding
from peer.coordination import Coordination, Standing
from peer.finding import Finder
from peer.network.node import Node
from peer.tasks import cancel
from swarm.config import CoordinatorSettings
from swarm.identity import Identity
from tests.peer_network import loopback
from tests.world import World

DEATHS = 5


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # hivemind leaves calls to a dead daemon open
async def test_presence_is_announced_for_ever_whenever_the_daemon_dies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed at whatever point of an announcement: that goes on over the new network, and nothing is taken for a twin's."""
    monkeypatch.setattr(finding, "DHT_EVERY_S", 0.0)
    world, twins = World(), list[str]()
    settings = CoordinatorSettings(listen="127.0.0.1:0", state_dir=tmp_path / "coordinator")
    identity = Identity.generate()
    identity.save(tmp_path / "key")
    standing = Standing(1, "training", "cpu", True)
    async with Coordinator.serve([world.signed_manifest], settings) as coordinator:
        coordination = Coordination(coordinator.link, identity, tmp_path)
        node = await Node.start(loopback(tmp_path / "key"))
        finder = Finder(node, identity, coordination.link.run_id, coordination, lambda: standing, True, twins.append,
                        lambda: twins.append("twin"))  # fmt: skip
        await finder.start()
        await finder.find()
        announcing = asyncio.create_task(finder.announce_for_ever())
        try:
            for death in range(DEATHS):
                await asyncio.sleep(0.05 + 0.013 * death)
                os.kill(node.daemon.pid, signal.SIGKILL)
                await node.daemon.wait()
                await finder.meet()
                await finder.close()
                await node.rebuild()
                await finder.start()
                assert finder.discovery is not None
                while not (await finder.discovery.find()).get(identity.peer_id):
                    assert not announcing.done(), announcing
                    await asyncio.sleep(0.05)
            assert not announcing.done()
            assert twins == []
        finally:
            await cancel([announcing])
            await finder.close()
            await node.close()
            await coordination.close()
            gc.collect()  # while that is ignored
