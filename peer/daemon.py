"""The daemon: one process, one event loop for the network, one thread for training.

It wires the parts together and decides nothing about rounds. Verbs: pause, resume, finish, stop.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import os
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import psutil
import structlog
import torch
from prometheus_client import CollectorRegistry, start_http_server

from peer.admissions import Admissions
from peer.codec import make_codec
from peer.control import ControlServer
from peer.coordination import Coordination, Standing
from peer.data import ShardReader
from peer.device import hardware_class, read_gpu
from peer.materials import Materials
from peer.metrics import PeerMetrics
from peer.model import initial_theta
from peer.network.blobs import BlobStore
from peer.network.discovery import Discovery
from peer.network.node import Node, PeerFailure
from peer.network.p2pd import P2pdOptions
from peer.network.transfer import Transfer
from peer.outer import OuterState, initial_state
from peer.reports import Outbox, Reporter
from peer.rounds.engine import Disagreement, Engine, RoundReport
from peer.rounds.entering import Entry, Whereabouts
from peer.rounds.post import DELIVER, PING, SYNC, Post
from peer.rounds.run import Services
from peer.rounds.snapshots import Snapshots
from peer.rounds.training import TrainingThread
from peer.rounds.wire import Checker
from peer.state import Layout, Snapshot, load_newest, save_checkpoint
from peer.status import Status
from peer.trainer import Trainer
from swarm import __version__
from swarm.clock import SystemClock
from swarm.control import HISTORY_NAME, STATUS_NAME
from swarm.errors import AlreadyRunning, DiskFull, OutOfMemory, PortBusy, SwarmError, VersionTooOld
from swarm.identity import Identity
from swarm.manifest import Manifest
from swarm.messages import JoinLink, seal
from swarm.rpc.client import RunInfo
from swarm.rpc.v1.ledger_pb2 import Report

CHECKPOINT_EVERY_S = 60.0
DHT_EVERY_S = 30.0
METRICS_EVERY_S = 2.0
CREDITS_EVERY_S = 10.0
FETCH_RETRY_S = 1.0
RECEIPT_WAIT_S = 10.0
RESERVE_BYTES = 256 << 20
MEMORY_LIMIT_BYTES = 512 << 20

log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class DaemonOptions:
    """What the command line decides. Addresses are host:port."""

    link: JoinLink
    directory: Path
    identity_path: Path
    device: torch.device
    listen: str = "0.0.0.0:0"
    announce: str = ""
    inbound: bool = True
    metrics: str = ""
    files: Path | None = None
    threads: int = 0


@dataclass
class Daemon:
    """A running peer."""

    options: DaemonOptions
    identity: Identity
    status: Status
    registry: CollectorRegistry
    pool: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(2, thread_name_prefix="arithmetic"))
    engine: Engine | None = None
    node: Node | None = None
    coordination: Coordination | None = None
    transfer: Transfer | None = None
    outbox: Outbox | None = None
    run: RunInfo | None = None
    metrics_address: str = ""
    balances: dict[str, float] = field(default_factory=dict)
    started_s: float = field(default_factory=time.monotonic)
    _wish: str = "train"
    _changed: asyncio.Event = field(default_factory=asyncio.Event)
    _checkpointed_s: float = 0.0
    _stack: contextlib.AsyncExitStack = field(default_factory=contextlib.AsyncExitStack)
    _sent: tuple[int, int] = (0, 0)
    _parts: _Parts | None = None
    _reporter: Reporter | None = None

    @property
    def parts(self) -> _Parts:
        """What `_build` has made."""
        if self._parts is None:
            raise SwarmError("the peer is still starting", "try again in a few seconds")
        return self._parts

    @classmethod
    def create(cls, options: DaemonOptions) -> Daemon:
        """A daemon with its key, not yet started. Raises `KeyFileError`."""
        registry = CollectorRegistry()
        options.directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        identity = Identity.load_or_create(options.identity_path)
        status = Status(PeerMetrics(registry), history=options.directory / HISTORY_NAME)
        return cls(options, identity, status, registry)

    # --- verbs ----------------------------------------------------------------------------------------------------------

    def wish(self, verb: str) -> None:
        """Take a verb: `pause`, `resume`, `finish` or `stop`. A second `finish` stops."""
        if verb == "finish" and self._wish == "finish":
            verb = "stop"
        self._wish = {"resume": "train"}.get(verb, verb)
        if self.engine is not None and verb in ("pause", "finish", "stop"):
            self.engine.ask(verb)  # type: ignore[arg-type]
        self.status.state({"finish": "finishing", "stop": "stopping", "pause": "paused"}.get(verb, self.status.reason))
        log.info("asked", verb=verb)
        self._changed.set()

    async def control(self, verb: str, arguments: dict[str, Any]) -> dict[str, Any]:
        """Answer the control socket."""
        match verb:
            case "status":
                return self.describe()
            case "pause" | "resume" | "finish" | "stop":
                self.wish(verb)
                return {"accepted": verb, **self.describe()}
            case "checkpoint":
                return {"directory": str(await self._checkpoint())}
            case _:
                return {"error": f"unknown verb {verb[:32]!r}"}

    def describe(self) -> dict[str, Any]:
        """Everything that `swarm status` shows."""
        node, engine = self.node, self.engine
        return {
            "peer_id": self.identity.peer_id,
            "run_id": self.options.link.run_id.hex(),
            "run_name": self.run.manifest.name if self.run else "",
            "pid": os.getpid(),
            "uptime_s": time.monotonic() - self.started_s,
            "device": str(self.options.device),
            "addresses": list(node.addresses) if node else [],
            "bytes_sent": node.sent_bytes if node else 0,
            "bytes_received": node.received_bytes if node else 0,
            "reports_waiting": len(self.outbox.waiting()) if self.outbox else 0,
            "coordinator_reachable": bool(self.coordination and self.coordination.reachable),
            "credits": self.balances,
            "repairs": engine.repairs if engine else 0,
            "rounds_total": self.run.manifest.rounds.total if self.run else 0,
            "metrics": self.metrics_address,
            "directory": str(self.options.directory),
            **self.status.as_dict(),
        }

    # --- life -----------------------------------------------------------------------------------------------------------

    async def serve(self) -> None:
        """Run until finished or stopped. Raises `SwarmError`."""
        async with self._stack:
            try:
                await self._start()
                await self._live()
            except SwarmError as error:
                self.status.error = error.message
                self.status.state("failed")
                raise
            finally:
                self._keep_status()

    def _keep_status(self) -> None:
        """Leave the last status behind for `swarm status`; a full disk costs only that."""
        with contextlib.suppress(OSError):
            (self.options.directory / STATUS_NAME).write_text(json.dumps(self.describe()))

    async def _start(self) -> None:
        options = self.options
        self._stack.enter_context(_only_one(options.directory))
        control = ControlServer(options.directory, self.control)
        await control.start()
        self._stack.push_async_callback(control.close)
        self._stack.callback(self.pool.shutdown)
        self._serve_metrics()
        self.status.state("connecting")
        self.coordination = Coordination(options.link, self.identity, options.directory)
        self._stack.push_async_callback(self.coordination.close)
        self.run = await self.coordination.describe()
        manifest = self.run.manifest
        _check_version(manifest)
        _check_memory(manifest)
        self.node = await Node.start(_p2pd_options(options))
        self._stack.push_async_callback(self.node.close)
        await self._build(self.run, self.node)

    async def _build(self, run: RunInfo, node: Node) -> None:
        """Wire the parts; from here on others can reach us."""
        options, manifest, coordination = self.options, run.manifest, self.coordination
        if coordination is None:
            raise SwarmError("not connected")
        clock = SystemClock()
        admissions = Admissions(run.run_id, run.coordinator)
        codec = make_codec(manifest.codec, manifest.model.parameters)
        snapshots, materials = Snapshots(), Materials(options.directory / "files", options.files)
        store = BlobStore(MEMORY_LIMIT_BYTES, disk_limit_bytes=4 << 30, directory=options.directory / "blobs")
        store.provide(snapshots.lookup)
        store.provide(materials.lookup)
        transfer = Transfer(node, store, run.run_id, admissions.check, lambda: admissions.token(self.identity.peer_id))
        post = Post(node, on_refused=lambda peer, reason: log.debug("delivery_refused", peer=peer, reason=reason))
        self._stack.push_async_callback(post.close)
        checker = Checker(manifest, run.run_id, run.coordinator, codec.part_count, admissions.is_admitted)
        services = Services(
            manifest, self.identity, checker, admissions, post, transfer, codec, self.pool, self.status, clock, coordination.grant
        )
        layout = Layout.of(manifest)
        discovery = await Discovery.start(
            node,
            self.identity,
            run.run_id,
            client_only=not options.inbound,
            on_rejected=lambda reason: self.status.refused("dht", reason),
        )
        self._stack.push_async_callback(discovery.close)
        self.transfer, self.outbox = transfer, Outbox(options.directory)
        self._parts = _Parts(services, snapshots, materials, discovery, layout, coordination)
        entry = Entry(services, layout, self._find, self._begin, lambda: self._local_snapshot())
        trainer = await self._trainer(manifest, materials, admissions, node)
        self._stack.callback(trainer.close)
        self.engine = Engine(services, trainer, snapshots, entry, self._on_round)
        post.on_lost = self._on_lost
        await self._register(node, self.engine)

    async def _register(self, node: Node, engine: Engine) -> None:
        async def pong(peer: str, raw: bytes) -> bytes:
            return b""

        await node.serve_calls(PING, pong)
        await node.serve_calls(DELIVER, engine.deliver)

    async def _trainer(self, manifest: Manifest, materials: Materials, admissions: Admissions, node: Node) -> TrainingThread:
        """Get the run's files while the model's libraries load; the network serves others meanwhile."""
        parts = self.parts
        coordination = parts.coordination
        coordination.remember_admission(admissions)
        coordination.on_answer = lambda answer: self._on_answer(admissions, answer)
        await node.serve_calls(SYNC, self._answer_sync)
        await parts.services.transfer.start()
        try:
            await coordination.announce(node, self._standing())
        except SwarmError:
            if coordination.last is None:
                raise
        trees = [manifest.tokenizer, *manifest.data.train, *manifest.data.validation]
        materials.check_space(trees, RESERVE_BYTES)
        await self._meet()
        for tree in trees:
            await self._obtain(tree)
        return await asyncio.to_thread(self._make_trainer, manifest, materials)

    def _make_trainer(self, manifest: Manifest, materials: Materials) -> TrainingThread:
        data, config = manifest.data, manifest.model.config
        vocabulary = int(config.get("vocab_size", 1 << 32))
        reader = ShardReader.open(data.train, materials.directory, data.sequence_length, vocabulary)
        validation = ShardReader.open(data.validation, materials.directory, data.sequence_length, vocabulary)
        if self.options.threads:
            torch.set_num_threads(self.options.threads)
        return TrainingThread(Trainer(manifest, self.options.device, reader, validation))

    async def _obtain(self, tree: Any) -> None:
        """Have one of the run's files, from this disk or from others; wait until somebody has it."""
        parts = self.parts
        while not await asyncio.to_thread(parts.materials.take_local, tree):
            self.status.state("fetching_data")
            where = await self._find()
            token = parts.services.admissions.token(self.identity.peer_id)
            with contextlib.suppress(PeerFailure):
                await parts.materials.fetch(tree, where.peers, parts.services.post, parts.services.transfer, token)
                continue
            await asyncio.sleep(FETCH_RETRY_S)

    async def _live(self) -> None:
        """Play rounds, and pause in between, until finished."""
        engine, coordination, node, outbox = self.engine, self.coordination, self.node, self.outbox
        if engine is None or coordination is None or node is None or outbox is None:
            raise SwarmError("not started")
        reporter = Reporter(outbox, lambda: coordination.client, self._on_report)
        self._reporter = reporter
        async with _background(
            coordination.announce_for_ever(node, self._standing),
            self._announce_in_dht(),
            reporter.run(),
            self._update_metrics(),
            self._watch_daemon(node),
        ) as failed:
            while True:
                playing: asyncio.Future[str] = asyncio.create_task(self._play(engine))
                await asyncio.wait((playing, failed), return_when=asyncio.FIRST_COMPLETED)
                if failed.done():
                    playing.cancel()
                    await asyncio.gather(playing, return_exceptions=True)
                    failed.result()
                reason = playing.result()
                if reason == "run_complete":
                    self.status.state("run_complete")
                if reason != "pause":
                    break
                if not await self._paused(engine):
                    break
            await self._leave(coordination, node, reporter)

    async def _play(self, engine: Engine) -> str:
        try:
            return await engine.play()
        except Disagreement as error:
            log.error("disagreement", error=str(error))
            self.status.error = str(error)
            self.status.state("disagreement")
            return "disagreement"

    async def _paused(self, engine: Engine) -> bool:
        """Free the device and wait; whether to go on."""
        self.status.state("paused")
        await self._checkpoint()
        await engine.training.release()
        engine.forget()
        while self._wish == "pause":
            self._changed.clear()
            await self._changed.wait()
        engine.wish = "train"
        return self._wish == "train"

    async def _leave(self, coordination: Coordination, node: Node, reporter: Reporter) -> None:
        """Post what is left, keep a checkpoint, say good-bye."""
        with contextlib.suppress(DiskFull):
            await self._checkpoint()
        if self._wish != "stop":
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(reporter.post_all(), RECEIPT_WAIT_S)
        with contextlib.suppress(Exception):
            await asyncio.wait_for(coordination.announce(node, self._standing(), leaving=True), 3.0)
        log.info("left", rounds=self.status.rounds_contributed, reports_waiting=len(reporter.outbox.waiting()))

    # --- what the parts ask for -----------------------------------------------------------------------------------------

    async def _answer_sync(self, peer: str, raw: bytes) -> bytes:
        if self.engine is not None:
            return await self.engine.answer_sync(peer, raw, self.parts.materials.hashes)
        return b""

    async def _find(self) -> Whereabouts:
        """Peers by the coordinator's list and the DHT."""
        parts, node = self.parts, self.node
        if node is None:
            return Whereabouts(())
        first = False
        try:
            answer = await parts.coordination.announce(node, self._standing())
            first = answer.genesis
        except SwarmError as error:
            log.info("announce_failed", error=error.message)
        await self._meet()
        for peer, presence in (await parts.discovery.find()).items():
            node.learn(peer, presence.addresses)
        known = [peer.peer_id for peer in parts.coordination.last.peers] if parts.coordination.last else []
        return Whereabouts(tuple(dict.fromkeys([*known, *node.known_peers()])), first)

    async def _meet(self) -> None:
        """Connect to the peers that the coordinator knows, and get to know their DHT nodes."""
        last, node = self.parts.coordination.last, self.node
        if last is None or node is None:
            return
        connected = await node.connected()
        new = [peer.peer_id for peer in last.peers if peer.peer_id not in connected and peer.peer_id != node.peer_id]
        await asyncio.gather(*(node.connect(peer) for peer in new), return_exceptions=True)
        await self.parts.discovery.meet(new)

    async def _begin(self) -> OuterState:
        """The state of a first peer: the newest checkpoint, or the manifest's initial weights."""
        local = self._local_snapshot()
        if local is not None:
            return local.state
        if self.run is None:
            raise SwarmError("not started")
        manifest = self.run.manifest
        theta = await asyncio.to_thread(initial_theta, manifest.model)
        return initial_state(manifest.strategy, theta)

    def _local_snapshot(self) -> Snapshot | None:
        newest = self.parts.snapshots.newest
        if newest is not None:
            return newest
        loaded = load_newest(self.options.directory / "checkpoints", self.parts.layout, self.options.link.run_id.hex())
        for skipped in loaded.skipped:
            log.warning("checkpoint_skipped", path=str(skipped.path), reason=skipped.reason)
        return loaded.snapshot

    async def _on_round(self, report: RoundReport) -> None:
        self.status.round_done(report)
        if report.commit is not None and report.result is not None and self.outbox is not None:
            message = Report(
                run_id=self.options.link.run_id,
                round=report.round_index,
                commit=report.commit,
                result=report.result,
                proposal_hash=report.proposal.proposal_hash,
                issued_at=int(time.time()),
            )
            signed = seal(self.identity, message)
            await asyncio.to_thread(self.outbox.add, report.round_index, signed, report.proposal.signed)
            if self._reporter is not None:
                self._reporter.wake()
        if time.monotonic() - self._checkpointed_s > CHECKPOINT_EVERY_S:
            self._checkpointed_s = time.monotonic()
            self.parts.services.post.spawn(self._checkpoint_quietly())

    def _on_report(self, outcome: str) -> None:
        self.status.metrics.reports.labels(outcome=outcome).inc()

    def _on_answer(self, admissions: Admissions, answer: Any) -> None:
        admissions.admit(answer.admission)
        self.status.metrics.clock_offset.set(self.coordination.clock_offset_s if self.coordination else 0.0)

    def _on_lost(self, peer: str) -> None:
        if self.engine is not None:
            self.engine.lost(peer)

    def _standing(self) -> Standing:
        return Standing(self.status.round_index, self.status.reason, hardware_class(self.options.device), self.options.inbound)

    async def _checkpoint(self) -> Path:
        directory = self.options.directory / "checkpoints"
        snapshot = self.parts.snapshots.newest
        if snapshot is not None:
            await asyncio.to_thread(save_checkpoint, directory, snapshot, self.options.link.run_id.hex())
        return directory

    async def _checkpoint_quietly(self) -> None:
        try:
            await self._checkpoint()
        except DiskFull as error:
            self.status.error = error.message
            log.warning("checkpoint_failed", error=error.message)

    # --- background -----------------------------------------------------------------------------------------------------

    async def _announce_in_dht(self) -> None:
        while True:
            node = self.node
            if node is not None:
                await self._meet()
                await self.parts.discovery.announce(node.addresses, self.status.round_index, __version__, self.options.inbound)
            await asyncio.sleep(DHT_EVERY_S)

    async def _watch_daemon(self, node: Node) -> None:
        status = await node.daemon.wait()
        raise SwarmError(f"the libp2p daemon ended with status {status}", "start again; see the log")

    async def _update_metrics(self) -> None:
        asked_s = 0.0
        while True:
            self._measure()
            if time.monotonic() - asked_s > CREDITS_EVERY_S:
                asked_s = time.monotonic()
                await self._ask_credits()
            await asyncio.sleep(METRICS_EVERY_S)

    def _measure(self) -> None:
        metrics, node, outbox = self.status.metrics, self.node, self.outbox
        if node is not None:
            sent, received = self._sent
            metrics.sent.inc(node.sent_bytes - sent)
            metrics.received.inc(node.received_bytes - received)
            self._sent = (node.sent_bytes, node.received_bytes)
        if outbox is not None:
            metrics.outbox.set(len(outbox.waiting()))
        reading = read_gpu(self.options.device)
        if reading is not None:
            metrics.temperature.set(reading.temperature_c)
            metrics.power.set(reading.power_w)
            metrics.memory.labels(kind="used").set(reading.memory_used_bytes)
            metrics.memory.labels(kind="total").set(reading.memory_total_bytes)

    async def _ask_credits(self) -> None:
        client = self.coordination.client if self.coordination else None
        if client is None:
            return
        try:
            answer = await client.credits(self.identity.peer_id)
        except SwarmError:
            return
        for balance in answer.balances:
            if balance.peer_id == self.identity.peer_id:
                flops = (balance.pending_flops, balance.verified_flops, balance.final_flops)
                self.balances = {
                    state: int(value or 0) / 1e15 for state, value in zip(("pending", "verified", "final"), flops, strict=True)
                }
        for state, value in self.balances.items():
            self.status.metrics.credits.labels(state=state).set(value)

    def _serve_metrics(self) -> None:
        if not self.options.metrics:
            return
        host, _, port = self.options.metrics.rpartition(":")
        try:
            server, thread = start_http_server(int(port), addr=host or "127.0.0.1", registry=self.registry)
        except OSError as error:
            raise PortBusy(
                f"can't listen on {self.options.metrics}: {error.strerror}", "choose another with --metrics"
            ) from error
        self.metrics_address = f"{host or '127.0.0.1'}:{server.server_port}"
        self._stack.callback(thread.join, 5.0)
        self._stack.callback(server.server_close)
        self._stack.callback(server.shutdown)


