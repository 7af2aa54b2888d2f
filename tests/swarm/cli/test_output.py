"""What commands print."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarm.cli.output import configure_logging, format_credits, print_fields, print_json, print_table
from swarm.errors import UsageError


@given(st.integers(0, 10**24))
def test_credits_are_rounded_down(flops: int) -> None:
    """Credits have three digits after the point and never show more than there is."""
    shown = format_credits(flops)
    thousandths = int(shown.replace(",", "").replace(".", ""))
    assert thousandths * 10**12 <= flops < (thousandths + 1) * 10**12


def test_tables_and_fields(capsys: pytest.CaptureFixture[str]) -> None:
    """Values come out whole, numbers with separators, and markup stays text."""
    print_table(("a", "b"), [("[red]x", 1234567)], numbers=("b",))
    print_fields({"name": 1000, "longer name": True})
    print_json({"a": 1})
    out = capsys.readouterr().out
    assert "[red]x" in out
    assert "1,234,567" in out
    assert "name         1,000\nlonger name  True\n" in out
    assert out.endswith('{"a": 1}\n')


def test_log_levels() -> None:
    """An unknown log level is a usage error."""
    with pytest.raises(UsageError, match="no such log level"):
        configure_logging("loud")
