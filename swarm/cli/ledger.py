"""`swarm ledger`: check everything that the coordinator has promised, or take a copy of the ledger."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated

import typer

from swarm.badges import Badge, badges_of
from swarm.cli.output import format_credits, print_fields, print_json, print_table
from swarm.config import LINK_HELP, find_link
from swarm.credits import Balance, CreditState, verify_ledger
from swarm.entry_proof import MAX_JSON_BYTES, ProvenEntry
from swarm.errors import LedgerInvalid, UsageError
from swarm.evaluations import best_of
from swarm.ledger import LedgerReader
from swarm.ledger_copy import LedgerCopy
from swarm.messages import JoinLink
from swarm.receipts import SUFFIX, Kept, read_receipts
from swarm.rpc.client import CoordinatorClient
from swarm.witness import cosigners

SHOWN_BALANCES = 20

app = typer.Typer(help="Check the public ledger, or export it.", no_args_is_help=True, rich_markup_mode=None)

LinkArgument = Annotated[str | None, typer.Argument(help=LINK_HELP)]
JsonOption = Annotated[bool, typer.Option("--json", help="One line of JSON.")]


@app.command()
def verify(
    link: LinkArgument = None,
    file: Annotated[Path | None, typer.Option("--file", help="An exported ledger instead of the coordinator's.")] = None,
    receipts: Annotated[
        Path | None, typer.Option("--receipts", help=f"Folder with your receipts (*{SUFFIX}), or a file of them.")
    ] = None,
    workers: Annotated[int, typer.Option("--workers", min=0, help="Processes for signatures; 0 = one per core.")] = 0,
    every_signature: Annotated[
        bool, typer.Option("--every-signature", help="Also those of commits and results, which signed reports contain.")
    ] = False,
    witness: Annotated[
        list[str] | None, typer.Option("--witness", help="Peer id of a witness that must have cosigned it; may be repeated.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Check the tree against the signed checkpoint, all signatures, every rule and your receipts; recompute balances."""
    promises = read_receipts(receipts) if receipts else []  # before the ledger: a peer goes on adding to both
    copy = read_copy(file, link) if file else asyncio.run(download(find_link(link), cosigned=bool(witness)))
    reader, checkpoint = LedgerReader(), copy.checkpoint()
    state = verify_ledger(copy.entries, copy.coordinator, workers, every_signature=every_signature, tree=reader.tree)
    reader.check_checkpoint(checkpoint)
    if copy.run_id not in state.run_ids:
        raise LedgerInvalid("the ledger doesn't open the run that it is said to be of")
    _check_receipts(reader, promises, copy)
    seen = cosigners(copy.note)
    missing = [peer for peer in witness or [] if peer not in seen]
    if missing:
        raise LedgerInvalid(f"witness {missing[0]} hasn't cosigned this checkpoint", "has it looked yet? swarm witness --once")
    _print_result(copy, state, len(promises), as_json)


