"""How a peer gives way to whatever else runs on its machine."""

from __future__ import annotations

import subprocess
import sys

import pytest

from peer.gpu import AUTOGROUP

LOWER = "from peer.gpu import AUTOGROUP, lower_session_priority as lower; lower(7); lower(3); print(AUTOGROUP.read_text())"


def has_autogroups() -> bool:
    """Whether the kernel has them and tells; some sandboxes show an empty file."""
    try:
        return bool(AUTOGROUP.read_text().split())
    except OSError:
        return False


pytestmark = pytest.mark.skipif(not has_autogroups(), reason="a kernel without autogroups")


def niceness(*, own_session: bool) -> int:
    """Of a process's session after it wanted 7 and then 3."""
    done = subprocess.run(
        [sys.executable, "-c", LOWER], start_new_session=own_session, capture_output=True, text=True, check=True
    )
    return int(done.stdout.split()[-1])


def test_a_session_of_its_own_is_lowered_and_not_raised_again() -> None:
    """What a service manager started for us gives way as a whole."""
    assert niceness(own_session=True) == 7


def test_a_session_that_others_share_is_left_as_it_is() -> None:
    """The shell in whose terminal we run stays as quick as it was."""
    assert niceness(own_session=False) == int(AUTOGROUP.read_text().split()[-1])
