"""Ending tasks."""

from __future__ import annotations

import asyncio

from peer.tasks import cancel


async def test_a_task_that_loses_its_first_cancellation_is_cancelled_again() -> None:
    """As one does whose `wait_for` ends at that moment, and which then goes on with its loop."""
    lost = 0

    async def loop_for_ever() -> None:
        nonlocal lost
        while True:
            try:
                await asyncio.sleep(3600)
            except asyncio.CancelledError:
                if lost:
                    raise
                lost += 1

    task = asyncio.create_task(loop_for_ever())
    await asyncio.sleep(0)
    await asyncio.wait_for(cancel([task]), 10)
    assert task.cancelled()
    assert lost == 1


async def test_tasks_that_fail_or_have_ended_trouble_nobody() -> None:
    """Whatever they end with."""

    async def fail() -> None:
        raise ValueError

    ended, failing = asyncio.create_task(asyncio.sleep(0)), asyncio.create_task(fail())
    await asyncio.sleep(0.01)
    await asyncio.wait_for(cancel([ended, failing]), 10)
    await cancel([])
