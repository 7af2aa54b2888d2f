"""The first five minutes, by the commands that the documents print: an operator makes a run, a volunteer joins and looks around.

The first two lines of "Joining" have made the virtual environment that this runs in; everything else is typed as it is printed,
in a home folder with nothing in it. Only addresses, the link and the device are put in.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from tests.runs import REPOSITORY, clean_environment
from tests.terminal import CTRL_C, Terminal, terminal
from tests.waiting import eventually

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

LINK = re.compile(r"swarm://[^\s'\x1b]+#[a-z2-7]+")
PRINTED_LINK = re.compile(r"'swarm://[^']*'")
PUT_IN = {
    "--listen 0.0.0.0:4300": "--listen 127.0.0.1:0",
    "--metrics 127.0.0.1:9400": "--metrics 127.0.0.1:0",
    "--gpu 0": "--cpu",
}


def blocks(document: str, heading: str) -> list[list[str]]:
    """The commands of each shell block below a heading, without what is said beside them."""
    section = re.split(r"^## ", (REPOSITORY / document).read_text(), flags=re.MULTILINE)
    text = next(part for part in section if part.startswith(heading))
    found = re.findall(r"^```sh\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    return [[line.split("  #")[0].strip() for line in block.splitlines()] for block in found]


def verbs(document: str) -> list[str]:
    """The commands of its table."""
    rows = re.findall(r"^\| (`swarm .*?) \|", (REPOSITORY / document).read_text(), flags=re.MULTILINE)
    return [command for row in rows for command in re.findall(r"`(swarm [^`]*)`", row)]


class Machine:
    """Somebody's machine: a home folder, and this installation in its `.venv`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "home").mkdir(parents=True)
        (folder / ".venv").symlink_to(sys.prefix)
        kept = clean_environment({"HOME": str(folder / "home"), "PATH": f"{folder}/.venv/bin:{os.environ['PATH']}"})
        kept |= {"SWARM_THREADS": "1", "SWARM_GOVERNOR_NICE": "0", "SWARM_LISTEN": "127.0.0.1:0", "COLUMNS": "100"}
        self.environment = {name: value for name, value in kept.items() if not name.startswith("XDG_")}
        self.link = ""

    def as_typed(self, command: str) -> list[str]:
        """The shell with a printed command, the link put in."""
        command = PRINTED_LINK.sub(f"'{self.link}'", command)
        for printed, ours in PUT_IN.items():
            command = command.replace(printed, ours)
        return ["bash", "-c", f"exec {command}"]

    def run(self, command: str) -> str:
        """What a command says; it has to succeed."""
        done = subprocess.run(
            self.as_typed(command),
            cwd=self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, f"{command}: {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
        return done.stdout

    def state(self) -> str:
        """What its peer is doing."""
        return str(json.loads(self.run("swarm status --json"))["state"])

    def terminal(self, command: str) -> AbstractContextManager[Terminal]:
        """The command in a terminal."""
        return terminal(self.as_typed(command), self.environment, self.folder)


async def test_from_nothing_to_credits(tmp_path: Path) -> None:
    """An operator's four commands and two peers, a volunteer's one, every verb that is printed, and a clean end."""
    make, serve, first_peer = _operators_commands()
    operator, helper, volunteer = (Machine(tmp_path / name) for name in ("operator", "helper", "volunteer"))
    for command in make:
        operator.run(command)
    with operator.terminal(serve) as coordinator:
        await coordinator.until("peers join with")
        link = await eventually(lambda: LINK.search(coordinator.screen.decode()), "the link")
        for machine in (operator, helper, volunteer):
            machine.link = str(link[0])
        data = f"--files {operator.folder / 'data'}"
        doctor = volunteer.run("swarm doctor 'swarm://...' --cpu")
        assert "you can join" in doctor.lower()
        with (
            operator.terminal(first_peer) as one,
            helper.terminal(first_peer.replace("--files data", data)) as two,
            volunteer.terminal(_volunteers_command()) as three,
        ):
            for peer in (one, two, three):
                await peer.until("swarm identity backup")
            await three.until("round_committed", 120)
            await _try_verbs(volunteer, three)
            assert await three.end() == 0
            for peer in (one, two):
                peer.type(CTRL_C)
                assert await peer.end() == 0
        coordinator.type(CTRL_C)
        assert await coordinator.end() == 0


def test_from_own_texts_to_a_manifest(tmp_path: Path) -> None:
    """The commands for somebody's own texts lead to a manifest without a fault."""
    author = Machine(tmp_path / "author")
    (author.folder / "texts").mkdir()
    for path in sorted(Path(json.__file__).parent.parent.glob("[a-d]*.py")):
        (author.folder / "texts" / path.name).write_bytes(path.read_bytes())
    for command in blocks("docs/operations.md", "Make a run")[1]:
        author.run(command)
    assert "is valid" in author.run("swarm run validate run.yaml")


def _operators_commands() -> tuple[list[str], str, str]:
    """What makes a run, what serves it, and what starts the operator's own first peer."""
    (*make, serve), _, (first_peer,), *_ = blocks("docs/operations.md", "Make a run")
    assert serve.startswith("swarm coordinator ")
    assert first_peer.startswith("swarm join ")
    return make, serve, first_peer


def _volunteers_command() -> str:
    """The third line of "Joining, in three lines"."""
    clone, make_venv, join = blocks("README.md", "Joining")[0]
    assert (clone, make_venv) == ("git clone REPOSITORY swarm && cd swarm", "make venv")
    assert blocks("docs/volunteers.md", "Start")[0] == [make_venv, join]
    return join


async def _try_verbs(volunteer: Machine, peer: Terminal) -> None:
    """Everything in the table of docs/volunteers.md, in its order, but `swarm stop`, which `swarm finish` makes pointless."""
    printed = verbs("docs/volunteers.md")
    assert {"swarm status", "swarm top", "swarm pause", "swarm resume", "swarm snooze 2h", "swarm finish"} <= set(printed)
    for command in printed:
        if command in ("swarm stop", "swarm finish"):
            continue
        if command == "swarm top":
            with volunteer.terminal(command) as top:
                await top.until("round")
                top.type(b"q")
                assert await top.end() == 0
            continue
        volunteer.run(command)
        if command.startswith(("swarm pause", "swarm snooze")):
            await eventually(lambda: volunteer.state() in ("paused", "snoozed"), "the pause")
        if command.startswith(("swarm resume", "swarm snooze")):
            volunteer.run("swarm resume")
            await eventually(lambda: volunteer.state() in ("training", "exchanging", "following"), "training again")
    volunteer.run("swarm finish")
