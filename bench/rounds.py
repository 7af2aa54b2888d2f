"""What a round costs: overhead beside hivemind.Optimizer, loss beside one process, transfers beside a bare stream."""

from __future__ import annotations

import asyncio
import contextlib
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

from hivemind.p2p import PeerID
from hivemind.proto.runtime_pb2 import ExpertRequest, ExpertResponse

from bench import report, swarms
from bench.children import Child, child
from bench.report import Report, quantile
from bench.single import Alone, held_out_loss, planned_batch, train_alone
from bench.transfer_peer import MESSAGE_STREAM, RAW_STREAM, transfer_on_loopback
from peer.network.node import Node
from peer.outcome import newest_weights
from peer.recipes import demo_manifest
from swarm.manifest import AdamW, DiLoCo, Manifest

PEERS = 3
LAYERS = 5  # 1.07 M parameters
INNER_STEPS = 5
BATCH_SAMPLES = 8
BLOBS, BLOB_BYTES = 64, 1 << 20
VALIDATION_SAMPLES = 512
COORDINATOR_STARTS = 3
CURVE_POINTS = 12
START_S, EPOCH_S, RUN_S = 120.0, 90.0, 900.0
STREAM_TIMEOUT_S = 10.0

HEADLINE, TUNED, GRADIENTS = "local", "local-tuned", "gradients"
HIVEMIND_MODES = {
    HEADLINE: "local AdamW steps, then averaged parameters; matchmaking 3 s as documented for small local runs",
    TUNED: "the same, told the size of the group in advance and looking for progress every 0.1 s",
    GRADIENTS: "its default: averaged gradients, matchmaking 3 s, state averaged in the background",
}
OVERHEAD = "wall time of a round minus the longest training time in it; median over peers and rounds after the first"


