"""Telling systemd how a service is: ready, alive, what it does (sd_notify(3)). Without systemd nothing happens."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Callable

SOCKET_VARIABLE = "NOTIFY_SOCKET"
WATCHDOG_VARIABLE = "WATCHDOG_USEC"
STATUS_EVERY_S = 30.0


def notify(state: str) -> bool:
    """Send one state, such as `READY=1`; whether anybody was there to hear it."""
    address = os.environ.get(SOCKET_VARIABLE, "")
    if not address.startswith(("/", "@")):
        return False
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as channel:
        channel.sendto(state.encode(), "\0" + address[1:] if address.startswith("@") else address)
        return True
    return False


def watchdog_s() -> float | None:
    """How often systemd wants to hear from us, in seconds; None if it doesn't watch."""
    given = os.environ.get(WATCHDOG_VARIABLE, "")
    return int(given) / 1e6 if given.isdigit() and int(given) > 0 else None


async def keep_watchdog(status: Callable[[], str]) -> None:
    """Say that the event loop is alive, twice as often as systemd asks, and what the service does."""
    every_s = watchdog_s()
    while True:
        notify(f"WATCHDOG=1\nSTATUS={status()}")
        await asyncio.sleep(min(STATUS_EVERY_S, every_s / 2) if every_s else STATUS_EVERY_S)
