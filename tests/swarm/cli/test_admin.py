"""`swarm admin` against a real coordinator."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from coordinator.server import Coordinator
from swarm.cli.main import run
from swarm.config import CoordinatorSettings
from swarm.rpc.client import CoordinatorClient
from tests.world import World, identity

ALICE = identity(0)


async def admin(*arguments: str) -> int:
    """Run a command in a thread, as if in another process; its exit code."""
    return await asyncio.to_thread(run, ["admin", *arguments])


async def test_the_operators_day(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The key is made and shown; every command works against a running coordinator, for people and for programs."""
    world = World()
    assert await admin("key", "--json") == 0
    key = json.loads(capsys.readouterr().out)["admin"]
    settings = CoordinatorSettings(listen="127.0.0.1:0", state_dir=home / "state", admin_listen="127.0.0.1:0", admin_keys=key)
    async with Coordinator.serve([world.signed_manifest], settings) as coordinator:
        link = ("--link", str(coordinator.admin_link))
        async with await CoordinatorClient.connect(coordinator.link) as client:
            await client.announce(world.announcement(ALICE, coordinator.journal.now().wall_s, round=4))
        capsys.readouterr()
        assert await admin("peers", "--json", *link) == 0
        peer = json.loads(capsys.readouterr().out)["peers"][0]
        assert (peer["peer_id"], peer["admitted"], peer["alive"], peer["round"]) == (ALICE.peer_id, True, True, 4)
        for command in (("suspend", ALICE.peer_id, "--reason", "wrong"), ("reinstate", ALICE.peer_id), ("invite", ALICE.peer_id)):
            assert await admin(*command, *link) == 0
            assert ALICE.peer_id[:20] in capsys.readouterr().out  # a narrow terminal folds it
        for command in (("pause",), ("resume",), ("audit-rate", "0.25"), ("runs",)):
            assert await admin(*command, *link) == 0
            assert world.manifest.name in capsys.readouterr().out
        assert await admin("finish", "--json", *link) == 0
        made = json.loads(capsys.readouterr().out)["runs"][0]
        assert (made["run_id"], made["state"], made["audit_rate"]) == (world.run_id.hex(), "finished", 0.25)
        assert await admin("log", "--json", *link) == 0
        actions = [line["action"] for line in json.loads(capsys.readouterr().out)["log"]]
        assert actions == ["finish", "audit-rate", "resume", "pause", "invite", "reinstate", "suspend"]
        assert await admin("log", "--limit", "1", *link) == 0
        assert "finish" in capsys.readouterr().out
        assert await admin("resume", *link) == 1
        assert "the run is finished" in capsys.readouterr().err


async def test_without_link_or_key(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What is missing is named."""
    assert await admin("peers") == 10
    assert "SWARM_ADMIN_LINK" in capsys.readouterr().err
    assert await admin("peers", "--link", "swarm://x") == 2
    assert "swarm admin key" in capsys.readouterr().err
    assert await admin("key") == 0
    assert await admin("peers", "--link", "swarm://x") == 10
