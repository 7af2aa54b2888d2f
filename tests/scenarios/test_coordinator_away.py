"""Training needs no coordinator: reports wait on disk, and credits end up as if nothing had happened."""

from __future__ import annotations

import shutil
import signal
from typing import Any

import pytest

from swarm.scenario import last_round

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


async def test_rounds_go_on_while_the_coordinator_is_away(scenario: Any) -> None:
    """Killed for several rounds and started again from its database: no round is missing and every credit is there, once."""
    async with scenario(3) as swarm:
        await swarm.start(3)
        await swarm.until_round(4)
        await swarm.swarm.stop_coordinator(signal.SIGKILL)
        await swarm.until_rounds_more(6)
        await swarm.restart_coordinator()
        await swarm.until_rounds_more(2)
        await swarm.finish_all()
        assert swarm.missing_rounds() == []
        assert swarm.differing_roots() == []
        assert await swarm.credit() == await swarm.worked()


async def test_a_coordinator_restored_from_a_backup_gets_back_what_it_forgot(scenario: Any) -> None:
    """Its folder is put back to an older copy: peers report again what their receipts prove, and credits are complete."""
    async with scenario(3) as swarm:
        await swarm.start(3)
        await swarm.until_round(3)
        await swarm.swarm.stop_coordinator()
        folder, copy = swarm.swarm.directory / "coordinator", swarm.swarm.directory / "backup"
        shutil.copytree(folder, copy)
        await swarm.restart_coordinator()
        await swarm.until_rounds_more(5)
        await swarm.until(
            lambda: any((peer.directory / "posted").glob("*.pb") for peer in swarm.live()), "reports are posted", 60
        )
        await swarm.swarm.stop_coordinator()
        shutil.rmtree(folder)
        shutil.copytree(copy, folder)
        await swarm.restart_coordinator()
        await swarm.until_rounds_more(3)
        await swarm.finish_all()
        assert max(map(last_round, swarm.peers.values())) > 8
        assert await swarm.credit() == await swarm.worked()
