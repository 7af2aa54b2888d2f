"""Peers of several releases meet at one coordinator: who has a protocol in common trains, and the others say why they don't."""

from __future__ import annotations

from pathlib import Path

import pytest

from coordinator.server import Coordinator
from swarm.config import CoordinatorSettings
from swarm.local import LocalSwarm
from swarm.protocol import Range, Version
from tests.disturbed import program
from tests.runs import make_run
from tests.waiting import eventually
from tests.world import sign_manifest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


async def test_peers_of_several_releases(tmp_path: Path) -> None:
    """A coordinator that speaks 1.0 to 2.1 lets all in but 3.0, which ends with its exit code; 1.x trains on, with 1.1 to 2.0.

    2.0 gets no place in the roster of 1.x, says so and disturbs nobody.
    """
    run = make_run(tmp_path / "run", peers=1)
    settings = CoordinatorSettings(listen="127.0.0.1:0", state_dir=tmp_path / "coordinator")
    async with Coordinator.serve([sign_manifest(run.manifest)], settings) as coordinator, LocalSwarm(tmp_path / "swarm") as swarm:
        coordinator.journal.spoken = Range(Version(1, 0), Version(2, 1))
        swarm.link = str(coordinator.link)

        async def rounds(name: str) -> int:
            peer = next(peer for peer in swarm.peers if peer.name == name)
            assert peer.running, peer.log()[-2000:]
            return int((await peer.status()).get("rounds", 0))

        async def trains(name: str, more: int) -> None:
            wanted = await rounds(name) + more

            async def reached() -> bool:
                return await rounds(name) >= wanted

            await eventually(reached, f"{more} more rounds of {name}", 120)

        await swarm.join("old", "--files", str(run.files))
        await trains("old", 1)
        await swarm.join("between", "--files", str(run.files), program=program("speaks:1.1-2.0"))
        stranger = await swarm.join("new", "--files", str(run.files), program=program("speaks:2.0-2.1"))
        future = await swarm.join("future", "--files", str(run.files), program=program("speaks:3.0-3.0"))

        async def says_why() -> bool:
            return (await stranger.status()).get("state") == "protocol_mismatch"

        await eventually(says_why, "the newer peer's reason", 120)
        assert await future.wait(120) == 16
        assert "protocol" in future.log()
        for name in ("old", "between"):
            await trains(name, 2)
        assert (await stranger.status())["rounds"] == 0
        assert (await stranger.status())["state"] == "protocol_mismatch"
