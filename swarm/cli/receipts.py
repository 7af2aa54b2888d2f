"""`swarm receipts`: what you can prove about your work without asking anybody."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from swarm.cli.output import print_fields, print_json, print_table
from swarm.config import PeerSettings, load
from swarm.receipts import check_together, coordinator_of, read_receipts, write_receipts
from swarm.rpc.v1.ledger_pb2 import Receipt

SHOWN = 12  # digits of a hash in a table

app = typer.Typer(help="What you can prove offline: list, verify, export.", no_args_is_help=True, rich_markup_mode=None)

PlaceOption = Annotated[
    Path | None, typer.Option("--from", help="Folder with receipts, or an exported file; by default the peer's folder.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="JSON instead of a table.")]


@app.command("list")
def list_(place: PlaceOption = None, as_json: JsonOption = False) -> None:
    """Show your receipts, unchecked.

    Examples:

      swarm receipts list

      swarm receipts list --from receipts.jsonl --json
    """
    claims = [(each.name, each.claimed()) for each in read_receipts(_place(place))]
    if as_json:
        for name, receipt in claims:
            print_json({"name": name, **_values(receipt)})
        return
    rows = [
        (name, receipt.run_id.hex()[:SHOWN], receipt.round, receipt.ledger_index, receipt.ledger_size) for name, receipt in claims
    ]
    print_table(("receipt", "run", "round", "entry", "of"), rows, numbers=("round", "entry", "of"))


@app.command()
def verify(
    place: PlaceOption = None,
    coordinator: Annotated[
        str | None, typer.Option("--coordinator", help="Peer id of the coordinator; by default whoever signed most of them.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Check countersignatures, your own signatures inside and inclusion proofs, and that no two contradict each other.

    Works offline. Whether the ledger still holds what they promise: `swarm ledger verify --receipts FOLDER`.
    """
    kept = read_receipts(_place(place))
    signer = coordinator or coordinator_of(kept)
    receipts = {each.name: each.verified(signer) for each in kept}
    check_together(receipts)
    newest = max(receipts.values(), key=lambda receipt: receipt.ledger_size)
    rounds = [receipt.round for receipt in receipts.values()]
    fields: dict[str, object] = {
        "verified": True,
        "receipts": len(receipts),
        "coordinator": signer,
        "rounds": f"{min(rounds)} to {max(rounds)}",
        "newest_size": newest.ledger_size,
        "newest_root": newest.ledger_root.hex(),
    }
    print_json(fields) if as_json else print_fields(fields)


@app.command()
def export(
    to: Annotated[Path, typer.Option("--to", help="File to write.")], place: PlaceOption = None, as_json: JsonOption = False
) -> None:
    """Write all receipts into one file, which `swarm receipts verify --from` and `swarm ledger verify --receipts` read."""
    kept = read_receipts(_place(place))
    write_receipts(to, kept)
    fields: dict[str, object] = {"receipts": len(kept), "path": str(to)}
    print_json(fields) if as_json else print_fields(fields)


def _place(place: Path | None) -> Path:
    return place or load(PeerSettings).data_dir


def _values(receipt: Receipt) -> dict[str, object]:
    return {
        "run_id": receipt.run_id.hex(),
        "round": receipt.round,
        "peer_id": receipt.peer_id,
        "report_hash": receipt.report_hash.hex(),
        "ledger_index": receipt.ledger_index,
        "ledger_size": receipt.ledger_size,
        "ledger_root": receipt.ledger_root.hex(),
    }
