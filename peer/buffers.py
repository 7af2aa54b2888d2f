"""Long vectors whose memory is used again: a model's worth of fresh memory costs more than most of what is done with it.

The system clears every page that it hands out, and takes back those of large arrays as soon as they are freed. So the few vectors
that every round needs are kept, and handed out again once nobody refers to them.
"""

from __future__ import annotations

import sys
from threading import Lock

import numpy as np
from numpy.typing import NDArray

LEAST_VALUES = 1 << 18
UNUSED_REFERENCES = 3  # the list's, the loop's and the counter's own

Vector = NDArray[np.float32]


class Buffers:
    """Hands out vectors like `numpy.empty`. A view, a tensor or a memoryview of one refers to it, so it isn't taken from them."""

    def __init__(self) -> None:
        self._vectors: list[Vector] = []
        self._lock = Lock()

    def empty(self, values: int) -> Vector:
        """A vector of so many float32 with anything in it."""
        if values < LEAST_VALUES:
            return np.empty(values, dtype=np.float32)
        with self._lock:
            for vector in self._vectors:
                if vector.size == values and sys.getrefcount(vector) <= UNUSED_REFERENCES:
                    vector.setflags(write=True)
                    return vector
            fresh: Vector = np.empty(values, dtype=np.float32)
            self._vectors.append(fresh)
            return fresh

    def clear(self) -> None:
        """Let go of all that nobody refers to, and keep track of none of the others."""
        with self._lock:
            self._vectors.clear()


buffers = Buffers()
