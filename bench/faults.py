"""What one peer's misfortune costs the others: stalls after kills, joining, downloads over real links, and random faults."""

from __future__ import annotations

import asyncio
import importlib.util
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from itertools import chain
from pathlib import Path

from bench import hosts, report
from bench.children import Child, child
from bench.hosts import MBIT, Link
from bench.report import Report
from peer.recipes import demo_manifest, tiny_manifest
from swarm.local import LocalPeer, LocalSwarm
from swarm.manifest import Manifest
from swarm.mishaps import Processes, break_things
from swarm.scenario import Scenario, growth, last_contribution, last_round, soak, write_run

STALL_PEERS, STALL_KILLS, STALL_KILLS_QUICK = 4, 7, 3
JOIN_PEERS, JOINS, JOINS_QUICK = 4, 3, 1
JOIN_INNER_STEPS = 3
YIELDING = ("env", "SWARM_GOVERNOR_NICE=10")  # the daemon's usual courtesy, which LocalSwarm turns off
BLOBS, BLOB_BYTES = 24, 1 << 20
FAULT_PEERS, FAULT_ROUNDS, FAULT_ROUNDS_QUICK = 5, 500, 100
TORCHFT_KILLS, TORCHFT_KILLS_QUICK = 3, 1
TORCHFT_PARAMETERS, TORCHFT_STEP_S = 100_000, 0.2
TORCHFT_STEPS_BEFORE, TORCHFT_STEPS_AFTER = 10, 3
SOAK_PEERS, SOAK_ROUNDS, SOAK_ROUNDS_QUICK, SOAK_WARM_UP, SOAK_SAMPLES = 3, 300, 60, 30, 15
START_S, ROUND_S = 180.0, 120.0
SEED = 20


@asynccontextmanager
async def running(manifest: Manifest, folder: Path, peers: int, prefix: Sequence[str] = ()) -> AsyncIterator[Scenario]:
    """A swarm in `folder`, whose `run/files` hold the manifest's files; `prefix` stands before each peer's command."""
    write_run(folder / "run", manifest)
    async with LocalSwarm(folder / "swarm") as swarm:
        scenario = Scenario(swarm, folder / "run")
        await scenario.start(peers, prefix=prefix)
        yield scenario


async def stall(bench: Report) -> None:
    """Kill one of four peers during the exchange; the others' longest round then, less the median of their rounds before."""
    with tempfile.TemporaryDirectory(prefix="swarm-faults-") as name:
        folder = Path(name)
        manifest = tiny_manifest(folder / "run" / "files", STALL_PEERS)
        async with running(manifest, folder, STALL_PEERS) as swarm:
            await swarm.until_round(12, timeout_s=START_S)
            stalls = [await _kill_one(bench, swarm, index) for index in range(bench.choose(STALL_KILLS, STALL_KILLS_QUICK))]
    how = f"{len(stalls)} kills -9 of one of {STALL_PEERS} peers while it exchanges: the others' longest round less their median"
    bench.figure("stall_after_kill9_p50_s", statistics.median(stalls), how, "<= 1")


async def _kill_one(bench: Report, swarm: Scenario, index: int) -> float:
    name = sorted(swarm.peers)[-1]
    victim = swarm.peers[name]
    others = [peer for peer in swarm.live() if peer is not victim]
    while (await victim.status()).get("state") != "exchanging":
        pass  # every answer comes over the control socket, which lets others run
    killed_in = max(map(last_round, others))
    await swarm.kill(name)
    await swarm.until_round(killed_in + 4, others, ROUND_S)
    walls = [line for peer in others for line in peer.history()]
    usual = statistics.median(line["wall_s"] for line in walls if killed_in - 10 < line["round"] < killed_in)
    longest = max(line["wall_s"] for line in walls if killed_in <= line["round"] <= killed_in + 4)
    bench.row("stalls", kill=index, round=killed_in, usual_round_s=usual, longest_round_s=longest, stall_s=longest - usual)
    del swarm.peers[name]
    swarm.retired.append(victim)
    await swarm.join(f"q{index}")
    await swarm.until(lambda: _contributed(swarm.peers[f"q{index}"]), "the newcomer contributes", START_S)
    return float(longest - usual)


async def torchft_stall(bench: Report) -> None:
    """The same with torchft: a lighthouse, four replica groups over gloo, one killed in its step, timeouts of its example."""
    if importlib.util.find_spec("torchft") is None:
        bench.row("torchft", note="torchft is not installed: pip install -e .[bench]")
        return
    kills = bench.choose(TORCHFT_KILLS, TORCHFT_KILLS_QUICK)
    stalls = [await _torchft_kill(bench, index) for index in range(kills)]
    how = f"{kills} kills -9 of one of {STALL_PEERS} torchft replica groups during its step: the others' longest step less median"
    bench.figure("torchft_stall_after_kill9_p50_s", statistics.median(stalls), how)


