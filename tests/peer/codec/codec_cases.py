"""What the codecs' tests have in common: vectors, damaged parts, and a bound on what decoding allocates."""

from __future__ import annotations

import contextlib
import tracemalloc
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from peer.codec import Codec
from swarm.errors import Rejected

finite = st.floats(width=32, allow_nan=False, allow_infinity=False)
moderate = st.floats(-1e6, 1e6, width=32, allow_subnormal=False)


def vectors(longest: int, elements: st.SearchStrategy[float] = finite) -> st.SearchStrategy[np.ndarray]:
    """Float32 vectors of 1 to `longest` values."""
    return st.integers(1, longest).flatmap(lambda size: arrays(np.float32, size, elements=elements))


def normal(size: int, seed: int = 0, scale: float = 1e-3) -> np.ndarray:
    """Values as of a pseudo-gradient."""
    return (np.random.default_rng(seed).standard_normal(size) * scale).astype(np.float32)


def is_rejected(codec: Codec, part: bytes, match: str = "") -> None:
    """Part 0 is refused as `bad_part` with this explanation."""
    with pytest.raises(Rejected, match=match) as raised:
        codec.decode_part(part, 0)
    assert raised.value.reason == "bad_part"


def damaged(part: bytes, flips: list[tuple[int, int]]) -> bytes:
    """`part` with the byte at each place (modulo its length) xored."""
    content = bytearray(part)
    for place, mask in flips:
        content[place % len(content)] ^= mask
    return bytes(content)


@contextlib.contextmanager
def allocating_at_most(limit_bytes: int) -> Iterator[None]:
    """The block's peak of traced memory stays below the limit."""
    tracemalloc.start()
    try:
        yield
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak <= limit_bytes
