"""The command `swarm`: a table of lazily imported commands, and the translation of errors into exit codes.

Convention: a line of `COMMANDS` names `module:attribute`. The attribute is a `typer.Typer` where the command has commands of
its own (by convention called `app`), or else a plain function with typer annotations (called `command`, or after the command
where one module holds several). The module is imported when its command runs; `swarm --help` imports none of them.

Commands raise `SwarmError`; `main` prints it as `error:` and `hint:` lines and exits with its code.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from typing import NamedTuple

import typer
from typer.core import TyperGroup

from swarm import __version__
from swarm.errors import Rejected, SwarmError, UsageError

INTERRUPTED = 130


class Command(NamedTuple):
    """Where a command is implemented and what `swarm --help` says about it."""

    target: str
    help: str


COMMANDS: dict[str, Command] = {
    "join": Command("swarm.cli.join:command", "Train with your GPU and earn credits."),
    "status": Command("swarm.cli.status:status", "What the peer on this machine is doing, and why."),
    "pause": Command("swarm.cli.status:pause", "Stop training now and free the GPU; stay in the swarm."),
    "snooze": Command("swarm.cli.status:snooze", "Pause for a while: swarm snooze 2h."),
    "resume": Command("swarm.cli.status:resume", "Go on training after a pause."),
    "finish": Command("swarm.cli.status:finish", "Complete the round, get the receipt, then stop."),
    "stop": Command("swarm.cli.status:stop", "Stop the peer now."),
    "top": Command("swarm.cli.top:command", "Watch the peers of this machine."),
    "doctor": Command("swarm.cli.doctor:command", "Check whether this machine can join, and how well."),
    "service": Command("swarm.cli.service:app", "Start with the machine: print, install, uninstall."),
    "credits": Command("swarm.cli.credits:command", "Credits of one peer: pending, verified and final."),
    "explain": Command("swarm.cli.explain:command", "Why you earned what you did in a round."),
    "leaderboard": Command("swarm.cli.leaderboard:command", "Who has contributed most."),
    "ledger": Command("swarm.cli.ledger:app", "Check the public ledger, or export it."),
    "witness": Command("swarm.cli.witness:command", "Watch that a ledger only grows, and sign it."),
    "receipts": Command("swarm.cli.receipts:app", "What you can prove offline: list, verify, export."),
    "evidence": Command("swarm.cli.evidence:app", "What was proven against peers: list, verify."),
    "identity": Command("swarm.cli.identity:app", "Make, show, back up and restore your key."),
    "export": Command("swarm.cli.export:command", "Write the trained model as safetensors."),
    "publish": Command("swarm.cli.publish:command", "Send an exported model to a hub."),
    "generate": Command("swarm.cli.generate:command", "See what a trained model writes."),
    "evaluate": Command("swarm.cli.evaluate:command", "See what a trained model reaches in benchmarks."),
    "demo": Command("swarm.cli.demo:command", "A coordinator and several peers on this machine."),
    "attack": Command("swarm.cli.attack:command", "See what an attack does to a swarm, on this machine."),
    "data": Command("swarm.cli.data:app", "Make a run's data from texts."),
    "run": Command("swarm.cli.run:app", "Describe a training run: init, validate, show, sign."),
    "coordinator": Command("swarm.cli.coordinator:app", "Run the coordinator of a training run, back it up, check it."),
    "admin": Command("swarm.cli.admin:app", "Watch and steer a run that you operate."),
    "config": Command("swarm.cli.config_show:app", "The configuration, and where each value comes from."),
}


class LazyGroup(TyperGroup):
    """The commands of `COMMANDS`, each imported when it is asked for."""

    def list_commands(self, ctx: typer.Context) -> list[str]:  # type: ignore[override]
        """The names, in the table's order."""
        return list(COMMANDS)

    def get_command(self, ctx: typer.Context, cmd_name: str) -> object:  # type: ignore[override]
        """Import and build one command, or None if there is none of that name."""
        entry = COMMANDS.get(cmd_name)
        return None if entry is None else _load(cmd_name, entry)

    def format_commands(self, ctx: typer.Context, formatter: object) -> None:  # type: ignore[override]
        """Write the table without importing any command."""
        with formatter.section("Commands"):  # type: ignore[attr-defined]
            formatter.write_dl([(name, entry.help) for name, entry in COMMANDS.items()])  # type: ignore[attr-defined]


def _load(name: str, entry: Command) -> object:
    module_name, _, attribute = entry.target.partition(":")
    try:
        target = getattr(importlib.import_module(module_name), attribute)
    except ModuleNotFoundError as error:
        raise UsageError(
            f"`swarm {name}` needs {error.name}, which is not installed",
            "install the whole package: pip install 'swarm-train[peer,coordinator]'",
        ) from error
    if not isinstance(target, typer.Typer):
        single = typer.Typer(add_completion=False, rich_markup_mode=None)
        single.command(name)(target)
        target = single
    return typer.main.get_command(target)


app = typer.Typer(
    name="swarm",
    cls=LazyGroup,
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Volunteers with consumer GPUs train one model together, and anyone can check the result.",
)


def _print_version(value: bool) -> None:
    if value:
        typer.echo(f"swarm {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: bool = typer.Option(False, "--version", callback=_print_version, is_eager=True, help="Print the version and exit."),
) -> None:
    """Nothing of its own; `--version` is handled by its callback."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit the process with the result's code."""
    sys.exit(run(arguments))


def run(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    command = typer.main.get_command(app)
    try:
        command(list(sys.argv[1:] if arguments is None else arguments), prog_name="swarm")
    except SystemExit as leaving:
        return leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
    except SwarmError as error:
        return _report(error.message, error.hint, error.exit_code)
    except Rejected as error:
        return _report(f"the coordinator says {error}", "", SwarmError.exit_code)
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return INTERRUPTED
    return 0


def _report(message: str, hint: str, exit_code: int) -> int:
    typer.echo(f"error: {message}", err=True)
    if hint:
        typer.echo(f"hint: {hint}", err=True)
    return exit_code


if __name__ == "__main__":
    main()
