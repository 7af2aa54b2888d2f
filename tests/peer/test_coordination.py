"""The control plane as a peer sees it, against a real coordinator."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from coordinator.server import Coordinator
from peer.coordination import Coordination, Standing
from swarm.config import CoordinatorSettings
from swarm.errors import VersionTooOld
from tests.waiting import eventually
from tests.world import World, identity


async def test_a_peer_that_has_become_too_old_is_told_while_it_runs(tmp_path: Path) -> None:
    """It announces itself as ever; when the run asks for a newer client, that ends with what to do, and isn't tried again."""
    world = World()
    node = cast("Any", SimpleNamespace(addresses=["/ip4/127.0.0.1/tcp/1"], learn=lambda peer, addresses: None))
    settings = CoordinatorSettings(listen="127.0.0.1:0", state_dir=tmp_path / "coordinator", presence_ttl_s=1)
    async with Coordinator.serve(world.signed_manifest, settings) as coordinator:
        coordination = Coordination(coordinator.link, identity(0), tmp_path)
        answers: list[object] = []
        coordination.on_answer = answers.append
        announcing = asyncio.create_task(coordination.announce_for_ever(node, lambda: Standing(1, "training", "cpu", True)))
        coordination.nudge()
        try:
            await eventually(lambda: answers, "an answer")
            journal = coordinator.journal
            journal.manifest = journal.manifest.model_copy(update={"min_client_version": "99.0.0"})
            coordination.nudge()
            with pytest.raises(VersionTooOld, match=r"99\.0\.0") as caught:
                await asyncio.wait_for(announcing, 30)
            assert "update" in caught.value.hint
        finally:
            announcing.cancel()
            await coordination.close()
