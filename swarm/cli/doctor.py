"""`swarm doctor`: whether this machine can join, how well, and what to do where it can't."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from swarm.cli.output import configure_logging, print_json
from swarm.config import LINK_HELP, PeerSettings, find_link, load
from swarm.errors import LinkError
from swarm.messages import JoinLink

if TYPE_CHECKING:
    from peer.doctor import Doctor, Finding

HELP_PAGE = "docs/reference/exit-codes.md"


def command(
    link: Annotated[str | None, typer.Argument(help=LINK_HELP)] = None,
    gpu: Annotated[str | None, typer.Option("--gpu", help="A GPU's number, several (0,1), or auto.")] = None,
    cpu: Annotated[bool, typer.Option("--cpu", help="Train on the processor.")] = False,
    data_dir: Annotated[Path | None, typer.Option("--dir", help="Folder for state, receipts and checkpoints.")] = None,
    identity: Annotated[Path | None, typer.Option("--identity", help="The peer's key file.")] = None,
    data: Annotated[Path | None, typer.Option("--data", help="Folder with private shards, where the run has such.")] = None,
    listen: Annotated[str | None, typer.Option("--listen", help="host:port for other peers; port 0 = any free one.")] = None,
    no_inbound: Annotated[bool, typer.Option("--no-inbound", help="Accept no connections, only dial out.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One line of JSON for each finding.")] = False,
) -> None:
    """Check whether this machine can join, and how well.

    With a link it announces your key to the coordinator, as joining does. Exits with the code of the first line that fails.
    """
    flags = {
        "gpu": "cpu" if cpu else gpu,
        "data_dir": data_dir,
        "identity": identity or (data_dir / "identity.key" if data_dir else None),
        "data": data,
        "listen": listen,
        "inbound": False if no_inbound else None,
    }
    settings = load(PeerSettings, flags)
    configure_logging("error")
    target = _link(link)
    from peer.doctor import Doctor

    doctor = Doctor(target, settings.data_dir, settings.identity, settings.gpu, settings.listen, settings.inbound, settings.data)
    code = asyncio.run(_examine(doctor, as_json))
    raise typer.Exit(code)


def _link(argument: str | None) -> JoinLink | None:
    """The join link, or None where nobody has given one. Raises `LinkError` for one that can't be read."""
    try:
        return find_link(argument)
    except LinkError as error:
        if error.message != "no join link":
            raise
        return None


async def _examine(doctor: Doctor, as_json: bool) -> int:
    code = 0
    async for finding in doctor.examine():
        code = code or finding.exit_code
        if as_json:
            print_json(as_dict(finding))
        else:
            for line in lines(finding):
                typer.echo(line)
    return code


def lines(finding: Finding) -> list[str]:
    """The finding, and what to do about it."""
    shown = [f"{finding.status:<5} {finding.name:<12} {finding.text}"]
    if finding.hint:
        shown.append(f"{'':<18} hint: {finding.hint}")
    if finding.error is not None:
        shown.append(f"{'':<18} exit code {finding.exit_code}: {HELP_PAGE}")
    return shown


def as_dict(finding: Finding) -> dict[str, object]:
    """For programs."""
    return {
        "name": finding.name,
        "status": finding.status,
        "text": finding.text,
        "hint": finding.hint,
        "exit_code": finding.exit_code,
    }
