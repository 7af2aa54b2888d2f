"""When a guest may train: what is measured, and what the rules allow, as a pure state machine over time.

A limit that is passed stops training at once; training begins again when nothing stands against it for a whole dwell. Between
the two lies a margin, so that a value that trembles about its limit switches nothing. Heat, power and noise first cost a share
of time, and stop training only where less work doesn't help.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from datetime import datetime
from typing import NamedTuple

from swarm.config import GovernorSettings, Limits
from swarm.errors import UsageError

DAYS = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
DAY_MINUTES = 24 * 60
TEMPERATURE_MARGIN_C = 5.0
POWER_MARGIN = 0.05
FAN_MARGIN = 0.05
ADJUST_S = 10.0
LESS, MORE = 0.75, 0.05
LEAST_SHARE = 0.1


@dataclass(frozen=True)
class Values:
    """One measurement; None is what this machine can't measure. `others` are programs that use the GPU beside us."""

    temperature_c: float | None = None
    power_w: float | None = None
    fan_ratio: float | None = None
    others: tuple[str, ...] | None = None
    user_idle_s: float | None = None
    on_battery: bool | None = None
    on_metered: bool | None = None
    gpu_present: bool = True


@dataclass(frozen=True)
class Decision:
    """Whether to train: `reason` is a code when not, `share` the part of the time that training may take."""

    reason: str = ""
    detail: str = ""
    share: float = 1.0
    in_use: bool = False


@dataclass(frozen=True)
class GovernorState:
    """What the governor remembers. Times are seconds of a clock that never goes back."""

    reason: str = ""
    clear_since_s: float | None = None
    share: float = 1.0
    adjusted_s: float = float("-inf")
    strained_since_s: float | None = None


class Objection(NamedTuple):
    """Something that stands against training."""

    reason: str
    detail: str


@dataclass(frozen=True)
class Window:
    """Hours of some weekdays (0 = Monday), in minutes; one that ends before it begins lasts into the next day."""

    days: frozenset[int]
    start: int
    end: int

    def covers(self, local: datetime) -> bool:
        """Whether a moment lies in it."""
        minute, day = local.hour * 60 + local.minute, local.weekday()
        if self.start < self.end:
            return day in self.days and self.start <= minute < self.end
        return (day in self.days and minute >= self.start) or ((day - 1) % 7 in self.days and minute < self.end)


def parse_hours(text: str) -> Window:
    """`mon-fri 18:00-08:00`, `sat,sun 00:00-24:00` or, for every day, `22:00-06:00`. Raises `UsageError`."""
    match = re.fullmatch(r"(?:([a-z,\- ]+?)\s+)?(\d{1,2}):(\d{2})\s*-\s*(\d{1,2}):(\d{2})", text.strip().lower())
    try:
        if match is None:
            raise ValueError(text)
        start, end = (int(match[place]) * 60 + int(match[place + 1]) for place in (2, 4))
        if not (0 <= start < DAY_MINUTES and 0 < end <= DAY_MINUTES and start != end):
            raise ValueError(text)
        return Window(frozenset(_days(match[1])), start, end)
    except ValueError as error:
        raise UsageError(f"hours {text!r} can't be read", "write for example: mon-fri 18:00-08:00") from error


def _days(text: str | None) -> Iterator[int]:
    if not text:
        yield from range(7)
        return
    for item in text.split(","):
        first, _, last = (part.strip() for part in item.partition("-"))
        begin = DAYS.index(first[:3])
        end = DAYS.index(last[:3]) if last else begin
        yield from ((begin + step) % 7 for step in range((end - begin) % 7 + 1))


def step(
    state: GovernorState, values: Values, rules: GovernorSettings, now_s: float, local: datetime
) -> tuple[GovernorState, Decision]:
    """The next state and what to do, from what is measured at `now_s`; `local` is the wall clock here."""
    in_use = is_in_use(values, rules)
    limits = rules.in_use if in_use else rules.idle
    strain = _strain(values, limits)
    state = _throttled(state, values, limits, strain, now_s)
    objections = list(_objections(state, values, rules, limits, in_use, local))
    if strain is not None and _is_exhausted(state, rules, now_s):
        objections.append(strain)
    if objections:
        first = objections[0]
        return replace(state, reason=first.reason, clear_since_s=None), Decision(first.reason, first.detail, 0.0, in_use)
    if state.reason:
        since_s = now_s if state.clear_since_s is None else state.clear_since_s
        if now_s - since_s < rules.dwell_s:
            left = rules.dwell_s - (now_s - since_s)
            detail = f"that is over; training goes on in {left:.0f} s if it stays so"
            return replace(state, clear_since_s=since_s), Decision(state.reason, detail, 0.0, in_use)
        state = replace(state, reason="", clear_since_s=None, strained_since_s=None)
    return state, Decision("", "", state.share, in_use)


def is_in_use(values: Values, rules: GovernorSettings) -> bool:
    """Whether somebody uses the machine; where that can't be seen, the rules for an idle one hold."""
    return values.user_idle_s is not None and values.user_idle_s < rules.idle_after_s


