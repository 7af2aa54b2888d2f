"""The governor's rules: what stops training, how soon it goes on, and that it never flaps."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peer.gpu import Sensors
from peer.rules import LEAST_SHARE, Decision, GovernorState, Values, is_in_use, parse_hours, step, unenforceable
from swarm.config import GovernorSettings, Limits
from swarm.errors import UsageError
from swarm.reasons import TABLE


def moment_of(year: int, month: int, day: int, hour: int, minute: int) -> datetime:
    """A local time."""
    return datetime(year, month, day, hour, minute, tzinfo=UTC)


MONDAY_NOON = moment_of(2026, 11, 23, 12, 0)
FINE = Values(60.0, 200.0, 0.4, (), float("inf"), False, False)
DWELL_S = 60.0


def rules(**changes: Any) -> GovernorSettings:
    """Rules with limits on everything, a minute of dwell, and `changes`."""
    limits = Limits(temperature_c=80, power_w=300, fan_ratio=0.8, other_programs=False)
    return GovernorSettings(**({"in_use": limits, "idle": limits, "dwell_s": DWELL_S} | changes))


@dataclass
class FakeCard:
    """A GPU that says what the test wants."""

    celsius: float | None = 60.0
    watts: float | None = 200.0
    fan: float | None = 0.4
    pids: tuple[int, ...] | None = ()
    present: bool = True

    def temperature_c(self) -> float | None:
        return self.celsius

    def power_w(self) -> float | None:
        return self.watts

    def fan_ratio(self) -> float | None:
        return self.fan

    def programs(self) -> tuple[int, ...] | None:
        return self.pids

    def is_present(self) -> bool:
        return self.present


@dataclass
class Clock:
    """A governor on a virtual clock: `run(values, seconds)` measures every two seconds; the decisions in order."""

    rules: GovernorSettings
    now_s: float = 0.0
    state: GovernorState = GovernorState()

    def run(self, values: Values, seconds: float) -> list[Decision]:
        decisions = []
        for _ in range(max(1, round(seconds / 2))):
            local = MONDAY_NOON + timedelta(seconds=self.now_s)
            self.state, decision = step(self.state, values, self.rules, self.now_s, local)
            decisions.append(decision)
            self.now_s += 2
        return decisions


@pytest.mark.parametrize(
    ("values", "changes", "reason"),
    [
        (replace(FINE, temperature_c=86.0), {}, "too_hot"),
        (replace(FINE, others=("game",)), {}, "gpu_busy"),
        (replace(FINE, on_battery=True), {}, "on_battery"),
        (replace(FINE, on_metered=True), {}, "metered_link"),
        (replace(FINE, user_idle_s=1.0), {"in_use": Limits(run=False)}, "user_active"),
        (replace(FINE, gpu_present=False), {}, "gpu_lost"),
        (FINE, {"hours": ("mon-fri 18:00-08:00",)}, "off_hours"),
    ],
)
def test_what_stands_against_training_stops_it_at_once(values: Values, changes: dict[str, Any], reason: str) -> None:
    """Each rule holds with its own reason from the first measurement on, and lets go a dwell after it is kept again."""
    clock = Clock(rules(**changes))
    assert clock.run(values, 2)[-1].reason == reason
    if changes.get("hours"):
        return
    kept = clock.run(FINE, DWELL_S)
    assert {decision.reason for decision in kept} == {reason}
    assert clock.run(FINE, 4)[-1].reason == ""


def test_heat_first_costs_time_and_then_training() -> None:
    """A little too hot: less and less work, and a stop only when the least share hasn't helped for a dwell."""
    clock = Clock(rules())
    warm = replace(FINE, temperature_c=82.0)
    shares = [decision.share for decision in clock.run(warm, 92) if not decision.reason]
    assert shares == sorted(shares, reverse=True)
    assert shares[-1] == pytest.approx(LEAST_SHARE)
    assert clock.run(warm, 120)[-1].reason == "too_hot"


def test_time_comes_back_slowly_when_it_is_cool() -> None:
    """After strain the share of time rises again, up to what the rules allow."""
    limits = Limits(temperature_c=80, time_share=0.6)
    clock = Clock(rules(idle=limits))
    assert clock.run(FINE, 2)[-1].share == pytest.approx(0.6)
    assert clock.run(replace(FINE, temperature_c=82.0), 20)[-1].share < 0.6
    assert clock.run(FINE, 200)[-1].share == pytest.approx(0.6)


def test_a_value_that_trembles_about_its_limit_switches_nothing() -> None:
    """Half a degree around the limit never stops or starts training."""
    clock = Clock(rules(idle=Limits(temperature_c=80)))
    reasons = []
    for index in range(600):
        reasons += [decision.reason for decision in clock.run(replace(FINE, temperature_c=79.5 + index % 2), 2)]
    assert sum(before != after for before, after in itertools.pairwise(reasons)) <= 1


