"""Training needs no coordinator: reports wait on disk, and credits end up as if nothing had happened."""

from __future__ import annotations

import shutil
import signal
from typing import Any

import pytest

from swarm.scenario import Scenario, last_round

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


async def earned(swarm: Scenario) -> dict[str, int]:
    """FLOPs that each peer should have been credited, from the rounds that it has finished."""
    per_token = (await swarm.manifest()).credit.flops_per_token
    sequence = (await swarm.manifest()).data.sequence_length
    found: dict[str, int] = {}
    for name, peer in swarm.peers.items():
        weights = sum(line["weight"] for line in peer.history())
        found[swarm.identity(name).peer_id] = weights * sequence * per_token
    return found


async def finish_all(swarm: Scenario) -> None:
    """Let every peer complete its round and post its reports."""
    for peer in swarm.live():
        await peer.ask("finish")
    for peer in swarm.peers.values():
        await peer.wait(60)


async def restart_coordinator(swarm: Scenario) -> None:
    """Start it again at the same address."""
    await swarm.swarm.start_coordinator(
        swarm.source / "run.yaml", swarm.source / "owner.key", listen=f"{swarm.link.host}:{swarm.link.port}"
    )


async def test_rounds_go_on_while_the_coordinator_is_away(scenario: Any) -> None:
    """Killed for several rounds and started again from its database: no round is missing and every credit is there, once."""
    async with scenario(3) as swarm:
        await swarm.start(3)
        await swarm.until_round(4)
        await swarm.swarm.stop_coordinator(signal.SIGKILL)
        await swarm.until_rounds_more(6)
        await restart_coordinator(swarm)
        await swarm.until_rounds_more(2)
        await finish_all(swarm)
        assert swarm.missing_rounds() == []
        assert swarm.differing_roots() == []
        assert await swarm.credit() == await earned(swarm)


async def test_a_coordinator_restored_from_a_backup_gets_back_what_it_forgot(scenario: Any) -> None:
    """Its folder is put back to an older copy: peers report again what their receipts prove, and credits are complete."""
    async with scenario(3) as swarm:
        await swarm.start(3)
        await swarm.until_round(3)
        await swarm.swarm.stop_coordinator()
        folder, copy = swarm.swarm.directory / "coordinator", swarm.swarm.directory / "backup"
        shutil.copytree(folder, copy)
        await restart_coordinator(swarm)
        await swarm.until_rounds_more(5)
        await swarm.until(
            lambda: any((peer.directory / "posted").glob("*.pb") for peer in swarm.live()), "reports are posted", 60
        )
        await swarm.swarm.stop_coordinator()
        shutil.rmtree(folder)
        shutil.copytree(copy, folder)
        await restart_coordinator(swarm)
        await swarm.until_rounds_more(3)
        await finish_all(swarm)
        assert max(map(last_round, swarm.peers.values())) > 8
        assert await swarm.credit() == await earned(swarm)
