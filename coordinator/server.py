"""Puts the coordinator together and serves it: `async with Coordinator.serve(signed_manifest, settings) as coordinator`.

Nothing outlives the context: tasks, threads, sockets and the database's connections are closed in the reverse order.
"""

from __future__ import annotations

import asyncio
import datetime
import fcntl
import socket
from collections.abc import AsyncIterator, Coroutine, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import grpc
import structlog
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1._async import HealthServicer
from prometheus_client import CollectorRegistry

from coordinator.admin import AdminService
from coordinator.gauges import watch
from coordinator.guard import ADDRESS_BURST_S, KEY_BURST_S, Guard
from coordinator.journal import Journal
from coordinator.limits import MAX_MESSAGE_BYTES, Ceilings, Rate
from coordinator.metrics import Metrics
from coordinator.replicas import ReplicaService, channels, is_passed_on, replica_secret
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
from swarm.rpc.v1.coordinator_pb2_grpc import add_AdminServiceServicer_to_server, add_PeerServiceServicer_to_server
from swarm.rpc.v1.signed_pb2 import Signed

KEY_FILE = "coordinator.key"
DATABASE_FILE = "coordinator.db"
LOCK_FILE = "lock"
ADMIN_HINT = "name the peer ids that `swarm admin key` prints in SWARM_COORDINATOR_ADMIN_KEYS"
WITNESS_HINT = "name the peer ids that `swarm identity show` prints in SWARM_COORDINATOR_WITNESSES"
ADMIN_FOLDER = "admin"
ADMIN_CALLS = 16
MEMORY_URL = "memory://"
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
class Coordinator:
    """A running coordinator: where it is, and its parts for tests that look inside."""

    link: JoinLink
    listen: Address
    metrics_address: Address | None
    identity: Identity
    state_folder: Path
    journal: Journal
    metrics: Metrics
    guard: Guard
    admin_link: JoinLink | None = None

    @classmethod
    @asynccontextmanager
    async def serve(
        cls, manifest: Signed, settings: CoordinatorSettings, clock: Clock | None = None
    ) -> AsyncIterator[Coordinator]:
        """Serve the run of an owner-signed manifest until the context is left.

        Raises `ManifestInvalid`, `PortBusy`, `AlreadyRunning`, `KeyFileError` or `DatabaseCorrupt`.
        """
        clock = clock or SystemClock()
        open_manifest(manifest)
        require_tls_1_3()
        folder = state_folder(settings, payload_hash(manifest))
        async with AsyncExitStack() as stack:
            stack.enter_context(locked(folder))
            identity = Identity.load_or_create(folder / KEY_FILE)
            now = datetime.datetime.fromtimestamp(clock.wall_s(), datetime.UTC)
            certificate = Certificate.load_or_create(folder, now)
            store = stack.enter_context(_store(settings, folder))
            metrics = Metrics(CollectorRegistry())
            snapshot = None if settings.db == MEMORY_URL else folder / SNAPSHOT_FILE
            journal = Journal(store, identity, manifest, clock, metrics, settings.presence_ttl_s, snapshot)
            shared = settings.db.startswith(SHARED)
            await asyncio.to_thread(journal.read if shared else journal.load)
            if snapshot is not None:
                source = Source(database_url(settings, folder), identity.peer_id, snapshot)
                await stack.enter_async_context(_background(keep_fresh(source, lambda: len(journal.tree))))
            checker = await stack.enter_async_context(SignatureChecker())
            guard = _guard(settings, journal, identity, clock, metrics)
            watch(metrics, journal, guard)
            kind = ReplicaService if shared else PeerService
            witnessed = Witnessed(_peer_ids(settings.witnesses, "a witness's key", WITNESS_HINT))
            service = kind(journal, store, identity, manifest, clock, metrics, guard, checker, witnessed)
            await stack.enter_async_context(_background(journal.run()))
            await stack.enter_async_context(_background(_ticks(journal, metrics, clock)))
            listen = await stack.enter_async_context(_grpc(service, guard, certificate, settings))
            if isinstance(service, ReplicaService):
                await stack.enter_async_context(_among_replicas(service, settings, listen, certificate))
            link = _link(settings, listen, journal.run_id, certificate)
            admin_link = await stack.enter_async_context(_admin(settings, journal, store, clock, metrics, folder))
            page = await stack.enter_async_context(_web(settings, journal, identity, metrics, link))
            log.info("coordinator_started", listen=str(listen), entries=len(journal.tree), run=journal.run_id.hex())
            yield cls(link, listen, page, identity, folder, journal, metrics, guard, admin_link)
        log.info("coordinator_stopped")


