"""Traffic by day and month, and the quota, under a clock that the test moves."""

from __future__ import annotations

import datetime
import json
from pathlib import Path

import pytest

from peer.network.traffic import Volume
from peer.usage import KEEP_DAYS, SAVE_EVERY_S, Usage
from swarm.clock import ManualClock

DAY_S = 86_400.0


def at(text: str) -> ManualClock:
    """A clock at a time in UTC."""
    return ManualClock(datetime.datetime.fromisoformat(f"{text}+00:00").timestamp())


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "traffic.json"


def test_days_and_months_are_those_of_utc(path: Path) -> None:
    """A second before and after midnight are different days, and here different months."""
    clock = at("2026-11-30T23:59:59")
    usage = Usage.load(path, clock=clock)
    usage.add(Volume(10, 1))
    clock.advance(2)
    usage.add(Volume(20, 2))
    usage.add(Volume(30, 3))
    assert usage.days == {"2026-11-30": Volume(10, 1), "2026-12-01": Volume(50, 5)}
    assert usage.months == {"2026-11": Volume(10, 1), "2026-12": Volume(50, 5)}
    assert (usage.today, usage.this_month) == (Volume(50, 5), Volume(50, 5))


def test_the_quota_holds_until_the_month_is_over(path: Path) -> None:
    """Both directions count; what is left never falls below nothing; the next month starts anew."""
    clock = at("2026-11-24T12:00:00")
    usage = Usage.load(path, 100, clock)
    assert usage.left_bytes == 100
    usage.add(Volume(30, 30))
    assert usage.left_bytes == 40
    assert usage.allows()
    assert usage.allows(40)
    assert not usage.allows(41)
    usage.add(Volume(50, 0))
    assert usage.left_bytes == 0
    assert not usage.allows()
    clock.advance(7 * DAY_S)
    assert usage.left_bytes == 100
    assert usage.allows()


def test_without_a_quota_everything_is_allowed(path: Path) -> None:
    """The traffic is counted all the same."""
    usage = Usage.load(path, clock=at("2026-11-24T12:00:00"))
    usage.add(Volume(1 << 50, 1 << 50))
    assert usage.left_bytes is None
    assert usage.allows(1 << 60)


def test_a_restart_forgets_nothing(path: Path) -> None:
    """What was saved counts on, under the quota of the new start."""
    clock = at("2026-11-24T12:00:00")
    before = Usage.load(path, 100, clock)
    before.add(Volume(60, 20))
    before.save()
    after = Usage.load(path, 200, clock)
    assert after.this_month == Volume(60, 20)
    assert after.left_bytes == 120


def test_saving_is_bounded_in_time(path: Path) -> None:
    """Many small transfers don't write the disk each time, and a power cut costs a quarter of a minute at most."""
    clock = at("2026-11-24T12:00:00")
    usage = Usage.load(path, clock=clock)
    for _ in range(100):
        usage.add(Volume(1, 1))
    assert json.loads(path.read_text())["months"]["2026-11"] == {"sent_bytes": 1, "received_bytes": 1}
    clock.advance(SAVE_EVERY_S)
    usage.add(Volume())
    assert json.loads(path.read_text())["months"]["2026-11"] == {"sent_bytes": 100, "received_bytes": 100}


@pytest.mark.parametrize("content", ["", "not json", "[]", "{}", '{"days": {}, "months": {"2026-11": 3}}', "\x00" * 50])
def test_a_damaged_record_is_no_error(path: Path, content: str) -> None:
    """The peer starts and counts anew."""
    path.write_text(content)
    usage = Usage.load(path, 100, at("2026-11-24T12:00:00"))
    usage.add(Volume(1, 2))
    usage.save()
    assert Usage.load(path, 100, at("2026-11-24T12:00:00")).left_bytes == 97


def test_a_full_disk_costs_nothing_else(tmp_path: Path) -> None:
    """Where nothing can be written, counting goes on in memory."""
    usage = Usage.load(tmp_path / "missing" / "traffic.json", 100, at("2026-11-24T12:00:00"))
    usage.add(Volume(40, 0))
    assert usage.left_bytes == 60


def test_old_days_are_forgotten(path: Path) -> None:
    """The record stays small."""
    clock = at("2026-01-01T00:00:00")
    usage = Usage.load(path, clock=clock)
    for _ in range(200):
        usage.add(Volume(1, 0))
        clock.advance(DAY_S)
    assert len(usage.days) == KEEP_DAYS
    assert len(usage.months) == 7


@pytest.mark.parametrize(
    ("now", "expected"), [("2026-11-24", "2026-12-01"), ("2026-12-31", "2027-01-01"), ("2028-02-01", "2028-03-01")]
)
def test_the_next_month_begins_at_its_first_midnight(path: Path, now: str, expected: str) -> None:
    """A used-up quota lasts until the first day of the next month, UTC, also over the turn of the year."""
    assert Usage.load(path, 1, at(f"{now}T12:00:00")).next_month_s == at(f"{expected}T00:00:00").wall_s()
