"""How long work tells how far it has come: by a bar, as `swarm.cli.output.bars` shows one on a terminal."""

from __future__ import annotations

from collections.abc import Callable

Bar = Callable[[str, int], Callable[[], None]]
"""Adds a bar for so many steps, and gives what moves it on by one."""


def no_bar(what: str, total: int) -> Callable[[], None]:
    """Nobody looks."""
    return lambda: None