measurements = st.builds(
    Values,
    temperature_c=st.none() | st.floats(20, 110),
    power_w=st.none() | st.floats(0, 600),
    fan_ratio=st.none() | st.floats(0, 1),
    others=st.none() | st.sampled_from([(), ("game",)]),
    user_idle_s=st.none() | st.sampled_from([0.0, 299.0, 301.0, float("inf")]),
    on_battery=st.none() | st.booleans(),
    on_metered=st.none() | st.booleans(),
    gpu_present=st.booleans(),
)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(measurements, st.floats(0.5, 90)), max_size=60), st.floats(0, 120))
def test_training_never_flaps(story: list[tuple[Values, float]], dwell_s: float) -> None:
    """Whatever is measured, training that was stopped stays so for a dwell at least, and every stop has a known reason."""
    limits = Limits(temperature_c=80, power_w=300, fan_ratio=0.8, other_programs=False)
    chosen = rules(dwell_s=dwell_s, in_use=limits.model_copy(update={"run": False}), idle=limits)
    state, now_s, stopped_s = GovernorState(), 0.0, None
    for values, gap_s in story:
        state, decision = step(state, values, chosen, now_s, MONDAY_NOON)
        if decision.reason:
            assert decision.reason in TABLE
            assert decision.share == 0
            stopped_s = now_s if stopped_s is None else stopped_s
        else:
            assert stopped_s is None or now_s - stopped_s >= dwell_s
            assert 0 < decision.share <= 1
            stopped_s = None
        now_s += gap_s


@settings(max_examples=100, deadline=None)
@given(st.lists(measurements, min_size=1, max_size=40))
def test_forbidden_is_forbidden(story: list[Values]) -> None:
    """Nothing that came before makes a peer train on battery, on a lost GPU, or five degrees above the limit."""
    state = GovernorState()
    for index, values in enumerate(story):
        state, decision = step(state, values, rules(), index * 2.0, MONDAY_NOON)
        hot = values.temperature_c is not None and values.temperature_c > 85
        if values.on_battery or values.on_metered or not values.gpu_present or hot or values.others:
            assert decision.reason


@pytest.mark.parametrize(
    ("text", "moment", "expected"),
    [
        ("mon-fri 18:00-08:00", moment_of(2026, 11, 23, 19, 0), True),
        ("mon-fri 18:00-08:00", moment_of(2026, 11, 28, 7, 59), True),  # Saturday morning belongs to Friday's night
        ("mon-fri 18:00-08:00", moment_of(2026, 11, 28, 8, 0), False),
        ("mon-fri 18:00-08:00", moment_of(2026, 11, 23, 7, 0), False),  # Sunday has no night
        ("sat,sun 00:00-24:00", moment_of(2026, 11, 29, 23, 59), True),
        ("22:00-06:00", moment_of(2026, 11, 25, 5, 0), True),
        ("fri-mon 10:00-12:00", moment_of(2026, 11, 29, 11, 0), True),
    ],
)
def test_hours(text: str, moment: datetime, expected: bool) -> None:
    """Windows of weekdays, also across midnight."""
    assert parse_hours(text).covers(moment) is expected


@pytest.mark.parametrize("text", ["", "25:00-26:00", "someday 10:00-12:00", "10:00-10:00", "mon 10-12", "mon 10:75-12:00x"])
def test_hours_that_cannot_be_read(text: str) -> None:
    """A mistake is told, never ignored."""
    with pytest.raises(UsageError):
        parse_hours(text)


def test_rules_that_cannot_be_kept_are_named() -> None:
    """Without NVML, logins, power supply and NetworkManager each rule that was set is named with the reason."""
    blind = unenforceable(Values(), rules(idle=Limits(memory_ratio=0.5)), on_gpu=False)
    text = "\n".join(blind)
    for rule in ("in_use.temperature_c", "in_use.power_w", "in_use.fan_ratio", "in_use.other_programs", "idle.memory_ratio"):
        assert rule in text
    assert "on_battery" in text
    assert "on_metered" in text
    assert "whether somebody uses this machine" in text
    assert unenforceable(FINE, rules(), on_gpu=True) == []


def test_where_nobody_can_be_seen_the_idle_rules_hold() -> None:
    """A machine without logins counts as idle."""
    assert not is_in_use(Values(), rules())
    assert is_in_use(Values(user_idle_s=10.0), rules())


def test_sensors_tell_other_programs_from_our_own() -> None:
    """Only processes that aren't ours or our children's count as others."""
    card = FakeCard(pids=(1, 4242))
    sensors = Sensors(card, mine=lambda: {4242})
    values = sensors.read()
    assert len(values.others or ()) == 1
    assert (values.temperature_c, values.power_w, values.fan_ratio) == (60.0, 200.0, 0.4)
    card.pids = None
    assert sensors.read().others is None
