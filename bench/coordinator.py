"""The coordinator under load: signed reports a second, latency, memory, restart and pages, beside a bare gRPC echo server."""

from __future__ import annotations

import asyncio
import signal
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import psutil

from bench import big_ledger, report
from bench.children import Child, child
from bench.echo_server import METHOD as ECHO_METHOD
from bench.load_generator import read_answers, write_lines
from bench.report import Report, quantile
from bench.signed_rounds import announcement, identity, round_of, sealer, sign_manifest, tiny_manifest
from coordinator.snapshot import EVERY_ENTRIES as SNAPSHOT_EVERY
from coordinator.snapshot import SNAPSHOT_FILE, Source, make
from coordinator.store.sql import SqlStore
from coordinator.tls import CERTIFICATE_FILE, KEY_FILE
from swarm.identity import Identity
from swarm.ledger import verify_receipt
from swarm.local import LocalSwarm
from swarm.messages import JoinLink, payload_hash
from swarm.protocol import MAX_REPORTS
from swarm.rpc.client import CoordinatorClient
from swarm.rpc.v1.coordinator_pb2 import (
    AnnounceRequest,
    SubmitReportRequest,
    SubmitReportResponse,
    SubmitReportsRequest,
    SubmitReportsResponse,
)
from swarm.rpc.v1.signed_pb2 import Signed

OWNER = 10**9
ACCOUNTS, ENTRIES = (100_000, 2_000), (1_000_000, 20_000)
RESTARTS, PAGE_VIEWS = 3, 50
CUTS, CUT_LIMIT_S, SEED = (2_000, 50), 3.0, 20
ANNOUNCE_METHOD = "/swarm.v1.PeerService/Announce"
REPORT_METHOD = "/swarm.v1.PeerService/SubmitReport"
REPORTS_METHOD = "/swarm.v1.PeerService/SubmitReports"
PEERS, GENERATORS = 64, 2
IN_FLIGHT_PER_PEER = 4
PHASES = {
    "warm": (60, 20),
    "full": (600, 120),
    "half": (300, 60),
    "waited": (1200, 120),
}  # rounds of 32 reports, and as many in a quick measurement
LIMIT_S = 300.0
SETTLE_S, IDLE_S = 1.0, 0.05
RECEIPTS_CHECKED = 400
FREE_ADDRESS = {
    f"SWARM_COORDINATOR_{name}": "1000000" for name in ("CALLS_PER_ADDRESS_PER_S", "CALLS_PER_KEY_PER_S", "MAX_CALLS_PER_ADDRESS")
}


@dataclass
class Loaded:
    """What the generators found."""

    answered: int
    failures: dict[str, int]
    seconds: float
    processor_s: float
    latencies_s: list[float]
    answers: list[bytes]

    @property
    def per_s(self) -> float:
        """Answers a second."""
        return self.answered / self.seconds


@dataclass
class Site:
    """A coordinator process with its folder and keys."""

    folder: Path
    swarm: LocalSwarm
    link: JoinLink
    run_id: bytes

    @property
    def certificate(self) -> Path:
        """The TLS certificate."""
        return self.folder / "swarm" / "coordinator" / CERTIFICATE_FILE

    @property
    def process(self) -> psutil.Process:
        """The coordinator's process."""
        if self.swarm.coordinator is None:
            raise RuntimeError("the coordinator is not running")
        return psutil.Process(self.swarm.coordinator.pid)


@asynccontextmanager
async def coordinator(folder: Path) -> AsyncIterator[Site]:
    """A coordinator that takes any number of calls from one address."""
    owner = identity(OWNER)
    signed = sign_manifest(tiny_manifest(), owner)
    run = folder / "run.signed"
    run.write_bytes(signed.SerializeToString())
    owner_key = folder / "owner.key"
    if not owner_key.exists():
        owner.save(owner_key)
    async with LocalSwarm(folder / "swarm", FREE_ADDRESS) as swarm:
        link = JoinLink.parse(await swarm.start_coordinator(run, owner_key, "--log-level", "warning"))
        yield Site(folder, swarm, link, payload_hash(signed))


