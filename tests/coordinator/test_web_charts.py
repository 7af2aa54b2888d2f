"""Charts show what the history says, whatever a liar has put into it."""

from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.web.charts import DRAWN_POINTS, HEIGHT, TABLE_ROWS, WIDTH, charts, drawn, table, ticks
from swarm.history import History

NAMES = ("loss", "tokens", "peers", "pace")


def history(losses: list[float], at_us: list[int] | None = None) -> History:
    """A round for each loss, one after a second, or at these moments."""
    made = History()
    for number, loss in enumerate(losses):
        place = made.confirmed(at_us[number] if at_us else (1_763_900_000 + number) * 1_000_000, peers=3)
        made.contributed(place, weight=2, tokens=100, loss=loss)
    return made


def places(svg: str) -> list[tuple[float, float]]:
    """Where the line goes."""
    found = re.search(r'<polyline class="line" points="([^"]*)"', svg)
    return [] if found is None else [(float(x), float(y)) for x, y in (pair.split(",") for pair in found[1].split())]


def by_name(made: History, by_time: bool = False) -> dict[str, str]:
    return {chart.name: str(chart.svg) for chart in charts(made, by_time)}


def test_nothing_yet() -> None:
    """A run without a round has charts, and they say so."""
    for svg in by_name(History()).values():
        assert "nothing yet" in svg
        assert not places(svg)
    assert table(History()) == []


def test_a_falling_loss_falls() -> None:
    """Lower loss is lower in the picture (a larger y), later is further right; axes are marked with round numbers."""
    svg = by_name(history([4.0, 3.0, 2.5, 2.2]))["loss"]
    line = places(svg)
    assert [x for x, _ in line] == sorted(x for x, _ in line)
    assert [y for _, y in line] == sorted(y for _, y in line)
    assert re.findall(r'class="left"[^>]*>([^<]+)<', svg) == ["2", "2.5", "3", "3.5", "4"]
    assert "From 4 to 2.2 nats per token at round 4; between 2.2 and 4 throughout." in svg


def test_pace_is_the_time_between_confirmations() -> None:
    """The first round has none; a clock that was set back makes no negative time."""
    made = history([1.0, 1.0, 1.0, 1.0], [10_000_000, 40_000_000, 30_000_000, 50_000_000])
    assert "From 30 to 20 seconds, mean at round 4; between 0 and 30 throughout." in by_name(made)["pace"]


@pytest.mark.parametrize("lie", [1e300, -1e300, math.inf, 1e7])
def test_a_liars_loss_spoils_no_picture(lie: float) -> None:
    """What no model could have is left out, and the caption says so."""
    made = history([3.0] * 30 + [lie] + [2.0] * 30)
    (loss, *_) = charts(made, by_time=False)
    assert "between 2 and 3 throughout" in loss.svg
    assert loss.caption == "1 point without a figure to draw."
    assert "none" in {row.loss for row in table(made)}


@given(
    st.lists(st.floats(allow_nan=False), max_size=60),
    st.lists(st.integers(0, 2**64 - 1), min_size=60, max_size=60),
    st.booleans(),
)
def test_every_history_can_be_drawn(losses: list[float], at_us: list[int], by_time: bool) -> None:
    """Whatever the figures are, the markup is well-formed and all of it inside the picture."""
    for svg in by_name(history(losses, at_us), by_time).values():
        ElementTree.fromstring(svg)  # noqa: S314 - our own
        for x, y in places(svg):
            assert 0 <= x <= WIDTH
            assert 0 <= y <= HEIGHT
        assert not re.search(r'"[^"]*(nan|inf)[^"]*"', svg)


@given(st.floats(-1e15, 1e15), st.floats(0, 1e15))
def test_ticks_hold_what_they_mark(low: float, span: float) -> None:
    """They begin at or below the least, end at or above the greatest, and are few."""
    marks = ticks(low, low + span)
    slack = 1e-6 * max(abs(low), span, 1e-300)
    assert marks[0] <= low + slack
    assert marks[-1] >= low + span - slack
    assert 2 <= len(marks) <= 8


def test_long_runs_are_drawn_with_few_points() -> None:
    """Picture and table stay small, and no token is missing from the table."""
    made = history([2.0] * 5000)
    assert len(drawn(made.points)) <= DRAWN_POINTS
    rows = table(made)
    assert len(rows) <= TABLE_ROWS
    assert sum(int(row.tokens.replace(",", "")) for row in rows) == 500_000
    assert rows[-1].rounds.startswith("1 to ")
    assert rows[0].rounds.endswith("5,000")
