"""What `swarm join` hands to its children where it trains on several devices, and signals between two programs of one peer."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from swarm.cli.join import _child_command
from swarm.config import PeerSettings, load
from swarm.units import parse_rate, parse_size

SCRIPT = """
import asyncio, os, signal, sys
from swarm.cli import join

async def work():
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, print, "in the loop")
    return {held}

asyncio.run(join._to_the_end(work()))
os.kill(os.getpid(), signal.SIGTERM)
print("alive", join._early)
"""


def after(command: list[str], option: str) -> str:
    return command[command.index(option) + 1]


@pytest.mark.parametrize(("upload", "download", "quota"), [("10Mbit/s", "50Mbit/s", "200GB"), ("0", "1Gbit/s", "0")])
def test_devices_share_the_caps(tmp_path: Path, upload: str, download: str, quota: str) -> None:
    """A volunteer's caps are for the machine: each device gets an equal share, and no limit stays no limit."""
    flags = {"data_dir": tmp_path, "max_upload": upload, "max_download": download, "monthly_quota": quota}
    flags |= {"keep_history": "90GB"}
    settings = load(PeerSettings, flags)
    command = _child_command("cuda:1", "swarm://link", settings, 2)
    assert parse_rate(after(command, "--max-upload")) == settings.max_upload // 2
    assert parse_rate(after(command, "--max-download")) == settings.max_download // 2
    assert parse_size(after(command, "--monthly-quota")) == settings.monthly_quota // 2
    assert parse_size(after(command, "--keep-history")) == 45 * 10**9


@pytest.mark.parametrize(("held", "kept"), [("'a pause'", "[15]"), ("None", "[]")])
def test_a_signal_after_the_loop_kills_nobody(held: str, kept: str) -> None:
    """It waits for the next program where there is one, and changes nothing at the end."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT.replace("{held}", held)], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout.strip()) == (0, f"alive {kept}"), done.stderr