async def _torchft_kill(bench: Report, index: int) -> float:
    with tempfile.TemporaryDirectory(prefix="swarm-faults-") as name:
        log = Path(name) / "log"
        async with AsyncExitStack() as stack:
            lighthouse = await stack.enter_async_context(child("torchft_replica", log, min_replicas=STALL_PEERS - 1))
            address = (await lighthouse.receive(START_S))["address"]
            groups = [
                await stack.enter_async_context(
                    child(
                        "torchft_replica",
                        log,
                        lighthouse_address=address,
                        name=f"group-{number}",
                        min_replicas=STALL_PEERS - 1,
                        parameters=TORCHFT_PARAMETERS,
                        step_s=TORCHFT_STEP_S,
                    )
                )
                for number in range(STALL_PEERS)
            ]
            async with asyncio.timeout(START_S):
                steps = await asyncio.gather(*(_steps_with_all(group) for group in groups))
            await asyncio.sleep(TORCHFT_STEP_S / 2)
            groups[-1].process.kill()
            after = await asyncio.gather(*(_next_steps(group, TORCHFT_STEPS_AFTER) for group in groups[:-1]))
    usual, longest = statistics.median(chain.from_iterable(steps)), max(chain.from_iterable(after))
    bench.row("torchft", kill=index, usual_step_s=usual, longest_step_s=longest, stall_s=longest - usual)
    return float(longest - usual)


async def _steps_with_all(group: Child) -> list[float]:
    """Seconds of a group's steps in which all groups took part."""
    seconds: list[float] = []
    while len(seconds) < TORCHFT_STEPS_BEFORE:
        said = await group.receive(START_S)
        if said["replicas"] == STALL_PEERS:
            seconds.append(said["seconds"])
    return seconds


async def _next_steps(group: Child, count: int) -> list[float]:
    """Seconds of its next steps."""
    return [(await group.receive(START_S))["seconds"] for _ in range(count)]


async def joining(bench: Report) -> None:
    """Join four peers with rounds of about 2 s; the time from starting the command to the first counted contribution.

    Elsewhere a newcomer has a machine of its own; here the four give way to it as the daemon gives way to its machine's user.
    """
    with tempfile.TemporaryDirectory(prefix="swarm-faults-") as name:
        folder = Path(name)
        manifest = demo_manifest(
            folder / "run" / "files", peers=JOIN_PEERS, inner_steps=JOIN_INNER_STEPS, rounds=10_000, layers=5
        )
        taken = []
        async with running(manifest, folder, JOIN_PEERS, YIELDING) as swarm:
            await swarm.until_round(3, timeout_s=START_S)
            for index in range(bench.choose(JOINS, JOINS_QUICK)):
                started = time.monotonic()
                newcomer = await swarm.join(f"n{index}")
                await swarm.until(lambda peer=newcomer: _contributed(peer), "the newcomer contributes", START_S)  # type: ignore[misc]
                taken.append(time.monotonic() - started)
                rounds_s = statistics.median(line["wall_s"] for line in swarm.peers["p0"].history()[-5:])
                bench.row("joins", join=index, seconds=taken[-1], round_s=rounds_s, missing_rounds=len(swarm.missing_rounds()))
                await newcomer.ask("finish")
                await newcomer.wait(60)
    how = (
        f"`swarm join` of a {manifest.model.parameters:,} parameter model, {JOIN_PEERS} peers on the same cores at lower priority"
    )
    bench.figure("join_to_first_round_s", statistics.median(taken), how, "<= 12")


async def downloads(bench: Report) -> None:
    """Download from other hosts over shaped links, hashes checked."""
    problem = hosts.unavailable()
    if problem:
        raise RuntimeError(problem)
    one = await _download(bench, 1, Link(up_bit_s=50 * MBIT), Link(), [1])
    bits = BLOBS * BLOB_BYTES * 8
    how = f"{BLOBS} MiB from one host with 50 Mbit/s up, payload bits over link bits"
    bench.figure("state_download_link_fraction", bits / one[0] / (50 * MBIT), how, ">= 0.85")
    several = await _download(bench, 4, Link(up_bit_s=20 * MBIT), Link(down_bit_s=100 * MBIT), [1, 4])
    how = f"{BLOBS} MiB, hosts with 20 Mbit/s up each, 100 Mbit/s down: time from one source over time from four"
    bench.figure("state_download_speedup_4_sources", several[0] / several[1], how, ">= 3")


