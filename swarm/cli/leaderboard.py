"""`swarm leaderboard`: who has earned most."""

from __future__ import annotations

import asyncio
from typing import Annotated

import typer

from swarm.cli.credits import as_values
from swarm.cli.output import format_credits, print_json, print_table
from swarm.config import LINK_HELP, find_link
from swarm.messages import JoinLink
from swarm.rpc.client import CoordinatorClient
from swarm.rpc.v1.coordinator_pb2 import Balance


def command(
    link: Annotated[str | None, typer.Argument(help=LINK_HELP)] = None,
    limit: Annotated[int, typer.Option("--limit", min=1, max=1000, help="How many to show.")] = 20,
    as_json: Annotated[bool, typer.Option("--json", help="One line of JSON.")] = False,
) -> None:
    """Who has contributed most."""
    balances = asyncio.run(_ask(find_link(link), limit))
    if as_json:
        print_json([as_values(balance) for balance in balances])
        return
    rows = [
        (place, item.account, _earned(item), format_credits(int(item.pending_flops)), item.rounds, item.tokens)
        for place, item in enumerate(balances, 1)
    ]
    columns = ("#", "account", "credits", "pending", "rounds", "tokens")
    print_table(columns, rows, numbers=("#", "credits", "pending", "rounds", "tokens"))


def _earned(balance: Balance) -> str:
    return format_credits(int(balance.verified_flops) + int(balance.final_flops))


async def _ask(link: JoinLink, limit: int) -> list[Balance]:
    async with await CoordinatorClient.connect(link) as client:
        return list((await client.credits(limit=limit)).balances)