def _objections(
    state: GovernorState, values: Values, rules: GovernorSettings, limits: Limits, in_use: bool, local: datetime
) -> Iterator[Objection]:
    if not values.gpu_present:
        yield Objection("gpu_lost", "the driver doesn't answer")
    if rules.hours and not any(parse_hours(text).covers(local) for text in rules.hours):
        yield Objection("off_hours", f"{local:%a %H:%M}; it may train {', '.join(rules.hours)}")
    if values.on_battery and not rules.on_battery:
        yield Objection("on_battery", "")
    if values.on_metered and not rules.on_metered:
        yield Objection("metered_link", "")
    if not limits.run:
        yield Objection("user_active", f"idle for {values.user_idle_s or 0:.0f} s") if in_use else Objection("off_hours", "")
    if values.others and not limits.other_programs:
        yield Objection("gpu_busy", ", ".join(values.others[:3]))
    if values.temperature_c is not None and limits.temperature_c:
        bound = limits.temperature_c + (-TEMPERATURE_MARGIN_C if state.reason == "too_hot" else TEMPERATURE_MARGIN_C)
        if values.temperature_c > bound:
            yield Objection("too_hot", f"{values.temperature_c:.0f} °C, limit {limits.temperature_c:.0f} °C")


def _strain(values: Values, limits: Limits) -> Objection | None:
    """What less work would help against."""
    if values.temperature_c is not None and limits.temperature_c and values.temperature_c > limits.temperature_c:
        return Objection("too_hot", f"{values.temperature_c:.0f} °C, limit {limits.temperature_c:.0f} °C")
    if values.power_w is not None and limits.power_w and values.power_w > limits.power_w:
        return Objection("power_limit", f"{values.power_w:.0f} W, limit {limits.power_w:.0f} W")
    if values.fan_ratio is not None and limits.fan_ratio and values.fan_ratio > limits.fan_ratio:
        return Objection("fan_limit", f"{values.fan_ratio:.0%}, limit {limits.fan_ratio:.0%}")
    return None


def _is_relaxed(values: Values, limits: Limits) -> bool:
    """Whether everything is below its limit by the margin."""
    pairs = (
        (values.temperature_c, limits.temperature_c, limits.temperature_c - TEMPERATURE_MARGIN_C),
        (values.power_w, limits.power_w, limits.power_w * (1 - POWER_MARGIN)),
        (values.fan_ratio, limits.fan_ratio, limits.fan_ratio - FAN_MARGIN),
    )
    return all(value is None or not limit or value < bound for value, limit, bound in pairs)


def _throttled(state: GovernorState, values: Values, limits: Limits, strain: Objection | None, now_s: float) -> GovernorState:
    """Take time away under strain, give it back slowly, never more than the rules' share."""
    share = min(state.share, limits.time_share)
    least = min(LEAST_SHARE, limits.time_share)
    since_s = (now_s if state.strained_since_s is None else state.strained_since_s) if strain else None
    if share > least:
        since_s = None
    state = replace(state, share=share, strained_since_s=since_s)
    if now_s - state.adjusted_s < ADJUST_S:
        return state
    if strain is not None and not state.reason:
        return replace(state, share=max(least, share * LESS), adjusted_s=now_s)
    if share < limits.time_share and _is_relaxed(values, limits):
        return replace(state, share=min(limits.time_share, share + MORE), adjusted_s=now_s)
    return state


def _is_exhausted(state: GovernorState, rules: GovernorSettings, now_s: float) -> bool:
    """Whether the least share of time has not helped for a whole dwell."""
    if state.reason in ("too_hot", "power_limit", "fan_limit"):
        return True
    return state.strained_since_s is not None and now_s - state.strained_since_s >= rules.dwell_s


def unenforceable(values: Values, rules: GovernorSettings, *, on_gpu: bool) -> list[str]:
    """The rules that this machine can't keep, each with the reason; `values` is a first measurement."""
    found = [text for name in ("in_use", "idle") for text in _blind(values, name, getattr(rules, name), on_gpu)]
    differing = rules.in_use != rules.idle
    if differing and values.user_idle_s is None:
        found.append("in_use: it can't be seen whether somebody uses this machine; the rules for `idle` always hold")
    if not rules.on_battery and values.on_battery is None:
        found.append("on_battery: the power supply can't be read")
    if not rules.on_metered and values.on_metered is None:
        found.append("on_metered: only NetworkManager knows whether a link is metered, and it doesn't answer here")
    return list(dict.fromkeys(found))


def _blind(values: Values, name: str, limits: Limits, on_gpu: bool) -> Iterator[str]:
    why = "the driver doesn't tell" if on_gpu else "no GPU is used"
    asked: Iterable[tuple[str, bool, bool]] = (
        ("temperature_c", bool(limits.temperature_c), values.temperature_c is None),
        ("power_w", bool(limits.power_w), values.power_w is None),
        ("fan_ratio", bool(limits.fan_ratio), values.fan_ratio is None),
        ("memory_ratio", bool(limits.memory_ratio), not on_gpu),
        ("other_programs", not limits.other_programs, values.others is None),
    )
    for rule, wanted, missing in asked:
        if wanted and missing:
            yield f"{name}.{rule}: {why}"