async def _download(bench: Report, count: int, up: Link, down: Link, source_counts: list[int]) -> list[float]:
    with tempfile.TemporaryDirectory(prefix="swarm-faults-") as name, hosts.hosts([up] * count + [down]) as made:
        log = Path(name) / "log"
        async with AsyncExitStack() as stack:
            sources = []
            for host in made[:count]:
                server = child(
                    "transfer_peer", log, prefix=host.prefix, blobs=BLOBS, blob_bytes=BLOB_BYTES, address=host.address, seed=SEED
                )
                sources.append(await (await stack.enter_async_context(server)).receive(START_S))
            client = child(
                "download_peer",
                log,
                prefix=made[-1].prefix,
                address=made[-1].address,
                sources=sources,
                blob_bytes=BLOB_BYTES,
                source_counts=source_counts,
            )
            downloader = await stack.enter_async_context(client)
            seconds = []
            for _ in source_counts:
                said = await downloader.receive(START_S)
                seconds.append(said["seconds"])
                rate = BLOBS * BLOB_BYTES * 8 / said["seconds"] / MBIT
                bench.row("downloads", sources=said["sources"], seconds=said["seconds"], mbit_s=rate, failed=len(said["failed"]))
    return seconds


async def random_faults(bench: Report) -> None:
    """Several hundred rounds with five peers and a fault every few rounds, drawn by seed; then the invariants."""
    wanted = bench.choose(FAULT_ROUNDS, FAULT_ROUNDS_QUICK)
    processes = Processes()
    with tempfile.TemporaryDirectory(prefix="swarm-faults-") as name:
        folder = Path(name)
        manifest = tiny_manifest(folder / "run" / "files", FAULT_PEERS)
        async with running(manifest, folder, FAULT_PEERS) as swarm:
            await swarm.until_round(3, timeout_s=START_S)
            async for mishap in break_things(swarm, wanted, SEED, processes):
                bench.row("faults", **vars(mishap))
            await swarm.finish_all()
            differing, wrong = swarm.differing_roots(), await swarm.wrong_credits()
            for round_index in differing:
                bench.row("differing", round=round_index, roots=sorted(root[:12] for root in swarm.roots()[round_index]))
            for peer, (credit, earned) in wrong.items():
                bench.row("credits", peer=peer, credit=credit, earned=earned)
            bench.figure("fault_rounds", len(swarm.roots()), f"rounds with {FAULT_PEERS} peers and random faults", f">= {wanted}")
            bench.figure("rounds_lost", len(swarm.missing_rounds()), "rounds that no peer finished", "== 0")
            bench.figure("roots_differing", len(differing), "rounds after which two peers' roots differ", "== 0")
            bench.figure("credits_lost_or_doubled", len(wrong), "peers whose credit isn't that of their signed reports", "== 0")
    how = "processes of the swarm, p2pd included, alive after its end"
    bench.figure("leftover_processes", len(processes.left()), how, "== 0")


async def soaking(bench: Report) -> None:
    """Several hundred rounds without faults: what a peer takes of its machine must not grow."""
    rounds = bench.choose(SOAK_ROUNDS, SOAK_ROUNDS_QUICK)
    with tempfile.TemporaryDirectory(prefix="swarm-faults-") as name:
        folder = Path(name)
        async with running(tiny_manifest(folder / "run" / "files", SOAK_PEERS), folder, SOAK_PEERS) as swarm:
            await swarm.until_round(SOAK_WARM_UP, timeout_s=START_S)
            seen = await soak(swarm, rounds, SOAK_SAMPLES)
    for peer, footprints in seen.items():
        for taken in (footprints[0], footprints[-1]):
            bench.row("footprint", peer=peer, **vars(taken))

    def worst(field: str) -> float:
        return max(growth([int(getattr(taken, field)) for taken in footprints]) for footprints in seen.values())

    how = f"largest growth of {SOAK_PEERS} peers over {rounds} rounds, last third of the samples less first"
    bench.figure("soak_memory_growth_mb", worst("memory_bytes") / 1e6, how)
    bench.figure("soak_descriptors_growth", worst("descriptors"), how)
    bench.figure("soak_threads_growth", worst("threads"), how)


def _contributed(peer: LocalPeer) -> bool:
    return last_contribution(peer) >= 0


def main() -> int:
    """Run the sections."""
    sections = {
        "stall": stall,
        "torchft": torchft_stall,
        "joining": joining,
        "downloads": downloads,
        "faults": random_faults,
        "soak": soaking,
    }
    return report.run("faults", __doc__ or "", sections)


if __name__ == "__main__":
    sys.exit(main())
