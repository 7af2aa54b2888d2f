"""What one peer's misfortune costs the others: stalls after kills, joining, downloads over real links, and random faults."""

from __future__ import annotations

import asyncio
import random
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import psutil

from bench import hosts, report
from bench.children import child
from bench.hosts import MBIT, Link
from bench.report import Report
from peer.recipes import demo_manifest, tiny_manifest
from swarm.local import LocalPeer, LocalSwarm
from swarm.manifest import Manifest
from swarm.messages import parse
from swarm.rpc.v1.coordinator_pb2 import SubmitReportRequest
from swarm.rpc.v1.ledger_pb2 import Report as LedgerReport
from swarm.rpc.v1.signed_pb2 import Commit
from swarm.scenario import Scenario, last_round, write_run

STALL_PEERS, STALL_KILLS, STALL_KILLS_QUICK = 4, 7, 3
JOIN_PEERS, JOINS, JOINS_QUICK = 4, 3, 1
JOIN_INNER_STEPS = 8
BLOBS, BLOB_BYTES = 24, 1 << 20
FAULT_PEERS, FAULT_ROUNDS, FAULT_ROUNDS_QUICK = 5, 500, 100
ROUNDS_BETWEEN_FAULTS = 6
FROZEN_S = 3.0
START_S, ROUND_S = 180.0, 120.0
SEED = 20


@asynccontextmanager
async def running(manifest: Manifest, folder: Path, peers: int) -> AsyncIterator[Scenario]:
    """A swarm in `folder`, whose `run/files` hold the manifest's files."""
    write_run(folder / "run", manifest)
    async with LocalSwarm(folder / "swarm") as swarm:
        scenario = Scenario(swarm, folder / "run")
        await scenario.start(peers)
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
    victim.signal(signal.SIGKILL)
    await victim.wait(10)
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


async def joining(bench: Report) -> None:
    """Join four peers with rounds of about 2 s; the time from starting the command to the first counted contribution."""
    with tempfile.TemporaryDirectory(prefix="swarm-faults-") as name:
        folder = Path(name)
        manifest = demo_manifest(
            folder / "run" / "files", peers=JOIN_PEERS, inner_steps=JOIN_INNER_STEPS, rounds=10_000, layers=5
        )
        taken = []
        async with running(manifest, folder, JOIN_PEERS) as swarm:
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
    how = f"`swarm join` of a {manifest.model.parameters:,} parameter model, {JOIN_PEERS} peers on the same cores; median"
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
    processes: dict[int, psutil.Process] = {}
    with tempfile.TemporaryDirectory(prefix="swarm-faults-") as name:
        folder = Path(name)
        manifest = tiny_manifest(folder / "run" / "files", FAULT_PEERS)
        async with running(manifest, folder, FAULT_PEERS) as swarm:
            await swarm.until_round(3, timeout_s=START_S)
            await _break_things(bench, swarm, wanted, processes)
            await _finish_all(swarm)
            rounds = swarm.roots()
            doubled = await _wrong_credits(swarm, manifest)
            bench.figure("fault_rounds", len(rounds), f"rounds with {FAULT_PEERS} peers and random faults", f">= {wanted}")
            bench.figure("rounds_lost", len(swarm.missing_rounds()), "rounds that no peer finished", "== 0")
            bench.figure("roots_differing", len(swarm.differing_roots()), "rounds after which two peers' roots differ", "== 0")
            bench.figure("credits_lost_or_doubled", doubled, "peers whose credit isn't that of their signed reports", "== 0")
    left = sum(1 for process in processes.values() if process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    bench.figure("leftover_processes", left, "processes of the swarm, p2pd included, alive after its end", "== 0")


async def _break_things(bench: Report, swarm: Scenario, wanted: int, processes: dict[int, psutil.Process]) -> None:
    """One fault at a time, so that a quorum is always alive; what was killed comes back."""
    draw = random.Random(SEED)
    while len(swarm.roots()) < wanted:
        _note_processes(swarm, processes)
        victim = swarm.peers[draw.choice(sorted(swarm.peers))]
        kind = draw.choice(("kill", "kill", "freeze", "network", "coordinator"))
        await asyncio.sleep(draw.random() * 0.5)
        started, before = time.monotonic(), max(map(last_round, swarm.live()))
        others = [peer for peer in swarm.live() if peer is not victim]
        await _harm(swarm, victim, kind)
        await swarm.until_round(before + ROUNDS_BETWEEN_FAULTS, others, ROUND_S)
        seconds = time.monotonic() - started
        bench.row("faults", kind=kind, victim=victim.name, after_round=before, rounds=ROUNDS_BETWEEN_FAULTS, seconds=seconds)
        if kind == "kill":
            await swarm.join(victim.name)
        returned = swarm.peers[victim.name]
        newest = max(map(last_round, others))
        await swarm.until(lambda peer=returned, after=newest: last_round(peer) > after, f"{victim.name} is back", ROUND_S)  # type: ignore[misc]


async def _harm(swarm: Scenario, victim: LocalPeer, kind: str) -> None:
    match kind:
        case "kill":
            victim.signal(signal.SIGKILL)
            await victim.wait(10)
        case "freeze":
            victim.signal(signal.SIGSTOP)
            await asyncio.sleep(FROZEN_S)
            victim.signal(signal.SIGCONT)
        case "network":
            for process in psutil.Process(victim.process.pid).children():
                process.kill()
        case "coordinator":
            await swarm.swarm.stop_coordinator(signal.SIGKILL)
            await asyncio.sleep(FROZEN_S)
            await swarm.swarm.start_coordinator(
                swarm.source / "run.yaml", swarm.source / "owner.key", listen=f"{swarm.link.host}:{swarm.link.port}"
            )


async def _finish_all(swarm: Scenario) -> None:
    """Everybody completes a round and posts what is left."""
    for peer in swarm.live():
        await peer.ask("finish")
    for peer in swarm.peers.values():
        await peer.wait(ROUND_S)


async def _wrong_credits(swarm: Scenario, manifest: Manifest) -> int:
    """How many peers' balances differ from the sum of the reports that they have signed."""
    credit = await swarm.credit()
    per_sample = manifest.data.sequence_length * manifest.credit.flops_per_token
    wrong = 0
    for name, peer in swarm.peers.items():
        reports = [*peer.directory.glob("posted/*.pb"), *peer.directory.glob("outbox/*.pb"), *peer.directory.glob("refused/*.pb")]
        earned = sum(_reported_weight(path) for path in reports) * per_sample
        wrong += credit.get(swarm.identity(name).peer_id, 0) != earned
    return wrong


def _reported_weight(path: Path) -> int:
    request = parse(SubmitReportRequest, path.read_bytes())
    claim = parse(LedgerReport, request.report.payload)
    return parse(Commit, claim.commit.payload).weight


def _note_processes(swarm: Scenario, processes: dict[int, psutil.Process]) -> None:
    for peer in swarm.live():
        process = psutil.Process(peer.process.pid)
        for each in (process, *process.children(recursive=True)):
            processes[each.pid] = each


def _contributed(peer: LocalPeer) -> bool:
    return any(line["weight"] for line in peer.history())


def main() -> int:
    """Run the sections."""
    sections = {"stall": stall, "joining": joining, "downloads": downloads, "faults": random_faults}
    return report.run("faults", __doc__ or "", sections)


if __name__ == "__main__":
    sys.exit(main())
