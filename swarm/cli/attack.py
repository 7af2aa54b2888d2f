"""`swarm attack`: see what an attack does to a swarm, on this machine."""

from __future__ import annotations

import asyncio
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from swarm.cli.output import print_fields, print_json
from swarm.errors import UsageError

if TYPE_CHECKING:
    from peer.trials import Outcome, Trial


def command(
    kind: Annotated[str, typer.Option("--kind", help="What the attackers do; `list` shows all.")],
    attackers: Annotated[int, typer.Option("--attackers", min=1, max=15, help="How many attack.")] = 2,
    peers: Annotated[int, typer.Option("--peers", min=2, max=32, help="How many there are in all.")] = 8,
    rounds: Annotated[int, typer.Option("--rounds", min=3, max=100_000, help="How many rounds are trained.")] = 40,
    merge: Annotated[str, typer.Option("--merge", help="The merge rule: centered_clip or mean.")] = "centered_clip",
    check_traffic: Annotated[float, typer.Option("--check-traffic", min=0, help="Share of traffic for checking merges.")] = 0.02,
    inner_state: Annotated[str, typer.Option("--inner-state", help="fresh: audits compute again; kept: by the loss.")] = "fresh",
    as_json: Annotated[bool, typer.Option("--json", help="One line of JSON.")] = False,
) -> None:
    """Train a small model with real peers, some of which attack, and once more without them, and compare.

    Says what the held-out loss is beside the clean run's, how many rounds it took until an attacker was proven guilty, what share
    of the credit the attackers have for work that they did not do, and whether somebody honest was accused.

    Examples:

      swarm attack --kind sign_flip

      swarm attack --kind tamper --attackers 1 --peers 4 --rounds 20 --check-traffic 1 --json
    """
    from peer.attacks import KINDS
    from peer.trials import Trial

    if kind == "list":
        typer.echo("\n".join(KINDS))
        return
    if kind not in KINDS:
        raise UsageError(f"no such attack: {kind}", f"one of {', '.join(KINDS)}")
    if merge not in ("centered_clip", "mean"):
        raise UsageError(f"no such merge rule: {merge}", "centered_clip or mean")
    if attackers >= peers:
        raise UsageError("somebody has to be honest", "fewer attackers than peers")
    if inner_state not in ("fresh", "kept"):
        raise UsageError(f"no such inner state: {inner_state}", "fresh or kept")
    trial = Trial(kind, attackers, peers, rounds, merge, check_traffic, inner_state)
    with tempfile.TemporaryDirectory(prefix="swarm-attack-", ignore_cleanup_errors=True) as folder:
        clean, attacked = asyncio.run(_both(trial, Path(folder)))
    fields = {
        **asdict(trial),
        "clean_loss": round(clean.loss, 4),
        "loss": round(attacked.loss, 4),
        "loss_over_clean": round(attacked.loss / clean.loss, 4),
        "detected_after_rounds": attacked.detected_after,
        "convicted": attacked.convicted,
        "honest_accused": attacked.honest_accused + clean.honest_accused,
        "credit_kept": round(attacked.credit_kept, 4),
        "roots_agree": attacked.roots_agree and clean.roots_agree,
    }
    if as_json:
        print_json(fields)
    else:
        print_fields({name: "-" if value is None else value for name, value in fields.items()})


async def _both(trial: Trial, folder: Path) -> tuple[Outcome, Outcome]:
    from peer.trials import run

    clean = await run(trial.clean, folder / "clean", lambda line: _say("clean", line))
    return clean, await run(trial, folder / "attacked", lambda line: _say(trial.kind, line))


def _say(what: str, line: str) -> None:
    if sys.stderr.isatty():
        typer.echo(f"\r{what}: {line} ", err=True, nl=False)
