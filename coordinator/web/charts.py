"""Charts as inline SVG, for readers without JavaScript and without a mouse: axes, labels, a title and a description.

All that goes into the markup are numbers and words of ours. What a liar puts into the ledger (a loss of 1e300) is left out of
the picture, and the caption says how many points are.
"""

from __future__ import annotations

import datetime
import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from markupsafe import Markup

from coordinator.web.words import LAST_SECOND, counted, quantity, utc
from swarm.evaluations import Agreed
from swarm.history import History, Point, halved

DRAWN_POINTS = 256
TABLE_ROWS = 12
WIDTH, HEIGHT = 420, 230
LEFT, RIGHT, TOP, BOTTOM = 54, 12, 12, 34
TICKS = 4
LARGEST_LOSS = 1e6  # nats per token; nothing that is trained comes near
SPREADS = 3
MANY = 20
HOUR_S, DAY_S = 3600, 86_400

DOTS = "Dots: held-out loss on which a quorum of peers agreed."

Place = Callable[[Point], float]


class Series(NamedTuple):
    """What one chart shows: pairs of x and y in the order of x, and how many have no place in the picture."""

    points: list[tuple[float, float]]
    left_out: int


class Chart(NamedTuple):
    """A chart with what stands around it."""

    name: str
    title: str
    svg: Markup
    caption: str
    newest: str


class Row(NamedTuple):
    """A line of the table that has the same figures."""

    rounds: str
    until: str
    loss: str
    tokens: str
    peers: str


def charts(history: History, by_time: bool, held_out: Sequence[Agreed] = ()) -> list[Chart]:
    """Loss, tokens, peers and pace over the run, by time or by the number of confirmed rounds; held-out losses as dots."""
    points = drawn(history.points)
    xs = [point.at_us / 1e6 for point in points] if by_time else list(_sums(point.rounds for point in points))
    tokens = list(_sums(point.tokens for point in points))
    peers = [point.peers / point.rounds for point in points]
    stands_for = f"A point stands for {counted(points[0].rounds, 'round')}." if points and points[0].rounds > 1 else ""
    made: list[tuple[str, str, str, Sequence[float | None], bool]] = [
        ("loss", "Training loss", "nats per token", [_loss(point) for point in points], False),
        ("tokens", "Verified tokens", "tokens in all", tokens, True),
        ("peers", "Peers in a round", "peers, mean", peers, True),
        ("pace", "Time for a round", "seconds, mean", list(_pace(points)), True),
    ]
    dots = fitting([each.at_us / 1e6 if by_time else each.place + 1 for each in held_out], [each.loss for each in held_out])
    return [
        _chart(name, title, unit, xs, ys, from_zero, by_time, stands_for, dots.points if name == "loss" else ())
        for name, title, unit, ys, from_zero in made
    ]


def table(history: History) -> list[Row]:
    """The same in a dozen lines, the newest first."""
    points, before = list(history.points), 0
    while len(points) > TABLE_ROWS:
        points = halved(points)
    rows = []
    for point in points:
        loss = _loss(point)
        rows.append(
            Row(
                f"{before + 1:,}" if point.rounds == 1 else f"{before + 1:,} to {before + point.rounds:,}",
                utc(point.at_us),
                "none" if loss is None else f"{loss:.4f}",
                f"{point.tokens:,}",
                f"{point.peers / point.rounds:.1f}",
            )
        )
        before += point.rounds
    return rows[::-1]


def drawn(points: Sequence[Point]) -> list[Point]:
    """As many points as fit a small picture."""
    found = list(points)
    while len(found) > DRAWN_POINTS:
        found = halved(found)
    return found


