"""The page, its headers, metrics and health."""

from __future__ import annotations

import re

import httpx
import pytest

from coordinator.orders import Orders
from coordinator.server import Coordinator
from coordinator.web import credits_text
from swarm.clock import ManualClock
from swarm.credits import Balance
from swarm.errors import Rejected
from swarm.ledger import origin_of, verify_checkpoint
from tests.coordinator.conftest import Serve, connected
from tests.world import NOW_S, World, identity, manifest

PEERS = [identity(number) for number in range(3)]
ALICE = PEERS[0]


async def get(coordinator: Coordinator, path: str) -> httpx.Response:
    """Fetch a path from the coordinator's page."""
    async with httpx.AsyncClient() as client:
        return await client.get(f"http://{coordinator.metrics_address}{path}")


async def test_page_shows_progress_and_leaderboard(serve: Serve, world: World) -> None:
    """The page shows the run, the join command, who earned what and the checkpoint, and allows no script."""
    async with serve(ManualClock(NOW_S), metrics="127.0.0.1:0") as coordinator, connected(coordinator) as client:
        empty = await get(coordinator, "/")
        assert "Nobody has contributed yet" in empty.text
        await client.announce(world.announcement(ALICE))
        proposal, reports = world.round([ALICE], 0)
        await client.submit_report(reports[0], proposal)
        page = await get(coordinator, "/")
        note = await get(coordinator, "/checkpoint")
        style = await get(coordinator, "/style.css")
    assert ALICE.peer_id in page.text
    assert f"swarm join {coordinator.link}" in page.text
    assert "0.256" in page.text
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert "<script" not in page.text
    assert style.headers["content-type"].startswith("text/css")
    verify_checkpoint(note.text, origin_of(world.run_id), coordinator.identity.peer_id)


async def test_what_strangers_write_is_escaped(serve: Serve) -> None:
    """Text from a manifest can't become markup."""
    world = World(manifest(description="<script>alert(1)</script>"))
    async with serve(ManualClock(NOW_S), world, metrics="127.0.0.1:0") as coordinator:
        page = await get(coordinator, "/")
    assert "<script>" not in page.text
    assert "&lt;script&gt;" in page.text


async def test_metrics(serve: Serve, world: World) -> None:
    """Every promised metric is exposed, with the work that was done."""
    async with serve(ManualClock(NOW_S), metrics="127.0.0.1:0") as coordinator, connected(coordinator) as client:
        await client.announce(world.announcement(ALICE))
        proposal, reports = world.round([ALICE], 0)
        await client.submit_report(reports[0], proposal)
        text = (await get(coordinator, "/metrics")).text
    values = dict(re.findall(r"^swarm_coordinator_(\S+) (\S+)$", text, re.MULTILINE))
    assert values["ledger_entries"] == "5.0"
    assert values['reports_total{outcome="confirmed"}'] == "1.0"
    assert values['admissions_total{outcome="admitted"}'] == "1.0"
    assert values["tokens_verified_total"] == "256.0"
    assert float(values["flops_verified_total"]) == 256e12
    assert values["train_loss_nats"] == "2.5"
    assert values['request_duration_seconds_count{method="SubmitReport"}'] == "1.0"
    assert values['calls_total{code="OK",method="SubmitReport"}'] == "1.0"
    assert (values["queue_events"], values["calls_in_progress"], values["writer"]) == ("0.0", "0.0", "1.0")
    assert [values[f'suspended_keys{{by="{by}"}}'] for by in ("audits", "operator")] == ["0.0", "0.0"]
    assert re.search(r"^process_resident_memory_bytes \S+$", text, re.MULTILINE)
    assert float(values["commit_duration_seconds_count"]) == 2
    assert 'build_info{version="0.1.0"}' in values


async def test_audits_and_suspensions_are_measured(serve: Serve) -> None:
    """What was drawn, what is open, and at which rate; a refused call counts by its status."""
    world = World(manifest(audit={"rate": 0.25, "first": 2}))
    async with serve(ManualClock(NOW_S), world, metrics="127.0.0.1:0") as coordinator, connected(coordinator) as client:
        for peer in PEERS:
            await client.announce(world.announcement(peer))
        proposal, reports = world.round(PEERS, 0)
        for report in reports:
            await client.submit_report(report, proposal)
        coordinator.journal.orders = Orders(suspended={ALICE.peer_id: "tests"})
        with pytest.raises(Rejected, match="suspended"):
            await client.announce(world.announcement(ALICE, NOW_S + 1))
        text = (await get(coordinator, "/metrics")).text
    values = dict(re.findall(r"^swarm_coordinator_(\S+) (\S+)$", text, re.MULTILINE))
    audits = ("audits_drawn_total", "audits_open", "audits_overdue", "audit_ratio")
    assert [values[name] for name in audits] == ["3.0", "3.0", "0.0", "0.25"]
    assert values['suspended_keys{by="operator"}'] == "1.0"
    assert values['calls_total{code="PERMISSION_DENIED",method="Announce"}'] == "1.0"


async def test_health(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """Health is what the ledger's writer says."""
    async with serve(metrics="127.0.0.1:0") as coordinator:
        assert (await get(coordinator, "/healthz")).status_code == 200
        monkeypatch.setattr(coordinator.journal, "_behind", True)
        assert (await get(coordinator, "/healthz")).status_code == 503
        assert (await get(coordinator, "/nothing")).status_code == 404


def test_credits_are_rounded_down() -> None:
    """Nobody is shown more than they have."""
    assert credits_text(Balance("a", "a", verified_flops=1_999_999_999_999_999)) == "1.999"


async def test_account_page(serve: Serve, world: World) -> None:
    """An account's page shows what it has and why it isn't earning, step by step; what isn't a peer id has no page."""
    async with serve(ManualClock(NOW_S), metrics="127.0.0.1:0") as coordinator, connected(coordinator) as client:
        path = f"/account/{ALICE.peer_id}"
        assert "never admitted" in (await get(coordinator, path)).text
        await client.announce(world.announcement(ALICE))
        assert "train yet" in (await get(coordinator, path)).text
        proposal, reports = world.round([ALICE], 0)
        await client.submit_report(reports[0], proposal)
        await client.announce(world.announcement(ALICE, state="training", round=1))
        page = await get(coordinator, path)
        assert "Nothing is in the way" in page.text
        assert "0.256" in page.text
        assert f'href="{path}"' in (await get(coordinator, "/")).text
        coordinator.journal.presence.forget(ALICE.peer_id)
        assert "Nothing was heard" in (await get(coordinator, path)).text
        for nobody in ("/account/nobody", "/account/%3Cscript%3E"):
            assert (await get(coordinator, nobody)).status_code == 404
