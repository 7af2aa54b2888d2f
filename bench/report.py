"""The frame of a benchmark: its command line, its sections, the table for people and the JSON for programs.

A benchmark is a module whose last lines are

    if __name__ == "__main__":
        sys.exit(report.run("rounds", __doc__, {"transfer": measure_transfer, ...}))

where each section is a function or coroutine function of a `Report`, into which it puts figures and rows.
"""

from __future__ import annotations

import argparse
import asyncio
import inspect
import json
import math
import operator
import os
import platform
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

from bench.plots import Plot, Points, draw_all

COMPARE = {"<=": operator.le, ">=": operator.ge, "==": operator.eq, "<": operator.lt, ">": operator.gt}
PACKAGES = ("swarm-train", "torch", "hivemind", "transformers", "grpcio", "numpy", "cryptography", "torchft", "flwr")
BUSY_LOAD_PER_CORE = 0.5
SIGNIFICANT_DIGITS = 4
PLAIN_WIDTH = 160

Number = float | int
Section = Callable[["Report"], "Awaitable[None] | None"]


@dataclass(frozen=True)
class Figure:
    """One number that a benchmark is about, how it was taken, and what it should be, for example `<= 0.3`."""

    value: Number
    how: str
    goal: str = ""

    @property
    def met(self) -> bool | None:
        """Whether the goal is met; None where there is none."""
        if not self.goal:
            return None
        comparison, bound = self.goal.split()
        return bool(COMPARE[comparison](self.value, float(bound)))


