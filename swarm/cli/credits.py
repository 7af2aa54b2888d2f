"""`swarm credits`: what one account has earned."""

from __future__ import annotations

import asyncio
from typing import Annotated

import typer

from swarm.cli.output import format_credits, print_fields, print_json
from swarm.config import LINK_HELP, PeerSettings, find_link, load
from swarm.identity import Identity
from swarm.messages import JoinLink
from swarm.rpc.client import CoordinatorClient
from swarm.rpc.v1.coordinator_pb2 import Balance


def command(
    link: Annotated[str | None, typer.Argument(help=LINK_HELP)] = None,
    peer: Annotated[str | None, typer.Option("--peer", help="Peer id; by default your own.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One line of JSON.")] = False,
) -> None:
    """Credits of one peer: pending, verified and final."""
    target = find_link(link)
    peer_id = peer or Identity.load(load(PeerSettings).identity).peer_id
    balance = asyncio.run(_ask(target, peer_id))
    if as_json:
        print_json(as_values(balance))
        return
    print_fields(
        {
            "peer": balance.peer_id,
            "pending": f"{format_credits(int(balance.pending_flops))} credits",
            "verified": f"{format_credits(int(balance.verified_flops))} credits",
            "final": f"{format_credits(int(balance.final_flops))} credits",
            "rounds": balance.rounds,
            "tokens": balance.tokens,
        }
    )


def as_values(balance: Balance) -> dict[str, object]:
    """A balance for JSON; FLOPs are exact integers."""
    return {
        "peer_id": balance.peer_id,
        "account": balance.account,
        "pending_flops": int(balance.pending_flops),
        "verified_flops": int(balance.verified_flops),
        "final_flops": int(balance.final_flops),
        "rounds": balance.rounds,
        "tokens": balance.tokens,
    }


async def _ask(link: JoinLink, peer_id: str) -> Balance:
    async with await CoordinatorClient.connect(link) as client:
        return (await client.credits(peer_id)).balances[0]
