"""Small complete runs and the processes that train them, for tests with real parts."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import os
import tempfile
import threading
import time
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeVar

import psutil
import yaml

from swarm import local
from swarm.control import ask, history
from swarm.identity import Identity
from swarm.manifest import Manifest

REPOSITORY = Path(__file__).resolve().parents[1]
COMMAND_S = 120.0
T = TypeVar("T")


@dataclass(frozen=True)
class Run:
    """A manifest with everything that it names: `run.yaml`, `owner.key` and the folder `files`."""

    directory: Path
    manifest: Manifest

    @property
    def path(self) -> Path:
        return self.directory / "run.yaml"

    @property
    def owner_key(self) -> Path:
        return self.directory / "owner.key"

    @property
    def files(self) -> Path:
        return self.directory / "files"


def make_run(directory: Path, *, total: int = 0, peers: int = 2, strategy: str = "diloco", inner_steps: int = 2) -> Run:
    """A run whose rounds take a fraction of a second; `total` = 0 never ends."""
    from peer.recipes import demo_manifest

    directory.mkdir(parents=True, exist_ok=True)
    manifest = demo_manifest(
        directory / "files",
        sequence_length=32,
        data_bytes=300_000,
        peers=peers,
        rounds=max(1, total or 1000),
        inner_steps=inner_steps,
        batch_samples=4,
        hidden_size=32,
        layers=2,
        strategy=strategy,
        name="small",
    )
    manifest = manifest.model_copy(update={"rounds": manifest.rounds.model_copy(update={"total": total})})
    run = Run(directory, manifest)
    run.path.write_text(yaml.safe_dump(manifest.model_dump(mode="json"), sort_keys=False))
    Identity.generate().save(run.owner_key)
    return run


@dataclass
class LoopThread:
    """An event loop in a thread of its own, so that what it runs outlives the loops of single tests."""

    def __post_init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="fixtures")
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, T], timeout_s: float = COMMAND_S) -> T:
        """Run a coroutine there and wait for its outcome."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(timeout_s)

    def close(self) -> None:
        """End the loop and its thread."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


@dataclass(frozen=True)
class LiveRun:
    """A coordinator and peers that train for as long as the test session needs them; `host:port` of every metrics endpoint."""

    run: Run
    link: str
    metrics_urls: list[str]
    peer_folders: list[Path]
    pids: list[int]

    @property
    def histories(self) -> list[list[dict[str, Any]]]:
        """The rounds that each peer has finished."""
        return [history(folder) for folder in self.peer_folders]

    async def statuses(self) -> list[dict[str, Any]]:
        """What each peer says about itself."""
        return [await ask(folder, "status") for folder in self.peer_folders]

    def to_json(self) -> str:
        """For other test processes."""
        folders = [str(folder) for folder in self.peer_folders]
        return json.dumps([str(self.run.directory), self.link, self.metrics_urls, folders, self.pids])

    @classmethod
    def from_json(cls, text: str) -> LiveRun:
        """What another test process has written."""
        directory, link, metrics_urls, folders, pids = json.loads(text)
        run = Run(Path(directory), Manifest.read(Path(directory) / "run.yaml"))
        return cls(run, link, metrics_urls, [Path(folder) for folder in folders], pids)


@dataclass
class Sharing:
    """One live run for all test processes of a session: whoever comes first starts it, and ends it after the last has left."""

    folder: Path
    name: str

    def __post_init__(self) -> None:
        (self.folder / "users").mkdir(parents=True, exist_ok=True)
        self._state = self.folder / "live.json"

    @contextlib.contextmanager
    def use(self, start: Callable[[], LiveRun], stop: Callable[[], None]) -> Iterator[LiveRun]:
        """The run, for as long as the body needs it."""
        user = self.folder / "users" / self.name
        with self._locked():
            mine = not self._state.exists()
            if mine:
                try:
                    self._state.write_text(start().to_json())
                except BaseException:
                    stop()
                    raise
            live = LiveRun.from_json(self._state.read_text())
            user.touch()
        try:
            yield live
        finally:
            user.unlink()
            if mine:
                self._wait_for_the_others()
                stop()

    def _wait_for_the_others(self) -> None:
        deadline = time.monotonic() + COMMAND_S
        while True:
            with self._locked():
                if not any((self.folder / "users").iterdir()) or time.monotonic() > deadline:
                    self._state.unlink()
                    return
            time.sleep(0.2)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        with (self.folder / "lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def agreed_roots(histories: Iterable[Sequence[dict[str, Any]]]) -> dict[int, str]:
    """Round to root; fails where two peers have different ones."""
    roots: dict[int, set[str]] = {}
    for lines in histories:
        for line in lines:
            roots.setdefault(line["round"], set()).add(line["root"])
    differing = {number: found for number, found in roots.items() if len(found) != 1}
    assert differing == {}
    return {number: next(iter(found)) for number, found in roots.items()}


@dataclass(frozen=True)
class Outcome:
    """What a command left behind."""

    code: int
    out: str
    err: str


async def run_command(
    *arguments: str, environment: Mapping[str, str] | None = None, timeout_s: float = COMMAND_S, prefix: Sequence[str] = ()
) -> Outcome:
    """Run `swarm` as a process of its own; `prefix` stands before the command, for example to run it on another host."""
    command = [*prefix, *local.swarm_command(), *arguments]
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        process = await local.spawn(command, clean_environment(environment), out, err)
        try:
            code = await asyncio.wait_for(process.wait(), timeout_s)
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        return Outcome(code, _read(out), _read(err))


async def printed_by(*arguments: str) -> str:
    """What a command prints that has to succeed."""
    outcome = await run_command(*arguments)
    assert outcome.code == 0, outcome
    return outcome.out


def _read(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read().decode()


def clean_environment(changes: Mapping[str, str] | None = None) -> dict[str, str]:
    """This process's environment without the user's own swarm settings, and with this repository importable from anywhere."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("SWARM_")}
    path = os.pathsep.join(filter(None, (str(REPOSITORY), kept.get("PYTHONPATH", ""))))
    return {**kept, "PYTHONPATH": path, **(changes or {})}


def alive(processes: Sequence[psutil.Process]) -> list[psutil.Process]:
    """Those that still run; one that nobody has collected yet has ended."""
    found = []
    for process in processes:
        try:
            if process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.NoSuchProcess:
            continue
    return found
