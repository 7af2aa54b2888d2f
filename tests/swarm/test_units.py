"""Rates and volumes as people write them."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarm.units import BYTES, RATES, format_rate, format_size, parse_rate, parse_size


@pytest.mark.parametrize(
    ("text", "bytes_per_s"),
    [("10Mbit/s", 1_250_000), ("1.5 Gbit/s", 187_500_000), ("800kbit/s", 100_000), ("64000bit/s", 8000), ("2MB/s", 2_000_000),
     ("1 MiB/s", 1 << 20), ("0", 0), ("0bit/s", 0)],
)  # fmt: skip
def test_rates(text: str, bytes_per_s: int) -> None:
    """Bits and bytes, decimal and binary; 0 is no limit."""
    assert parse_rate(text) == bytes_per_s


@pytest.mark.parametrize(
    ("text", "size"), [("200GB", 200 * 10**9), ("1.5TB", 1500 * 10**9), ("3 KiB", 3072), ("7B", 7), ("0", 0), ("2TiB", 2 << 40)]
)
def test_volumes(text: str, size: int) -> None:
    """Decimal and binary bytes; 0 is no limit."""
    assert parse_size(text) == size


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("10", "unit is missing"),
        ("10Mb/s", "is Mbit/s or MB/s meant"),
        ("10mbit/s", "is Mbit/s meant"),
        ("10MB", "not known"),
        ("fast", "can't be read"),
        ("-1Mbit/s", "can't be read"),
        ("", "can't be read"),
        ("1e9999Mbit/s", "can't be read"),
        ("9999999999999GB/s", "too much"),
        ("10kbit/s", "too slow"),
        ("nan", "can't be read"),
    ],
)
def test_a_wrong_rate_says_what_is_wrong(text: str, problem: str) -> None:
    """The units are listed, and a likely meaning is named."""
    with pytest.raises(ValueError, match=problem):
        parse_rate(text)


@pytest.mark.parametrize("text", ["10", "10Mbit/s", "ten GB", "10gb", "-5GB", "inf"])
def test_a_wrong_volume_is_refused(text: str) -> None:
    """A rate is no volume."""
    with pytest.raises(ValueError, match="a volume is a number"):
        parse_size(text)


@given(st.text(max_size=40))
def test_any_text_is_read_or_refused(text: str) -> None:
    """Nothing but `ValueError` comes out of what people type."""
    for parse in (parse_rate, parse_size):
        with contextlib.suppress(ValueError):
            assert parse(text) >= 0


@pytest.mark.parametrize("unit", [*RATES])
def test_a_formatted_rate_is_read_back(unit: str) -> None:
    """What is shown can be written."""
    assert parse_rate(format_rate(parse_rate(f"123456{unit}"))) == pytest.approx(parse_rate(f"123456{unit}"), rel=1e-3)


@pytest.mark.parametrize("unit", [*BYTES])
def test_a_formatted_volume_is_read_back(unit: str) -> None:
    """The same for volumes."""
    assert parse_size(format_size(parse_size(f"123456{unit}"))) == pytest.approx(parse_size(f"123456{unit}"), rel=1e-3)


def test_nothing_is_nothing() -> None:
    """Zero has the smallest unit."""
    assert (format_rate(0), format_size(0), format_size(999)) == ("0 bit/s", "0 B", "999 B")