def fitting(xs: Sequence[float], ys: Sequence[float | None]) -> Series:
    """The pairs that belong into the picture: numbers, and not absurdly far from most of the others."""
    known = [(x, y) for x, y in zip(xs, ys, strict=True) if y is not None]
    if len(known) >= MANY:
        ranked = sorted(y for _, y in known)
        low, high = ranked[len(ranked) // 50], ranked[-1 - len(ranked) // 50]
        slack = SPREADS * (high - low) or max(abs(high), 1.0)
        known = [(x, y) for x, y in known if low - slack <= y <= high + slack]
    return Series(known, len(ys) - len(known))


def ticks(low: float, high: float, most: int = TICKS) -> list[float]:
    """Round numbers from at or below `low` to at or above `high`, evenly spaced, about `most` of them."""
    span = high - low
    if span <= 0:
        span = abs(high) or 1.0
    rough = span / most
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * unit for factor in (1, 2, 2.5, 5, 10) if factor * unit >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [number * step for number in range(first, max(last, first + 1) + 1)]


def _loss(point: Point) -> float | None:
    """The mean loss; None where there is none, or nothing that a model could have."""
    loss = point.loss
    return loss if loss is not None and abs(loss) <= LARGEST_LOSS else None


def _sums(numbers: Iterator[int]) -> Iterator[int]:
    total = 0
    for number in numbers:
        total += number
        yield total


def _pace(points: Sequence[Point]) -> Iterator[float | None]:
    """Seconds for a round since the point before; the first has none before it."""
    before: Point | None = None
    for point in points:
        yield None if before is None else max(0.0, (point.at_us - before.at_us) / 1e6 / point.rounds)
        before = point


def _chart(
    name: str,
    title: str,
    unit: str,
    xs: Sequence[float],
    ys: Sequence[float | None],
    from_zero: bool,
    by_time: bool,
    note: str,
    dots: Sequence[tuple[float, float]] = (),
) -> Chart:
    series = fitting(xs, ys)
    newest = f"{quantity(series.points[-1][1])} {unit}" if series.points else "nothing yet"
    missing = f"{counted(series.left_out, 'point')} without a figure to draw." if series.left_out > (name == "pace") else ""
    caption = " ".join(filter(None, (DOTS if dots else "", note, missing)))
    return Chart(name, title, _svg(name, title, unit, series.points, from_zero, by_time, dots), caption, newest)


def _svg(
    name: str,
    title: str,
    unit: str,
    points: Sequence[tuple[float, float]],
    from_zero: bool,
    by_time: bool,
    dots: Sequence[tuple[float, float]],
) -> Markup:
    xs, ys = [x for x, _ in (*points, *dots)], [y for _, y in (*points, *dots)]
    marks = ticks(min([0.0, *ys] if from_zero else ys, default=0.0), max(ys, default=1.0))
    low, high = marks[0], marks[-1]
    first, last = (min(xs), max(xs)) if xs else (0.0, 1.0)

    def across(x: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * ((x - first) / (last - first) if last > first else 0.5)

    def up(y: float) -> float:
        return TOP + (HEIGHT - TOP - BOTTOM) * (1 - (y - low) / (high - low))

    parts = [_horizontal(up(mark), quantity(mark)) for mark in marks]
    parts += [_vertical(across(x), text) for x, text in _below(first, last, by_time) if xs]
    if points:
        path = " ".join(f"{across(x):.1f},{up(y):.1f}" for x, y in points)
        if len(points) > 1:
            floor = f"{across(points[-1][0]):.1f},{up(low):.1f} {across(points[0][0]):.1f},{up(low):.1f}"
            parts.append(f'<polygon class="area" points="{path} {floor}"/><polyline class="line" points="{path}"/>')
        parts.append(f'<circle class="dot" cx="{across(points[-1][0]):.1f}" cy="{up(points[-1][1]):.1f}" r="4"/>')
    elif not dots:
        parts.append(f'<text class="empty" x="{(WIDTH + LEFT) / 2}" y="{HEIGHT / 2}">nothing yet</text>')
    parts += [f'<circle class="held-out" cx="{across(x):.1f}" cy="{up(y):.1f}" r="3.5"/>' for x, y in dots]
    return Markup(  # noqa: S704 - numbers and words of ours
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-labelledby="{name}-title {name}-text">'
        f'<title id="{name}-title">{title}</title><desc id="{name}-text">{_described(unit, points, by_time)}</desc>'
        f"{''.join(parts)}"
        f'<text class="axis" x="{WIDTH - RIGHT}" y="{HEIGHT - 3}">{"time, UTC" if by_time else "confirmed rounds"}</text></svg>'
    )


def _described(unit: str, points: Sequence[tuple[float, float]], by_time: bool) -> str:
    """What the line shows, in a sentence."""
    if not points:
        return "There is nothing to show yet."
    low, high = min(y for _, y in points), max(y for _, y in points)
    until = utc(int(points[-1][0] * 1e6)) if by_time else f"round {points[-1][0]:,.0f}"
    return (
        f"From {quantity(points[0][1])} to {quantity(points[-1][1])} {unit} at {until}; "
        f"between {quantity(low)} and {quantity(high)} throughout."
    )


def _horizontal(y: float, text: str) -> str:
    return (
        f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        f'<text class="left" x="{LEFT - 7}" y="{y + 4:.1f}">{text}</text>'
    )


def _vertical(x: float, text: str) -> str:
    place = "start" if x < LEFT + 20 else "end" if x > WIDTH - RIGHT - 20 else "middle"
    bottom = HEIGHT - BOTTOM
    return (
        f'<line class="tick" x1="{x:.1f}" x2="{x:.1f}" y1="{bottom}" y2="{bottom + 4}"/>'
        f'<text class="{place}" x="{x:.1f}" y="{bottom + 17}">{text}</text>'
    )


def _below(first: float, last: float, by_time: bool) -> list[tuple[float, str]]:
    """Where the lower axis is marked, and how."""
    if not by_time:
        return [(mark, quantity(mark)) for mark in ticks(first, last) if first <= mark <= last and mark == int(mark)]
    if last <= first:
        return [(first, _clock(first, 0.0))]
    marks = [first + (last - first) * place / (TICKS - 1) for place in range(TICKS)]
    return [(mark, _clock(mark, last - first)) for mark in marks]


def _clock(at_s: float, span_s: float) -> str:
    """A moment as exactly as the span asks for."""
    at = datetime.datetime.fromtimestamp(min(at_s, LAST_SECOND), datetime.UTC)
    if span_s > 3 * DAY_S:
        return f"{at:%d %b}"
    return f"{at:%d %H:%M}" if span_s > 12 * HOUR_S else f"{at:%H:%M}" if span_s > HOUR_S / 6 else f"{at:%H:%M:%S}"
