"""`swarm config`: what is configured, and where each value comes from."""

from __future__ import annotations

from typing import Annotated

import typer

from swarm.cli.output import print_json, print_table
from swarm.config import COMPONENTS, Settings, config_path, load, origins

app = typer.Typer(help="The configuration, and where each value comes from.", no_args_is_help=True, rich_markup_mode=None)


@app.command()
def show(as_json: Annotated[bool, typer.Option("--json", help="One line of JSON.")] = False) -> None:
    """Every value with its origin: a variable, the file, or the default. Flags of a command come before all of them."""
    rows = [row for model in COMPONENTS for row in _rows(model)]
    if as_json:
        keys = ("component", "name", "value", "origin")
        print_json({"file": str(config_path()), "values": [dict(zip(keys, row, strict=True)) for row in rows]})
        return
    typer.echo(f"file: {config_path()}")
    print_table(("component", "name", "value", "origin"), rows)


@app.command()
def path() -> None:
    """Print where the configuration file is looked for."""
    typer.echo(str(config_path()))


def _rows(model: type[Settings]) -> list[tuple[str, str, str, str]]:
    values, found = load(model), origins(model)
    return [(model.table, name, str(getattr(values, name)), found[name]) for name in found]
