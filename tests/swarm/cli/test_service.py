"""The systemd unit that `swarm service` writes."""

from __future__ import annotations

import os
import re
import shutil
import stat
import subprocess
from pathlib import Path

import pytest

from swarm.cli.service import unit
from swarm.messages import JoinLink
from tests.runs import run_command

needs_systemd = pytest.mark.skipif(
    shutil.which("systemd-analyze") is None, reason="systemd-analyze is missing: apt-get install systemd"
)
LINK = str(JoinLink("127.0.0.1", 4300, bytes(32), bytes(32)))
MAX_EXPOSURE = 30


def analyze(*arguments: str | Path, runtime: Path) -> subprocess.CompletedProcess[str]:
    """Run systemd-analyze with a runtime folder of its own."""
    environment = os.environ | {"XDG_RUNTIME_DIR": str(runtime)}
    return subprocess.run(["systemd-analyze", *arguments], capture_output=True, text=True, env=environment, check=False)


@needs_systemd
@pytest.mark.parametrize("user", [True, False])
@pytest.mark.parametrize("gpu", ["auto", "0,1", "cpu"])
def test_systemd_accepts(user: bool, gpu: str, tmp_path: Path) -> None:
    """systemd reads the unit without a complaint."""
    path = tmp_path / "swarm-peer.service"
    path.write_text(unit(Path("/bin/true"), gpu, user=user))
    done = analyze(*(["--user"] if user else []), "verify", path, runtime=tmp_path)
    assert done.returncode == 0, done.stderr
    assert path.name not in done.stderr


@needs_systemd
def test_the_machine_wide_unit_is_confined(tmp_path: Path) -> None:
    """systemd's own estimate of its exposure stays low."""
    path = tmp_path / "swarm-peer.service"
    path.write_text(unit(Path("/bin/true"), "auto", user=False))
    done = analyze("security", "--offline=true", f"--threshold={MAX_EXPOSURE}", "--no-pager", path, runtime=tmp_path)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr


def test_readiness_watchdog_and_a_round_to_finish() -> None:
    """It says when it is ready, is watched, and gets time to finish at SIGTERM."""
    text = unit(Path("/opt/a b/swarm"), "auto", user=True)
    for line in ("Type=notify", "WatchdogSec=5min", "KillSignal=SIGTERM", "KillMode=mixed", "TimeoutStopSec=15min"):
        assert line in text.splitlines()
    assert re.search(r'^ExecStart="/opt/a b/swarm" join --gpu auto$', text, re.MULTILINE)


async def test_installed_and_removed_for_one_account(tmp_path: Path) -> None:
    """The unit and the link's file appear where systemd looks, the link readable by its owner only, and go again."""
    environment = {"XDG_CONFIG_HOME": str(tmp_path), "HOME": str(tmp_path)}
    done = await run_command("service", "install", "--user", "--no-start", "--gpu", "cpu", LINK, environment=environment)
    assert (done.code, done.err) == (0, "")
    installed, settings = tmp_path / "systemd" / "user" / "swarm-peer.service", tmp_path / "swarm" / "peer.env"
    assert "join --cpu" in installed.read_text()
    assert settings.read_text() == f"SWARM_LINK='{LINK}'\n"
    assert stat.S_IMODE(settings.stat().st_mode) == 0o600
    done = await run_command("service", "uninstall", "--user", environment=environment)
    assert done.code == 0, done.err
    assert not installed.exists()
    assert not settings.exists()
    assert (await run_command("service", "uninstall", "--user", environment=environment)).code == 2


async def test_only_for_oneself(tmp_path: Path) -> None:
    """Without --user nothing is touched."""
    assert (await run_command("service", "install", LINK, environment={"HOME": str(tmp_path)})).code == 2
    assert not (tmp_path / ".config").exists()
