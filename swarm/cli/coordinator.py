"""`swarm coordinator`: serve one run until SIGTERM or Ctrl-C; `backup`, `restore` and `fsck` for what it has stored."""

from __future__ import annotations

import asyncio
import gc
import signal
from collections.abc import Iterator
from contextlib import AsyncExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from swarm.cli.output import configure_logging, print_fields, print_json
from swarm.cli.run import OWNER_KEY_HELP, read_run
from swarm.errors import UsageError

if TYPE_CHECKING:
    from coordinator.server import Coordinator
    from coordinator.store.sql import SqlStore
    from swarm.config import CoordinatorSettings
    from swarm.rpc.v1.signed_pb2 import Signed


app = typer.Typer(
    help="Run the coordinator of a training run, back it up, check it.",
    invoke_without_command=True,
    add_completion=False,
    rich_markup_mode=None,
)

GARBAGE_OBJECTS = 20_000
DB_HELP = "Database URL; SQLite in the state folder by default."
DbOption = Annotated[str | None, typer.Option("--db", help=DB_HELP)]
StateOption = Annotated[Path | None, typer.Option("--state-dir", help="Folder for keys and database.")]
JsonOption = Annotated[bool, typer.Option("--json", help="One line of JSON.")]


@app.callback()
def serve(
    context: typer.Context,
    run: Annotated[
        list[Path] | None, typer.Option("--run", help="run.yaml, which is signed now, or run.signed; several times.")
    ] = None,
    owner_key: Annotated[Path | None, typer.Option("--owner-key", help=OWNER_KEY_HELP)] = None,
    db: DbOption = None,
    listen: Annotated[str | None, typer.Option("--listen", help="Address for peers.")] = None,
    advertise: Annotated[str | None, typer.Option("--advertise", help="host:port for the join link.")] = None,
    metrics: Annotated[str | None, typer.Option("--metrics", help="Address for web page and metrics.")] = None,
    state_dir: StateOption = None,
    link_file: Annotated[Path | None, typer.Option("--link-file", help="File to write the join link to.")] = None,
    log_level: Annotated[str | None, typer.Option("--log-level", help="debug, info, warning or error.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the addresses as one line of JSON.")] = False,
) -> None:
    """Run the coordinator of a training run."""
    given = (run, owner_key, db, listen, advertise, metrics, state_dir, link_file, log_level)
    if context.invoked_subcommand is not None:
        if any(value is not None for value in given) or as_json:
            name = context.invoked_subcommand
            raise UsageError("these options belong to another command", f"write them behind: swarm coordinator {name} ...")
        return
    if not run:
        raise UsageError("which run?", "name its manifest: swarm coordinator --run run.yaml")
    from swarm.config import CoordinatorSettings, load

    flags = {
        "db": db,
        "listen": listen,
        "advertise": advertise,
        "metrics": metrics,
        "state_dir": state_dir,
        "log_level": log_level,
    }
    settings = load(CoordinatorSettings, flags)
    configure_logging(settings.log_level)
    import uvloop

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_serve([read_run(path, owner_key) for path in run], settings, link_file, as_json))


async def _serve(manifests: list[Signed], settings: CoordinatorSettings, link_file: Path | None, as_json: bool) -> None:
    from coordinator.server import Coordinator

    stopped = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopped.set)
    async with AsyncExitStack() as stack:
        with _no_garbage():
            coordinator = await stack.enter_async_context(Coordinator.serve(manifests, settings))
        if link_file is not None:
            _write_links(link_file, [str(run.link) for run in coordinator.runs])
        _announce(coordinator, as_json)
        _collect_garbage_seldom()
        await stopped.wait()


@contextmanager
def _no_garbage() -> Iterator[None]:
    """Collect none while the ledger is read: it makes a great many objects, and they stay."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _collect_garbage_seldom() -> None:
    """What the ledger holds stays as long as the process, so no collection looks through it; and calls leave few cycles."""
    gc.freeze()
    gc.set_threshold(GARBAGE_OBJECTS)


def _write_links(path: Path, links: list[str]) -> None:
    """Write the links, a line each, so that a reader sees all of them or none. Raises `UsageError`."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_text("".join(f"{link}\n" for link in links))
        temporary.replace(path)
    except OSError as error:
        raise UsageError(f"can't write {path}: {error.strerror}", "name another file with --link-file") from error


