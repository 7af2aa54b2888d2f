"""`swarm witness`: watch a coordinator's ledger, and sign what you have seen."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Annotated

import typer

from swarm.cli.output import print_fields, print_json
from swarm.config import LINK_HELP, PeerSettings, data_path, find_link, load
from swarm.errors import CoordinatorUnreachable, Rejected
from swarm.identity import Identity
from swarm.messages import JoinLink
from swarm.rpc.client import CoordinatorClient
from swarm.witness import Witness


def command(
    link: Annotated[str | None, typer.Argument(help=LINK_HELP)] = None,
    interval: Annotated[float, typer.Option("--interval", min=1, max=86400, help="Seconds between looks.")] = 60.0,
    once: Annotated[bool, typer.Option("--once", help="Look once and end.")] = False,
    state: Annotated[Path | None, typer.Option("--state", help="File in which to remember the last checkpoint.")] = None,
    identity: Annotated[Path | None, typer.Option("--identity", help="Key file; by default the one of `swarm join`.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="A line of JSON for each look.")] = False,
) -> None:
    """Check again and again that the ledger only grows, and cosign its checkpoints.

    Needs no account: the operator names your peer id in `witnesses`, and whoever trusts you asks for your cosignature with
    `swarm ledger verify --witness`. Ends with 42, keeping both signed checkpoints, where the coordinator shows another history.

    Examples:

      swarm witness 'swarm://host:4300/...'

      swarm witness --once --json
    """
    target = find_link(link)
    key = Identity.load_or_create(identity or load(PeerSettings).identity)
    witness = Witness(key, state or data_path() / "witness" / f"{target.run_id.hex()}.json")
    asyncio.run(_watch(witness, target, interval, once, as_json))


async def _watch(witness: Witness, link: JoinLink, interval_s: float, once: bool, as_json: bool) -> None:
    while True:
        try:
            await _look(witness, link, as_json)
        except (CoordinatorUnreachable, Rejected) as error:
            if once:
                raise
            typer.echo(f"warning: {error}; trying again", err=True)
        if once:
            return
        await asyncio.sleep(interval_s)


async def _look(witness: Witness, link: JoinLink, as_json: bool) -> None:
    async with await CoordinatorClient.connect(link) as client:
        checkpoint, count = await witness.look(client, time.time())
    fields: dict[str, object] = {
        "witness": witness.identity.peer_id,
        "entries": checkpoint.size,
        "root": checkpoint.root.hex(),
        "cosignatures": count,
    }
    print_json(fields) if as_json else print_fields(fields)
