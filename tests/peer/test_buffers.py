"""Memory that is used again, but never under somebody's hands."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from peer.buffers import LEAST_VALUES, Buffers

Keep = Callable[[np.ndarray], Any]


def address(vector: np.ndarray) -> int:
    """Where its memory is."""
    return int(vector.__array_interface__["data"][0])


def test_a_vector_that_nobody_refers_to_is_handed_out_again() -> None:
    """Writable, whatever it was made before; one of another length, or a short one, is another."""
    pool = Buffers()
    first = pool.empty(LEAST_VALUES)
    first.setflags(write=False)
    place = address(first)
    del first
    again = pool.empty(LEAST_VALUES)
    assert address(again) == place
    again[:] = 1.0
    assert address(pool.empty(LEAST_VALUES + 1)) != place
    assert pool.empty(3).shape == (3,)


@pytest.mark.parametrize(
    "keep",
    [
        lambda vector: vector,
        lambda vector: vector[10:20],
        lambda vector: vector[10:20][2:3],
        lambda vector: vector.view(np.uint8),
        lambda vector: memoryview(vector)[5:6],
        lambda vector: vector[7:9].astype("<f4", copy=False).data.cast("B"),
        torch.from_numpy,
        lambda vector: torch.from_numpy(vector[3:4]).view(1, 1),
    ],
)
def test_whoever_holds_a_piece_keeps_the_whole(keep: Keep) -> None:
    """A view, a view of one, a memoryview or a tensor."""
    pool = Buffers()
    vector = pool.empty(LEAST_VALUES)
    place = address(vector)
    held = keep(vector)
    del vector
    assert address(pool.empty(LEAST_VALUES)) != place
    del held
    both = {address(pool.empty(LEAST_VALUES)) for _ in range(3)}
    assert place in both


def test_what_was_let_go_is_not_handed_out() -> None:
    """After `clear` vectors that are in use live on by themselves."""
    pool = Buffers()
    vector = pool.empty(LEAST_VALUES)
    pool.clear()
    assert address(pool.empty(LEAST_VALUES)) != address(vector)