@dataclass
class Report:
    """What a benchmark finds out. `quick` asks for a short measurement."""

    name: str
    quick: bool = False
    figures: dict[str, Figure] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    plots: list[Plot] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=lambda: package_versions())
    machine: dict[str, Any] = field(default_factory=lambda: describe_machine())
    started_at: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    console: Console = field(default_factory=lambda: Console(stderr=True, highlight=False))

    def figure(self, name: str, value: Number, how: str, goal: str = "") -> None:
        """Note a figure. Raises `ValueError` for one that is not finite or was noted before."""
        if name in self.figures or not math.isfinite(value):
            raise ValueError(f"{name} = {value}: figures are finite and noted once")
        self.figures[name] = Figure(value, how, goal)

    def add(self, name: str, value: Number, how: str, goal: str = "") -> None:
        """Add to a figure that several sections count together."""
        before = self.figures.pop(name, None)
        self.figure(name, value + (before.value if before else 0), how, goal)

    def row(self, table: str, **fields: Any) -> None:
        """Note one line of the table named `table`."""
        self.rows.append({"table": table, **fields})

    def plot(self, title: str, series: Mapping[str, Points], *, x: str, y: str, log: str = "") -> None:
        """Note points to be drawn, by the name of their series; `log` names the logarithmic axes."""
        self.plots.append(Plot(title, x, y, series, log))

    def say(self, text: str) -> None:
        """Tell whoever waits what goes on."""
        self.console.print(text, markup=False)

    def choose(self, full: int, quick: int) -> int:
        """How many, by whether it should be quick."""
        return quick if self.quick else full

    @contextmanager
    def section(self, name: str) -> Iterator[None]:
        """Time a part of the benchmark; what fails in it is noted, and the other parts go on."""
        self.say(f"{self.name}: {name} ...")
        started = time.monotonic()
        try:
            yield
        except Exception as error:  # noqa: BLE001 - the outermost boundary of a section
            self.failures[name] = f"{type(error).__name__}: {error}"
            self.say(traceback.format_exc())
        finally:
            self.seconds[name] = time.monotonic() - started

    def as_dict(self) -> dict[str, Any]:
        """For the JSON file."""
        return {
            "benchmark": self.name,
            "quick": self.quick,
            "started_at": self.started_at,
            "figures": {name: figure.value for name, figure in self.figures.items()},
            "how": {name: figure.how for name, figure in self.figures.items()},
            "goals": {name: figure.goal for name, figure in self.figures.items() if figure.goal},
            "rows": self.rows,
            "plots": [plot.as_dict() for plot in self.plots],
            "seconds": self.seconds,
            "failures": self.failures,
            "machine": self.machine,
            "versions": self.versions,
        }

    def write(self, path: Path) -> None:
        """Write the JSON file."""
        path.write_text(json.dumps(self.as_dict(), indent=1, allow_nan=False) + "\n")

    def show(self, console: Console) -> None:
        """Print everything for people."""
        for name in dict.fromkeys(row["table"] for row in self.rows):
            console.print(_table_of_rows(name, [row for row in self.rows if row["table"] == name]))
        console.print(_table_of_figures(self.figures))
        for name, figure in self.figures.items():
            console.print(f"{name}: {figure.how}", markup=False)
        machine, versions = self.machine, self.versions
        console.print(f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_bytes'] / 2**30:.0f} GiB, {machine['os']}")
        console.print(f"Python {machine['python']}, " + ", ".join(f"{package} {number}" for package, number in versions.items()))
        if machine["load"] > BUSY_LOAD_PER_CORE * machine["cores"]:
            console.print(f"the machine was busy with something else: load {machine['load']:.1f} at the start")
        for name, reason in self.failures.items():
            console.print(f"FAILED {name}: {reason}", markup=False)


def run(name: str, description: str | None, sections: Mapping[str, Section], argv: Sequence[str] | None = None) -> int:
    """Measure, print and write; the exit code: 0, 1 if a section failed, or 130 when interrupted, with what there is by then.

    Figures short of their goals don't fail.
    """
    options = _parse(name, description, sections, argv)
    signal.signal(signal.SIGTERM, _interrupt)
    report = Report(name, options.quick)
    chosen = options.only or list(sections)
    try:
        asyncio.run(_measure(report, {key: sections[key] for key in sections if key in chosen}))
        code = 1 if report.failures else 0
    except KeyboardInterrupt:
        report.say("interrupted")
        code = 130
    report.show(_console())
    if options.json is not None:
        report.write(options.json)
    if options.plots is not None:
        for path in draw_all(report.plots, options.plots, name):
            report.say(f"drawn: {path}")
    return code


def _console() -> Console:
    """Standard output: as wide as the terminal, and wide where there is none."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=PLAIN_WIDTH)


def _parse(name: str, description: str | None, sections: Iterable[str], argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=f"python -m bench.{name}", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="measure for a short time, with more noise")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the outcome to this file")
    parser.add_argument("--plots", type=Path, metavar="FOLDER", help="draw what there is to draw into this folder, as SVG files")
    parser.add_argument("--only", action="append", choices=list(sections), metavar="SECTION", help=", ".join(sections))
    return parser.parse_args(argv)


async def _measure(report: Report, sections: Mapping[str, Section]) -> None:
    for name, section in sections.items():
        with report.section(name):
            outcome = section(report)
            if inspect.isawaitable(outcome):
                await outcome


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


@contextmanager
def workspace() -> Iterator[Path]:
    """A folder that is removed afterwards."""
    with tempfile.TemporaryDirectory(prefix="swarm-bench-", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


def quantile(values: Iterable[float], fraction: float) -> float:
    """The value below which `fraction` of `values` lie, by linear interpolation."""
    ordered = sorted(values)
    if not ordered:
        raise ValueError("no values")
    place = fraction * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def describe_machine() -> dict[str, Any]:
    """What the figures were taken on. `load` is the number of processes that were running before."""
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": psutil.virtual_memory().total,
        "os": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "load": os.getloadavg()[0],
    }


def package_versions(packages: Iterable[str] = PACKAGES) -> dict[str, str]:
    """The installed ones of `packages`."""
    found = {}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _table_of_figures(figures: Mapping[str, Figure]) -> Table:
    table = Table(title="figures", title_justify="left", box=None, pad_edge=False)
    for column in ("figure", "value", "goal", ""):
        table.add_column(column, justify="right" if column == "value" else "left", no_wrap=True)
    verdicts = {True: "met", False: "SHORT", None: ""}
    for name, figure in figures.items():
        table.add_row(name, _cell(figure.value), figure.goal, verdicts[figure.met])
    return table


def _table_of_rows(name: str, rows: Sequence[Mapping[str, Any]]) -> Table:
    columns = [column for column in dict.fromkeys(column for row in rows for column in row) if column != "table"]
    table = Table(title=name, title_justify="left", box=None, pad_edge=False)
    for column in columns:
        numeric = all(isinstance(row.get(column), int | float | None) for row in rows)
        table.add_column(column, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        table.add_row(*(_cell(row.get(column)) for column in columns))
    return table


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:,.{SIGNIFICANT_DIGITS}g}" if abs(value) < 1000 else f"{value:,.0f}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return "" if value is None else str(value)


if __name__ == "__main__":
    sys.exit("this is the frame of the benchmarks, not one of them")
