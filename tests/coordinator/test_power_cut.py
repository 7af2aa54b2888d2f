"""No receipt without its entry, at whatever moment the writer is killed; `bench.coordinator` does it thousands of times."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

LIMIT_S = 1400


def cut(**arguments: object) -> dict[str, int]:
    """Cut the power in a process that forks its victims, so that nothing of this one is copied."""
    command = [sys.executable, "-m", "bench.power_cut", json.dumps(arguments)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=LIMIT_S)
    found: dict[str, int] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("cuts", [24, pytest.param(1000, marks=[pytest.mark.slow, pytest.mark.timeout(1500)])])
def test_no_receipt_without_its_entry(cuts: int) -> None:
    """Killed again and again, the writer never gave a receipt for what the database doesn't have, and the ledger stays whole."""
    found = cut(cuts=cuts, seed=cuts)
    assert found["cuts"] == cuts
    assert found["receipts"] > cuts
    assert (found["lost"], found["broken"]) == (0, 0)


def test_the_check_finds_a_careless_writer() -> None:
    """A writer that answers before its commit is durable is found out."""
    assert cut(cuts=6, seed=1, careless=True)["lost"] > 0
