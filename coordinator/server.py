"""Puts the coordinator together and serves it: `async with Coordinator.serve([signed_manifest], settings) as coordinator`.

Nothing outlives the context: tasks, threads, sockets and the database's connections are closed in the reverse order.
"""

from __future__ import annotations

import asyncio
import datetime
import fcntl
import socket
from collections.abc import AsyncIterator, Coroutine, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import structlog
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1._async import HealthServicer
from prometheus_client import CollectorRegistry

from coordinator.admin import AdminService
from coordinator.gauges import watch, watch_calls
from coordinator.guard import ADDRESS_BURST_S, KEY_BURST_S, Guard
from coordinator.journal import Journal
from coordinator.limits import MAX_MESSAGE_BYTES, Ceilings, Rate
from coordinator.metrics import CallMetrics, Metrics
from coordinator.replicas import ReplicaService, channels, is_passed_on, replica_secret
from coordinator.runs import ByRun, by_run
from coordinator.service import PeerService
from coordinator.signatures import SignatureChecker
from coordinator.snapshot import SNAPSHOT_FILE, Source, keep_fresh
from coordinator.store.interface import Store
from coordinator.store.memory import MemoryStore
from coordinator.tls import Certificate, require_tls_1_3
from coordinator.witnesses import Witnessed
from swarm.clock import Clock, SystemClock
from swarm.config import CoordinatorSettings, data_path
from swarm.errors import AlreadyRunning, DatabaseCorrupt, PortBusy, Rejected, UsageError
from swarm.identity import Identity, public_key_of
from swarm.ledger import open_manifest
from swarm.messages import JoinLink, base32, payload_hash
from swarm.rpc.v1 import coordinator_pb2
from swarm.rpc.v1.coordinator_pb2_grpc import add_AdminServiceServicer_to_server, add_PeerServiceServicer_to_server
from swarm.rpc.v1.signed_pb2 import Signed
from swarm.tracing import Tracer, exporting

KEY_FILE = "coordinator.key"
DATABASE_FILE = "coordinator.db"
LOCK_FILE = "lock"
ADMIN_HINT = "name the peer ids that `swarm admin key` prints in SWARM_COORDINATOR_ADMIN_KEYS"
TRACED_HINT = "name the peer ids that `swarm identity show` prints in SWARM_COORDINATOR_TRACES_OF"
WITNESS_HINT = "name the peer ids that `swarm identity show` prints in SWARM_COORDINATOR_WITNESSES"
ADMIN_FOLDER = "admin"
ADMIN_CALLS = 16
MEMORY_URL = "memory://"
RUN_PLACE = "{run}"
DB_HINT = f"write {RUN_PLACE} into the URL where the run's name belongs, as in postgresql://host/swarm_{RUN_PLACE}"
PEER_SERVICE = coordinator_pb2.DESCRIPTOR.services_by_name["PeerService"]
ADMIN_SERVICE = coordinator_pb2.DESCRIPTOR.services_by_name["AdminService"]
SHARED = "postgresql"  # databases that several coordinators may use at a time
GRACE_S = 5.0
READY_S = 60.0
TICK_S = 1.0
WILDCARDS = ("0.0.0.0", "::", "")  # noqa: S104 - recognised, not chosen here
ELSEWHERE = ("192.0.2.1", 9)  # TEST-NET-1 (RFC 5737): no packet is sent, the route to it tells our own address

