"""Training over home uplinks: first to a loss beside other systems, share of time spent computing, and bits per parameter."""

from __future__ import annotations

import contextlib
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench import hosts, linked, report
from bench.children import Child, child
from bench.first_to_loss import Race
from bench.hosts import MBIT, Link
from bench.linked import Linked, Note
from bench.report import Report
from peer.recipes import tiny_manifest
from swarm import auto
from swarm.manifest import Manifest

PEERS = 4
UPLINK = Link(20 * MBIT, 100 * MBIT)
LINK = "4 peers in network namespaces with 20 Mbit/s up and 100 Mbit/s down (tc tbf)"

PARAMETERS = 124_000_000
STEPS, STEP_S = 50, 2.0
MEASURED_ROUNDS = 2
SPARSE_TOP_K = 32
UTILISATIONS = (
    ("sparse", "off", "utilisation_sparse", ">= 0.97"),
    ("sparse", "on", "utilisation_sparse_overlap", ">= 0.995"),
    ("int4", "off", "utilisation_int4", ""),
    ("int4", "on", "utilisation_int4_overlap", ">= 0.98"),
)
ROUND_S = 1200.0

TRAFFIC_PARAMETERS = 16_000_000
TRAFFIC_ROUNDS, TRAFFIC_ROUNDS_QUICK = 6, 3
TRAFFIC_STEPS, TRAFFIC_STEP_S = 4, 0.5
TRAFFIC_TOP_K = 64


async def utilisation(out: Report, folder: Path) -> None:
    """Rounds of a large update over home uplinks, training emulated."""
    for codec, overlap, figure, goal in UTILISATIONS[1::2] if out.quick else UTILISATIONS:
        out.say(f"  {codec}, overlap {overlap}")
        await _utilisation(out, folder / figure, codec, overlap, figure, goal)
    out.say("  hivemind")
    await _hivemind_round(out, folder)


async def _utilisation(out: Report, folder: Path, codec: str, overlap: str, figure: str, goal: str) -> None:
    values = {"kind": codec, "density_top_k": SPARSE_TOP_K}
    rounds = 1 if out.quick else MEASURED_ROUNDS
    manifest = _emulated(folder / "files", PARAMETERS, values, STEPS, rounds + 3, overlap)
    async with linked.running(folder, manifest, folder / "files", [UPLINK] * PEERS, step_s=STEP_S) as swarm:
        await swarm.first_round()
        before = await swarm.next_round(ROUND_S)  # until now not everybody has had work and could begin the next round early
        sent = swarm.sent_bytes()
        for _ in range(rounds):
            after = await swarm.next_round(ROUND_S)
        sent = [now - earlier for now, earlier in zip(swarm.sent_bytes(), sent, strict=True)]
    computed_s = _grown(before, after, "computed_s")
    wall_s = _grown(before, after, "at_s")
    share = sum(computed_s) / sum(wall_s)
    out.row(
        "124 M parameters, H = 50 steps of 2 s",
        kind=f"{codec}, overlap {overlap}",
        utilisation=share,
        wall_s=statistics.mean(wall_s) / rounds,
        computing_s=statistics.mean(computed_s) / rounds,
        processor_s=statistics.mean(_grown(before, after, "processor_s")) / rounds,
        sent_MB=statistics.mean(sent) / rounds / 1e6,
        peak_GB=max(note["peak_rss_bytes"] for note in after) / 1e9,
        differing_roots=int(len({note["root"] for note in after}) > 1),
    )
    density = f", top {SPARSE_TOP_K} of 4096" if codec == "sparse" else ""
    how = (
        f"{codec}{density}, overlap {overlap}: {LINK}, {PARAMETERS // 1_000_000} M parameters, {STEPS} inner steps a round "
        f"emulated by waiting {STEP_S:g} s each; emulated computing over wall time of {rounds} whole rounds after the second. "
        f"All peers encode and merge on the same {out.machine['cores']} cores at once, see processor_s (per peer and round)"
    )
    out.figure(figure, share, how, goal)


