"""What commands print: one line of JSON for programs, or tables for people; log events go to stderr."""

from __future__ import annotations

import atexit
import json
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, TextIO, cast

import structlog
import typer

from swarm.errors import UsageError
from swarm.log_writer import LogWriter

LAST_LINES_S = 1.0
STDERR = 2
LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}


class Moved(Protocol):
    """Moves a bar on."""

    def __call__(self, advance: int = 1) -> None:
        """By so many."""


Bar = Callable[[str, int | None], Moved]


def print_json(value: object) -> None:
    """Write `value` as one line of JSON, at once."""
    sys.stdout.write(json.dumps(value, separators=(", ", ": "), ensure_ascii=False) + "\n")
    sys.stdout.flush()


def print_table(columns: Sequence[str], rows: Sequence[Sequence[object]], numbers: Sequence[str] = ()) -> None:
    """Write a table; the columns in `numbers` are aligned to the right."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for column in columns:
        table.add_column(column, justify="right" if column in numbers else "left", overflow="fold")
    for row in rows:
        table.add_row(*(_cell(value) for value in row))
    Console(soft_wrap=True, highlight=False, markup=False).print(table)


def print_fields(fields: dict[str, object]) -> None:
    """Write names and values below each other."""
    width = max(map(len, fields), default=0)
    for name, value in fields.items():
        typer.echo(f"{name:<{width}}  {_cell(value)}")


def format_credits(flops: int) -> str:
    """FLOPs as credits, rounded down to three digits after the point."""
    from swarm.credits import FLOPS_PER_CREDIT

    thousandths = flops * 1000 // FLOPS_PER_CREDIT
    return f"{thousandths // 1000:,}.{thousandths % 1000:03d}"


def configure_logging(level: str) -> LogWriter:
    """Send log events to stderr: as JSON lines, or in colour where a person watches. Raises `UsageError`.

    Nobody waits for a stderr that takes nothing; to be drained before the program makes way for another.
    """
    if level not in LEVELS:
        raise UsageError(f"no such log level: {level}", f"choose one of {', '.join(LEVELS)}")
    watched = sys.stderr.isatty()
    writer = LogWriter(STDERR)
    atexit.register(writer.drain, LAST_LINES_S)
    renderer: Any = structlog.dev.ConsoleRenderer() if watched else structlog.processors.JSONRenderer()
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            *([] if watched else [structlog.processors.format_exc_info]),
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(LEVELS[level]),
        logger_factory=structlog.WriteLoggerFactory(cast("TextIO", writer)),
    )
    return writer


def _cell(value: object) -> str:
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


@contextmanager
def bars() -> Iterator[Bar]:
    """Bars on the terminal; nothing where there is none. `bar(what, total)` adds one, and gives what moves it on by one."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:

        def bar(what: str, total: int | None) -> Moved:
            task = progress.add_task(what, total=total)
            return lambda advance=1: progress.advance(task, advance)

        yield bar
