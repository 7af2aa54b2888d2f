"""Account keys against a running coordinator, and on the command line."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from coordinator.server import Coordinator
from swarm.accounts import CERTIFICATE_SUFFIX, DAY_S, hold
from swarm.cli.main import run
from swarm.clock import ManualClock
from swarm.config import CoordinatorSettings
from swarm.errors import NotAdmitted
from swarm.rpc.client import CoordinatorClient
from swarm.rpc.v1.ledger_pb2 import LedgerEntry
from swarm.rpc.v1.signed_pb2 import Signed
from tests.swarm.test_accounts import ACCOUNT, DESKTOP, LAPTOP, PEERS, STRANGER, WORLD, held
from tests.world import NOW_S


def test_against_a_coordinator(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Announced with a certificate, which expires, is renewed, and is revoked on the command line; the ledger verifies."""
    settings = CoordinatorSettings(listen="127.0.0.1:0", state_dir=home / "state", db="memory://")
    clock = ManualClock(NOW_S)
    ACCOUNT.save(home / "account.key")

    async def announce(client: CoordinatorClient, certificate: Signed | None) -> Any:
        more = {} if certificate is None else {"held": certificate}
        return await client.announce(WORLD.announcement(LAPTOP, clock.wall_s(), **more))

    async def work() -> None:
        async with Coordinator.serve([WORLD.signed_manifest], settings, clock) as coordinator:
            link = str(coordinator.link)
            async with await CoordinatorClient.connect(coordinator.link) as client:
                await announce(client, None)
                await announce(client, held(LAPTOP, days=2))
                await announce(client, held(LAPTOP, days=2))
                for peer in (DESKTOP, STRANGER):
                    await client.announce(WORLD.announcement(peer))
                proposal, reports = WORLD.round(PEERS, 0)
                for report in reports:
                    await client.submit_report(report, proposal)
                balance = (await client.credits(ACCOUNT.peer_id)).balances[0]
                assert (balance.account, balance.rounds) == (ACCOUNT.peer_id, 1)
                clock.advance(3 * DAY_S)
                for certificate in (None, held(LAPTOP, days=2)):
                    with pytest.raises(NotAdmitted, match="certify the key anew"):
                        await announce(client, certificate)
                await announce(client, held(LAPTOP, days=9))
                code = await asyncio.to_thread(
                    run, ["identity", "revoke", LAPTOP.peer_id, link, "--path", "account.key", "--json"]
                )
                assert code == 0
                with pytest.raises(NotAdmitted, match="revoked"):
                    await announce(client, held(LAPTOP, days=20))
                wrong = ["identity", "revoke", DESKTOP.peer_id, link, "--path", "account.key"]
                assert await asyncio.to_thread(run, wrong) == 14
                assert await asyncio.to_thread(run, ["ledger", "verify", link, "--json"]) == 0
                entries = [LedgerEntry.FromString(raw).WhichOneof("body") async for raw in client.entries()]
                assert (entries.count("admitted"), entries.count("revoked")) == (5, 1)

    asyncio.run(work())
    said = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert said[0] == {"account": ACCOUNT.peer_id, "peer_id": LAPTOP.peer_id, "revoked": True, "before": False}


def test_certify_on_the_command_line(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What it writes is what a machine holds."""
    ACCOUNT.save(home / "account.key")
    to = f"identity{CERTIFICATE_SUFFIX}"
    assert run(["identity", "certify", LAPTOP.peer_id, "--path", "account.key", "--to", to, "--days", "7", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["account"] == ACCOUNT.peer_id
    assert hold(LAPTOP, home / to) is not None
    assert run(["identity", "certify", "laptop", "--path", "account.key", "--to", to]) == 2
    assert "not a peer id" in capsys.readouterr().err
