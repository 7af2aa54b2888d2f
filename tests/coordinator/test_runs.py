"""Several runs behind one address: each has its own ledger, credits, operator's orders and metrics."""

from __future__ import annotations

import os
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import grpc
import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from coordinator.server import Coordinator, RunLinks, run_name
from swarm.clock import ManualClock
from swarm.config import CoordinatorSettings
from swarm.errors import NotAdmitted, UnknownRun, UsageError
from swarm.rpc.admin import AdminClient
from swarm.rpc.client import CHANNEL_OPTIONS, CoordinatorClient
from swarm.rpc.v1.coordinator_pb2 import GetRunRequest
from swarm.rpc.v1.coordinator_pb2_grpc import PeerServiceStub
from tests.world import NOW_S, World, identity, manifest

ALICE, BOB, ADMIN = identity(0), identity(1), identity(500)
ONE, OTHER = World(manifest(name="one")), World(manifest(name="other"))


def settings(folder: Path, **changes: object) -> CoordinatorSettings:
    """Everything on ports that the system chooses."""
    addresses = {"listen": "127.0.0.1:0", "metrics": "127.0.0.1:0", "admin_listen": "127.0.0.1:0", "admin_keys": ADMIN.peer_id}
    return CoordinatorSettings(**({"state_dir": folder} | addresses | changes))


@asynccontextmanager
async def both(folder: Path) -> AsyncIterator[Coordinator]:
    """A coordinator of both runs."""
    manifests = [world.signed_manifest for world in (ONE, OTHER)]
    async with Coordinator.serve(manifests, settings(folder), ManualClock(NOW_S)) as coordinator:
        yield coordinator


@asynccontextmanager
async def of_run(run: RunLinks) -> AsyncIterator[CoordinatorClient]:
    """A client with a run's join link."""
    async with await CoordinatorClient.connect(run.link, timeout_s=10) as client:
        yield client


async def play(client: CoordinatorClient, world: World) -> None:
    """Alice joins a run and earns in one round."""
    await client.announce(world.announcement(ALICE))
    proposal, reports = world.round([ALICE], 0)
    await client.submit_report(reports[0], proposal)


async def test_each_run_has_a_ledger_of_its_own(tmp_path: Path) -> None:
    """What is earned in one run shows in that run only, also after a restart; both are reached at one address."""
    async with both(tmp_path) as coordinator:
        one, other = coordinator.runs
        assert (one.name, other.name) == ("one", "other")
        assert one.link.address == other.link.address
        async with of_run(one) as client, of_run(other) as elsewhere:
            assert [(await each.get_run()).manifest.name for each in (client, elsewhere)] == ["one", "other"]
            await play(client, ONE)
            assert (await client.credits(ALICE.peer_id)).balances[0].tokens > 0
            assert (await elsewhere.credits(ALICE.peer_id)).balances[0].tokens == 0
            proposal, reports = OTHER.round([BOB], 0)
            with pytest.raises(NotAdmitted):
                await elsewhere.submit_report(reports[0], proposal)
            assert len([entry async for entry in client.entries()]) == 5
            assert len([entry async for entry in elsewhere.entries()]) == 1
    async with both(tmp_path) as again, of_run(again.runs[0]) as client, of_run(again.runs[1]) as elsewhere:
        assert (await client.credits(ALICE.peer_id)).balances[0].tokens > 0
        assert (await elsewhere.progress()).ledger_size == 1


async def test_a_run_joins_one_that_is_served_already(tmp_path: Path) -> None:
    """Folders don't depend on the order in which the runs are named, so that one can be added later."""
    async with both(tmp_path) as coordinator, of_run(coordinator.runs[1]) as client:
        await play(client, OTHER)
    third = World(manifest(name="third"))
    manifests = [world.signed_manifest for world in (OTHER, third, ONE)]
    serving = Coordinator.serve(manifests, settings(tmp_path), ManualClock(NOW_S))
    async with serving as coordinator, of_run(coordinator.runs[0]) as client:
        assert (await client.credits(ALICE.peer_id)).balances[0].tokens > 0


async def test_messages_for_another_run_are_refused(tmp_path: Path) -> None:
    """A message that was signed for one run is worth nothing in another, whatever run the call names."""
    async with both(tmp_path) as coordinator:
        one, other = coordinator.runs
        async with of_run(one) as client:
            await client.get_run()
            with pytest.raises(UnknownRun):
                await client.announce(OTHER.announcement(ALICE))
        stranger = World(manifest(name="stranger"))
        async with of_run(replace(one, link=replace(one.link, run_id=stranger.run_id))) as client:
            with pytest.raises(UnknownRun):
                await client.get_run()
        async with of_run(other) as client:
            await client.announce(OTHER.announcement(ALICE))


