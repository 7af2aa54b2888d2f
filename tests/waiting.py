"""Waiting for something that happens elsewhere: bounded, and with a name for what didn't come."""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

T = TypeVar("T")
LOOK_EVERY_S = 0.05


async def eventually(look: Callable[[], T | Awaitable[T]], what: str, timeout_s: float = 60.0) -> T:
    """Look again and again until the answer is true; the answer. Fails with `what` when that takes too long."""
    deadline = time.monotonic() + timeout_s
    while True:
        found = look()
        answer = await found if inspect.isawaitable(found) else found
        if answer:
            return answer
        assert time.monotonic() < deadline, f"{what} did not happen within {timeout_s:.0f} s"
        await asyncio.sleep(LOOK_EVERY_S)
