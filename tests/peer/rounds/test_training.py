"""The training thread: what was begun is gone on with, or given up."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import pytest

from peer.rounds.training import TrainingThread
from peer.trainer import TrainedUpdate

THETA, OTHER = np.zeros(4, dtype=np.float32), np.zeros(4, dtype=np.float32)


@dataclass
class Slow:
    """A trainer whose rounds last until somebody stops them, or some hundredths of a second."""

    precision: str = "fp32"
    calls: list[tuple[int, int]] = field(default_factory=list)
    stopped: list[str | None] = field(default_factory=list)

    def forget_inner(self) -> None:
        self.calls.append((0, 0))

    def train_round(self, theta: np.ndarray, round_number: int, peer: str, quota: int, tokens: int, *rest: Any) -> TrainedUpdate:
        self.calls.append((round_number, quota))
        should_stop, reason = rest[0], None
        for _ in range(quota):
            time.sleep(0.01)
            if (reason := should_stop()) is not None:
                break
        self.stopped.append(reason)
        return TrainedUpdate(theta + np.float32(round_number), quota, 0, 1.0, 1.0, 1.0, 0.1)


@pytest.fixture
async def thread() -> AsyncIterator[TrainingThread]:
    """A thread with a slow trainer."""
    found = TrainingThread(cast("Any", Slow()))
    yield found
    await found.drop_early()
    found.close()


def slow(thread: TrainingThread) -> Slow:
    return cast("Slow", cast("Any", thread.trainer))


async def test_what_was_begun_is_gone_on_with(thread: TrainingThread) -> None:
    """It is trained once, and what comes of it is the round's contribution."""
    thread.begin(THETA, 3, "me", 5, 100)
    contribution = await thread.train(THETA, 3, "me", 5, 100)
    assert slow(thread).calls == [(3, 5)]
    assert slow(thread).stopped == [None]
    assert contribution.weight == 5


@pytest.mark.parametrize(("theta", "round_index", "quota"), [(OTHER, 3, 5), (THETA, 4, 5), (THETA, 3, 6)])
async def test_another_round_is_trained_anew(thread: TrainingThread, theta: np.ndarray, round_index: int, quota: int) -> None:
    """From other weights, of another number or with another quota: what was begun is stopped first."""
    thread.begin(THETA, 3, "me", 500, 100)
    await thread.train(theta, round_index, "me", quota, 100)
    assert slow(thread).calls == [(3, 500), (round_index, quota)]
    assert slow(thread).stopped == ["cancelled", None]


async def test_what_was_begun_can_be_given_up(thread: TrainingThread) -> None:
    """The thread is free afterwards."""
    thread.begin(THETA, 3, "me", 500, 100)
    await thread.drop_early()
    assert slow(thread).stopped == ["cancelled"]
    assert await thread.in_thread(lambda: 7) == 7


async def test_a_stop_holds_until_it_is_taken_back(thread: TrainingThread) -> None:
    """Whatever comes after it: a job that runs ends early, and no further one touches the device."""
    thread.begin(THETA, 3, "me", 500, 100)
    thread.stop("pause")
    await thread.train(THETA, 3, "me", 500, 100)
    assert slow(thread).stopped == ["pause"]
    nothing = await thread.train(THETA, 4, "me", 5, 100)
    assert (nothing.update, nothing.weight, slow(thread).calls) == (None, 0, [(3, 500)])
    assert thread.is_stopped()
    thread.go_on()
    assert (await thread.train(THETA, 4, "me", 5, 100)).weight == 5


async def test_after_a_skipped_round_everything_begins_anew(thread: TrainingThread) -> None:
    """What was begun on its weights is given up, and the inner optimizer forgotten before the next job."""
    thread.begin(THETA, 3, "me", 10**6, 100)
    await thread.start_over()
    contribution = await thread.train(THETA, 3, "me", 5, 100)
    assert slow(thread).calls == [(3, 10**6), (0, 0), (3, 5)]
    assert slow(thread).stopped == ["cancelled", None]
    assert contribution.weight == 5
