"""Runs that many tests share: made once per session, trained by real processes, ended with the session."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from swarm.local import LocalSwarm
from tests.runs import LiveRun, LoopThread, Run, make_run
from tests.waiting import eventually

START_S = 150.0


@pytest.fixture(scope="session")
def small_run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run that never ends, with a model that trains a round in a fraction of a second."""
    return make_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="session")
def two_peer_run(small_run: Run, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveRun]:
    """A coordinator and two peers that have finished a few rounds and go on training."""
    loop = LoopThread()
    live = LiveRun(small_run, LocalSwarm(tmp_path_factory.mktemp("swarm")), [])
    try:
        loop.run(_start(live), START_S)
        yield live
    finally:
        loop.run(live.swarm.close())
        loop.close()


async def _start(live: LiveRun) -> None:
    await live.swarm.start_coordinator(live.run.path, live.run.owner_key)
    for name in ("peer-0", "peer-1"):
        await live.swarm.join(name, "--files", str(live.run.files))

    async def trained() -> bool:
        ended = [(peer.name, peer.log()[-2000:]) for peer in live.swarm.peers if not peer.running]
        assert ended == []
        return all([(await peer.status()).get("rounds", 0) >= 2 for peer in live.swarm.peers])

    await eventually(trained, "two rounds", START_S - 10)
    live.metrics_urls = [live.swarm.metrics, *[(await peer.status())["metrics"] for peer in live.swarm.peers]]
