"""How figures, moments and keys are written on the page."""

from __future__ import annotations

import datetime
import math

from swarm.credits import FLOPS_PER_CREDIT

LAST_SECOND = 253_402_300_799  # of the year 9999
SCALES = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
HEAD, TAIL = 8, 8


def credits_text(flops: int) -> str:
    """FLOPs as credits, to three digits after the point; nobody is shown more than they have."""
    thousandths = flops * 1000 // FLOPS_PER_CREDIT
    return f"{thousandths // 1000:,}.{thousandths % 1000:03d}"


def utc(at_us: int) -> str:
    """A moment in Unix microseconds; what no calendar has is said in plain numbers."""
    if not 0 <= at_us // 1_000_000 <= LAST_SECOND:
        return f"{at_us} µs"
    return f"{datetime.datetime.fromtimestamp(at_us // 1_000_000, datetime.UTC):%Y-%m-%d %H:%M:%S} UTC"


def short_key(peer_id: str) -> str:
    """A peer id by its two ends."""
    return peer_id if len(peer_id) <= HEAD + TAIL + 1 else f"{peer_id[:HEAD]}…{peer_id[-TAIL:]}"


def quantity(value: float) -> str:
    """A number in about three digits, with a prefix where it is large."""
    if not math.isfinite(value):
        return str(value)
    for size, prefix in SCALES:
        if abs(value) >= size * (10 if prefix == "k" else 1):
            return f"{value / size:.3g} {prefix}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def counted(count: int, thing: str) -> str:
    """So many of something."""
    return f"{count:,} {thing}" if count == 1 else f"{count:,} {thing}s"


def percent(share: float) -> str:
    """A share, to a tenth of a per cent; what isn't nothing, and isn't everything, doesn't look like it."""
    if 0 < share < 0.001:
        return "< 0.1 %"
    if 0.999 < share < 1:
        return "> 99.9 %"
    return f"{share * 100:.3g} %"