def state_folder(settings: CoordinatorSettings, run_id: bytes) -> Path:
    """Where the run's keys and database are."""
    return settings.state_dir or data_path() / "coordinator" / base32(run_id)[:16]


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


def _guard(settings: CoordinatorSettings, journal: Journal, identity: Identity, clock: Clock, metrics: Metrics) -> Guard:
    secret = replica_secret(identity) if settings.db.startswith(SHARED) else ""
    per_address, per_key = settings.calls_per_address_per_s, settings.calls_per_key_per_s
    return Guard(
        clock,
        metrics,
        lambda peer_id: not journal.is_writer or journal.credits.is_admitted(journal.run_id, peer_id),
        Rate(per_address, per_address * ADDRESS_BURST_S),
        Rate(per_key, per_key * KEY_BURST_S),
        lambda context: bool(secret) and is_passed_on(context, secret),
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
async def _grpc(
    service: PeerService, guard: Guard, certificate: Certificate, settings: CoordinatorSettings
) -> AsyncIterator[Address]:
    age_ms = int(settings.connection_age_s * 1000)
    ages = (("grpc.max_connection_age_ms", age_ms), ("grpc.max_connection_age_grace_ms", min(age_ms, CLOSING_MS)))
    server = grpc.aio.server(interceptors=(guard,), options=(*SERVER_OPTIONS, *ages))
    health = HealthServicer()
    add_PeerServiceServicer_to_server(service, server)
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
    settings: CoordinatorSettings, journal: Journal, store: Store, clock: Clock, metrics: Metrics, folder: Path
) -> AsyncIterator[JoinLink | None]:
    """The operator's service: an address, a TLS key and a list of admins of its own."""
    if not settings.admin_listen:
        yield None
        return
    admins = _peer_ids(settings.admin_keys, "an admin's key", ADMIN_HINT)
    if not admins:
        raise UsageError("an admin address without an admin's key", ADMIN_HINT)
    (folder / ADMIN_FOLDER).mkdir(mode=0o700, exist_ok=True)
    certificate = Certificate.load_or_create(folder / ADMIN_FOLDER, datetime.datetime.fromtimestamp(clock.wall_s(), datetime.UTC))
    guard = Guard(clock, metrics, admins.__contains__, ceilings=Ceilings(ADMIN_CALLS, ADMIN_CALLS, settings.slow_call_s))
    server = grpc.aio.server(interceptors=(guard,), options=SERVER_OPTIONS)
    add_AdminServiceServicer_to_server(AdminService(journal, store, clock, guard), server)
    async with _started(server, certificate, Address.parse(settings.admin_listen)) as listen:
        address = _reachable(listen)
        host = f"[{address.host}]" if ":" in address.host else address.host
        yield JoinLink(host, address.port, journal.run_id, certificate.fingerprint)


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
    settings: CoordinatorSettings, journal: Journal, identity: Identity, metrics: Metrics, link: JoinLink
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
        async with web.serve(web.Pages(journal, identity, metrics, str(link)), listener):
            yield Address(wanted.host, listener.getsockname()[1])


def _listener(wanted: Address) -> socket.socket:
    family = socket.AF_INET6 if ":" in wanted.host else socket.AF_INET
    listener = socket.create_server((wanted.host, wanted.port), family=family)
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # inherited: else a page's body waits 40 ms for an ACK
    return listener
