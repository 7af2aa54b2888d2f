"""`swarm explain`: why a key earned what it did in a round."""

from __future__ import annotations

import asyncio
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from swarm.cli.ledger import download, read_copy
from swarm.cli.output import format_credits, print_fields, print_json
from swarm.config import LINK_HELP, PeerSettings, find_link, load
from swarm.explain import explain
from swarm.identity import Identity
from swarm.ledger import LedgerReader


def command(
    round_number: Annotated[int, typer.Option("--round", min=0, help="The round in question.")],
    link: Annotated[str | None, typer.Argument(help=LINK_HELP)] = None,
    peer: Annotated[str | None, typer.Option("--peer", help="Peer id; by default your own.")] = None,
    file: Annotated[Path | None, typer.Option("--file", help="An exported ledger instead of the coordinator's.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One line of JSON.")] = False,
) -> None:
    """Say why a key earned what it did in a round, or why it earned nothing: from the ledger, as anybody can.

    Examples:

      swarm explain --round 17

      swarm explain --round 17 --peer 12D3KooW... --file ledger.copy --json
    """
    copy = read_copy(file, link) if file else asyncio.run(download(find_link(link)))
    reader = LedgerReader()
    reader.extend(copy.entries)
    reader.check_checkpoint(copy.checkpoint())
    peer_id = peer or Identity.load(load(PeerSettings).identity).peer_id
    found = explain(copy.entries, copy.coordinator, copy.run_id, peer_id, round_number)
    if as_json:
        print_json(asdict(found))
        return
    print_fields(
        {
            "peer": found.peer_id,
            "round": str(found.round),
            "reason": found.reason,
            "why": found.why,
            "credits": format_credits(found.flops),
            **({"audits": "\n".join(found.audits)} if found.audits else {}),
        }
    )
