"""The command line as a whole: help, versions, errors and exit codes."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from swarm import __version__, errors
from swarm.cli import main as module
from swarm.cli.main import COMMANDS, run

ROOT = Path(__file__).resolve().parents[3]
HEAVY = ("torch", "grpc", "sqlalchemy", "pydantic", "transformers", "hivemind", "rich")


def test_help_is_light() -> None:
    """`swarm --help` lists every command and imports nothing heavy."""
    code = f"import sys; from swarm.cli.main import run; run(['--help']); print([m for m in {HEAVY} if m in sys.modules])"
    started_s = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.endswith("[]\n")
    assert all(f"  {name} " in done.stdout for name in COMMANDS)
    assert time.monotonic() - started_s < 2


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    """`swarm --version` prints it."""
    assert run(["--version"]) == 0
    assert capsys.readouterr().out == f"swarm {__version__}\n"


@pytest.mark.parametrize(
    "arguments", [["nonsense"], ["credits", "--nonsense"], ["ledger", "nonsense"], ["run", "init", "a", "b"]]
)
def test_wrong_usage(arguments: list[str]) -> None:
    """Wrong arguments end with code 2."""
    assert run(arguments) == 2


def test_errors_become_two_lines(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """An error is one line, its hint another, and the process ends with its code and no traceback."""

    def fail(*_: object) -> object:
        raise errors.DiskFull("the disk is full", "free some space")

    monkeypatch.setattr(module, "_load", fail)
    assert run(["join"]) == errors.DiskFull.exit_code
    assert capsys.readouterr().err == "error: the disk is full\nhint: free some space\n"


def test_rejections_are_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A refusal by the coordinator is an error, not a traceback."""

    def fail(*_: object) -> object:
        raise errors.Rejected("stale", "900 s behind")

    monkeypatch.setattr(module, "_load", fail)
    assert run(["credits"]) == 1
    assert capsys.readouterr().err == "error: the coordinator says stale: 900 s behind\n"


def test_interrupt(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C ends with the shell's usual code."""

    def interrupt(*_: object) -> object:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "_load", interrupt)
    assert run(["credits"]) == module.INTERRUPTED


def test_missing_parts_are_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A command whose packages aren't installed says what to install."""
    monkeypatch.setitem(COMMANDS, "join", module.Command("swarm.cli.no_such_module:command", "x"))
    assert run(["join"]) == 2
    assert "pip install" in capsys.readouterr().err