async def reports(bench: Report) -> None:
    """Reports one by one, as fast as they are answered and at half that rate, beside an echo server; then many in a call."""
    peers = sorted((identity(number) for number in range(PEERS)), key=lambda peer: peer.peer_id)
    rounds = [bench.choose(*PHASES[name]) for name in PHASES]
    with report.workspace() as folder:
        async with coordinator(folder) as site:
            warm, full, half, waited = _prepared(site.run_id, peers, rounds)
            await _announce(site, peers)
            await _load(site.link.address, site.certificate, REPORT_METHOD, _lines(warm), folder)
            await _settled(site.process)
            single = await _measured(bench, "reports", site, REPORT_METHOD, _lines(full), folder)
            await _check_receipts(site, [SubmitReportResponse.FromString(answer).receipt for answer in single.answers])
            half_rate = single.per_s / 2
            relaxed = await _load(site.link.address, site.certificate, REPORT_METHOD, _lines(half), folder, per_s=half_rate)
            _note_load(bench, "reports at half load", relaxed, 0.0)
            certificate = (site.folder / "swarm" / "coordinator" / KEY_FILE, site.certificate)
            echoed = await _echo(bench, certificate, _lines(full), folder)
            await _settled(site.process)
            name = f"calls of {MAX_REPORTS} reports"
            calls = await _measured(bench, name, site, REPORTS_METHOD, _calls(waited), folder, in_flight=1)
            outcomes = [each for answer in calls.answers for each in SubmitReportsResponse.FromString(answer).outcomes]
            receipts = [outcome.receipt for outcome in outcomes if outcome.HasField("receipt")]
            await _check_receipts(site, receipts)
    who = f"{PEERS} peers, each over a TLS connection of its own, {GENERATORS} generators"
    how = f"{len(receipts)} reports of {who}, {MAX_REPORTS} in a call (SubmitReports), as after an outage"
    bench.figure("reports_per_s", len(receipts) / calls.seconds, how, ">= 2000")
    how = f"{single.answered} reports of {who}, {IN_FLIGHT_PER_PEER} calls each on the way; unary SubmitReport"
    bench.figure("single_reports_per_s", single.per_s, how)
    bench.figure("echo_per_s", echoed.per_s, "the same requests to a grpc.aio server that sends them back")
    bench.figure("ratio_to_echo", single.per_s / echoed.per_s, "single_reports_per_s over echo_per_s", ">= 0.4")
    how = f"from the moment a report was due to its receipt, at {half_rate:.0f} single reports a second at random moments"
    bench.figure("p99_at_half_load_s", quantile(relaxed.latencies_s, 0.99), how, "<= 0.25")
    refused = sum(sum(load.failures.values()) for load in (single, relaxed, calls)) + len(outcomes) - len(receipts)
    bench.figure("reports_refused", refused, "of all that were sent", "== 0")


def _prepared(run_id: bytes, peers: Sequence[Identity], rounds: Sequence[int]) -> list[list[list[SubmitReportRequest]]]:
    """Requests by phase and peer: every request carries the round's proposal, as peers send it."""
    names = [peer.peer_id for peer in peers]
    sign = sealer(peers)
    phases, number = [], 0
    for count in rounds:
        lines: list[list[SubmitReportRequest]] = [[] for _ in peers]
        for _ in range(count):
            members = names[number % 2 :: 2]
            proposal, signed = round_of(run_id, number, members, names, sign)
            for each in signed:
                lines[names.index(each.signer)].append(SubmitReportRequest(report=each, proposal=proposal))
            number += 1
        phases.append(lines)
    return phases


def _lines(requests: list[list[SubmitReportRequest]]) -> list[list[bytes]]:
    return [[each.SerializeToString() for each in line] for line in requests]


def _calls(requests: list[list[SubmitReportRequest]]) -> list[list[bytes]]:
    """The same, many in a call."""
    return [
        [SubmitReportsRequest(reports=line[at : at + MAX_REPORTS]).SerializeToString() for at in range(0, len(line), MAX_REPORTS)]
        for line in requests
    ]


async def _measured(
    bench: Report, name: str, site: Site, method: str, lines: list[list[bytes]], folder: Path, in_flight: int = IN_FLIGHT_PER_PEER
) -> Loaded:
    before = _processor_s(site.process)
    loaded = await _load(site.link.address, site.certificate, method, lines, folder, in_flight=in_flight)
    _note_load(bench, name, loaded, _processor_s(site.process) - before)
    return loaded


async def _announce(site: Site, peers: Sequence[Identity]) -> None:
    async with await CoordinatorClient.connect(site.link) as client:
        for peer in peers:
            await client.announce(announcement(site.run_id, peer, time.time()))


async def _load(
    address: str,
    certificate: Path,
    method: str,
    lines: list[list[bytes]],
    folder: Path,
    per_s: float = 0.0,
    in_flight: int = IN_FLIGHT_PER_PEER,
) -> Loaded:
    """Send the requests from several processes at once."""
    async with AsyncExitStack() as stack:
        generators: list[tuple[Child, Path]] = []
        for number in range(GENERATORS):
            requests, answers = folder / f"requests-{number}", folder / f"answers-{number}"
            write_lines(requests, lines[number::GENERATORS])
            started = child(
                "load_generator",
                folder / "log",
                address=address,
                certificate=str(certificate),
                method=method,
                requests=str(requests),
                answers=str(answers),
                in_flight=in_flight,
                per_s=per_s / GENERATORS,
                limit_s=LIMIT_S,
            )
            generators.append((await stack.enter_async_context(started), answers))
        for generator, _ in generators:
            await generator.receive(LIMIT_S)
        for generator, _ in generators:
            await generator.tell("go")
        outcomes = [await generator.receive(LIMIT_S + 30) for generator, _ in generators]
        return _together(outcomes, [read_answers(path) for _, path in generators])


