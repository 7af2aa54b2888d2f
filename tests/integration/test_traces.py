"""The rounds of real peers as a collector sees them."""

from __future__ import annotations

from pathlib import Path

import pytest

from swarm.identity import Identity
from swarm.local import LocalSwarm
from tests.collector import Received, collecting
from tests.runs import make_run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

ROUNDS = 4


async def test_rounds_are_traced_from_training_to_receipt(tmp_path: Path) -> None:
    """Each round is a span with its number; inside are training, exchange, merge and report, down to the coordinator's commit."""
    run = make_run(tmp_path / "run", total=ROUNDS, peers=1)
    identity = Identity.generate()
    with collecting() as collector:
        environment = {
            **collector.environment,
            "SWARM_TRACES": "true",
            "SWARM_COORDINATOR_TRACES": "true",
            "SWARM_COORDINATOR_TRACES_OF": identity.peer_id,
        }
        async with LocalSwarm(tmp_path / "swarm", environment) as swarm:
            await swarm.start_coordinator(run.path, run.owner_key)
            identity.save(swarm.directory / "peer" / "identity.key")
            peer = await swarm.join("peer", "--files", str(run.files))
            assert await peer.wait(200) == 0, peer.log()[-3000:]
        rounds = collector.named("round", "swarm-peer")
        assert [each.attributes["swarm.round"] for each in rounds] == list(range(ROUNDS + 1))

        def inside(outer: Received) -> list[Received]:
            return sorted(
                (each for each in collector.spans if each.inside(outer)), key=lambda each: each.span.start_time_unix_nano
            )

        for each in rounds[1:]:
            steps = inside(each)
            assert [step.name for step in steps] == ["training", "exchange", "merge", "report"]
            assert {step.attributes["swarm.round"] for step in steps} == {each.attributes["swarm.round"]}
            (call,) = inside(steps[-1])
            assert (call.service, call.attributes["rpc.method"]) == ("swarm-coordinator", "SubmitReport")
            assert {"check_signatures", "group_commit"} == {step.name for step in inside(call)}
