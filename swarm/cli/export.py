"""`swarm export`: the latest agreed weights, or a past round's, as a directory that transformers loads with no extra code."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from swarm.cli.output import bars, print_fields, print_json
from swarm.config import PeerSettings, find_link, load, remembered_link
from swarm.control import RUN_NAME, ask
from swarm.errors import LedgerInvalid, LinkError, NotRunning, Rejected, SwarmError, UsageError
from swarm.ledger import open_manifest
from swarm.ledger_copy import LedgerCopy
from swarm.messages import parse
from swarm.rpc.client import CoordinatorClient
from swarm.rpc.v1.coordinator_pb2 import Balance, GetProgressResponse, GetRunResponse

if TYPE_CHECKING:
    from peer.state import Snapshot
    from swarm.manifest import Manifest

MOST_CONTRIBUTORS = 1000


def command(
    to: Annotated[Path, typer.Option("--to", help="Directory to write; new or empty.")],
    merged: Annotated[bool, typer.Option("--merged", help="Of an adapter: the whole model with the adapter in it.")] = False,
    best: Annotated[
        bool, typer.Option("--best", help="The weights with the lowest held-out loss, instead of the newest.")
    ] = False,
    round_number: Annotated[
        int | None, typer.Option("--round", min=0, help="After this round, from what swarm join --keep-history has kept.")
    ] = None,
    ledger: Annotated[
        Path | None, typer.Option("--ledger", help="With --round: compare with this ledger, from swarm ledger export.")
    ] = None,
    data_dir: Annotated[Path | None, typer.Option("--dir", help="The peer's folder, if it isn't the configured one.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One line of JSON.")] = False,
) -> None:
    """Write the trained model as safetensors, with tokenizer and model card; of an adapter the adapter, as peft loads it.

    A running peer is asked for its present weights first; otherwise its newest checkpoint is taken. Where the run is evaluated, a
    peer also keeps the checkpoint with the lowest held-out loss on which a quorum agreed, or else that it measured itself. A past
    round's weights are rebuilt from the nearest kept checkpoint and the merged updates since, and every state root on the way is
    checked. For the card the coordinator is asked for contributors, credits and ledger; where it doesn't answer, the card goes
    without.

    Examples:

      swarm export --to ./model

      swarm export --best --to ./model

      swarm export --to ./model-41 --round 41 --ledger ledger.copy
    """
    if best and round_number is not None:
        raise UsageError("--best and --round name different weights", "leave one of them out")
    if ledger is not None and round_number is None:
        raise UsageError("--ledger is for a past round's weights", "name the round with --round")
    folder = load(PeerSettings, {"data_dir": data_dir}).data_dir
    if round_number is None and not best:
        asyncio.run(_refresh(folder))
    run, coordinator = read_run_of(folder / RUN_NAME)
    if run.generates:
        raise UsageError("the run generates, it trains no weights", "its samples are written by: swarm data collect --to DIR")
    from peer.export import require_new
    from peer.outcome import FILES, best_weights, export, newest_weights, provenance

    require_new(to)
    fields: dict[str, object] = {"directory": str(to)}
    if round_number is None:
        snapshot = best_weights(folder, run) if best else newest_weights(folder, run)
    else:
        snapshot, more = _rebuilt(folder, run, coordinator, round_number, ledger)
        fields |= more
    origin = provenance(folder, run, snapshot, *asyncio.run(_recorded(folder)))
    export(run, folder / FILES, snapshot, to, origin, merged=merged)
    fields |= {"round": snapshot.round, "after_round": snapshot.round - 1, "state_root": snapshot.root_hex}
    if origin.validation_loss is not None:
        fields["held_out_loss"] = origin.validation_loss
    print_json(fields) if as_json else print_fields(fields)


def _rebuilt(
    folder: Path, run: Manifest, coordinator: str, round_number: int, ledger: Path | None
) -> tuple[Snapshot, dict[str, object]]:
    """The state after a past round, and how it was come by."""
    from peer.history import HISTORY
    from peer.rebuilding import Rebuilder

    confirmed = _confirmed(ledger, run, coordinator, round_number) if ledger is not None else {}
    with bars() as bar:
        found = Rebuilder.of(folder / HISTORY, run, coordinator, confirmed).after(round_number, bar)
    fields: dict[str, object] = {
        "rebuilt_from": found.start,
        "rounds_applied": found.snapshot.round - found.start,
        "rounds_skipped": list(found.skipped),
        "confirmed_by": found.confirmed_by or "nothing but this peer's own notes",
    }
    return found.snapshot, fields


def _confirmed(path: Path, run: Manifest, coordinator: str, round_number: int) -> dict[int, bytes]:
    copy = LedgerCopy.read(path)
    if (copy.run_id.hex(), copy.coordinator) != (run.run_id, coordinator):
        raise LedgerInvalid(f"{path} is the ledger of another run", "write this one's with: swarm ledger export")
    roots = copy.confirmed_roots()
    if round_number not in roots:
        raise LedgerInvalid(f"round {round_number} isn't confirmed in {path}", "export the ledger again, or leave --ledger out")
    return roots


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


def read_run_of(path: Path) -> tuple[Manifest, str]:
    """The manifest of the run that a peer has last taken part in, and its coordinator's peer id."""
    try:
        answer = parse(GetRunResponse, path.read_bytes())
        return open_manifest(answer.manifest, answer.run_id), answer.coordinator
    except FileNotFoundError as error:
        raise LinkError(f"no peer has ever run in {path.parent}", "join a run first: swarm join LINK") from error
    except Rejected as error:
        raise SwarmError(f"{path} is damaged: {error}", "start the peer again; it is fetched anew") from error
