"""Who keeps a peer from training, and until when."""

from __future__ import annotations

from pathlib import Path

import pytest

from peer.governor import slept_for
from peer.held import Held, Waiting, check_snooze
from peer.holds import Hold, Holds
from swarm.cli.status import parse_duration
from swarm.config import GovernorSettings
from swarm.errors import UsageError


def test_it_goes_on_when_nobody_holds_it() -> None:
    """The user's word comes first, and taking one hold away leaves the others."""
    holds = Holds().put("governor", Hold("too_hot")).put("user", Hold("paused"))
    assert holds.first == Hold("paused")
    assert holds.put("user", None).first == Hold("too_hot")
    assert holds.put("user", None).put("governor", None).first is None


def test_the_users_word_ends_what_may_be_over() -> None:
    """A device, a suspension, an operator's pause: `swarm resume` looks again. Rules and the quota stand."""
    holds = Holds(governor=Hold("too_hot"), quota=Hold("quota_used"))
    full = (
        holds.put("operator", Hold("run_paused"))
        .put("device", Hold("gpu_failed"))
        .put("rejections", Hold("contributions_rejected"))
    )
    assert full.put("suspension", Hold("suspended")).resumed() == holds


def test_a_snooze_ends_by_itself() -> None:
    """At its end it is gone, and nothing else is."""
    holds = Holds(user=Hold("snoozed", until_s=100.0), governor=Hold("too_hot"))
    assert holds.next_end_s == 100.0
    assert holds.at(99.9) == holds
    assert holds.at(100.0).first == Hold("too_hot")


def test_a_paused_peer_says_why_from_the_first_moment(tmp_path: Path) -> None:
    """Its socket is open all the time, so that it may be asked before the rules were read."""
    held = Held(Holds(user=Hold("paused")), {}, None, -1)
    status = Waiting(held, tmp_path, "", GovernorSettings()).describe()
    assert (status["state"], status["hint"], status["waits_for"]) == ("paused", "swarm resume", "")


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("30m", 1800), ("2h", 7200), ("1d", 86400), ("1h30m", 5400)])
def test_durations(text: str, seconds: float) -> None:
    """Seconds, minutes, hours and days, also together."""
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "2", "h", "2 weeks", "2h!", "-2h"])
def test_durations_that_cannot_be_read(text: str) -> None:
    """A mistake is told."""
    with pytest.raises(UsageError):
        parse_duration(text)


@pytest.mark.parametrize("seconds", [0.0, -1.0, float("nan"), 1e12])
def test_snoozes_that_make_no_sense(seconds: float) -> None:
    """Nobody sleeps for no time, or for ever."""
    with pytest.raises(UsageError):
        check_snooze(seconds)


@pytest.mark.parametrize(
    ("before", "now", "expected"),
    [
        ((100.0, 1000.0), (102.0, 1002.0), 0.0),
        ((100.0, 1000.0), (702.0, 1602.0), 600.0),  # the process was frozen
        ((100.0, 1000.0), (102.0, 8202.0), 7200.0),  # the machine was suspended, or the clock set forward
        ((100.0, 1000.0), (102.0, 400.0), 0.0),  # the clock was set back
    ],
)
def test_sleep_is_noticed(before: tuple[float, float], now: tuple[float, float], expected: float) -> None:
    """A frozen process, a suspended machine and a clock that jumps forward look alike; a step back is nothing."""
    assert slept_for(before, now, 2.0) == pytest.approx(expected)
