"""A reducer that merges wrongly is proven guilty by the others, and plays no more."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from peer.rounds.planning import leader_of
from swarm.rpc.client import CoordinatorClient
from swarm.scenario import Scenario
from tests.runs import run_command

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

HONEST = ("p0", "p1", "p2")


def proofs(swarm: Scenario, name: str) -> list[Path]:
    """What a peer has kept."""
    return sorted((swarm.peers[name].directory / "evidence").glob("*.evidence"))


async def test_a_tampering_reducer_is_convicted(scenario: Callable[[int], Any]) -> None:
    """p3 merges with the wrong sign for some rounds. A proof is found, reaches everybody, and p3 alone is left out."""
    async with scenario(4) as swarm:
        script = "; ".join(f"at round {number} after proposal: tamper" for number in range(4, 40))
        swarm.swarm.environment = {"SWARM_CHECK_TRAFFIC": "100"}
        await swarm.start(4, faults={"p3": script})
        guilty = swarm.identity("p3").peer_id
        await swarm.until(lambda: all(proofs(swarm, name) for name in HONEST), "a proof with everybody", 120)
        for name in HONEST:
            assert [path.stem for path in proofs(swarm, name)] == [guilty]
            outcome = await run_command("evidence", "verify", str(proofs(swarm, name)[0]), "--json")
            assert outcome.code == 0, outcome.err
            said = json.loads(outcome.out)
            assert (said["accused"], said["kind"], said["proven"]) == (guilty, "wrong_merge", True)
            assert said["round"] >= 4
        await swarm.until_rounds_more(4, [swarm.peers[name] for name in HONEST])
        statuses = [await swarm.peers[name].status() for name in HONEST]
        assert [status["roster_size"] for status in statuses] == [3, 3, 3]
        async with await CoordinatorClient.connect(swarm.link) as client:
            assert list((await client.list_audits(guilty)).suspended) == [guilty]
        assert swarm.differing_roots() == []
        assert swarm.missing_rounds() == []


async def test_a_leader_that_commits_to_rubbish_is_replaced(scenario: Callable[[int], Any]) -> None:
    """The first round's leader sends parts that nobody can decode, and would wait for itself: the next one goes on at once."""
    async with scenario(3) as swarm:
        await swarm.swarm.start_coordinator(swarm.source / "run.yaml", swarm.source / "owner.key")
        names = {swarm.identity(name).peer_id: name for name in ("p0", "p1", "p2")}
        guilty = leader_of(swarm.link.run_id, 1, sorted(names), 0)
        for name in names.values():
            await swarm.join(name, prefix=("env", "SWARM_ATTACK=nan") if name == names[guilty] else ())
        honest = [peer for name, peer in swarm.peers.items() if name != names[guilty]]
        await swarm.until_round(6, honest)
        kept = [[path.stem for path in (peer.directory / "evidence").glob("*.evidence")] for peer in honest]
        assert kept == [[guilty], [guilty]]
        statuses = [await peer.status() for peer in honest]
        assert [status["roster_size"] for status in statuses] == [2, 2]
        assert swarm.missing_rounds() == []


async def test_honest_merges_prove_nothing(scenario: Callable[[int], Any]) -> None:
    """Every round checked by everybody, with a peer that dies and one that joins: no evidence against anybody."""
    async with scenario(3) as swarm:
        swarm.swarm.environment = {"SWARM_CHECK_TRAFFIC": "100"}
        await swarm.start(3)
        await swarm.until_round(6)
        await swarm.kill("p2")
        await swarm.until_rounds_more(3)
        await swarm.join("p2")
        await swarm.until_rounds_more(6, timeout_s=180)
        assert [proofs(swarm, name) for name in ("p0", "p1", "p2")] == [[], [], []]
        checked = [swarm.peers[name].log().count("merge_checked") for name in ("p0", "p1")]
        assert min(checked) > 3