@app.command()
def export(
    to: Annotated[Path, typer.Option("--to", help="File to write.")],
    link: LinkArgument = None,
    cosigned: Annotated[
        bool, typer.Option("--cosigned", help="Up to the checkpoint with the most witnesses' cosignatures.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Write the ledger with its signed checkpoint to a file that `swarm ledger verify --file` checks offline."""
    copy = asyncio.run(download(find_link(link), cosigned))
    copy.write(to)
    fields: dict[str, object] = {"entries": len(copy.entries), "path": str(to)}
    print_json(fields) if as_json else print_fields(fields)


@app.command()
def check(
    file: Annotated[Path, typer.Argument(help="An entry with its proof, as the coordinator's page serves it at /api/ledger/N.")],
    coordinator: Annotated[str, typer.Option("--coordinator", help="The coordinator's peer id, from somebody whom you trust.")],
    as_json: JsonOption = False,
) -> None:
    """Check offline that one entry is in the ledger that the coordinator has signed, and what is signed inside it."""
    try:
        with file.open("rb") as opened:
            proven = ProvenEntry.parse(opened.read(MAX_JSON_BYTES + 1))
    except OSError as error:
        raise UsageError(f"can't read {file}: {error.strerror}", "check the path") from error
    checkpoint, entry = proven.verify(coordinator)
    fields: dict[str, object] = {
        "verified": True,
        "entry": proven.index,
        "what": type(entry).__name__.lower(),
        "run": proven.run_id.hex(),
        "entries": checkpoint.size,
        "root": checkpoint.root.hex(),
    }
    print_json(fields) if as_json else print_fields(fields)


def read_copy(path: Path, link: str | None) -> LedgerCopy:
    """An exported ledger, of the link's run where there is a link. Raises `LedgerInvalid` and `UsageError`."""
    copy = LedgerCopy.read(path)
    if link is not None and JoinLink.parse(link).run_id != copy.run_id:
        raise LedgerInvalid(f"{path} is the ledger of another run than the link's")
    return copy


async def download(link: JoinLink, cosigned: bool = False) -> LedgerCopy:
    """The coordinator's ledger, up to its newest checkpoint or to the one with the most cosignatures."""
    async with await CoordinatorClient.connect(link) as client:
        run = await client.get_run()
        checkpoint, note, _ = await client.checkpoint(cosigned=cosigned)
        entries = [entry async for entry in client.entries(0, checkpoint.size)]
    return LedgerCopy(run.run_id, run.coordinator, note, entries)


def _check_receipts(reader: LedgerReader, kept: list[Kept], copy: LedgerCopy) -> None:
    for each in kept:
        receipt = each.verified(copy.coordinator)
        try:
            reader.check_receipt(receipt)
        except LedgerInvalid as error:
            raise LedgerInvalid(f"{each.name}: {error.message}", error.hint) from error


def _print_result(copy: LedgerCopy, state: CreditState, receipts: int, as_json: bool) -> None:
    checkpoint = copy.checkpoint()
    balances = state.balances(copy.run_id)
    fields: dict[str, object] = {
        "verified": True,
        "entries": checkpoint.size,
        "root": checkpoint.root.hex(),
        "receipts": receipts,
    }
    agreed = state.agreed_evaluations(copy.run_id)
    if as_json:
        progress = state.progress(copy.run_id)
        more: dict[str, object] = {"confirmed_round": progress.confirmed_round, "tokens": progress.tokens}
        honoured = {account: [f"{badge.name}:{badge.level}" for badge in _badges(copy, state, account)] for account in balances}
        more["badges"] = {account: names for account, names in honoured.items() if names}
        more["evaluations"] = [each._asdict() for each in agreed]
        more["disputed_evaluations"] = state.disputed_evaluations(copy.run_id)
        print_json({**fields, **more, "balances": [item._asdict() for item in balances.values()]})
        return
    found = best_of(agreed)
    if found is not None:
        newest, lowest = agreed[-1], f"best {found.loss:.4f} after round {found.round:,}"
        fields["held-out loss"] = f"{newest.loss:.4f} after round {newest.round:,}, {lowest}"
    print_fields(fields)
    best = state.leaderboard(copy.run_id, SHOWN_BALANCES)
    rows = [_row(item, _badges(copy, state, item.account)) for item in best]
    print_table(("account", "credits", "pending", "tokens", "badges"), rows, numbers=("credits", "pending", "tokens"))


def _badges(copy: LedgerCopy, state: CreditState, account: str) -> list[Badge]:
    return badges_of(state.deeds(copy.run_id, account))


def _row(item: Balance, badges: list[Badge]) -> tuple[str, str, str, int, str]:
    titles = ", ".join(f"{badge.title} {badge.level:,}" for badge in badges)
    return item.account, format_credits(item.earned_flops), format_credits(item.pending_flops), item.tokens, titles
