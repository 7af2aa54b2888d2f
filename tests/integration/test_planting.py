"""Auditors that don't look, among real peers: planted contributions find them out."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from peer.recipes import tiny_manifest
from swarm.identity import Identity
from swarm.local import LocalPeer, LocalSwarm
from swarm.manifest import Audit, Manifest
from swarm.messages import JoinLink
from swarm.rpc.client import CoordinatorClient
from swarm.scenario import write_run
from tests.disturbed import program
from tests.waiting import eventually

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

PEERS = 3


async def test_who_passes_what_it_never_looked_at_is_suspended(tmp_path: Path) -> None:
    """p1 lets everything pass, p2 sends made-up leaves: both others of three are asked about them, so p1 is found out at once.

    It is suspended by its own signature, which the planter and p0 have checked; p0 is not.
    """
    files = tmp_path / "files"
    files.mkdir()
    values = tiny_manifest(files, PEERS).model_dump(mode="json")
    values["strategy"]["inner_state"] = "fresh"
    values["audit"] = Audit().model_dump(mode="json")
    path, key = write_run(tmp_path, Manifest.model_validate(values))
    async with LocalSwarm(tmp_path / "swarm") as swarm:
        await swarm.start_coordinator(path, key)

        peers = dict[str, LocalPeer]()

        async def join(name: str, what: str = "", **environment: str) -> str:
            peer = peers[name] = await swarm.join(
                name, "--files", str(files), environment=environment, program=program(what) if what else ()
            )
            await eventually(lambda: asyncio.to_thread((peer.directory / "identity.key").exists), "a key")
            return Identity.load(peer.directory / "identity.key").peer_id

        honest = {await join("p0")}
        lazy = await join("p1", "rubber_stamp")
        planter = await join("p2", SWARM_PLANT="true")
        async with await CoordinatorClient.connect(JoinLink.parse(swarm.link)) as client:

            async def caught() -> bool:
                suspended = set((await client.list_audits("")).suspended)
                assert not suspended & honest
                assert suspended <= {planter, lazy}
                return lazy in suspended

            await eventually(caught, "the auditor that doesn't look is suspended", 120)
        proven = {event["accused"]: event["kind"] for event in peers["p0"].events("proven")}
        assert proven == {lazy: "false_pass"}