@dataclass
class Rounds:
    """The sections; what one of them finds, others are held against."""

    folder: Path
    overhead_p50_s: float | None = None
    _manifest: Manifest | None = field(default=None)

    @property
    def files(self) -> Path:
        """Tokenizer and shards of the run."""
        return self.folder / "files"

    @property
    def manifest(self) -> Manifest:
        """Three peers with equal work, AdamW inside so that hivemind can do the same, fp16 between them."""
        if self._manifest is None:
            made = demo_manifest(
                self.files, peers=PEERS, inner_steps=INNER_STEPS, batch_samples=BATCH_SAMPLES, layers=LAYERS, name="bench-rounds"
            )
            self._manifest = _with_equal_work(made)
        return self._manifest

    async def transfer(self, out: Report) -> None:
        """One peer pulls 64 MiB from another one's process."""
        runs = out.choose(9, 5)
        async with (
            child("transfer_peer", self.folder / "server.log", blobs=BLOBS, blob_bytes=BLOB_BYTES) as server,
            transfer_on_loopback() as transfer,
        ):
            hello = await server.receive(START_S)
            peer, node = hello["peer"], transfer.node
            node.learn(peer, hello["addresses"])
            await node.connect(peer)
            sizes = dict.fromkeys((bytes.fromhex(name) for name in hello["hashes"]), BLOB_BYTES)
            rates: dict[str, list[float]] = {"transfer": [], "bare stream": [], "bare messages": []}
            for _ in range(runs):
                started = time.perf_counter()
                found = await transfer.fetch(peer, sizes)
                rates["transfer"].append(_rate(sum(map(len, found.values())), started))
                rates["bare stream"].append(await _pull_raw(node, peer))
                rates["bare messages"].append(await _pull_messages(node, peer))
        middle = {kind: statistics.median(values) for kind, values in rates.items()}
        for kind, values in rates.items():
            out.row("64 MiB on loopback", kind=kind, runs=runs, median=middle[kind], least=min(values), most=max(values))
        how = f"64 blobs of 1 MiB by Transfer.fetch from another process, every hash checked; median of {runs} runs"
        out.figure("transfer_MB_per_s", middle["transfer"], how, ">= 60")
        out.figure("bare_stream_MB_per_s", middle["bare stream"], "the same bytes over a raw libp2p stream, nothing checked")
        out.figure("bare_messages_MB_per_s", middle["bare messages"], "the same bytes as a streaming RPC of hivemind's P2P")

    async def coordinator(self, out: Report) -> None:
        """Start a coordinator several times."""
        starts, processor_s = [], []
        for index in range(COORDINATOR_STARTS):
            async with swarms.coordinated(self.folder / f"start-{index}", self.manifest) as (swarm, start_s):
                starts.append(start_s)
                processor_s.append(swarms.processor_s(swarm.coordinator.pid) if swarm.coordinator else 0.0)
        how = f"from starting the process to its first answer; median of {COORDINATOR_STARTS} starts"
        out.figure("coordinator_start_s", statistics.median(starts), how, "< 2")
        out.figure("coordinator_start_processor_s", statistics.median(processor_s), "processor time of the same starts")

    async def rounds(self, out: Report) -> None:
        """Real peers train together."""
        manifest = _ending_after(self.manifest, out.choose(25, 8))
        outcome = await swarms.train(self.folder / "diloco", manifest, self.files, PEERS, RUN_S)
        overheads = outcome.overheads_s
        self.overhead_p50_s = statistics.median(overheads)
        _row_of_rounds(out, "swarm", overheads, outcome.round_p50_s, f"{INNER_STEPS} local AdamW steps, fp16, every part checked")
        size = f"{manifest.model.parameters / 1e6:.2f} M parameters"
        how = f"{PEERS} peers, {size}, diloco, fp16, {outcome.rounds} rounds: {OVERHEAD}"
        out.figure("round_overhead_p50_s", self.overhead_p50_s, how, "<= 0.3")
        out.figure("round_overhead_p95_s", quantile(overheads, 0.95), "of the same rounds")
        rss_how = f"the most that it had resident in a run of {PEERS} peers and {outcome.rounds} rounds"
        out.figure("coordinator_rss_bytes", outcome.coordinator_rss_bytes, rss_how, "< 200e6")
        _count_roots(out, outcome)

    async def hivemind(self, out: Report) -> None:
        """The same model, data and local work with `hivemind.Optimizer`."""
        waits: dict[str, float] = {}
        modes = (HEADLINE, TUNED) if out.quick else tuple(HIVEMIND_MODES)
        for mode in modes:
            out.say(f"  hivemind.Optimizer, {mode}")
            epochs = await self._hivemind_epochs(mode, out.choose(12 if mode != GRADIENTS else 8, 4))
            overheads = _waits_s(epochs)
            waits[mode] = statistics.median(overheads)
            wall_s = statistics.median(epoch["wall_s"] for lines in epochs for epoch in lines if epoch["epoch"])
            _row_of_rounds(out, f"hivemind.Optimizer, {mode}", overheads, wall_s, HIVEMIND_MODES[mode])
        out.figure("hivemind_optimizer_round_p50_s", waits[HEADLINE], f"{HIVEMIND_MODES[HEADLINE]}: {OVERHEAD}")
        out.figure("hivemind_optimizer_tuned_round_p50_s", waits[TUNED], HIVEMIND_MODES[TUNED])
        if self.overhead_p50_s is not None:
            ours = self.overhead_p50_s
            out.figure("ratio_to_hivemind_optimizer", ours / waits[HEADLINE], "our median over hivemind's", "<= 0.2")
            out.figure("ratio_to_hivemind_optimizer_tuned", ours / waits[TUNED], "the same with the group known")

    async def _hivemind_epochs(self, mode: str, epochs: int) -> list[list[dict[str, Any]]]:
        """What every process says of its epochs."""
        path = self.folder / "hivemind.json"
        path.write_text(self.manifest.model_dump_json())
        given: dict[str, Any] = {"manifest": str(path), "files": str(self.files), "mode": mode, "peers": PEERS}
        async with contextlib.AsyncExitStack() as stack:
            started: list[Child] = []
            addresses: list[str] = []
            for index in range(PEERS):
                log, name = self.folder / f"hivemind-{mode}-{index}.log", f"hivemind-{index}"
                process = child("hivemind_peer", log, **given, name=name, initial_peers=addresses)
                started.append(await stack.enter_async_context(process))
                if index == 0:
                    addresses = (await started[0].receive(START_S))["addresses"]
            for other in started[1:]:
                await other.receive(START_S)
            for each in started:
                await each.tell("go")
            return list(await asyncio.gather(*(_epochs_of(each, epochs) for each in started)))

    async def sync(self, out: Report) -> None:
        """`sync` with real peers, and one process with the whole batch on the same samples."""
        rounds = out.choose(120, 30)
        made = demo_manifest(
            self.files, peers=PEERS, rounds=rounds, batch_samples=BATCH_SAMPLES, strategy="sync", name="bench-sync"
        )
        manifest = _with_equal_work(made)
        outcome = await swarms.train(self.folder / "sync", manifest, self.files, PEERS, RUN_S)
        _count_roots(out, outcome)
        peers = [status["peer_id"] for status in outcome.statuses]
        samples = outcome.histories[0][-1]["tokens_total"] // manifest.data.sequence_length
        batches = (planned_batch(manifest, peers, index) for index in count(1))
        alone = await asyncio.to_thread(train_alone, manifest, self.files, batches, samples)
        snapshot = newest_weights(outcome.directory / "peer-0", manifest)
        ours = held_out_loss(manifest, self.files, snapshot.state.theta, VALIDATION_SAMPLES)
        theirs = held_out_loss(manifest, self.files, alone.theta, VALIDATION_SAMPLES)
        _rows_of_curve(out, outcome.histories[0], alone)
        missed = PEERS * outcome.rounds - sum(bool(line["weight"]) for lines in outcome.histories for line in lines)
        how = (
            f"{PEERS} peers x {BATCH_SAMPLES} samples a round over one process x {PEERS * BATCH_SAMPLES} with torch.optim.AdamW, "
            f"same start, schedule and samples; loss on {VALIDATION_SAMPLES} held-out samples after {samples} samples"
        )
        out.figure("sync_over_single_validation_loss", ours / theirs, how, "<= 1.005")
        out.figure("sync_validation_loss", ours, f"nats per byte, of the weights after round {snapshot.round - 1}")
        out.figure("single_validation_loss", theirs, f"nats per byte, after {alone.samples} samples in {len(alone.losses)} steps")
        out.figure("sync_contributions_missed", missed, f"updates too late for their round, of {PEERS * outcome.rounds}")
        out.figure("sync_overhead_p50_s", statistics.median(outcome.overheads_s), OVERHEAD)


