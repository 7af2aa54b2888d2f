"""What has a receipt survives a hard kill: a real process, killed with SIGKILL while it works."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import sys
import time
from asyncio.subprocess import PIPE, Process
from pathlib import Path

from swarm.errors import CoordinatorUnreachable
from swarm.ledger import LedgerReader, verify_receipt
from swarm.messages import JoinLink
from swarm.rpc.client import CoordinatorClient
from swarm.rpc.v1.signed_pb2 import Signed
from tests.waiting import eventually
from tests.world import World, identity

ROOT = Path(__file__).resolve().parents[2]
PEERS = [identity(number) for number in range(3)]
START_TIMEOUT_S = 30
ENOUGH_RECEIPTS = 60


async def start(folder: Path, listen: str, state: str = "state", *options: str) -> tuple[Process, JoinLink]:
    """Start `swarm coordinator` and wait for its one line of JSON."""
    command = [
        "coordinator",
        "--run",
        str(folder / "run.signed"),
        "--state-dir",
        str(folder / state),
        "--listen",
        listen,
        "--json",
        *options,
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HOME": str(folder)}
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "swarm.cli.main", *command, stdout=PIPE, stderr=PIPE, env=environment
    )
    assert process.stdout is not None
    line = await asyncio.wait_for(process.stdout.readline(), START_TIMEOUT_S)
    if not line:
        raise AssertionError((await process.communicate())[1].decode())
    return process, JoinLink.parse(json.loads(line)["link"])


async def report_until_unreachable(link: JoinLink, world: World, receipts: list[Signed], enough: asyncio.Event) -> None:
    """Report round after round until the coordinator is gone; tell when there are enough receipts."""
    async with await CoordinatorClient.connect(link, timeout_s=5) as client:
        for number in range(10_000):
            proposal, reports = world.round(PEERS, number)
            try:
                receipts += await asyncio.gather(*(client.submit_report(report, proposal) for report in reports))
            except CoordinatorUnreachable:
                return
            if len(receipts) >= ENOUGH_RECEIPTS:
                enough.set()


async def test_receipts_survive_a_kill(tmp_path: Path, world: World) -> None:
    """Every receipt that was handed out before the kill is in the ledger afterwards, and the same report gets it again."""
    (tmp_path / "run.signed").write_bytes(world.signed_manifest.SerializeToString())
    process, link = await start(tmp_path, "127.0.0.1:0")
    async with await CoordinatorClient.connect(link) as client:
        for peer in PEERS:
            await client.announce(world.announcement(peer, time.time()))
    receipts: list[Signed] = []
    enough = asyncio.Event()
    reporting = asyncio.create_task(report_until_unreachable(link, world, receipts, enough))
    await asyncio.wait_for(enough.wait(), 30)
    process.send_signal(signal.SIGKILL)
    await process.communicate()
    await asyncio.wait_for(reporting, 30)

    process, again = await start(tmp_path, link.address)
    assert again == link
    async with await CoordinatorClient.connect(again) as client:
        run = await client.get_run()
        checkpoint, _, _ = await client.checkpoint()
        reader = LedgerReader()
        reader.extend([entry async for entry in client.entries(0, checkpoint.size)])
        reader.check_checkpoint(checkpoint)
        for receipt in receipts:
            reader.check_receipt(verify_receipt(receipt, run.coordinator))
        proposal, reports = world.round(PEERS, 0)
        assert await client.submit_report(reports[0], proposal) in receipts
    process.send_signal(signal.SIGTERM)
    await asyncio.wait_for(process.communicate(), 30)
    assert process.returncode == 0


async def test_receipts_survive_a_killed_replica(tmp_path: Path, world: World, postgres: str) -> None:
    """Of two replicas the writer is killed; the other one takes over, has every entry of a receipt, and gives new ones."""
    (tmp_path / "run.signed").write_bytes(world.signed_manifest.SerializeToString())
    writer, first = await start(tmp_path, "127.0.0.1:0", "state", "--db", postgres)
    shutil.copytree(tmp_path / "state", tmp_path / "other")
    follower, second = await start(tmp_path, "127.0.0.1:0", "other", "--db", postgres)
    async with await CoordinatorClient.connect(first) as client:
        for peer in PEERS:
            await client.announce(world.announcement(peer, time.time()))
    receipts: list[Signed] = []
    enough = asyncio.Event()
    reporting = asyncio.create_task(report_until_unreachable(second, world, receipts, enough))
    await asyncio.wait_for(enough.wait(), 60)
    writer.send_signal(signal.SIGKILL)
    await writer.communicate()
    await reporting
    async with await CoordinatorClient.connect(second) as client:
        proposal, reports = world.round(PEERS, 0)
        again = await eventually(lambda: _receipt(client, reports[0], proposal), "the follower takes over")
        assert again in receipts
        reader = LedgerReader()
        reader.extend([entry async for entry in client.entries()])
        coordinator = (await client.get_run()).coordinator
    for receipt in receipts:
        reader.check_receipt(verify_receipt(receipt, coordinator))
    follower.send_signal(signal.SIGTERM)
    await asyncio.wait_for(follower.communicate(), 30)
    assert follower.returncode == 0


async def _receipt(client: CoordinatorClient, report: Signed, proposal: Signed) -> Signed | None:
    try:
        return await client.submit_report(report, proposal)
    except CoordinatorUnreachable:
        return None