def _announce(coordinator: Coordinator, as_json: bool) -> None:
    page = coordinator.metrics_address
    if as_json:
        runs = [
            {"name": run.name, "run_id": run.run_id.hex(), "link": str(run.link), "admin": _text(run.admin_link)}
            for run in coordinator.runs
        ]
        addresses = {"listen": str(coordinator.listen), "metrics": _text(page)}
        print_json({"link": str(coordinator.link), **addresses, "admin": _text(coordinator.admin_link), "runs": runs})
        return
    fields: dict[str, object] = {"listening on": coordinator.listen}
    if page is not None:
        fields["page and metrics"] = f"http://{page}/"
    for run in coordinator.runs:
        which = "" if len(coordinator.runs) == 1 else f" ({run.name})"
        if run.admin_link is not None:
            fields[f"admin link{which}"] = run.admin_link
        fields[f"peers join with{which}"] = f"swarm join {run.link}"
    print_fields(fields)


def _text(value: object) -> str | None:
    return None if value is None else str(value)


@app.command()
def backup(
    to: Annotated[Path, typer.Option("--to", help="Folder to make.")],
    db: DbOption = None,
    state_dir: StateOption = None,
    as_json: JsonOption = False,
) -> None:
    """Copy ledger and keys into a new folder, also while the coordinator serves."""
    from coordinator.backup import back_up

    folder = _folder(state_dir)
    with _opened(db, folder) as store:
        copied = back_up(store, folder, to)
    _tell({"entries": copied.entries, "root": copied.root.hex(), "path": str(to)}, as_json)


@app.command()
def restore(
    source: Annotated[Path, typer.Option("--from", help="Folder that `backup` wrote.")],
    state_dir: Annotated[Path, typer.Option("--state-dir", help="Folder for keys and database.")],
    db: DbOption = None,
    as_json: JsonOption = False,
) -> None:
    """Bring a backup back into an empty database; then check it with fsck."""
    from coordinator.backup import restore as bring_back
    from coordinator.server import locked

    with locked(state_dir), _opened(db, state_dir) as store:
        copied = bring_back(source, store, state_dir)
    _tell({"entries": copied.entries, "root": copied.root.hex(), "coordinator": copied.coordinator}, as_json)


@app.command()
def fsck(
    db: DbOption = None,
    state_dir: StateOption = None,
    workers: Annotated[int, typer.Option("--workers", min=0, help="Processes for signatures; 0 = one per core.")] = 0,
    as_json: JsonOption = False,
) -> None:
    """Verify the ledger and every balance from raw storage; the first fault is named."""
    from coordinator.fsck import check
    from coordinator.snapshot import SNAPSHOT_FILE

    folder = _folder(state_dir)
    with _opened(db, folder) as store:
        sound = check(store, folder / SNAPSHOT_FILE, workers)
    fields: dict[str, object] = {
        "sound": True,
        "entries": len(sound.tree),
        "root": sound.tree.root().hex(),
        "accounts": sound.accounts,
        "snapshot_entries": sound.snapshot_entries,
        "coordinator": sound.coordinator,
    }
    _tell(fields, as_json)


def _tell(fields: dict[str, object], as_json: bool) -> None:
    print_json(fields) if as_json else print_fields(fields)


def _folder(state_dir: Path | None) -> Path:
    """The state folder: the one that is named, set or, of those in the data folder, the only one. Raises `UsageError`."""
    from swarm.config import CoordinatorSettings, data_path, load

    named = load(CoordinatorSettings, {"state_dir": state_dir}).state_dir
    if named is not None:
        return named
    found = sorted(path for path in (data_path() / "coordinator").glob("*") if path.is_dir())
    if len(found) != 1:
        raise UsageError(f"{len(found)} coordinators have a folder in {data_path()}", "name one with --state-dir")
    return found[0]


@contextmanager
def _opened(db: str | None, folder: Path) -> Iterator[SqlStore]:
    from coordinator.server import DATABASE_FILE, database_url
    from coordinator.store.sql import SqlStore
    from swarm.config import CoordinatorSettings, load

    settings = load(CoordinatorSettings, {"db": db})
    if not settings.db and not folder.is_dir():
        raise UsageError(f"no coordinator's folder at {folder}", f"name the folder that has {DATABASE_FILE} with --state-dir")
    store = SqlStore.open(database_url(settings, folder))
    try:
        yield store
    finally:
        store.close()
