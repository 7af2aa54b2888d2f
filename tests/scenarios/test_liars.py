"""Whoever lies to a newcomer about the state is named and avoided."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from peer.recipes import demo_manifest
from swarm.local import LocalPeer, LocalSwarm
from swarm.scenario import FINISH_S, Scenario, last_contribution, last_round, write_run
from tests.disturbed import program
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
