"""`swarm export`: the latest agreed weights as a directory that transformers loads with no extra code."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from swarm.cli.output import print_fields, print_json
from swarm.config import PeerSettings, find_link, load, remembered_link
from swarm.control import RUN_NAME, ask
from swarm.errors import LinkError, NotRunning, Rejected, SwarmError
from swarm.ledger import open_manifest
from swarm.messages import parse
from swarm.rpc.client import CoordinatorClient
from swarm.rpc.v1.coordinator_pb2 import Balance, GetProgressResponse, GetRunResponse

if TYPE_CHECKING:
    from swarm.manifest import Manifest

MOST_CONTRIBUTORS = 1000


def command(
    to: Annotated[Path, typer.Option("--to", help="Directory to write; new or empty.")],
    merged: Annotated[bool, typer.Option("--merged", help="Of an adapter: the whole model with the adapter in it.")] = False,
    data_dir: Annotated[Path | None, typer.Option("--dir", help="The peer's folder, if it isn't the configured one.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One line of JSON.")] = False,
) -> None:
    """Write the trained model as safetensors, with tokenizer and model card; of an adapter the adapter, as peft loads it.

    A running peer is asked for its present weights first; otherwise its newest checkpoint is taken. The coordinator is asked for
    contributors, credits and ledger; where it doesn't answer, the card goes without.

    Example:

      swarm export --to ./model
    """
    folder = load(PeerSettings, {"data_dir": data_dir}).data_dir
    asyncio.run(_refresh(folder))
    run = _read_run(folder / RUN_NAME)
    from peer.outcome import FILES, export, newest_weights, provenance_of

    snapshot = newest_weights(folder, run)
    provenance = provenance_of(snapshot, *asyncio.run(_recorded(folder)))
    export(run, folder / FILES, snapshot, to, provenance, merged=merged)
    fields: dict[str, object] = {"directory": str(to), "round": snapshot.round, "state_root": snapshot.root_hex}
    print_json(fields) if as_json else print_fields(fields)


async def _refresh(folder: Path) -> None:
    try:
        await ask(folder, "checkpoint")
    except NotRunning:
        return


async def _recorded(folder: Path) -> tuple[GetProgressResponse | None, list[Balance]]:
    """What the ledger of the peer's run says; nothing, and a warning, where it can't be asked."""
    try:
        async with await CoordinatorClient.connect(find_link(remembered_link(folder))) as client:
            return await client.progress(), list((await client.credits(limit=MOST_CONTRIBUTORS)).balances)
    except (SwarmError, Rejected) as error:
        typer.echo(f"warning: the card has no contributors and no ledger: {error}", err=True)
        return None, []


def _read_run(path: Path) -> Manifest:
    try:
        answer = parse(GetRunResponse, path.read_bytes())
        return open_manifest(answer.manifest, answer.run_id)
    except FileNotFoundError as error:
        raise LinkError(f"no peer has ever run in {path.parent}", "join a run first: swarm join LINK") from error
    except Rejected as error:
        raise SwarmError(f"{path} is damaged: {error}", "start the peer again; it is fetched anew") from error