def _with_equal_work(manifest: Manifest) -> Manifest:
    """The same work for every peer whatever its speed; AdamW as the inner optimizer."""
    rounds = manifest.rounds.model_copy(update={"scale_to_speed": False})
    strategy = manifest.strategy
    if isinstance(strategy, DiLoCo):
        return manifest.model_copy(update={"rounds": rounds, "strategy": strategy.model_copy(update={"inner": AdamW()})})
    return manifest.model_copy(update={"rounds": rounds})


def _ending_after(manifest: Manifest, rounds: int) -> Manifest:
    return manifest.model_copy(update={"rounds": manifest.rounds.model_copy(update={"total": rounds})})


def _count_roots(out: Report, outcome: swarms.Outcome) -> None:
    if not outcome.rounds:
        raise RuntimeError("no round was made")
    for round_index, roots in outcome.differing.items():
        out.row("differing roots", round=round_index, last_round=outcome.rounds, roots=", ".join(roots))
    out.add("roots_differing", outcome.roots_differing, "rounds of all runs here after which not all peers had one root", "== 0")


def _row_of_rounds(out: Report, kind: str, overheads_s: Sequence[float], round_s: float, what: str) -> None:
    p50, p95 = statistics.median(overheads_s), quantile(overheads_s, 0.95)
    out.row("rounds", kind=kind, overhead_p50_s=p50, overhead_p95_s=p95, round_p50_s=round_s, taken=len(overheads_s), what=what)


def _rows_of_curve(out: Report, history: Sequence[Mapping[str, Any]], alone: Alone) -> None:
    """The training loss of both after the same steps, at some points of the curve."""
    lines = [line for line in history if line["tokens"]][: len(alone.losses)]
    step = max(1, len(lines) // CURVE_POINTS)
    for index in range(step - 1, len(lines), step):
        swarm_loss, single_loss = lines[index]["loss"], alone.losses[index]
        ratio = swarm_loss / single_loss
        out.row("training loss", step=index + 1, swarm=swarm_loss, single=single_loss, swarm_over_single=ratio)


async def _epochs_of(process: Child, epochs: int) -> list[dict[str, Any]]:
    return [await process.receive(EPOCH_S) for _ in range(epochs)]


def _waits_s(epochs: Sequence[Sequence[Mapping[str, Any]]]) -> list[float]:
    """Every epoch's wall time on every peer minus the longest training time in it, without the first epoch."""
    longest: dict[int, float] = {}
    for lines in epochs:
        for line in lines:
            longest[line["epoch"]] = max(longest.get(line["epoch"], 0.0), line["train_s"])
    return [max(0.0, line["wall_s"] - longest[line["epoch"]]) for lines in epochs for line in lines if line["epoch"] > 0]


async def _pull_raw(node: Node, peer: str) -> float:
    started, size = time.perf_counter(), 0
    reader, writer = await node.open_stream(peer, RAW_STREAM, STREAM_TIMEOUT_S)
    try:
        while piece := await asyncio.wait_for(reader.read(1 << 17), STREAM_TIMEOUT_S):
            size += len(piece)
    finally:
        writer.close()
    return _rate(size, started)


async def _pull_messages(node: Node, peer: str) -> float:
    started, size = time.perf_counter(), 0
    stream = await node.p2p.iterate_protobuf_handler(PeerID.from_base58(peer), MESSAGE_STREAM, ExpertRequest(), ExpertResponse)
    async for message in stream:
        size += len(message.metadata)
    return _rate(size, started)


def _rate(size_bytes: int, started_s: float) -> float:
    """Megabytes per second."""
    if size_bytes != BLOBS * BLOB_BYTES:
        raise RuntimeError(f"only {size_bytes} bytes came")
    return size_bytes / 1e6 / (time.perf_counter() - started_s)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure."""
    with report.workspace() as folder:
        parts = Rounds(folder)
        sections: dict[str, report.Section] = {
            "transfer": parts.transfer,
            "coordinator": parts.coordinator,
            "rounds": parts.rounds,
            "hivemind": parts.hivemind,
            "sync": parts.sync,
        }
        return report.run("rounds", __doc__, sections, argv)


if __name__ == "__main__":
    sys.exit(main())
