"""The systemd units are valid, hardened, and let a round finish."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from swarm import errors

FOLDER = Path(__file__).resolve().parents[2] / "deploy" / "systemd"
SYSTEM_UNITS = sorted(FOLDER.glob("*.service"))
UNITS = [*SYSTEM_UNITS, FOLDER / "user" / "swarm-peer.service"]
MAX_EXPOSURE = 20  # tenths of systemd's scale: 0 is safest, 100 unconfined
needs_systemd = pytest.mark.skipif(
    shutil.which("systemd-analyze") is None, reason="systemd-analyze is missing: apt-get install systemd"
)


def named(path: Path) -> str:
    """user/swarm-peer.service and the like."""
    return str(path.relative_to(FOLDER))


def runnable(path: Path, folder: Path) -> Path:
    """A copy of the unit whose program exists on this machine."""
    copy = folder / path.name
    copy.write_text(re.sub(r"^ExecStart=\S+", "ExecStart=/bin/true", path.read_text(), flags=re.MULTILINE))
    return copy


def analyze(*arguments: str | Path, runtime: Path) -> subprocess.CompletedProcess[str]:
    """Run systemd-analyze with a runtime folder of its own."""
    environment = os.environ | {"XDG_RUNTIME_DIR": str(runtime)}
    return subprocess.run(["systemd-analyze", *arguments], capture_output=True, text=True, env=environment, check=False)


@needs_systemd
@pytest.mark.parametrize("path", UNITS, ids=named)
def test_systemd_accepts(path: Path, tmp_path: Path) -> None:
    """systemd reads the unit without a complaint."""
    scope = ["--user"] if path.parent.name == "user" else []
    done = analyze(*scope, "verify", runnable(path, tmp_path), runtime=tmp_path)
    assert done.returncode == 0, done.stderr
    assert path.name not in done.stderr


@needs_systemd
@pytest.mark.parametrize("path", SYSTEM_UNITS, ids=named)
def test_units_are_confined(path: Path, tmp_path: Path) -> None:
    """systemd's own estimate of a unit's exposure stays low."""
    arguments = ("security", "--offline=true", f"--threshold={MAX_EXPOSURE}", "--no-pager")
    done = analyze(*arguments, runnable(path, tmp_path), runtime=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("path", UNITS, ids=named)
def test_stopping_finishes_the_round(path: Path) -> None:
    """SIGTERM means finish; a peer's network process outlives the signal."""
    text = path.read_text()
    assert "KillSignal=SIGTERM" in text
    if path.name == "swarm-peer.service":
        assert "KillMode=mixed" in text


@pytest.mark.parametrize("path", UNITS, ids=named)
def test_errors_that_stay_are_not_tried_again(path: Path) -> None:
    """Exit codes at which systemd gives up are documented ones."""
    match = re.search(r"^RestartPreventExitStatus=(.*)$", path.read_text(), re.MULTILINE)
    assert match is not None
    classes = [value for value in vars(errors).values() if isinstance(value, type)]
    known = {cls.exit_code for cls in classes if issubclass(cls, errors.SwarmError)}
    assert {int(code) for code in match[1].split()} <= known


def test_peer_unit_reaches_gpus_and_no_other_devices() -> None:
    """GPU nodes are allowed by name, everything else is closed."""
    text = (FOLDER / "swarm-peer.service").read_text()
    assert "DevicePolicy=closed" in text
    assert "DeviceAllow=char-nvidia-uvm rw" in text
    assert "PrivateDevices" not in text
