"""What a run's operator orders, and what the peers do: pause, go on, end."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from swarm.local import LocalPeer, LocalSwarm
from swarm.scenario import last_round
from tests.runs import make_run, run_command
from tests.waiting import eventually

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


async def state_of(peer: LocalPeer) -> str:
    """A peer's state, as `swarm status` has it."""
    return str((await peer.status())["state"])


async def test_pause_resume_finish(tmp_path: Path) -> None:
    """Paused, both peers complete their round and rest; resumed they train on; finished they post everything and end with 0."""
    run = make_run(tmp_path / "run")
    key = tmp_path / "admin.key"
    made = json.loads((await run_command("admin", "key", "--key", str(key), "--json")).out)["admin"]
    environment = {"SWARM_COORDINATOR_ADMIN_LISTEN": "127.0.0.1:0", "SWARM_COORDINATOR_ADMIN_KEYS": made}
    environment |= {"SWARM_COORDINATOR_PRESENCE_TTL_S": "6"}
    async with LocalSwarm(tmp_path / "swarm", environment) as swarm:
        await swarm.start_coordinator(run.path, run.owner_key)

        async def order(action: str) -> None:
            outcome = await run_command("admin", action, "--key", str(key), "--link", swarm.admin)
            assert outcome.code == 0, outcome.err

        peers = [await swarm.join(name, "--files", str(run.files)) for name in ("peer-0", "peer-1")]

        async def all_are(state: str) -> bool:
            return all([await state_of(peer) == state for peer in peers])

        def past(number: int) -> bool:
            return all(peer.running and last_round(peer) > number for peer in peers)

        await eventually(lambda: past(3), "rounds", 120)
        await order("pause")
        await eventually(lambda: all_are("run_paused"), "the pause", 60)
        rested = max(map(last_round, peers))
        await order("resume")
        for peer in peers:
            assert (await run_command("resume", "--dir", str(peer.directory))).code == 0
        await eventually(lambda: past(rested + 3), "rounds after the pause", 120)
        await order("finish")
        for peer in peers:
            assert await peer.wait(60) == 0, peer.log()[-3000:]
            status = await peer.status()
            assert (status["state"], status["reports_waiting"]) == ("run_complete", 0)
