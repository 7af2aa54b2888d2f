"""Faults that scenarios ask for, at exact points of a round: `at round 3 after commit: kill`.

Only read from `SWARM_FAULTS`, which tests and benchmarks set; an ordinary daemon has no script and no cost.
"""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, get_args

import structlog
import torch

from swarm.errors import UsageError

VARIABLE = "SWARM_FAULTS"
Point = Literal["training", "commit", "proposal", "reduce", "merge", "apply"]
LINE = re.compile(r"^at round (?P<round>\d+) after (?P<point>[a-z]+): (?P<what>[a-z_]+)$")

log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class Fault:
    """One line of a script."""

    round_index: int
    point: str
    what: str


def parse_script(text: str) -> tuple[Fault, ...]:
    """Lines separated by semicolons. Raises `UsageError`."""
    faults = []
    for line in filter(None, (part.strip() for part in text.split(";"))):
        match = LINE.match(line)
        if match is None or match["point"] not in get_args(Point):
            raise UsageError(f"not a fault: {line!r}", "a fault looks like: at round 3 after commit: kill")
        faults.append(Fault(int(match["round"]), match["point"], match["what"]))
    return tuple(faults)


def kill() -> None:
    """End this process at once, as a power cut would."""
    os.kill(os.getpid(), signal.SIGKILL)


def stop() -> None:
    """Freeze this process, as a sleeping laptop would."""
    os.kill(os.getpid(), signal.SIGSTOP)


def break_device() -> None:
    """What torch says once a GPU has failed; nothing works on it any more in this process."""
    raise torch.AcceleratorError("CUDA error: unspecified launch failure")


@dataclass
class Faults:
    """Carries a script out. `actions` are what lines may name, beside `kill` and `stop`."""

    script: tuple[Fault, ...] = ()
    actions: dict[str, Callable[[], None]] = field(default_factory=dict)
    _done: set[Fault] = field(default_factory=set)

    @classmethod
    def from_environment(cls) -> Faults:
        """The script in `SWARM_FAULTS`, usually none."""
        return cls(parse_script(os.environ.get(VARIABLE, "")))

    def reached(self, point: Point, round_index: int) -> None:
        """A point of a round is reached: do what the script says."""
        for fault in self.script:
            if fault not in self._done and (fault.point, fault.round_index) == (point, round_index):
                self._done.add(fault)
                log.warning("fault", round=round_index, point=point, what=fault.what)
                {"kill": kill, "stop": stop, **self.actions}[fault.what]()