def _together(outcomes: Sequence[dict[str, Any]], answers: Sequence[list[bytes]]) -> Loaded:
    failures: dict[str, int] = {}
    for outcome in outcomes:
        for reason, count in outcome["failures"].items():
            failures[reason] = failures.get(reason, 0) + count
    return Loaded(
        sum(outcome["answered"] for outcome in outcomes),
        failures,
        max(outcome["seconds"] for outcome in outcomes),
        sum(outcome["processor_s"] for outcome in outcomes),
        [latency for outcome in outcomes for latency in outcome["latencies_s"]],
        [answer for each in answers for answer in each],
    )


def _note_load(bench: Report, name: str, loaded: Loaded, server_s: float) -> None:
    bench.row(
        "load",
        what=name,
        answered=loaded.answered,
        refused=sum(loaded.failures.values()),
        per_s=loaded.per_s,
        p50_s=quantile(loaded.latencies_s, 0.5),
        p99_s=quantile(loaded.latencies_s, 0.99),
        generator_us_each=loaded.processor_s / loaded.answered * 1e6,
        server_us_each=server_s / loaded.answered * 1e6,
    )
    for reason, count in loaded.failures.items():
        bench.say(f"{count} x {reason}")


async def _check_receipts(site: Site, receipts: Sequence[Signed]) -> None:
    """Check a part of the receipts whole."""
    async with await CoordinatorClient.connect(site.link) as client:
        run = await client.get_run()
        progress = await client.progress()
    for signed in receipts[:: max(1, len(receipts) // RECEIPTS_CHECKED)]:
        if verify_receipt(signed, run.coordinator).ledger_index >= progress.ledger_size:
            raise RuntimeError("a receipt of an entry that is not in the ledger")


async def _echo(bench: Report, pair: tuple[Path, Path], lines: list[list[bytes]], folder: Path) -> Loaded:
    async with child("echo_server", folder / "log", key=str(pair[0]), certificate=str(pair[1])) as server:
        port = (await server.receive(30))["port"]
        loaded = await _load(f"127.0.0.1:{port}", pair[1], ECHO_METHOD, lines, folder)
        await server.tell("stop")
        _note_load(bench, "echo", loaded, (await server.receive(30))["processor_s"])
    return loaded


async def _settled(process: psutil.Process) -> None:
    """Wait until what the warm-up has started is up: until the coordinator's processes do nothing for a moment."""
    busy_s = -1.0
    while (now_s := _processor_s(process)) - busy_s > IDLE_S:
        busy_s = now_s
        await asyncio.sleep(SETTLE_S)


def _processor_s(process: psutil.Process) -> float:
    """Processor time of a process and its children."""
    return sum(sum(each.cpu_times()[:2]) for each in (process, *process.children(recursive=True)))


async def scale(bench: Report) -> None:
    """Many accounts and a long ledger: restart after a kill, pages, and memory once everybody has announced itself."""
    accounts, length = bench.choose(*ACCOUNTS), bench.choose(*ENTRIES)
    tail = min(SNAPSHOT_EVERY, length // 10)
    with report.workspace() as folder:
        peers = await asyncio.to_thread(lambda: [identity(number) for number in range(accounts)])
        names = [peer.peer_id for peer in peers]
        owner = identity(OWNER)
        signed = sign_manifest(tiny_manifest(), owner)
        state = folder / "swarm" / "coordinator"
        state.mkdir(parents=True)
        key = Identity.generate()
        key.save(state / "coordinator.key")
        source = big_ledger.entries(payload_hash(signed), signed, key, names)
        url = f"sqlite:///{state / 'coordinator.db'}"
        started = time.perf_counter()
        await asyncio.to_thread(_grow, url, source, length - tail)
        grown_s = time.perf_counter() - started
        started = time.perf_counter()
        await asyncio.to_thread(make, Source(url, key.peer_id, state / SNAPSHOT_FILE))
        bench.row("ledger", entries=length - tail, written_s=grown_s, folded_s=time.perf_counter() - started)
        await asyncio.to_thread(_grow, url, source, tail)
        await _restart(bench, folder, accounts, length, tail)
        async with coordinator(folder) as site:
            await _pages(bench, site, names[0], accounts, length)
            await _everybody(bench, site, peers)


def _grow(url: str, source: Iterator[big_ledger.Keyed], count: int) -> None:
    store = SqlStore.open(url)
    try:
        big_ledger.append(store, source, count)
    finally:
        store.close()


async def _restart(bench: Report, folder: Path, accounts: int, length: int, tail: int) -> None:
    """From starting the command to the first answer, after the process before was killed."""
    seconds = []
    for attempt in range(RESTARTS):
        started = time.perf_counter()
        async with coordinator(folder) as site, await CoordinatorClient.connect(site.link) as client:
            progress = await client.progress()
            seconds.append(time.perf_counter() - started)
            if progress.ledger_size != length:
                raise RuntimeError(f"{progress.ledger_size} entries after the restart, not {length}")
            bench.row("restarts", attempt=attempt, entries=length, seconds=seconds[-1], rss_bytes=site.process.memory_info().rss)
            await site.swarm.stop_coordinator(signal.SIGKILL)
    how = (
        f"`swarm coordinator` to its first answer after kill -9; {accounts} accounts, newest snapshot {tail} entries old; median"
    )
    bench.figure("restart_1m_entries_s", quantile(seconds, 0.5), how, "<= 3")


async def _pages(bench: Report, site: Site, account: str, accounts: int, length: int) -> None:
    """The web pages, and the calls for progress and leaderboard, one after the other."""
    paths = ("/", "/leaderboard?page=20", f"/account/{account}", "/audits", "/ledger", f"/ledger/{length // 2}")
    taken: dict[str, list[float]] = {}
    async with await CoordinatorClient.connect(site.link) as client, httpx.AsyncClient() as browser:
        asked: list[tuple[str, Callable[[], Awaitable[object]]]] = [
            ("leaderboard", lambda: client.credits(limit=100)),
            ("progress", client.progress),
            *((path.removesuffix(account), partial(browser.get, f"http://{site.swarm.metrics}{path}")) for path in paths),
        ]
        for _ in range(PAGE_VIEWS):
            for name, ask in asked:
                started = time.perf_counter()
                answer = await ask()
                taken.setdefault(name, []).append(time.perf_counter() - started)
                if isinstance(answer, httpx.Response):
                    answer.raise_for_status()
    for name, each in taken.items():
        bench.row("pages", what=name, p50_s=quantile(each, 0.5), p95_s=quantile(each, 0.95), worst_s=max(each))
    how = f"the slowest of {len(taken)} pages and calls, each the median of {PAGE_VIEWS}; {accounts} accounts, {length} entries"
    bench.figure("leaderboard_100k_accounts_s", max(quantile(each, 0.5) for each in taken.values()), how, "<= 0.05")


async def _everybody(bench: Report, site: Site, peers: Sequence[Identity]) -> None:
    """Every registered peer announces itself over gRPC; the memory of all the coordinator's processes afterwards."""
    now_s = time.time()
    lines: list[list[bytes]] = [[] for _ in range(GENERATORS * 4)]
    for number, peer in enumerate(peers):
        request = AnnounceRequest(announcement=announcement(site.run_id, peer, now_s))
        lines[number % len(lines)].append(request.SerializeToString())
    before = _memory(site.process)
    loaded = await _load(site.link.address, site.certificate, ANNOUNCE_METHOD, lines, site.folder)
    _note_load(bench, "announcements", loaded, 0.0)
    if loaded.failures:
        raise RuntimeError(f"announcements failed: {loaded.failures}")
    how = f"resident memory after {len(peers)} registered peers announced themselves ({before:,} before), with a full ledger"
    bench.figure("rss_bytes_100k_peers", _memory(site.process), how, "<= 1e9")


async def power_cuts(bench: Report) -> None:
    """Kill the writer at random moments and look for receipts without an entry."""
    cuts = bench.choose(*CUTS)
    with report.workspace() as folder:
        async with child("power_cut", folder / "log", cuts=cuts, seed=SEED) as helper:
            found = await helper.receive(cuts * CUT_LIMIT_S)
    bench.row("power cuts", **found)
    how = f"of {found['receipts']} receipts that left a writer before it was killed, {cuts} kills at random moments"
    bench.figure("receipts_without_entry", found["lost"], how, "== 0")
    bench.figure("databases_broken", found["broken"], "databases that couldn't be read back after a kill", "== 0")


def _memory(process: psutil.Process) -> int:
    return sum(each.memory_info().rss for each in (process, *process.children(recursive=True)))


def main() -> int:
    """Run the sections."""
    return report.run("coordinator", __doc__, {"reports": reports, "scale": scale, "power_cuts": power_cuts})


if __name__ == "__main__":
    sys.exit(main())