async def _hivemind_round(out: Report, folder: Path) -> None:
    """One averaging of as many parameters by hivemind."""
    problem = hosts.unavailable()
    if problem:
        raise RuntimeError(problem)
    async with contextlib.AsyncExitStack() as stack:
        made = stack.enter_context(hosts.hosts([UPLINK] * PEERS))
        addresses: list[str] = []
        started: list[Child] = []
        for index, host in enumerate(made):
            given: dict[str, Any] = {"address": host.address, "peers": PEERS, "parameters": PARAMETERS}
            log = folder / f"averager-{index}.log"
            process = child("averager_peer", log, prefix=host.prefix, initial_peers=addresses, **given)
            started.append(await stack.enter_async_context(process))
            addresses = addresses or (await started[0].receive(linked.START_S))["addresses"]
        for other in started[1:]:
            await other.receive(linked.START_S)
        before = [host.counters()[0] for host in made]
        for each in started:
            await each.tell("go")
        seconds = [(await each.receive(ROUND_S))["seconds"] for each in started]
        sent = [host.counters()[0] - earlier for host, earlier in zip(made, before, strict=True)]
    round_s = statistics.mean(seconds)
    share = STEPS * STEP_S / (STEPS * STEP_S + round_s)
    out.row(
        "124 M parameters, H = 50 steps of 2 s",
        kind="hivemind, fp16",
        utilisation=share,
        wall_s=STEPS * STEP_S + round_s,
        computing_s=STEPS * STEP_S,
        sent_MB=statistics.mean(sent) / 1e6,
    )
    how = (
        f"{STEPS * STEP_S:g} s over that plus {round_s:.0f} s, which one averaging of {PARAMETERS // 1_000_000} M parameters by "
        f"hivemind.DecentralizedAverager in fp16 took, matchmaking of {round(3.0)} s included: {LINK}"
    )
    out.figure("utilisation_hivemind", share, how)


async def traffic(out: Report, folder: Path) -> None:
    """What the interfaces of the peers count."""
    for codec in ("sparse", "int4"):
        bits = await _bits(out, folder / f"traffic-{codec}", codec)
        rounds = out.choose(TRAFFIC_ROUNDS, TRAFFIC_ROUNDS_QUICK)
        how = (
            f"all bytes that the {PEERS} peers' interfaces have sent in {rounds} rounds "
            "(Ethernet, IP, TCP, libp2p, signatures, DHT and coordinator included, nothing taken off), "
            f"{TRAFFIC_PARAMETERS // 1_000_000} M parameters, "
        )
        if codec == "sparse":
            what = f"top {TRAFFIC_TOP_K} of 4096: bits per parameter, per round and per other peer"
            out.figure("bits_per_parameter_sparse", bits, how + what, "<= 0.25")
        else:
            what = "per round, over the 2 x 3/4 of all parameters that a peer has to send: each way of the butterfly"
            out.figure("bits_per_parameter_int4", bits, how + what, "<= 4.5")


async def _bits(out: Report, folder: Path, codec: str) -> float:
    rounds = out.choose(TRAFFIC_ROUNDS, TRAFFIC_ROUNDS_QUICK)
    values = {"kind": codec, "density_top_k": TRAFFIC_TOP_K}
    manifest = _emulated(folder / "files", TRAFFIC_PARAMETERS, values, TRAFFIC_STEPS, rounds + 3)
    async with linked.running(folder, manifest, folder / "files", [UPLINK] * PEERS, step_s=TRAFFIC_STEP_S) as swarm:
        await swarm.first_round()
        before = await swarm.next_round(ROUND_S)
        counted = _counters(swarm)
        for _ in range(rounds):
            after = await swarm.next_round(ROUND_S)
        counted = [now - earlier for now, earlier in zip(_counters(swarm), counted, strict=True)]
    vectors = PEERS - 1 if codec == "sparse" else 2 * (PEERS - 1) / PEERS
    bits = [8 * count / rounds / TRAFFIC_PARAMETERS / vectors for count in counted]
    sent, received = statistics.mean(bits[:PEERS]), statistics.mean(bits[PEERS:])
    out.row(
        "traffic",
        codec=codec,
        rounds=rounds,
        sent_bits_per_parameter=sent,
        received_bits_per_parameter=received,
        sent_MB_per_round=sum(counted[:PEERS]) / rounds / PEERS / 1e6,
        round_s=statistics.mean(_grown(before, after, "at_s")) / rounds,
    )
    return max(sent, received)


def _counters(swarm: Linked) -> list[int]:
    return [*swarm.sent_bytes(), *swarm.received_bytes()]


def _grown(before: Sequence[Note], after: Sequence[Note], name: str) -> list[float]:
    return [float(now[name] - earlier[name]) for now, earlier in zip(after, before, strict=True)]


def _emulated(
    files: Path, parameters: int, codec: dict[str, Any], steps: int, rounds: int, overlap: str = "off", peers: int = PEERS
) -> Manifest:
    """A run whose updates have so many parameters; its model is never built."""
    made = tiny_manifest(files, peers, scale_to_speed=False, grace_floor_s=60.0, total=rounds)
    values: dict[str, Any] = made.model_dump(mode="json")
    values["model"]["parameters"] = parameters
    values["codec"] = {"part_values": auto.part_values(codec["kind"], parameters), **codec}
    values["strategy"] |= {"inner_steps": steps, "overlap": overlap}
    return Manifest.model_validate(values)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure."""
    with report.workspace() as folder:
        sections: dict[str, report.Section] = {
            "traffic": lambda out: traffic(out, folder),
            "first_to_loss": lambda out: Race(folder / "race", PEERS, UPLINK).run(out),
            "utilisation": lambda out: utilisation(out, folder),
        }
        return report.run("links", __doc__, sections, argv)


if __name__ == "__main__":
    sys.exit(main())
