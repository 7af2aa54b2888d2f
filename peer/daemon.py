"""The daemon: one process, one event loop for the network, one thread for training.

It wires the parts together and decides nothing about rounds. Verbs: pause, snooze, resume, finish, stop.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import statistics
import time
from collections import deque
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import psutil
import structlog
import torch
from prometheus_client import CollectorRegistry, start_http_server

from peer.admissions import Admissions
from peer.attacks import Attack
from peer.best import BestCheckpoint
from peer.checkpoints import Checkpoints
from peer.control import ControlServer
from peer.coordination import Coordination, Standing
from peer.device import hardware_class
from peer.faults import Faults, break_device
from peer.finding import Finder
from peer.generator import Generator
from peer.governor import Governor, device_uuid
from peer.gpu import Sensors, lower_disk_priority, lower_session_priority, lower_thread_priority, open_card
from peer.held import Held, check_snooze
from peer.history import HISTORY, Keeper, check_limit
from peer.holds import Hold, Holds
from peer.lock import only_one
from peer.materials import Materials
from peer.memory import give_back
from peer.metrics import PeerMetrics
from peer.mirror import Mirror
from peer.model import initial_theta
from peer.network.blobs import BlobStore
from peer.network.dialback import DIAL, DialBack
from peer.network.metering import Metering
from peer.network.node import NETWORK_ERRORS, Node, PeerFailure
from peer.network.p2pd import P2pdOptions
from peer.network.traffic import Volume
from peer.network.transfer import Transfer
from peer.outcome import CHECKPOINTS, EVIDENCE, FILES, PIECES
from peer.outer import OuterState, initial_state
from peer.reports import Outbox, Reporter
from peer.rounds.auditor import Auditor
from peer.rounds.audits import AuditDesk
from peer.rounds.docket import Docket
from peer.rounds.engine import Disagreement, Engine, RoundReport, Wish
from peer.rounds.entering import Entry
from peer.rounds.evaluations import EvaluationDesk
from peer.rounds.gathering import Gatherer, PieceFolder
from peer.rounds.keeping import Keeping
from peer.rounds.planting import Planter
from peer.rounds.post import DELIVER, PING, RELAY, SYNC, Post
from peer.rounds.residuals import Residuals, save_quietly
from peer.rounds.run import Services
from peer.rounds.snapshots import Snapshots
from peer.rounds.training import TrainingThread
from peer.rounds.wire import Checker
from peer.state import Layout
from peer.status import Status
from peer.tasks import cancel
from peer.trainer import Trainer
from peer.usage import FILE_NAME as USAGE_NAME
from peer.usage import Usage, month_of
from peer.vitals import Vitals
from swarm import __version__, tracing
from swarm.accounts import CERTIFICATE_SUFFIX, hold
from swarm.clock import SystemClock
from swarm.config import GovernorSettings
from swarm.control import HISTORY_NAME, STATUS_NAME
from swarm.errors import (
    CoordinatorUnreachable,
    NetworkBroken,
    NotAdmitted,
    OutOfMemory,
    PortBusy,
    Rejected,
    StateDisputed,
    SwarmError,
    VersionTooOld,
)
from swarm.identity import Identity
from swarm.manifest import CenteredClip, Manifest, Tree
from swarm.messages import JoinLink, parse
from swarm.notify import keep_watchdog, notify
from swarm.rpc.client import RunInfo
from swarm.rpc.v1.coordinator_pb2 import TWIN_OTHER_COUNTS, TWIN_THIS_COUNTS, TWIN_UNSPECIFIED, AnnounceResponse, Twin
from swarm.rpc.v1.peer_pb2 import RelayRequest, SyncReply, SyncRequest
from swarm.rpc.v1.signed_pb2 import Signed

FETCH_RETRY_S = 1.0
RECEIPT_WAIT_S = 10.0
EVALUATION_WAIT_S = 15.0
GOODBYE_S = 3.0
MOST_DEATHS, DEATHS_WITHIN_S = 6, 600.0
QUOTA_CHECK_S = 30.0
OPERATOR_REST_S = 300.0
DEVICE_REST_S = 60.0
RECENT_ROUNDS = 8
REFUSALS_IN_A_ROW = 5
ADMISSION_ATTEMPTS = 10
COUNTS = {TWIN_UNSPECIFIED: "", TWIN_THIS_COUNTS: ", and this one counts", TWIN_OTHER_COUNTS: ", and that one counts"}
RESERVE_BYTES = 256 << 20
MEMORY_LIMIT_BYTES = 512 << 20
DISK_LIMIT_BYTES = 4 << 30
ANY_ADDRESS = "0.0.0.0"  # noqa: S104 - volunteers accept connections on every interface unless told otherwise

log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class DaemonOptions:
    """What the command line decides. Addresses are host:port; rates are bytes per second, 0 = no limit.

    `keep_history` is the bytes of disk for past rounds, 0 = keep none.
    """

    link: JoinLink
    directory: Path
    identity_path: Path
    device: torch.device
    listen: str = f"{ANY_ADDRESS}:0"
    announce: str = ""
    inbound: bool = True
    metrics: str = ""
    files: Path | None = None
    mirror: str = ""
    data: Path | None = None
    threads: int = 0
    max_upload: int = 0
    max_download: int = 0
    monthly_quota: int = 0
    keep_history: int = 0
    check_traffic: float = 0.02
    plant: bool = False
    ticket: Signed | None = None
    traces: bool = False
    rules: GovernorSettings = field(default_factory=GovernorSettings)
    control_socket: int | None = None


@dataclass(frozen=True)
class Parts:
    """A wired peer."""

    run: RunInfo
    node: Node
    coordination: Coordination
    admissions: Admissions
    materials: Materials
    transfer: Transfer
    post: Post
    finder: Finder
    services: Services
    snapshots: Snapshots
    checkpoints: Checkpoints
    reporter: Reporter
    vitals: Vitals
    metering: Metering


@dataclass
class Daemon:
    """A running peer."""

    options: DaemonOptions
    identity: Identity
    status: Status
    registry: CollectorRegistry
    faults: Faults
    usage: Usage
    governor: Governor = field(init=False)
    _gpu_uuid: str | None = None
    _control: ControlServer | None = None
    engine: Engine | None = None
    evaluations: EvaluationDesk | None = None
    run: RunInfo | None = None
    metrics_address: str = ""
    started_s: float = field(default_factory=time.monotonic)
    _parts: Parts | None = None
    _wish: str = "train"
    _round_began: Volume = field(default_factory=Volume)
    _rounds_used: deque[Volume] = field(default_factory=lambda: deque([Volume()], RECENT_ROUNDS))
    _holds: Holds = field(default_factory=Holds)
    _refused: int = 0
    _run_is_over: bool = False
    _changed: asyncio.Event = field(default_factory=asyncio.Event)
    _stack: contextlib.AsyncExitStack = field(default_factory=contextlib.AsyncExitStack)

    def __post_init__(self) -> None:
        device = self.options.device
        uuid = self._gpu_uuid = device_uuid(device.type, device.index)
        sensors = Sensors(open_card(uuid) if uuid else None)
        self.governor = Governor(self.options.rules, sensors, bool(uuid), self._on_rules, self._on_wake)

    @classmethod
    def create(cls, options: DaemonOptions) -> Daemon:
        """A daemon with its key, not yet started. Raises `KeyFileError`."""
        registry = CollectorRegistry()
        options.directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        identity = Identity.load_or_create(options.identity_path)
        status = Status(PeerMetrics(registry), history=options.directory / HISTORY_NAME)
        usage = Usage.load(options.directory / USAGE_NAME, options.monthly_quota)
        daemon = cls(options, identity, status, registry, Faults.from_environment(), usage)
        daemon.faults.actions.update(
            flip_bit=daemon.flip_bit, break_device=break_device, tamper=daemon.tamper, spoil=daemon.spoil
        )
        return daemon

    def flip_bit(self) -> None:
        """What a cosmic ray does to the weights; only fault scripts ask for it."""
        if self.engine is not None and self.engine.state is not None:
            theta = self.engine.state.theta
            theta.setflags(write=True)
            theta.view(np.uint32)[theta.size // 2] ^= np.uint32(1 << 20)
            theta.setflags(write=False)

    def tamper(self) -> None:
        """Merge with the wrong sign in the present round, as a hostile reducer would; only fault scripts ask for it."""
        if self.engine is not None and self.engine.current is not None:
            self.engine.current.exchange.distort = Attack("tamper").merged

    def spoil(self) -> None:
        """Train on labels that make no sense, as of a damaged file; the next time on the right ones. Only fault scripts ask."""
        if self.engine is not None:
            trainer, vocabulary = self.engine.training.trainer, self.engine.services.manifest.model.vocabulary_size
            trainer.relabel = (lambda labels: vocabulary - 1 - labels) if trainer.relabel is None else None

    @property
    def parts(self) -> Parts:
        """The wired parts. Raises `SwarmError` while they are still being put together."""
        if self._parts is None:
            raise SwarmError("the peer is still starting", "try again in a few seconds")
        return self._parts

    # --- verbs ----------------------------------------------------------------------------------------------------------

    def wish(self, verb: str) -> None:
        """Take a verb: `pause`, `resume`, `finish` or `stop`. A second `finish` stops."""
        log.info("asked", verb=verb)
        match verb:
            case "pause":
                self._put("user", Hold("paused"))
            case "resume":
                self._holds, self._refused = self._holds.resumed(), 0
                self._put("user", None)
            case _:
                self._obey(verb)

    def snooze(self, seconds: float) -> None:
        """Pause for a while. Raises `UsageError`."""
        log.info("asked", verb="snooze", seconds=seconds)
        self._put("user", check_snooze(seconds))

    def _put(self, who: str, hold: Hold | None) -> None:
        """Let somebody keep the peer from training, or let go; it pauses with the first and goes on after the last."""
        self._holds = self._holds.put(who, hold)
        first = self._holds.first
        if first is None and self._wish == "pause":
            self._obey("resume")
        elif first is not None and self._wish == "train":
            self._obey("pause")
        elif first is not None and self._wish == "pause" and (self._parts is None or self._is_settled()):
            self.status.state(first.reason, first.detail)

    def _obey(self, verb: str) -> None:
        if verb == "finish" and self._wish == "finish":
            verb = "stop"
        self._wish = {"resume": "train"}.get(verb, verb)
        if self.engine is not None and verb != "resume":
            self.engine.ask(cast("Wish", verb))
        if verb == "pause" and self.engine is not None and self._parts is not None:
            self._parts.post.spawn(self._free_device(self.engine))
        first = self._holds.first
        if verb == "pause" and first is not None:
            self.status.state(first.reason, first.detail)
        else:
            self.status.state({"finish": "finishing", "stop": "stopping"}.get(verb, self.status.reason))
        self._changed.set()

    async def _free_device(self, engine: Engine) -> None:
        """Give the device back as soon as the micro-batch is done; the round goes on with what was trained."""
        try:
            await engine.training.release()
        except torch.AcceleratorError as error:
            log.warning("device_not_released", error=_first_line(error))  # the program that takes our place frees it
        await asyncio.to_thread(give_back)
        log.info("device_free")

    def _is_settled(self) -> bool:
        return not self._waits_for()

    def _waits_for(self) -> str:
        """What stands between the wish and its effect; empty when it has taken effect."""
        engine = self.engine
        if self._wish == "train":
            return ""
        if engine is None:
            return "the start to come to its end"
        if self._wish == "pause" and engine.training.worker.is_loaded:
            return "the micro-batch to end"
        if engine.current is not None:
            return f"round {engine.current.round_index} to be exchanged, so that its work counts"
        return "receipts" if self._wish == "finish" else ""

    async def control(self, verb: str, arguments: dict[str, Any]) -> dict[str, Any]:
        """Answer the control socket."""
        match verb:
            case "status":
                return self.describe()
            case "snooze":
                self.snooze(float(arguments.get("seconds", 0)))
                return {"accepted": verb, **self.describe()}
            case "pause" | "resume" | "finish" | "stop":
                self.wish(verb)
                return {"accepted": verb, **self.describe()}
            case "checkpoint":
                await self.parts.checkpoints.save()
                return {"directory": str(self.parts.checkpoints.directory)}
            case _:
                return {"error": f"unknown verb {verb[:32]!r}"}

    def describe(self) -> dict[str, Any]:
        """Everything that `swarm status` shows."""
        parts, engine = self._parts, self.engine
        return {
            "peer_id": self.identity.peer_id,
            "run_id": self.options.link.run_id.hex(),
            "run_name": self.run.manifest.name if self.run else "",
            "pid": os.getpid(),
            "uptime_s": time.monotonic() - self.started_s,
            "device": str(self.options.device),
            "addresses": list(parts.node.addresses) if parts else [],
            "inbound": self.options.inbound,
            "bytes_sent": parts.node.traffic.total.sent_bytes if parts else 0,
            "bytes_received": parts.node.traffic.total.received_bytes if parts else 0,
            "traffic": self._describe_traffic(),
            "reports_waiting": len(parts.reporter.outbox.waiting()) if parts else 0,
            "coordinator_reachable": bool(parts and parts.coordination.reachable),
            "clock_offset_s": parts.coordination.clock_offset_s if parts else 0.0,
            "credits": parts.vitals.balances if parts else {},
            "repairs": engine.repairs if engine else 0,
            "rounds_total": self.run.manifest.rounds.total if self.run else 0,
            "metrics": self.metrics_address,
            "directory": str(self.options.directory),
            "waits_for": self._waits_for(),
            "device_free": engine is None or not engine.training.worker.is_loaded,
            "governor": self.governor.describe(),
            **({"history": engine.keeping.keeper.describe()} if engine and engine.keeping else {}),
            "evaluation": self.evaluations.best.describe() if self.evaluations else {},
            **self.status.as_dict(),
        }

    def _describe_traffic(self) -> dict[str, Any]:
        """Bytes, and bytes per second; `counted_at` says whether they are those of the sockets or an estimate."""
        parts, usage, options = self._parts, self.usage, self.options
        found: dict[str, Any] = {
            "last_round": asdict(self._rounds_used[-1]),
            "today": asdict(usage.today),
            "month": {"month": month_of(usage.clock.wall_s()), **asdict(usage.this_month)},
            "quota_bytes": options.monthly_quota,
            "quota_left_bytes": usage.left_bytes,
            "max_upload_bytes_per_s": options.max_upload,
            "max_download_bytes_per_s": options.max_download,
        }
        if parts is not None:
            traffic = parts.node.traffic
            found |= {
                "counted_at": "socket" if traffic.at_socket else "stream",
                "sent_bytes": dict(traffic.sent),
                "received_bytes": dict(traffic.received),
                "upload_bytes_per_s": parts.transfer.upload_meter.bytes_per_s,
                "source_bytes_per_s": {peer: meter.bytes_per_s for peer, meter in parts.transfer.sources.items()},
            }
        return found

    # --- life -----------------------------------------------------------------------------------------------------------

    async def serve(self) -> Held | None:
        """Run until finished, stopped or paused; what the program that waits out a pause needs. Raises `SwarmError`."""
        async with self._stack:
            self._stack.enter_context(tracing.started(self.options.traces, "swarm-peer"))
            try:
                await self._interruptible(self._start())
                if self._wish in ("train", "pause") and self.engine is not None:
                    await self._live(self.engine, self.parts)
            except SwarmError as error:
                self.status.error = error.message
                self.status.state("failed")
                raise
            finally:
                self._keep_status()
            return self._hand_over()

    def _hand_over(self) -> Held | None:
        """Keep what outlives this program when it isn't the end: the socket, the totals, and why we wait."""
        if (
            self._wish not in ("pause", "train")
            or self.status.reason in ("run_complete", "disagreement")
            or self._control is None
        ):
            return None
        return Held(self._holds, self.describe(), self._gpu_uuid, self._control.keep())

    async def _interruptible(self, starting: Any) -> None:
        """Start up, unless we are asked to stop meanwhile: there is no round to finish yet."""
        work = asyncio.create_task(starting)
        while not work.done() and self._wish not in ("finish", "stop"):
            self._changed.clear()
            changed = asyncio.create_task(self._changed.wait())
            await asyncio.wait((work, changed), return_when=asyncio.FIRST_COMPLETED)
            changed.cancel()
        if not work.done():
            work.cancel()
            await asyncio.gather(work, return_exceptions=True)
            return
        work.result()

    def _keep_status(self) -> None:
        """Leave the last status behind for `swarm status`; a full disk costs only that."""
        with contextlib.suppress(OSError):
            (self.options.directory / STATUS_NAME).write_text(json.dumps(self.describe()))

    async def _start(self) -> None:
        options = self.options
        self._stack.enter_context(only_one(options.directory))
        control = self._control = ControlServer(options.directory, self.control)
        await control.start(options.control_socket)
        self._stack.push_async_callback(control.close)
        self._serve_metrics()
        if options.rules.disk_idle:
            lower_disk_priority()
        await self.governor.begin()
        if self._wish == "pause":
            return
        self.status.state("connecting")
        held = hold(self.identity, options.identity_path.with_suffix(CERTIFICATE_SUFFIX))
        coordination = Coordination(options.link, self.identity, options.directory, held, options.ticket)
        self._stack.push_async_callback(coordination.close)
        self.run = await coordination.describe()
        _check_version(self.run.manifest)
        _check_memory(self.run.manifest)
        if options.keep_history:
            check_limit(options.keep_history, Layout.of(self.run.manifest).size_limit_bytes)
        mirror = Mirror(options.mirror) if options.mirror else None
        materials = Materials(options.directory / FILES, options.files, options.data, mirror)
        await asyncio.to_thread(materials.take_private, self.run.manifest.data)
        await self._await_quota()
        node = await Node.start(_p2pd_options(options))
        self._stack.push_async_callback(node.close)
        parts = self._parts = self._wire(self.run, node, coordination, materials)
        await self._open(parts)
        notify("READY=1")
        await self._prepare(parts)

    async def _await_quota(self) -> None:
        """Wait, without a network, while the month's quota is used up."""
        self._stack.callback(self.usage.save)
        while not self.usage.allows():
            self.status.state("quota_used")
            await asyncio.sleep(QUOTA_CHECK_S)
        self.status.state("connecting")

    def _wire(self, run: RunInfo, node: Node, coordination: Coordination, materials: Materials) -> Parts:
        """Put the parts together; nothing runs yet."""
        options, manifest = self.options, run.manifest
        pool = ThreadPoolExecutor(2, thread_name_prefix="arithmetic")
        self._stack.callback(pool.shutdown)
        node.on_rejected = self.status.refused
        admissions = Admissions(run.run_id, run.coordinator)
        layout = Layout.of(manifest)
        snapshots = Snapshots()
        store = BlobStore(MEMORY_LIMIT_BYTES, disk_limit_bytes=DISK_LIMIT_BYTES, directory=options.directory / "blobs")
        attack = Attack.from_environment()
        store.provide(snapshots.lookup if attack is None else lambda name: attack.served(snapshots.lookup(name)))
        store.provide(materials.lookup)
        rule = run.manifest.merge
        momentum = rule.worker_momentum if isinstance(rule, CenteredClip) else 0.0
        residuals = Residuals(options.directory, run.run_id.hex(), momentum, options.device)
        store.provide(residuals.lookup)

        def token() -> Any:
            return admissions.token(self.identity.peer_id)

        transfer = Transfer(node, store, run.run_id, admissions.check, token, relays=self._relays)
        transfer.limit(options.max_upload, options.max_download)
        transfer.may_move = self.usage.allows
        post = Post(
            node,
            on_lost=self._on_lost,
            on_refused=self._on_refused,
            relays=self._relays,
            relay_request=lambda to, call, payload: RelayRequest(
                run_id=run.run_id, to=to, call=call, payload=payload, admission=token()
            ),
        )
        checker = Checker(manifest, run.run_id, run.coordinator, admissions.is_admitted)
        services = Services(
            manifest,
            run.signed_manifest,
            self.identity,
            checker,
            admissions,
            post,
            transfer,
            residuals,
            pool,
            self.status,
            SystemClock(),
            coordination.grant,
            self.faults,
            attack,
        )
        outbox = Outbox(options.directory)
        finder = Finder(
            node,
            self.identity,
            run.run_id,
            coordination,
            self._standing,
            options.inbound,
            on_rejected=lambda reason: self.status.refused("dht", reason),
            on_twin=self._on_twin,
        )
        reporter = Reporter(run.run_id, outbox, coordination.connected, self._on_report)
        vitals = Vitals(
            self.status.metrics,
            node,
            outbox,
            options.device,
            self.identity.peer_id,
            lambda: coordination.client,
            self.usage,
            lambda: transfer.upload_meter.bytes_per_s,
        )
        checkpoints = Checkpoints(options.directory / CHECKPOINTS, run.run_id.hex(), layout, snapshots)
        return Parts(
            run,
            node,
            coordination,
            admissions,
            materials,
            transfer,
            post,
            finder,
            services,
            snapshots,
            checkpoints,
            reporter,
            vitals,
            Metering(node.traffic, transfer, self._on_moved),
        )

    async def _open(self, parts: Parts) -> None:
        """Let others reach us, and be admitted."""
        self._stack.push_async_callback(parts.post.close)
        self._stack.push_async_callback(parts.finder.close)
        parts.post.spawn(keep_watchdog(lambda: self.status.reason))
        parts.coordination.remember_admission(parts.admissions)
        parts.coordination.on_answer = self._on_answer
        parts.post.spawn(parts.metering.watch())
        self._stack.callback(parts.metering.measure)
        await parts.node.serve_calls(PING, _pong)
        await parts.node.serve_calls(SYNC, self._answer_sync)
        await parts.node.serve_calls(DELIVER, self._answer_delivery)
        await parts.node.serve_calls(RELAY, self._answer_relay)
        await parts.node.serve_calls(DIAL, DialBack(parts.node, parts.admissions.check).answer)
        await parts.transfer.start()
        await parts.finder.start()
        await self._be_admitted(parts)

    async def _be_admitted(self, parts: Parts) -> None:
        """Announce until the coordinator has answered, or go on with the admission of an earlier start."""
        for attempt in range(ADMISSION_ATTEMPTS):
            try:
                await parts.coordination.announce(parts.node, self._standing())
            except Rejected as error:
                raise NotAdmitted(f"the coordinator refuses this key: {error}", "why: swarm explain --round N") from error
            except CoordinatorUnreachable:
                if parts.coordination.last is not None:
                    return
                if attempt + 1 == ADMISSION_ATTEMPTS:
                    raise
                await asyncio.sleep(FETCH_RETRY_S)
            else:
                return

    async def _prepare(self, parts: Parts) -> None:
        """Have the run's files and a loaded model."""
        manifest, materials = parts.run.manifest, parts.materials
        materials.check_space(manifest.files, RESERVE_BYTES)
        await parts.finder.meet()
        for tree in manifest.files:
            await self._obtain(parts, tree)
        training = await asyncio.to_thread(self._make_trainer, manifest, materials)
        self._stack.callback(training.close)
        lower_session_priority(self.options.rules.nice)
        await training.in_thread(lambda: lower_thread_priority(self.options.rules.nice))
        self.governor.brake.is_stopped = training.is_stopped
        layout, newest = parts.checkpoints.layout, parts.checkpoints.newest
        entry = Entry(parts.services, layout, parts.finder.find, self._begin, newest, self._initial)
        docket = Docket(self.options.directory / EVIDENCE, parts.run.run_id)
        await asyncio.to_thread(docket.load)
        parts.transfer.store.provide(docket.lookup)
        desk = AuditDesk(parts.services, training, parts.coordination.connected, self._on_suspended)
        for proven in docket.proven.values():
            desk.convict(proven)
        auditor = Auditor(parts.services, docket, self.options.check_traffic)
        self.engine = Engine(
            parts.services, training, parts.snapshots, entry, auditor, desk, self._on_round, parts.coordination.nudge
        )
        if self.options.keep_history:
            keeper = await asyncio.to_thread(Keeper, self.options.directory / HISTORY, manifest.run_id, self.options.keep_history)
            self.engine.keeping = Keeping(parts.services, keeper, self.status.metrics.history_gaps.inc)
        if manifest.evaluation is not None:
            best = await asyncio.to_thread(BestCheckpoint.open, self.options.directory, manifest)
            self.evaluations = EvaluationDesk(parts.services, training, parts.coordination.connected, best, materials.directory)
        if parts.run.manifest.generates:
            pieces = PieceFolder(self.options.directory / PIECES)
            await asyncio.to_thread(pieces.load, parts.run.run_id)
            parts.transfer.store.provide(pieces.lookup)
            self.engine.gatherer = Gatherer(manifest, parts.transfer, pieces)
        elif self.options.plant:
            self.engine.planter = Planter(parts.services, auditor, parts.coordination.connected)

    def _make_trainer(self, manifest: Manifest, materials: Materials) -> TrainingThread:
        """Load the model and warm it up, so that the first round isn't slower than the others."""
        if self.options.threads:
            torch.set_num_threads(self.options.threads)
        rules = self.options.rules
        memory_ratio = min(filter(None, (rules.in_use.memory_ratio, rules.idle.memory_ratio)), default=0.0)
        if memory_ratio and self.options.device.type == "cuda":
            torch.cuda.set_per_process_memory_fraction(memory_ratio, self.options.device)
        attack = self.parts.services.attack
        if manifest.generates:
            generator = Generator.open(manifest, self.options.device, materials.directory)
            if attack is not None:
                generator.passed_off = attack.samples
            generator.evaluate(np.zeros(1, dtype=np.float32))
            return TrainingThread(generator, self.governor.brake.on_progress)
        trainer = Trainer.open(manifest, self.options.device, materials.directory)
        if attack is not None:
            trainer.relabel = lambda labels: attack.labels(labels, manifest.model.vocabulary_size)
        trainer.evaluate(np.zeros(manifest.model.parameters, dtype=np.float32), 1)
        return TrainingThread(trainer, self.governor.brake.on_progress, lambda trained: self.status.routed(trained.experts))

    async def _obtain(self, parts: Parts, tree: Tree) -> None:
        """Have one of the run's files, from this disk or from others; wait until somebody has it."""
        while not await asyncio.to_thread(parts.materials.take_local, tree):
            self.status.state("fetching_data" if self.usage.allows() else "quota_used")
            if await parts.materials.fetch_mirrored(tree, parts.transfer):
                continue
            where = await parts.finder.find()
            token = parts.admissions.token(self.identity.peer_id)
            with contextlib.suppress(PeerFailure):
                await parts.materials.fetch(tree, where.peers, parts.post, parts.transfer, token)
                continue
            await asyncio.sleep(FETCH_RETRY_S)

    async def _live(self, engine: Engine, parts: Parts) -> None:
        """Play rounds, and pause in between, until finished."""
        async with _background(
            parts.coordination.announce_for_ever(parts.node, self._standing),
            parts.finder.announce_for_ever(),
            parts.reporter.run(),
            engine.desk.work(),
            *([engine.planter.work()] if engine.planter is not None else []),
            *([self.evaluations.work()] if self.evaluations is not None else []),
            parts.vitals.watch(),
            self.governor.watch(),
            self._keep_network(parts),
        ) as failed:
            reason = "pause"
            while self._wish == "train" and reason == "pause":
                engine.ask("train")
                playing: asyncio.Future[str] = asyncio.create_task(self._play(engine))
                await asyncio.wait((playing, failed), return_when=asyncio.FIRST_COMPLETED)
                if failed.done():
                    playing.cancel()
                    await asyncio.gather(playing, return_exceptions=True)
                    failed.result()
                reason = playing.result()
            await self._leave(parts)
        if reason == "disagreement":
            raise StateDisputed(self.status.error, "the state and its parts are kept; tell the run's owner")

    async def _play(self, engine: Engine) -> str:
        try:
            reason = await engine.play()
            if reason == "finish" and self._run_is_over:
                reason = "run_complete"
        except Disagreement as error:
            log.error("disagreement", error=str(error))
            self.status.error = str(error)
            reason = "disagreement"
        except torch.AcceleratorError as error:
            log.exception("device_failed")
            self._put("device", Hold("gpu_failed", _first_line(error), self.usage.clock.wall_s() + DEVICE_REST_S))
            reason = "pause"
        if reason in ("run_complete", "disagreement"):
            self.status.state(reason)
        return reason

    async def _leave(self, parts: Parts) -> None:
        """Post what is left, keep a checkpoint, say good-bye."""
        hold = self._holds.first
        if hold is not None and self._wish == "pause":
            self.status.state(hold.reason, hold.detail)
        elif self._wish != "train":
            notify("STOPPING=1")
        await self._save(parts)
        if self._wish != "stop":
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(parts.reporter.post_until_empty(), RECEIPT_WAIT_S)
        if self.evaluations is not None:
            await self.evaluations.end(EVALUATION_WAIT_S if self._wish in ("train", "finish") else 0.0)
        with contextlib.suppress(TimeoutError, SwarmError, Rejected):
            await asyncio.wait_for(parts.coordination.announce(parts.node, self._standing(), leaving=True), GOODBYE_S)
        log.info("left", rounds=self.status.rounds_contributed, reports_waiting=len(parts.reporter.outbox.waiting()))

    async def _keep_network(self, parts: Parts) -> None:
        """Rebuild the network when its daemon dies; the training state is not touched. Raises `NetworkBroken` if that goes on."""
        deaths = deque[float](maxlen=MOST_DEATHS)
        while True:
            status = await parts.node.daemon.wait()
            deaths.append(time.monotonic())
            if len(deaths) == MOST_DEATHS and deaths[-1] - deaths[0] < DEATHS_WITHIN_S:
                raise NetworkBroken("the libp2p daemon keeps dying", "see the log; is something killing it?")
            log.warning("network_lost", status=status)
            await parts.finder.close()
            try:
                await parts.node.rebuild()
                await parts.finder.start()
            except (SwarmError, *NETWORK_ERRORS) as error:
                log.warning("network_not_rebuilt", error=str(error))
                await asyncio.sleep(FETCH_RETRY_S)
                continue
            await parts.finder.find()
            log.info("network_rebuilt", addresses=list(parts.node.addresses))

    # --- what the parts ask for -----------------------------------------------------------------------------------------

    async def _answer_sync(self, peer: str, raw: bytes) -> bytes:
        parts = self.parts
        if self.engine is not None:
            return await self.engine.answer_sync(peer, raw, parts.materials.hashes)
        request = parse(SyncRequest, raw, peer)
        parts.admissions.require(peer, request.admission, "sync")
        return SyncReply(chunk_hashes=b"".join(parts.materials.hashes(request.state_root))).SerializeToString()

    async def _answer_delivery(self, peer: str, raw: bytes) -> bytes:
        if self.engine is None:
            raise Rejected("starting", "", peer)
        return await self.engine.deliver(peer, raw)

    async def _answer_relay(self, peer: str, raw: bytes) -> bytes:
        parts = self.parts
        request = parse(RelayRequest, raw, peer)
        if not parts.admissions.check(peer, request.admission) or not parts.admissions.is_admitted(request.to):
            raise Rejected("not_admitted", "relay", peer)
        return (await parts.post.relay(request)).SerializeToString()

    def _relays(self, peer: str) -> list[str]:
        """Who could pass something on to a peer that accepts no connections: members of the roster, or whom we know, that do."""
        parts, engine = self.parts, self.engine
        if not parts.node.is_dial_only(peer):
            return []
        place = engine.place if engine is not None else None
        names = [member.peer for member in place.roster] if place is not None else list(parts.node.known_peers())
        return [name for name in names if name not in (peer, self.identity.peer_id) and not parts.node.is_dial_only(name)]

    async def _begin(self) -> OuterState:
        """The state of a first peer: the newest checkpoint, or the manifest's initial weights."""
        local = self.parts.checkpoints.newest()
        if local is not None:
            return local.state
        return await self._initial()

    async def _initial(self) -> OuterState:
        """The state that the manifest begins with."""
        manifest = self.parts.run.manifest
        theta = await asyncio.to_thread(initial_theta, manifest.model, self.parts.materials.directory)
        return initial_state(manifest.strategy, theta)

    async def _on_round(self, report: RoundReport) -> None:
        parts = self.parts
        parts.metering.measure()
        now = parts.node.traffic.total
        moved, self._round_began = now - self._round_began, now
        self._rounds_used.append(moved)
        self.status.round_done(report, moved)
        await parts.reporter.add(self.identity, report)
        if self.evaluations is not None and report.tokens:
            await self.evaluations.keep(report.round_index, parts.snapshots.newest, report.wall_s)
        if parts.checkpoints.due():
            parts.post.spawn(self._save(parts))

    async def _save(self, parts: Parts) -> None:
        """Keep what a restart needs."""
        await parts.checkpoints.save_quietly()
        await asyncio.to_thread(save_quietly, parts.services.residuals, parts.checkpoints.standing()[0])

    def _on_moved(self, volume: Volume) -> None:
        """Count traffic; pause before a round that the quota wouldn't outlast, until a new month begins.

        Two are still to come: the one that goes on, and the one in which we leave the roster.
        """
        self.usage.add(volume)
        used_up = not self.usage.allows(2 * int(statistics.median_low(used.total_bytes for used in self._rounds_used)))
        if used_up != (self._holds.quota is not None):
            self._put("quota", Hold("quota_used", until_s=self.usage.next_month_s) if used_up else None)

    def _on_report(self, outcome: str) -> None:
        self.count_report(outcome, self.parts.reporter.outbox)

    def count_report(self, outcome: str, outbox: Outbox) -> None:
        """Take the outcome of a report into account; several refusals in a row pause the peer.

        Rounds that were played again ("superseded") say nothing about the work of this machine.
        """
        self.status.metrics.reports.labels(outcome=outcome).inc()
        if outcome == "superseded":
            return
        self._refused = self._refused + 1 if outcome == "refused" else 0
        if self._refused == REFUSALS_IN_A_ROW:
            self._put("rejections", Hold("contributions_rejected", f"the last one because: {outbox.last_refusal()}"))

    def _on_suspended(self) -> None:
        """Nothing that this key does counts any more: stop, so that its owner looks at it."""
        if self._parts is not None and self._parts.services.attack is None:
            self._put("suspension", Hold("suspended"))

    def _on_twin(self, twin: Twin.ValueType = TWIN_UNSPECIFIED) -> None:
        """Two machines with one key contradict each other: one counts, as the coordinator says, and the other pauses."""
        log.warning("key_used_elsewhere", peer=self.identity.peer_id, counts=COUNTS[twin])
        self.status.warning = f"another machine uses this key{COUNTS[twin]}: make one for each with `swarm identity new`"
        if twin == TWIN_OTHER_COUNTS:
            self._put("twin", Hold("key_used_elsewhere"))

    def _on_rules(self, reason: str, detail: str) -> None:
        hold = Hold(reason, detail) if reason else None
        if hold != self._holds.governor:
            self._put("governor", hold)

    def _on_wake(self, slept_s: float) -> None:
        """After a sleep everybody else's idea of us is old."""
        if self._parts is not None:
            self._parts.coordination.nudge()
            self._parts.post.spawn(self._parts.finder.meet())

    def _on_answer(self, answer: AnnounceResponse) -> None:
        parts = self.parts
        parts.admissions.admit(answer.admission)
        parts.post.spawn(parts.finder.meet())
        self.status.metrics.clock_offset.set(self.parts.coordination.clock_offset_s)
        if answer.twin != TWIN_UNSPECIFIED:
            self._on_twin(answer.twin)
        self._heed(answer.run_state)

    def _heed(self, run_state: str) -> None:
        """Do what the run's operator has ordered: end with this round, or rest and then look again."""
        if run_state == "finished" and not self._run_is_over:
            log.info("run_finished")
            self._run_is_over = True
            if self._wish in ("train", "pause"):
                self._obey("finish")
            if self.engine is None:
                self.status.state("run_complete")
        paused = run_state == "paused"
        if paused != (self._holds.operator is not None):
            self._put("operator", Hold("run_paused", until_s=self.usage.clock.wall_s() + OPERATOR_REST_S) if paused else None)

    def _on_lost(self, peer: str) -> None:
        if self.engine is not None:
            self.engine.lost(peer)

    def _on_refused(self, peer: str, reason: str) -> None:
        log.debug("delivery_refused", peer=peer, reason=reason)
        if self.engine is not None:
            self.engine.refused(reason)

    def _standing(self) -> Standing:
        round_index, root = self._parts.checkpoints.standing() if self._parts is not None else (0, b"")
        return Standing(round_index, self.status.reason, hardware_class(self.options.device), self.options.inbound, root)

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


async def _pong(peer: str, raw: bytes) -> bytes:
    return b""


def _p2pd_options(options: DaemonOptions) -> P2pdOptions:
    host, _, port = options.listen.rpartition(":")
    host = host.strip("[]") or ANY_ADDRESS
    announce: tuple[str, ...] = ()
    if options.announce:
        name, _, announced = options.announce.rpartition(":")
        family = "ip4" if name.replace(".", "").isdigit() else "dns4"
        announce = (f"/{family}/{name}/tcp/{announced}",)
    listen = (f"/{'ip6' if ':' in host else 'ip4'}/{host}/tcp/{port}",)
    return P2pdOptions(options.identity_path, listen, announce, options.inbound, map_port=host == ANY_ADDRESS)


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


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


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
        await cancel(tasks)
        failed.cancel()
