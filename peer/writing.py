"""What a model goes on with after a prompt, drawn by numbers that everybody draws alike, on whatever device.

The likeliest token alone would let small models repeat themselves for ever (Holtzman et al., 2020).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

TEMPERATURE = 0.7
NUMBER_BYTES = 8

Logits = NDArray[np.float32]


def drawn_numbers(key: bytes, place: int, count: int) -> list[float]:
    """So many numbers from 0 to 1 for the prompt at this place."""
    stream = hashlib.shake_256(key + place.to_bytes(2, "big")).digest(NUMBER_BYTES * count)
    starts = range(0, len(stream), NUMBER_BYTES)
    return [int.from_bytes(stream[start : start + NUMBER_BYTES], "big") / 2.0**64 for start in starts]


def draw(logits: Logits, number: float) -> int:
    """The token that a number from 0 to 1 stands for, by what is expected, [vocabulary]."""
    scaled = logits.astype(np.float64) / TEMPERATURE
    sums = np.cumsum(np.exp(scaled - scaled.max()))
    return min(int(np.searchsorted(sums, number * sums[-1], side="right")), len(sums) - 1)


def continuation(
    logits_after: Callable[[Sequence[int]], Logits],
    prompt: Sequence[int],
    numbers: Sequence[float],
    end: int | None,
    context: int,
) -> list[int]:
    """A token for each number, as far as the text goes on; the model sees the last `context` ones. Nothing after no prompt."""
    written: list[int] = []
    for number in numbers if prompt else ():
        token = draw(logits_after([*prompt, *written][-context:]), number)
        if token == end:
            break
        written.append(token)
    return written
