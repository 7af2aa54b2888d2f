"""The control plane as a peer sees it, against a real coordinator."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from coordinator.server import Coordinator
from peer.admissions import Admissions
from peer.coordination import Coordination, Standing
from swarm.config import CoordinatorSettings
from swarm.errors import CoordinatorUnreachable, ProtocolMismatch, VersionTooOld
from swarm.protocol import OURS, Range, Version
from tests.waiting import eventually
from tests.world import World, identity


async def test_a_peer_that_has_become_too_old_is_told_while_it_runs(tmp_path: Path) -> None:
    """It announces itself as ever; when the run asks for a newer client, that ends with what to do, and isn't tried again."""
    world = World()
    node = cast("Any", SimpleNamespace(addresses=["/ip4/127.0.0.1/tcp/1"], learn=lambda peer, addresses: None))
    settings = CoordinatorSettings(listen="127.0.0.1:0", state_dir=tmp_path / "coordinator", presence_ttl_s=1)
    async with Coordinator.serve([world.signed_manifest], settings) as coordinator:
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


SECOND = Range(Version(2, 0), Version(2, 1))


async def test_a_peer_whose_protocol_is_given_up_is_told_while_it_runs(tmp_path: Path) -> None:
    """At its next announcement it ends with an exit code of its own, between two rounds, and says what to do."""
    world = World()
    node = cast("Any", SimpleNamespace(addresses=["/ip4/127.0.0.1/tcp/1"], learn=lambda peer, addresses: None))
    settings = CoordinatorSettings(listen="127.0.0.1:0", state_dir=tmp_path / "coordinator", presence_ttl_s=1)
    async with Coordinator.serve([world.signed_manifest], settings) as coordinator:
        coordination = Coordination(coordinator.link, identity(0), tmp_path)
        try:
            assert (await coordination.describe()).protocol == OURS.newest
            await coordination.announce(node, Standing(1, "training", "cpu", True))
            coordinator.journal.spoken = SECOND
            announcing = coordination.announce_for_ever(node, lambda: Standing(1, "training", "cpu", True))
            with pytest.raises(ProtocolMismatch, match=r"it speaks .* needed is .*") as caught:
                await asyncio.wait_for(announcing, 30)
            assert (caught.value.exit_code, "update" in caught.value.hint) == (16, True)
        finally:
            await coordination.close()


async def test_a_peer_that_is_too_new_is_told_at_its_first_question(tmp_path: Path) -> None:
    """It waits for the operator, or takes the version that the run has; its key isn't admitted meanwhile."""
    world = World()
    settings = CoordinatorSettings(listen="127.0.0.1:0", state_dir=tmp_path / "coordinator")
    async with Coordinator.serve([world.signed_manifest], settings) as coordinator:
        coordination = Coordination(coordinator.link, identity(0), tmp_path, spoken=SECOND)
        try:
            with pytest.raises(ProtocolMismatch, match=r"it speaks .* known is .*") as caught:
                await coordination.describe()
            assert "operator" in caught.value.hint
            assert len(coordinator.journal.tree) == 1
        finally:
            await coordination.close()


async def test_an_admission_of_before_an_update_is_not_shown_to_others(tmp_path: Path) -> None:
    """It names a protocol that this version doesn't speak any more; while the coordinator is away, that means to wait for it."""
    world = World()
    node = cast("Any", SimpleNamespace(addresses=["/ip4/127.0.0.1/tcp/1"], learn=lambda peer, addresses: None))
    settings = CoordinatorSettings(listen="127.0.0.1:0", state_dir=tmp_path / "coordinator")
    async with Coordinator.serve([world.signed_manifest], settings) as coordinator:
        before = Coordination(coordinator.link, identity(0), tmp_path)
        await before.announce(node, Standing(1, "training", "cpu", True))
        await before.close()
    for spoken, kept in ((OURS, True), (Range(Version(1, 0), Version(3, 0)), True), (Range(Version(1, 1), Version(2, 0)), False)):
        after = Coordination(coordinator.link, identity(0), tmp_path, spoken=spoken)
        admissions = Admissions(world.run_id, coordinator.identity.peer_id, spoken=spoken)
        after.remember_admission(admissions)
        assert (after.last is not None, admissions.is_admitted(identity(0).peer_id)) == (kept, kept)
        with pytest.raises(CoordinatorUnreachable):
            await after.announce(node, Standing(1, "training", "cpu", True))