@dataclass(frozen=True)
class _Parts:
    services: Services
    snapshots: Snapshots
    materials: Materials
    discovery: Discovery
    layout: Layout
    coordination: Coordination


def _p2pd_options(options: DaemonOptions) -> P2pdOptions:
    host, _, port = options.listen.rpartition(":")
    kind = "ip6" if ":" in host else "ip4"
    announce: tuple[str, ...] = ()
    if options.announce:
        name, _, announced = options.announce.rpartition(":")
        family = "ip4" if name.replace(".", "").isdigit() else "dns4"
        announce = (f"/{family}/{name}/tcp/{announced}",)
    listen = (f"/{kind}/{host.strip('[]') or '0.0.0.0'}/tcp/{port}",)
    return P2pdOptions(options.identity_path, listen, announce, options.inbound, map_port=host in ("", "0.0.0.0"))


def _check_version(manifest: Manifest) -> None:
    def parts(version: str) -> tuple[int, ...]:
        return tuple(int(part) for part in version.split(".")[:3])

    if parts(__version__) < parts(manifest.min_client_version):
        raise VersionTooOld(
            f"the run needs version {manifest.min_client_version}, this is {__version__}",
            "update with: pip install --upgrade swarm-train",
        )


def _check_memory(manifest: Manifest) -> None:
    """A rough bound, before anything is loaded: weights, gradients, snapshots and optimizer state in fp32."""
    needed = manifest.model.parameters * 4 * 8
    available = psutil.virtual_memory().available
    if available < needed:
        raise OutOfMemory(
            f"the run needs about {needed / 1e9:.1f} GB of memory, {available / 1e9:.1f} GB are free",
            "close other programs, or join a run with a smaller model",
        )


@contextlib.contextmanager
def _only_one(directory: Path) -> Iterator[None]:
    """Hold the directory's lock file. Raises `AlreadyRunning`."""
    file: IO[str] = (directory / "lock").open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        raise AlreadyRunning(f"a peer is running already in {directory}", "see it with: swarm status") from error
    try:
        yield
    finally:
        file.close()


@contextlib.asynccontextmanager
async def _background(*coroutines: Any) -> AsyncIterator[asyncio.Future[None]]:
    """Run coroutines beside the body; the future fails with the first of them that does."""
    failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def note(task: asyncio.Task[Any]) -> None:
        if not task.cancelled() and task.exception() is not None and not failed.done():
            failed.set_exception(task.exception() or SwarmError("a background task ended"))

    tasks = [asyncio.create_task(coroutine) for coroutine in coroutines]
    for task in tasks:
        task.add_done_callback(note)
    try:
        yield failed
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        failed.cancel()
