"""A GPU that reports an error costs its own peer a minute, and nobody else anything."""

from __future__ import annotations

from typing import Any

import pytest

from tests.waiting import eventually

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


async def test_a_peer_whose_gpu_failed_begins_anew(scenario: Any) -> None:
    """p2's training fails as after a CUDA error: it says so, rests, starts a fresh process under its id, and trains again."""
    async with scenario(3) as swarm:
        await swarm.start(3, faults={"p2": "at round 4 after training: break_device"})
        peer = swarm.peers["p2"]

        async def has_failed() -> bool:
            return bool((await peer.status()).get("state") == "gpu_failed")

        await eventually(has_failed, "the failure", 60)
        status = await peer.status()
        assert "unspecified launch failure" in status["detail"]
        assert status["ends_by_itself"]
        before, pid = status["rounds"], peer.process.pid
        await peer.ask("resume")

        async def trains_again() -> bool:
            assert peer.running, peer.log()[-3000:]
            return bool((await peer.status()).get("rounds", 0) > before)

        await eventually(trains_again, "training again", 120)
        assert peer.process.pid == pid
        assert swarm.missing_rounds() == []
        assert swarm.differing_roots() == []
