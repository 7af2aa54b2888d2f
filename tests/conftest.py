"""Runs that many tests share: made once per session, trained by real processes, ended with the session."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from hypothesis import settings

from swarm.local import LocalPeer, LocalSwarm
from tests.forked import SERVER
from tests.runs import LiveRun, LoopThread, Run, Sharing, make_run
from tests.waiting import eventually

settings.register_profile("fuzz", print_blob=True, deadline=None)  # make fuzz
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")  # a change is judged by itself, not by the luck of the draw

START_S = 170.0
YIELDING = {"SWARM_GOVERNOR_NICE": "5"}


@pytest.fixture(scope="session", autouse=True)
def forked_processes() -> Iterator[None]:
    """What tests start through `swarm.local` is forked from a process that has loaded everything, and not loaded anew."""
    SERVER.take_over()
    try:
        yield
    finally:
        SERVER.close()


@pytest.fixture(scope="session")
def small_run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run that never ends, with a model that trains a round in a fraction of a second."""
    return make_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="session")
def two_peer_run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveRun]:
    """A coordinator and two peers that have finished a few rounds and go on training; one for all of xdist's workers."""
    base = tmp_path_factory.getbasetemp()
    worker = os.environ.get("PYTEST_XDIST_WORKER", "")
    loop = LoopThread()
    swarm = LocalSwarm(tmp_path_factory.mktemp("swarm"))

    def start() -> LiveRun:
        return loop.run(_start(swarm, request.getfixturevalue("small_run")), START_S)

    def stop() -> None:
        loop.run(swarm.close())

    try:
        with Sharing((base.parent if worker else base) / "live", worker or "only").use(start, stop) as live:
            yield live
    finally:
        loop.close()


async def _start(swarm: LocalSwarm, run: Run) -> LiveRun:
    await swarm.start_coordinator(run.path, run.owner_key)
    for name in ("peer-0", "peer-1"):
        await swarm.join(name, "--files", str(run.files), environment=YIELDING)
    await eventually(lambda: _trained(swarm.peers), "two rounds", START_S - 10)
    statuses = [await peer.status() for peer in swarm.peers]
    return LiveRun(
        run,
        swarm.link,
        [swarm.metrics, *(status["metrics"] for status in statuses)],
        [peer.directory for peer in swarm.peers],
        [status["pid"] for status in statuses],
    )


async def _trained(peers: list[LocalPeer]) -> bool:
    assert [peer.log()[-2000:] for peer in peers if not peer.running] == []
    return all([(await peer.status()).get("rounds", 0) >= 2 for peer in peers])
