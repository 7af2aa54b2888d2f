"""`swarm evaluate`: what a trained model reaches in known benchmarks."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from swarm.cli.folders import require_model
from swarm.cli.output import print_json, print_table
from swarm.cli.synthetic import GpuOption, JsonOption
from swarm.errors import UsageError


def command(
    model: Annotated[
        Path | None, typer.Argument(help="A directory that `swarm export` has written, or any of transformers.")
    ] = None,
    tasks: Annotated[str, typer.Option("--tasks", help="Tasks or groups of tasks, with commas between.")] = "",
    listed: Annotated[bool, typer.Option("--list", help="Print the names of all tasks instead.")] = False,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Ask only the first so many samples of each task.")] = None,
    shots: Annotated[
        int | None,
        typer.Option("--shots", min=0, max=100, help="So many worked examples before each, instead of the task's own."),
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Ask in the model's chat template.")] = False,
    include: Annotated[
        Path | None, typer.Option("--include", help="A folder with tasks of your own; Python that they name is run.")
    ] = None,
    base: Annotated[Path | None, typer.Option("--base", help="Of an adapter: the directory of the model that it adapts.")] = None,
    card: Annotated[bool, typer.Option("--card", help="Put the scores into the model's card.")] = False,
    gpu: GpuOption = None,
    as_json: JsonOption = False,
) -> None:
    """Ask a model the tasks of the LM Evaluation Harness, and print what it reaches.

    Needs the extra `evaluation`: pip install 'swarm-train[evaluation]'. A task's data are fetched from a hub the first time, and
    kept there where `datasets` keeps them.

    Examples:

      swarm evaluate ./model --tasks arc_easy,hellaswag --limit 200

      swarm evaluate ./adapter --base ./base --tasks gsm8k --chat --card

      swarm evaluate --list
    """
    if listed:
        from peer.benchmarks import Harness

        names = Harness(include).names
        print_json(names) if as_json else typer.echo("\n".join(names))
        return
    if model is None:
        raise UsageError("no model named", "swarm evaluate ./model --tasks arc_easy")
    require_model(model)
    from peer.benchmarks import Harness, card_of, write_in_card
    from peer.device import choose_devices

    written = card_of(model) if card else None
    harness = Harness(include)
    device = choose_devices(gpu or "", cpu=gpu is None)[0]
    named = [name.strip() for name in tasks.split(",") if name.strip()]
    scores = harness.measure(model, named, device, base=base, limit=limit, shots=shots, chat=chat)
    if written is not None:
        write_in_card(written, scores, harness.version)
    if as_json:
        print_json({"harness": harness.version, "card": str(written) if written else None, "scores": [asdict(s) for s in scores]})
        return
    columns = ("task", "metric", "value", "stderr", "samples", "shots")
    rows = [
        (one.task, one.metric, f"{one.value:.4f}", "" if one.stderr is None else f"{one.stderr:.4f}", one.samples, one.shots)
        for one in scores
    ]
    print_table(columns, rows, columns[2:])
    if written is not None:
        typer.echo(f"written into {written}")
