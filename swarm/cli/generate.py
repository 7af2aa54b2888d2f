"""`swarm generate`: what a trained model writes, for a quick try."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from swarm.cli.folders import require_model
from swarm.cli.output import print_json
from swarm.errors import UsageError


def command(
    model: Annotated[Path, typer.Argument(help="A directory that `swarm export` has written, or any of transformers.")],
    prompt: Annotated[str, typer.Argument(help="What the model goes on from; - reads it from standard input.")] = "-",
    tokens: Annotated[int, typer.Option("--tokens", min=1, max=100_000, help="Write at most so many.")] = 128,
    chat: Annotated[bool, typer.Option("--chat", help="The prompt is what a user says in a chat.")] = False,
    base: Annotated[Path | None, typer.Option("--base", help="Of an adapter: the directory of the model that it adapts.")] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Draw other tokens.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="One line of JSON.")] = False,
) -> None:
    """Print what a model continues a prompt with, on the processor; the same each time for the same seed.

    Examples:

      swarm generate ./model "def fibonacci(n):"

      echo "What is a ledger?" | swarm generate ./model --chat
    """
    require_model(model)
    text = sys.stdin.read() if prompt == "-" else prompt
    if not text.strip():
        raise UsageError("an empty prompt", 'write one: swarm generate ./model "Once upon a time"')
    from peer.outcome import sample

    written = sample(model, text, tokens, chat=chat, base=base, seed=seed)
    print_json({"prompt": text, "text": written}) if as_json else typer.echo(written)
