"""Peers of the last release, and of a later one, with the coordinator as it is, over TLS."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from coordinator.server import Coordinator
from swarm.credits import verify_ledger
from swarm.protocol import OURS, Range, Version
from swarm.rpc.v1.ledger_pb2 import LedgerEntry, Report
from swarm.rpc.v1.signed_pb2 import Commit
from tests.coordinator.conftest import Serve, connected
from tests.world import World

ROOT = Path(__file__).resolve().parents[2]
CLIENT = Path(__file__).with_name("released_client.py")
ADDED = {
    "message Announcement {": "string motto = 2000;",
    "message AnnounceResponse {": "string motto = 2000;",
    "message Commit {": "string motto = 2000;",
}


def compiled(sources: Path, folder: Path) -> Path:
    """Python modules of a wire, in a package that doesn't get in the way of ours."""
    made = folder / "made"
    package = folder / "stubs" / "released"
    made.mkdir()
    package.mkdir(parents=True)
    names = sorted(str(path.relative_to(sources)) for path in (sources / "swarm").rglob("*.proto"))
    outputs = [f"--python_out={made}", f"--grpc_python_out={made}"]
    command = [sys.executable, "-m", "grpc_tools.protoc", f"-I{sources}", *outputs, *names]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    (package / "__init__.py").touch()
    for path in (made / "swarm" / "v1").iterdir():
        (package / path.name).write_text(re.sub(r"\bfrom swarm\.v1 import\b", "from released import", path.read_text()))
    return package.parent


@pytest.fixture
def released(tmp_path: Path) -> Path:
    """The wire of the last release."""
    return compiled(ROOT / "proto" / "released", tmp_path)


@pytest.fixture
def later(tmp_path: Path) -> Path:
    """The wire of a release to come, with a field more here and there."""
    sources = tmp_path / "proto"
    shutil.copytree(ROOT / "proto" / "swarm", sources / "swarm")
    for path in sources.rglob("*.proto"):
        text = path.read_text()
        for heading, field in ADDED.items():
            text = text.replace(heading, f"{heading}\n  {field}\n")
        path.write_text(text)
    return compiled(sources, tmp_path)


async def told(stubs: Path, coordinator: Coordinator, number: int, extra: dict[str, Any] | None = None) -> dict[str, Any]:
    """What a client made of such stubs is told by the coordinator."""
    address, run = f"127.0.0.1:{coordinator.listen.port}", coordinator.journal.run_id.hex()
    seed, certificate = number.to_bytes(32, "big").hex(), coordinator.state_folder / "tls.crt"
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, str(CLIENT), str(stubs), address, str(certificate), run, seed, repr(extra) if extra else ""),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    out, err = await asyncio.wait_for(process.communicate(), 60)
    assert process.returncode == 0, err.decode()
    answer: dict[str, Any] = json.loads(out)
    return answer


async def entries_of(coordinator: Coordinator) -> list[bytes]:
    """The whole ledger."""
    async with connected(coordinator) as client:
        return [entry async for entry in client.entries()]


@pytest.mark.parametrize("newest", [OURS.newest, Version(2, 0)], ids=str)
async def test_a_peer_of_the_last_release_earns(serve: Serve, world: World, released: Path, newest: Version) -> None:
    """It joins, hands in a round, has a receipt for it and sees its credits, however new a coordinator is that still knows it."""
    async with serve() as coordinator:
        coordinator.journal.spoken = Range(OURS.oldest, newest)
        answer = await told(released, coordinator, 7)
        entries = await entries_of(coordinator)
        counted = coordinator.metrics.announcements_total.labels("1.0")._value.get()
    assert answer["admitted"] == answer["peer_id"]
    assert (answer["run_state"], answer["kept"], answer["rounds"]) == ("running", True, 1)
    assert answer["receipt"] == answer["report"]
    assert answer["entries"] == ["run_opened", "admitted", "proposed", "reported", "confirmed"]
    balance = verify_ledger(entries, coordinator.identity.peer_id).balances(world.run_id)[answer["peer_id"]]
    assert balance.rounds == 1
    assert counted == 1


async def test_a_peer_of_a_later_release_earns(serve: Serve, later: Path) -> None:
    """What it says in fields that we don't know stays in what it has signed, byte for byte, and harms nothing else."""
    async with serve() as coordinator:
        extra = {"protocol": ((1, 1), (1, 9)), "motto": "all together now"}
        answer = await told(later, coordinator, 8, extra)
        entries = await entries_of(coordinator)
    assert (answer["admitted"], answer["kept"], answer["rounds"]) == (answer["peer_id"], True, 1)
    verify_ledger(entries, coordinator.identity.peer_id)
    opened = [LedgerEntry.FromString(entry) for entry in entries]
    report = next(entry.reported for entry in opened if entry.HasField("reported"))
    commit = Report.FromString(report.payload).commit
    assert b"all together now" in commit.payload
    assert Commit.FromString(commit.payload).weight == 4


async def test_peers_out_of_reach_are_refused_by_name(serve: Serve, released: Path) -> None:
    """The last release is told that it is too old for a coordinator that has given its protocol up, and nothing is written."""
    async with serve() as coordinator:
        coordinator.journal.spoken = Range(Version(2, 0), Version(2, 1))
        answer = await told(released, coordinator, 7)
        assert len(coordinator.journal.tree) == 1
    assert (answer["reason"], answer["code"]) == ("protocol_too_old", "FAILED_PRECONDITION")
    assert answer["details"].startswith("this client's protocol is older")


async def test_peers_from_a_far_future_are_refused_by_name(serve: Serve, later: Path) -> None:
    """A peer that doesn't speak anything as old as this coordinator is told so when it announces itself."""
    async with serve() as coordinator:
        answer = await told(later, coordinator, 8, {"protocol": ((7, 0), (8, 2))})
        assert len(coordinator.journal.tree) == 1
    assert (answer["reason"], answer["code"]) == ("protocol_too_new", "FAILED_PRECONDITION")