CLOSING_MS = 60_000  # for calls in progress when their connection gets too old
SERVER_OPTIONS = (
    ("grpc.so_reuseport", 0),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_metadata_size", 8 << 10),
    ("grpc.max_concurrent_streams", 128),  # of one connection
    ("grpc.server_handshake_timeout_ms", 10_000),
    ("grpc.max_connection_idle_ms", 900_000),
    ("grpc.keepalive_time_ms", 60_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.http2.min_ping_interval_without_data_ms", 30_000),
)

log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class Address:
    """A host and a port."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @classmethod
    def parse(cls, text: str) -> Address:
        """Read `host:port`. Raises `UsageError`."""
        host, separator, port = text.rpartition(":")
        if not separator or not port.isdigit() or int(port) > 65535:
            raise UsageError(f"not an address: {text!r}", "an address looks like 0.0.0.0:4300 or [::]:4300")
        return cls(host.strip("[]"), int(port))


@dataclass(frozen=True)
class Books:
    """What is kept of one run."""

    manifest: Signed
    settings: CoordinatorSettings
    folder: Path
    identity: Identity
    store: Store
    journal: Journal
    metrics: Metrics

    @property
    def run(self) -> str:
        """The run's id in hexadecimal, as calls name it."""
        return self.journal.run_id.hex()


@dataclass(frozen=True)
class RunLinks:
    """How a run is reached: by peers, and by its operator."""

    name: str
    run_id: bytes
    link: JoinLink
    admin_link: JoinLink | None


@dataclass(frozen=True)
class Coordinator:
    """A running coordinator: where it is, and its parts for tests that look inside: `journal` and such are the first run's."""

    link: JoinLink
    listen: Address
    metrics_address: Address | None
    identity: Identity
    state_folder: Path
    journal: Journal
    metrics: Metrics
    guard: Guard
    admin_link: JoinLink | None
    runs: tuple[RunLinks, ...]

    @classmethod
    @asynccontextmanager
    async def serve(
        cls, manifests: Sequence[Signed], settings: CoordinatorSettings, clock: Clock | None = None
    ) -> AsyncIterator[Coordinator]:
        """Serve the runs of owner-signed manifests until the context is left.

        Raises `ManifestInvalid`, `PortBusy`, `AlreadyRunning`, `KeyFileError`, `DatabaseCorrupt` or `UsageError`.
        """
        clock = clock or SystemClock()
        require_tls_1_3()
        registry = CollectorRegistry()
        async with AsyncExitStack() as stack:
            tracer = stack.enter_context(exporting(settings.traces, "swarm-coordinator"))
            calls = CallMetrics(registry)
            kept = [
                await stack.enter_async_context(
                    _books(manifest, settings_of_run(settings, manifest, len(manifests)), clock, metrics)
                )
                for manifest, metrics in zip(manifests, _metrics(registry, calls, manifests), strict=True)
            ]
            first = kept[0]
            now = datetime.datetime.fromtimestamp(clock.wall_s(), datetime.UTC)
            certificate = Certificate.load_or_create(first.folder, now)
            checker = await stack.enter_async_context(SignatureChecker())
            guard = _guard(settings, kept, clock, calls)
            guard.tracer, guard.traced = tracer, _peer_ids(settings.traces_of, "a peer's key", TRACED_HINT)
            watch_calls(calls, guard)
            services = {books.run: _service(books, clock, guard, checker) for books in kept}
            for books in kept:
                await stack.enter_async_context(_background(books.journal.run()))
                await stack.enter_async_context(_background(_ticks(books.journal, books.metrics, clock)))
            service = by_run(PEER_SERVICE, services)
            listen = await stack.enter_async_context(_grpc(service, guard, certificate, settings))
            for books in kept:
                replica = services[books.run]
                if isinstance(replica, ReplicaService):
                    await stack.enter_async_context(_among_replicas(replica, books.settings, listen, certificate))
            links = {books.run: _link(settings, listen, books.journal.run_id, certificate) for books in kept}
            admin_links = await stack.enter_async_context(_admin(settings, kept, clock, calls, tracer))
            page = await stack.enter_async_context(_web(settings, kept, registry, links))
            runs = tuple(
                RunLinks(books.journal.manifest.name, books.journal.run_id, links[books.run], admin_links.get(books.run))
                for books in kept
            )
            for books in kept:
                log.info("coordinator_started", listen=str(listen), entries=len(books.journal.tree), run=books.run)
            link, admin_link = runs[0].link, runs[0].admin_link
            folder, journal = first.folder, first.journal
            yield cls(link, listen, page, first.identity, folder, journal, first.metrics, guard, admin_link, runs)
        log.info("coordinator_stopped")


def settings_of_run(settings: CoordinatorSettings, manifest: Signed, runs: int) -> CoordinatorSettings:
    """The settings with the folder and the database of one of several runs. Raises `UsageError` where they would share one."""
    if runs == 1:
        return settings
    name = run_name(payload_hash(manifest))
    if settings.db not in ("", MEMORY_URL) and RUN_PLACE not in settings.db:
        raise UsageError("several runs in one database", DB_HINT)
    folder = None if settings.state_dir is None else settings.state_dir / name
    return settings.model_copy(update={"db": settings.db.replace(RUN_PLACE, name), "state_dir": folder})


def run_name(run_id: bytes) -> str:
    """What a run's folder is called."""
    return base32(run_id)[:16]


def _metrics(registry: CollectorRegistry, calls: CallMetrics, manifests: Sequence[Signed]) -> list[Metrics]:
    """The metrics of each run: in `registry` as they are, or, where there are several runs, with the run's name as a label."""
    if len(manifests) == 1:
        return [Metrics(registry, calls)]
    made = {run_name(payload_hash(manifest)): Metrics(CollectorRegistry(), calls) for manifest in manifests}
    if len(made) != len(manifests):
        raise UsageError("a run is named twice", "name each run once: swarm coordinator --run one.yaml --run other.yaml")
    registry.register(ByRun({name: metrics.registry for name, metrics in made.items()}))
    return list(made.values())


@asynccontextmanager
async def _books(manifest: Signed, settings: CoordinatorSettings, clock: Clock, metrics: Metrics) -> AsyncIterator[Books]:
    """Open what is kept of a run, and keep its snapshot fresh."""
    open_manifest(manifest)
    folder = state_folder(settings, payload_hash(manifest))
    async with AsyncExitStack() as stack:
        stack.enter_context(locked(folder))
        identity = Identity.load_or_create(folder / KEY_FILE)
        store = stack.enter_context(_store(settings, folder))
        snapshot = None if settings.db == MEMORY_URL else folder / SNAPSHOT_FILE
        journal = Journal(store, identity, manifest, clock, metrics, settings.presence_ttl_s, snapshot)
        await asyncio.to_thread(journal.read if settings.db.startswith(SHARED) else journal.load)
        if snapshot is not None:
            source = Source(database_url(settings, folder), identity.peer_id, snapshot)
            await stack.enter_async_context(_background(keep_fresh(source, lambda: len(journal.tree))))
        watch(metrics, journal)
        yield Books(manifest, settings, folder, identity, store, journal, metrics)


def _service(books: Books, clock: Clock, guard: Guard, checker: SignatureChecker) -> PeerService:
    settings = books.settings
    kind = ReplicaService if settings.db.startswith(SHARED) else PeerService
    witnessed = Witnessed(_peer_ids(settings.witnesses, "a witness's key", WITNESS_HINT))
    return kind(books.journal, books.store, books.identity, books.manifest, clock, books.metrics, guard, checker, witnessed)


def state_folder(settings: CoordinatorSettings, run_id: bytes) -> Path:
    """Where the run's keys and database are."""
    return settings.state_dir or data_path() / "coordinator" / run_name(run_id)


def database_url(settings: CoordinatorSettings, folder: Path) -> str:
    """The database's URL."""
    return settings.db or f"sqlite:///{folder / DATABASE_FILE}"


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other coordinators out of the folder. Raises `AlreadyRunning`."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    with (folder / LOCK_FILE).open("wb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise AlreadyRunning(f"another coordinator uses {folder}", "stop it, or choose another --state-dir") from error
        yield


@contextmanager
def _store(settings: CoordinatorSettings, folder: Path) -> Iterator[Store]:
    if settings.db == MEMORY_URL:
        yield MemoryStore()
        return
    from coordinator.store.sql import SqlStore  # noqa: PLC0415 - a third of the start-up time

    store = SqlStore.open(database_url(settings, folder))
    try:
        yield store
    finally:
        store.close()


@asynccontextmanager
async def _among_replicas(
    service: ReplicaService, settings: CoordinatorSettings, listen: Address, certificate: Certificate
) -> AsyncIterator[None]:
    """Take part in the election of the writer, and pass on to it what it alone can do."""
    from coordinator.store.sql import PostgresSeat  # noqa: PLC0415 - a third of the start-up time

    address = settings.replica_address or str(_reachable(listen))
    replica = service.join(PostgresSeat(settings.db), address)
    async with channels(certificate.certificate) as service.channels, _background(replica.run()):
        try:
            await asyncio.wait_for(replica.ready.wait(), READY_S)
        except TimeoutError as error:
            hint = "another coordinator may hold the writer's lock without writing: look at its log, or at pg_locks"
            raise DatabaseCorrupt(f"no replica has opened the run in {READY_S:.0f} s", hint) from error
        yield


def _reachable(listen: Address) -> Address:
    return Address(_own_address() if listen.host in WILDCARDS else listen.host, listen.port)


def _guard(settings: CoordinatorSettings, kept: Sequence[Books], clock: Clock, metrics: CallMetrics) -> Guard:
    """The runs' common limits. Who is admitted to any run may make the calls of peers; whether to this one, its journal says."""
    secrets = [replica_secret(books.identity) for books in kept] if settings.db.startswith(SHARED) else []
    journals = [books.journal for books in kept]
    per_address, per_key = settings.calls_per_address_per_s, settings.calls_per_key_per_s
    return Guard(
        clock,
        metrics,
        lambda peer_id: any(not each.is_writer or each.credits.is_admitted(each.run_id, peer_id) for each in journals),
        Rate(per_address, per_address * ADDRESS_BURST_S),
        Rate(per_key, per_key * KEY_BURST_S),
        lambda context: any(is_passed_on(context, secret) for secret in secrets),
        Ceilings(settings.max_calls, settings.max_calls_per_address, settings.slow_call_s),
        settings.new_keys_per_network_per_hour,
        settings.new_keys_per_account_per_hour,
    )


@asynccontextmanager
async def _background(work: Coroutine[None, None, None]) -> AsyncIterator[None]:
    """Run `work` meanwhile. Should it fail, the body is cancelled and the failure raised in its place."""
    host = asyncio.current_task()
    task = asyncio.create_task(work)

    def interrupt(done: asyncio.Task[None]) -> None:
        if host is not None and not done.cancelled() and done.exception() is not None:
            host.cancel()

    task.add_done_callback(interrupt)
    try:
        yield
    finally:
        task.remove_done_callback(interrupt)
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


async def _ticks(journal: Journal, metrics: Metrics, clock: Clock) -> None:
    while True:
        journal.presence.expire(clock.monotonic_s())
        metrics.peers_alive.set(len(journal.presence))
        await asyncio.sleep(TICK_S)


@asynccontextmanager
async def _grpc(service: Any, guard: Guard, certificate: Certificate, settings: CoordinatorSettings) -> AsyncIterator[Address]:
    age_ms = int(settings.connection_age_s * 1000)
    ages = (("grpc.max_connection_age_ms", age_ms), ("grpc.max_connection_age_grace_ms", min(age_ms, CLOSING_MS)))
    server = grpc.aio.server(options=(*SERVER_OPTIONS, *ages))
    health = HealthServicer()
    add_PeerServiceServicer_to_server(service, guard.before(server))
    health_pb2_grpc.add_HealthServicer_to_server(health, server)
    async with _started(server, certificate, Address.parse(settings.listen)) as address:
        await health.set("", health_pb2.HealthCheckResponse.SERVING)
        try:
            yield address
        finally:
            await health.enter_graceful_shutdown()


@asynccontextmanager
async def _started(server: grpc.aio.Server, certificate: Certificate, wanted: Address) -> AsyncIterator[Address]:
    _check_free(wanted)
    try:
        port = _bind(server, certificate, wanted)
        await server.start()
        yield Address(wanted.host, port)
    finally:
        await server.stop(GRACE_S)


@asynccontextmanager
async def _admin(
    settings: CoordinatorSettings, kept: Sequence[Books], clock: Clock, metrics: CallMetrics, tracer: Tracer | None
) -> AsyncIterator[Mapping[str, JoinLink]]:
    """The operator's service: an address, a TLS key and a list of admins of its own; its link for each run."""
    if not settings.admin_listen:
        yield {}
        return
    admins = _peer_ids(settings.admin_keys, "an admin's key", ADMIN_HINT)
    if not admins:
        raise UsageError("an admin address without an admin's key", ADMIN_HINT)
    folder = kept[0].folder / ADMIN_FOLDER
    folder.mkdir(mode=0o700, exist_ok=True)
    certificate = Certificate.load_or_create(folder, datetime.datetime.fromtimestamp(clock.wall_s(), datetime.UTC))
    guard = Guard(clock, metrics, admins.__contains__, ceilings=Ceilings(ADMIN_CALLS, ADMIN_CALLS, settings.slow_call_s))
    guard.tracer = tracer
    services = {
        books.run: AdminService(books.journal, books.store, clock, guard, [other.journal for other in kept if other is not books])
        for books in kept
    }
    server = grpc.aio.server(options=SERVER_OPTIONS)
    add_AdminServiceServicer_to_server(by_run(ADMIN_SERVICE, services), guard.before(server))
    async with _started(server, certificate, Address.parse(settings.admin_listen)) as listen:
        address = _reachable(listen)
        host = f"[{address.host}]" if ":" in address.host else address.host
        yield {books.run: JoinLink(host, address.port, books.journal.run_id, certificate.fingerprint) for books in kept}


def _peer_ids(listed: str, what: str, hint: str) -> frozenset[str]:
    """The peer ids of a setting. Raises `UsageError` where one isn't."""
    keys = frozenset(filter(None, (key.strip() for key in listed.split(","))))
    for key in sorted(keys):
        try:
            public_key_of(key)
        except Rejected as error:
            raise UsageError(f"not {what}: {key!r}", hint) from error
    return keys


def _bind(server: grpc.aio.Server, certificate: Certificate, wanted: Address) -> int:
    credentials = grpc.ssl_server_credentials([(certificate.key, certificate.certificate)])
    try:
        return server.add_secure_port(str(wanted), credentials)
    except RuntimeError as error:
        raise _busy(wanted) from error


def _check_free(wanted: Address) -> None:
    """Ask the system first: gRPC itself writes a failure to stderr."""
    try:
        _listener(wanted).close()
    except OSError as error:
        raise _busy(wanted) from error


def _busy(wanted: Address) -> PortBusy:
    return PortBusy(f"can't listen on {wanted}", "another process may hold the port; choose one with --listen or --metrics")


def _link(settings: CoordinatorSettings, listen: Address, run_id: bytes, certificate: Certificate) -> JoinLink:
    advertised = Address.parse(settings.advertise) if settings.advertise else _reachable(listen)
    host = f"[{advertised.host}]" if ":" in advertised.host else advertised.host
    return JoinLink(host, advertised.port, run_id, certificate.fingerprint)


def _own_address() -> str:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(ELSEWHERE)
        except OSError:
            return "127.0.0.1"
        return str(probe.getsockname()[0])


@asynccontextmanager
async def _web(
    settings: CoordinatorSettings, kept: Sequence[Books], registry: CollectorRegistry, links: Mapping[str, JoinLink]
) -> AsyncIterator[Address | None]:
    if not settings.metrics:
        yield None
        return
    from coordinator import web  # noqa: PLC0415 - only where a page is asked for

    wanted = Address.parse(settings.metrics)
    try:
        listener = _listener(wanted)
    except OSError as error:
        raise _busy(wanted) from error
    with listener:
        several = len(kept) > 1
        sites = [
            web.Site(
                books.journal,
                books.store,
                books.identity,
                str(links[books.run]),
                f"/run/{run_name(books.journal.run_id)}" if several else "",
            )
            for books in kept
        ]
        async with web.serve(sites, registry, listener):
            yield Address(wanted.host, listener.getsockname()[1])


def _listener(wanted: Address) -> socket.socket:
    family = socket.AF_INET6 if ":" in wanted.host else socket.AF_INET
    listener = socket.create_server((wanted.host, wanted.port), family=family)
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # inherited: else a page's body waits 40 ms for an ACK
    return listener
