"""Log lines that nobody takes."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from swarm.log_writer import LogWriter

MOST = 100
LINE = "x" * 1023 + "\n"


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    ends = os.pipe()
    yield ends
    for end in ends:
        os.close(end)


def test_nobody_waits_for_a_reader(pipe: tuple[int, int]) -> None:
    """A full pipe costs lines, not time, and says so when it is read again."""
    reading, writing = pipe
    writer = LogWriter(writing, MOST)
    for _ in range(1000):
        assert writer.write(LINE) == len(LINE)
    assert not writer.drain(0.05)
    seen = b""
    while not writer.drain(0.05):
        seen += os.read(reading, 1 << 16)
    writer.write("afterwards\n")
    assert writer.drain(10)
    seen += os.read(reading, 1 << 20)
    lines = seen.decode().splitlines()
    (told,) = [line for line in lines if "were left out" in line]
    left_out = int(told.split()[0])
    assert 0 < left_out <= 1000 - MOST
    assert lines.count(LINE.strip()) + left_out == 1000
    assert lines[-1] == "afterwards"


def test_a_terminal_that_is_gone_ends_nothing(pipe: tuple[int, int]) -> None:
    """Lines for a descriptor that can't be written to are dropped."""
    reading, _ = pipe
    writer = LogWriter(reading)
    writer.write(LINE)
    assert writer.drain(10)
