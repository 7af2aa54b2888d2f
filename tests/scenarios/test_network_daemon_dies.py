"""libp2p's daemon lives and dies with us, and its death alone is survived."""

from __future__ import annotations

import signal
from typing import Any

import psutil
import pytest

from tests.runs import alive
from tests.waiting import eventually

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


def p2pd_of(peer: Any) -> psutil.Process:
    """The network daemon of a peer."""
    return next(child for child in psutil.Process(peer.process.pid).children() if "p2pd" in child.name())


async def test_p2pd_ends_with_a_peer_that_is_killed(scenario: Any) -> None:
    """When the peer's process is killed hard, its p2pd is gone within two seconds, and the others go on without it."""
    async with scenario(3) as swarm:
        await swarm.start(3)
        await swarm.until_round(3)
        daemon = p2pd_of(swarm.peers["p2"])
        swarm.peers["p2"].signal(signal.SIGKILL)
        await swarm.peers["p2"].wait(10)
        await eventually(lambda: not alive([daemon]), "p2pd's end", 2)
        await swarm.until_rounds_more(3)
        assert all(line["roster_size"] == 2 for line in swarm.peers["p0"].history()[-1:])


async def test_the_network_is_rebuilt_when_p2pd_dies(scenario: Any) -> None:
    """p2pd is killed: the peer's process goes on, starts another one, and contributes again."""
    async with scenario(3) as swarm:
        await swarm.start(3)
        await swarm.until_round(3)
        pid = swarm.peers["p2"].process.pid
        p2pd_of(swarm.peers["p2"]).kill()
        newest = swarm.peers["p0"].history()[-1]["round"]

        def contributes() -> bool:
            return any(line["weight"] and line["round"] > newest + 2 for line in swarm.peers["p2"].history())

        await swarm.until(contributes, "p2 contributes again", 90)
        assert swarm.peers["p2"].process.pid == pid
        assert swarm.peers["p2"].running
        assert swarm.differing_roots() == []
        assert swarm.missing_rounds() == []
