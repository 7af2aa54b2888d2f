"""How much traffic a volunteer's peer has used per day and month (UTC), kept on disk, and what its quota leaves."""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import structlog

from peer.folders import write_atomically
from peer.network.traffic import Volume
from swarm.clock import Clock, SystemClock

FILE_NAME = "traffic.json"
KEEP_DAYS, KEEP_MONTHS = 62, 24
SAVE_EVERY_S = 15.0

log = structlog.get_logger(__name__)


def day_of(wall_s: float) -> str:
    """The calendar day in UTC, `2026-11-24`."""
    return datetime.datetime.fromtimestamp(wall_s, datetime.UTC).date().isoformat()


def month_of(wall_s: float) -> str:
    """The calendar month in UTC, `2026-11`."""
    return day_of(wall_s)[:7]


@dataclass
class Usage:
    """Volumes by day and month. `quota_bytes` is for both directions together in a month; 0 = no limit."""

    path: Path
    quota_bytes: int = 0
    clock: Clock = SystemClock()
    days: dict[str, Volume] = field(default_factory=dict)
    months: dict[str, Volume] = field(default_factory=dict)
    _saved_s: float = float("-inf")
    _changed: bool = False

    @classmethod
    def load(cls, path: Path, quota_bytes: int = 0, clock: Clock | None = None) -> Usage:
        """What earlier starts have used. A damaged file is set aside, never an error."""
        usage = cls(path, quota_bytes, clock or SystemClock())
        try:
            content = json.loads(path.read_bytes())
            usage.days, usage.months = _volumes(content["days"]), _volumes(content["months"])
        except FileNotFoundError:
            pass
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            log.warning("traffic_record_damaged", path=str(path), error=str(error))
        return usage

    @property
    def today(self) -> Volume:
        """Used on this day."""
        return self.days.get(day_of(self.clock.wall_s()), Volume())

    @property
    def this_month(self) -> Volume:
        """Used in this month."""
        return self.months.get(month_of(self.clock.wall_s()), Volume())

    @property
    def next_month_s(self) -> float:
        """When the next month begins, UTC, on the wall clock."""
        year, month = (int(part) for part in month_of(self.clock.wall_s()).split("-"))
        return datetime.datetime(year + month // 12, month % 12 + 1, 1, tzinfo=datetime.UTC).timestamp()

    @property
    def left_bytes(self) -> int | None:
        """What the quota leaves for the rest of the month; None without a quota."""
        return max(0, self.quota_bytes - self.this_month.total_bytes) if self.quota_bytes else None

    def allows(self, needed_bytes: int = 0) -> bool:
        """Whether that much may still be moved in this month, or anything at all."""
        left = self.left_bytes
        return left is None or (left > 0 and left >= needed_bytes)

    def add(self, volume: Volume) -> None:
        """Count what was moved just now; on disk within a quarter of a minute."""
        if volume.total_bytes:
            now_s = self.clock.wall_s()
            day, month = day_of(now_s), month_of(now_s)
            self.days[day] = self.days.get(day, Volume()) + volume
            self.months[month] = self.months.get(month, Volume()) + volume
            self.days = _latest(self.days, KEEP_DAYS)
            self.months = _latest(self.months, KEEP_MONTHS)
            self._changed = True
        if self._changed and self.clock.monotonic_s() - self._saved_s >= SAVE_EVERY_S:
            self.save()

    def save(self) -> None:
        """Write the record; where the disk is full it stays in memory until there is room."""
        self._saved_s = self.clock.monotonic_s()
        content = {
            "days": {name: asdict(volume) for name, volume in self.days.items()},
            "months": {name: asdict(volume) for name, volume in self.months.items()},
        }
        try:
            write_atomically(self.path, json.dumps(content, sort_keys=True).encode())
        except OSError as error:
            log.warning("traffic_not_recorded", error=error.strerror)
            return
        self._changed = False


def _volumes(content: Mapping[str, Any]) -> dict[str, Volume]:
    return {
        str(name): Volume(max(0, int(item["sent_bytes"])), max(0, int(item["received_bytes"]))) for name, item in content.items()
    }


def _latest(volumes: dict[str, Volume], count: int) -> dict[str, Volume]:
    return {name: volumes[name] for name in sorted(volumes)[-count:]}
