"""Whoever lies to a newcomer about the state is named and avoided."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from peer.recipes import demo_manifest
from swarm.local import LocalPeer, LocalSwarm
from swarm.scenario import FINISH_S, Scenario, last_contribution, last_round, write_run
from tests.disturbed import program
from tests.runs import run_command
from tests.waiting import eventually

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


async def waits_for_others(peer: LocalPeer) -> bool:
    """Whether a peer has begun the run, so that newcomers get their state from it."""
    return (await peer.status()).get("state") == "gathering"


async def join_beside_a_liar(swarm: Scenario, lie: str, rounds: int) -> tuple[list[LocalPeer], LocalPeer]:
    """p0 and p1 are honest, p2 isn't; after some rounds n0 comes and contributes. The honest ones, and the newcomer."""
    await swarm.start(1)
    await eventually(lambda: waits_for_others(swarm.peers["p0"]), "the honest peer begins the run")
    await swarm.join("p1")
    await swarm.join("p2", program=program(lie))
    honest = [swarm.peers["p0"], swarm.peers["p1"]]
    await swarm.until_round(rounds, honest)
    newcomer = await swarm.join("n0")
    await swarm.until(lambda: last_contribution(newcomer) >= 0, "the newcomer contributes", 90)
    return honest, newcomer


@pytest.mark.parametrize(("lie", "reason"), [("wrong_chunks", "wrong_bytes"), ("endless", "too_large")])
async def test_a_donor_that_sends_wrong_bytes_is_named(tmp_path: Path, lie: str, reason: str) -> None:
    """p1 trains honestly but serves wrong chunks, or an endless one: a newcomer gets the state from p0 and names p1.

    The state has several chunks, and p0 takes its time for each, so that p1 has sent something before p0 has sent everything.
    """
    folder = tmp_path / "run"
    manifest = demo_manifest(
        folder / "files", sequence_length=32, data_bytes=400_000, peers=2, rounds=10_000, inner_steps=1, hidden_size=256, layers=1
    )
    write_run(folder, manifest)
    async with LocalSwarm(tmp_path / "swarm") as local:
        swarm = Scenario(local, folder)
        await swarm.start(0)
        honest = await swarm.join("p0", program=program("slow_donor"))
        await eventually(lambda: waits_for_others(honest), "the honest peer begins the run")
        await swarm.join("p1", program=program(lie))
        await swarm.until_round(3)
        newcomer = await swarm.join("n0")
        await swarm.until(lambda: last_contribution(newcomer) >= 0, "the newcomer contributes", 90)
        dropped = {line["source"]: line["reason"] for line in newcomer.events("source_dropped")}
        assert dropped == {swarm.identity("p1").peer_id: reason}
        assert swarm.differing_roots() == []
        assert swarm.missing_rounds() == []


async def test_a_peer_that_signs_another_root_convinces_nobody(scenario: Any) -> None:
    """p2 signs a root that isn't its state's: nobody repairs towards it, a newcomer takes the majority's, it earns nothing."""
    async with scenario(3) as swarm:
        honest, newcomer = await join_beside_a_liar(swarm, "wrong_root", 4)
        await swarm.until_round(last_round(newcomer) + 2, [*honest, newcomer])
        assert [(await peer.status())["repairs"] for peer in [*honest, newcomer]] == [0, 0, 0]
        assert swarm.missing_rounds() == []
        assert swarm.differing_roots() == []
        liar = swarm.peers["p2"]  # leaves first: a round of it and one other has no majority and would stay pending
        await liar.ask("finish")
        await liar.wait(FINISH_S)
        await swarm.finish_all()
        credit = await swarm.credit()
        assert credit.get(swarm.identity("p2").peer_id, 0) == 0
        worked = await swarm.worked()
        for name in ("p0", "p1", "n0"):
            peer = swarm.identity(name).peer_id
            assert credit[peer] == worked[peer] > 0


async def test_a_peer_that_claims_a_later_round_keeps_nobody_out(scenario: Any) -> None:
    """p2 says that the swarm is a million rounds further: a newcomer believes the two others and comes in with them."""
    async with scenario(3) as swarm:
        await join_beside_a_liar(swarm, "far_ahead", 3)
        assert swarm.missing_rounds() == []
        assert swarm.differing_roots() == []


@pytest.mark.parametrize(("lie", "kind"), [("two_merges", "equivocation"), ("rotten_merge", "bad_part")])
async def test_a_reducer_that_tells_each_another_merge_stops_nobody(scenario: Any, lie: str, kind: str) -> None:
    """p2 signs two merges of its span from round 3 on: the others find that out, end at one state, and go on without it."""
    async with scenario(3) as swarm:
        swarm.swarm.environment = {"SWARM_CHECK_TRAFFIC": "0"}
        await swarm.start(2)
        await swarm.join("p2", program=program(lie))
        honest = [swarm.peers["p0"], swarm.peers["p1"]]
        guilty = swarm.identity("p2").peer_id
        proofs = [peer.directory / "evidence" / f"{guilty}.evidence" for peer in honest]
        await swarm.until(lambda: all(proof.exists() for proof in proofs), "a proof with both", 90)
        for proof in proofs:
            outcome = await run_command("evidence", "verify", str(proof), "--json")
            said = json.loads(outcome.out)
            assert (said["accused"], said["kind"], said["proven"]) == (guilty, kind, True)
        await swarm.until(lambda: abs(last_round(honest[0]) - last_round(honest[1])) < 2, "they are at one again", 60)
        await swarm.until_rounds_more(4, honest)

        async def are_the_roster() -> bool:
            return [(await peer.status())["roster_size"] for peer in honest] == [2, 2]

        await eventually(are_the_roster, "both are in, and nobody else", 60)
        await swarm.finish_all()
        newest = max(swarm.roots())
        assert [len(roots) for index, roots in swarm.roots().items() if index > newest - 3] == [1, 1, 1]
        assert swarm.missing_rounds() == []
