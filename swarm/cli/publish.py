"""`swarm publish`: an exported model on a hub."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from swarm.cli.output import print_fields, print_json, print_table
from swarm.units import format_size


def command(
    folder: Annotated[Path, typer.Argument(help="Written by `swarm export`.")],
    to: Annotated[str, typer.Option("--to", help="The hub's repository, owner/name; made if there is none.")],
    public: Annotated[bool, typer.Option("--public", help="For everybody to see; else a new repository is private.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List what would be sent, and send nothing.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One line of JSON.")] = False,
) -> None:
    """Send an exported model to a hub: weights, settings, tokenizer and card, and nothing else that lies in the folder.

    The token is the one of `hf auth login`, or HF_TOKEN; the hub that of HF_ENDPOINT, or huggingface.co.

    Examples:

      swarm publish ./model --to owner/name --dry-run

      swarm publish ./model --to owner/name --public
    """
    from huggingface_hub.utils.tqdm import disable_progress_bars

    from peer.publishing import Parcel, publish

    parcel = Parcel.of(folder)
    if parcel.left_out:
        typer.echo(f"warning: left out {', '.join(parcel.left_out)}: no part of a model", err=True)
    if as_json or not sys.stderr.isatty():
        disable_progress_bars()
    address = None if dry_run else publish(parcel, to, public=public)
    if as_json:
        print_json({"to": to, "public": public, "sent": address, "files": parcel.files, "left_out": list(parcel.left_out)})
        return
    if dry_run:
        rows = [(name, format_size(size)) for name, size in parcel.files.items()]
        print_table(("file", "size"), rows, numbers=("size",))
    total = format_size(sum(parcel.files.values()))
    print_fields({"to": to, "seen_by": "everybody" if public else "you", "size": total, "sent": address or "nothing: a dry run"})