async def test_a_call_that_names_no_run_is_for_the_first(tmp_path: Path) -> None:
    """So that peers of earlier versions go on after a run has been added."""
    async with both(tmp_path) as coordinator:
        certificate = (coordinator.state_folder / "tls.crt").read_bytes()
        credentials = grpc.ssl_channel_credentials(certificate)
        async with grpc.aio.secure_channel(str(coordinator.listen), credentials, options=CHANNEL_OPTIONS) as channel:
            answer = await PeerServiceStub(channel).GetRun(GetRunRequest(), timeout=10)
    assert answer.run_id == ONE.run_id


async def test_the_operator_steers_one_run_and_sees_all(tmp_path: Path) -> None:
    """A pause of one run leaves the other; `runs` lists both."""
    async with both(tmp_path) as coordinator:
        one, other = coordinator.runs
        assert other.admin_link is not None
        async with await AdminClient.connect(other.admin_link, timeout_s=10) as admin:
            assert [run.name for run in (await admin.execute(ADMIN, NOW_S, action="pause")).runs] == ["other"]
            listed = (await admin.execute(ADMIN, NOW_S, action="runs")).runs
        assert {run.name: run.state for run in listed} == {"one": "running", "other": "paused"}
        async with of_run(one) as client:
            await client.announce(ONE.announcement(ALICE))


async def test_metrics_say_of_which_run_they_are(tmp_path: Path) -> None:
    """A run's metrics carry its name; those of calls and of the process are the coordinator's."""
    async with both(tmp_path) as coordinator, of_run(coordinator.runs[1]) as client:
        await play(client, OTHER)
        async with httpx.AsyncClient() as web:
            text = (await web.get(f"http://{coordinator.metrics_address}/metrics")).text
    families = {family.name: family for family in text_string_to_metric_families(text)}
    entries = {sample.labels["run"]: sample.value for sample in families["swarm_coordinator_ledger_entries"].samples}
    assert sorted(entries.values()) == [1, 5]
    assert all("run" not in sample.labels for sample in families["swarm_coordinator_calls"].samples)
    assert len(families["swarm_coordinator_build_info"].samples) == 1


async def test_each_run_has_its_pages(tmp_path: Path) -> None:
    """The first page lists the runs; each has all pages below its own path, and none links to another's."""
    async with both(tmp_path) as coordinator, of_run(coordinator.runs[1]) as client:
        await play(client, OTHER)
        address = f"http://{coordinator.metrics_address}"
        async with httpx.AsyncClient(base_url=address, follow_redirects=True) as web:
            listed = (await web.get("/")).text
            paths = [f"/run/{run_name(run.run_id)}" for run in coordinator.runs]
            assert all(f'<a href="{path}/">' in listed for path in paths)
            for page in ("/", "/leaderboard", "/ledger", "/ledger/0", "/audits", "/badges", f"/account/{ALICE.peer_id}"):
                answer = await web.get(paths[1] + page)
                assert answer.status_code == 200, page
                links = re.findall(r'(?:href|src|action)="(/[^"]*)"', answer.text)
                assert [link for link in links if not link.startswith(paths[1])] == []
            assert (await web.get(f"{paths[1]}/account", params={"id": ALICE.peer_id})).url.path.startswith(paths[1])
            assert (await web.get(f"{paths[1]}/api/ledger/4")).status_code == 200
            assert (await web.get(f"{paths[0]}/api/ledger/4")).status_code == 404


async def test_several_runs_in_one_database_are_refused(tmp_path: Path) -> None:
    """Each needs its own: the URL says where the run's name belongs."""
    manifests = [world.signed_manifest for world in (ONE, OTHER)]
    with pytest.raises(UsageError, match="several runs in one database"):
        async with Coordinator.serve(manifests, settings(tmp_path, db=f"sqlite:///{tmp_path / 'all.db'}")):
            pass
    named = settings(tmp_path, db=f"sqlite:///{tmp_path}/{{run}}.db")
    async with Coordinator.serve(manifests, named, ManualClock(NOW_S)) as coordinator:
        assert len(coordinator.runs) == 2
    assert len([name for name in os.listdir(tmp_path) if name.endswith(".db")]) == 2
    with pytest.raises(UsageError, match="named twice"):
        async with Coordinator.serve(manifests[:1] * 2, settings(tmp_path)):
            pass
