"""`swarm coordinator`: serve one run until SIGTERM or Ctrl-C."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from swarm.cli.output import configure_logging, print_fields, print_json
from swarm.cli.run import OWNER_KEY_HELP, read_run
from swarm.errors import UsageError

if TYPE_CHECKING:
    from coordinator.server import Coordinator
    from swarm.config import CoordinatorSettings
    from swarm.rpc.v1.signed_pb2 import Signed


def command(
    run: Annotated[Path, typer.Option("--run", help="run.yaml, which is signed now, or run.signed.")],
    owner_key: Annotated[Path | None, typer.Option("--owner-key", help=OWNER_KEY_HELP)] = None,
    db: Annotated[str | None, typer.Option("--db", help="Database URL; SQLite in the state folder by default.")] = None,
    listen: Annotated[str | None, typer.Option("--listen", help="Address for peers.")] = None,
    advertise: Annotated[str | None, typer.Option("--advertise", help="host:port for the join link.")] = None,
    metrics: Annotated[str | None, typer.Option("--metrics", help="Address for web page and metrics.")] = None,
    state_dir: Annotated[Path | None, typer.Option("--state-dir", help="Folder for keys and database.")] = None,
    link_file: Annotated[Path | None, typer.Option("--link-file", help="File to write the join link to.")] = None,
    log_level: Annotated[str | None, typer.Option("--log-level", help="debug, info, warning or error.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the addresses as one line of JSON.")] = False,
) -> None:
    """Run the coordinator of a training run."""
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
    asyncio.run(_serve(read_run(run, owner_key), settings, link_file, as_json))


async def _serve(manifest: Signed, settings: CoordinatorSettings, link_file: Path | None, as_json: bool) -> None:
    from coordinator.server import Coordinator

    stopped = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopped.set)
    async with Coordinator.serve(manifest, settings) as coordinator:
        if link_file is not None:
            _write_link(link_file, str(coordinator.link))
        _announce(coordinator, as_json)
        await stopped.wait()


def _write_link(path: Path, link: str) -> None:
    """Write the link so that a reader sees all of it or none. Raises `UsageError`."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_text(link + "\n")
        temporary.replace(path)
    except OSError as error:
        raise UsageError(f"can't write {path}: {error.strerror}", "name another file with --link-file") from error


def _announce(coordinator: Coordinator, as_json: bool) -> None:
    page = coordinator.metrics_address
    if as_json:
        listen, metrics = str(coordinator.listen), None if page is None else str(page)
        print_json({"link": str(coordinator.link), "listen": listen, "metrics": metrics})
        return
    fields: dict[str, object] = {"listening on": coordinator.listen}
    if page is not None:
        fields["page and metrics"] = f"http://{page}/"
    print_fields({**fields, "peers join with": f"swarm join {coordinator.link}"})
