"""A signal that comes between two programs of one peer."""

from __future__ import annotations

import subprocess
import sys

import pytest

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


@pytest.mark.parametrize(("held", "kept"), [("'a pause'", "[15]"), ("None", "[]")])
def test_a_signal_after_the_loop_kills_nobody(held: str, kept: str) -> None:
    """It waits for the next program where there is one, and changes nothing at the end."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT.replace("{held}", held)], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout.strip()) == (0, f"alive {kept}"), done.stderr
