"""The error catalogue."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from grpc import StatusCode

from coordinator.errors import CATALOGUE, StoreFailed, answer_to
from swarm.errors import DatabaseCorrupt, ManifestInvalid, Rejected

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("error", "status", "reason"),
    [
        (Rejected("bad_signature"), StatusCode.UNAUTHENTICATED, "bad_signature"),
        (Rejected("something_new"), StatusCode.INVALID_ARGUMENT, "something_new"),
        (StoreFailed("disk on fire"), StatusCode.UNAVAILABLE, "store_failed"),
        (TimeoutError(), StatusCode.DEADLINE_EXCEEDED, "timeout"),
        (ManifestInvalid(["x"]), StatusCode.INVALID_ARGUMENT, "malformed"),
        (DatabaseCorrupt("/secret/path"), StatusCode.INTERNAL, "internal"),
        (KeyError("/secret/path"), StatusCode.INTERNAL, "internal"),
    ],
)
def test_statuses(error: Exception, status: StatusCode, reason: str) -> None:
    """Each kind of error has its status and reason."""
    answer = answer_to(error)
    assert (answer.status, answer.reason) == (status, reason)


def test_private_details_stay_private() -> None:
    """What isn't meant for callers is not told, and marked for the log."""
    for error in (StoreFailed("disk on fire"), KeyError("/secret/path")):
        answer = answer_to(error)
        assert answer.private
        assert "fire" not in answer.message
        assert "secret" not in answer.message


def test_every_reason_is_in_the_catalogue() -> None:
    """Every reason with which the coordinator and the credit rules reject has a public message."""
    sources = [*(ROOT / "coordinator").rglob("*.py"), ROOT / "swarm/entries.py", ROOT / "swarm/messages.py"]
    used = {reason for path in sources for reason in re.findall(r'Rejected\("(\w+)"', path.read_text())}
    assert used - CATALOGUE.keys() == set()
