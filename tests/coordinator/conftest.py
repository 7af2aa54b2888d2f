"""Databases and running coordinators for tests."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path

import pytest
import sqlalchemy as sa

from coordinator.server import Coordinator
from coordinator.store.interface import Store
from coordinator.store.memory import MemoryStore
from coordinator.store.sql import SqlStore
from swarm.clock import Clock
from swarm.config import CoordinatorSettings
from swarm.rpc.client import CoordinatorClient
from tests.world import World

BINARIES = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
START_TIMEOUT_S = 30
Serve = Callable[..., AbstractAsyncContextManager[Coordinator]]


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[str]:
    """The URL of a private PostgreSQL server that listens on a socket in a temporary folder only."""
    if not BINARIES:
        pytest.skip("no PostgreSQL binaries under /usr/lib/postgresql")
    folder = Path(tempfile.mkdtemp(prefix="swarm-pg-"))
    user = _unprivileged(folder)
    data = folder / "data"
    environment = {"PATH": os.environ["PATH"], "LC_ALL": "C", "HOME": str(folder)}

    def call(name: str, *arguments: str) -> None:
        command = [str(BINARIES[-1].parent / name), *arguments]
        subprocess.run(
            command, check=True, user=user, env=environment, cwd=folder, timeout=START_TIMEOUT_S, stdout=subprocess.DEVNULL
        )

    call("initdb", "-D", str(data), "-U", "swarm", "-A", "trust", "-N", "-E", "UTF8")
    options = f"-k {folder} -c listen_addresses= -c max_connections=20 -c shared_buffers=8MB -c fsync=off"
    call("pg_ctl", "-D", str(data), "-w", "-l", str(folder / "log"), "-o", options, "start")
    try:
        yield f"postgresql://swarm@/postgres?host={folder}"
    finally:
        call("pg_ctl", "-D", str(data), "-m", "immediate", "stop")
        shutil.rmtree(folder, ignore_errors=True)


def _unprivileged(folder: Path) -> int | None:
    """PostgreSQL refuses to run as root: give the folder to another user."""
    if os.getuid() != 0:
        return None
    names = {entry.pw_name: entry.pw_uid for entry in pwd.getpwall()}
    user = names.get("postgres", names.get("nobody"))
    if user is None:
        pytest.skip("running as root, and there is no other user to run PostgreSQL")
    os.chown(folder, user, -1)
    return user


@pytest.fixture
def postgres(postgres_server: str) -> str:
    """The URL of an empty PostgreSQL database."""
    _empty(postgres_server)
    return postgres_server


def _empty(url: str) -> None:
    engine = sa.create_engine(url.replace("postgresql:", "postgresql+psycopg:"))
    with engine.begin() as connection:
        connection.execute(sa.text("DROP SCHEMA public CASCADE"))
        connection.execute(sa.text("CREATE SCHEMA public"))
    engine.dispose()


@pytest.fixture(params=["memory", "sqlite", "postgres"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    """An empty store of every kind."""
    made: Store
    if request.param == "memory":
        made = MemoryStore()
    elif request.param == "sqlite":
        made = SqlStore.open(f"sqlite:///{tmp_path / 'ledger.db'}")
    else:
        made = SqlStore.open(request.getfixturevalue("postgres"))
    yield made
    made.close()


@pytest.fixture
def world() -> World:
    """One run with its keys."""
    return World()


@pytest.fixture
def serve(tmp_path: Path, world: World) -> Serve:
    """Starts a real coordinator on this machine: gRPC over TLS, SQLite, and whatever else the settings ask for."""

    @asynccontextmanager
    async def start(clock: Clock | None = None, served: World = world, **changes: object) -> AsyncIterator[Coordinator]:
        values = {"listen": "127.0.0.1:0", "state_dir": tmp_path / "state"} | changes
        async with Coordinator.serve([served.signed_manifest], CoordinatorSettings(**values), clock) as coordinator:
            yield coordinator

    return start


@asynccontextmanager
async def connected(coordinator: Coordinator) -> AsyncIterator[CoordinatorClient]:
    """A client of a running coordinator."""
    async with await CoordinatorClient.connect(coordinator.link, timeout_s=10) as client:
        yield client
