"""int2's bytes and what it loses."""

from __future__ import annotations

import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from peer.codec import decode, encode
from peer.codec.int2 import Int2
from tests.peer.codec.codec_cases import is_rejected, moderate, normal, vectors


def test_bytes_are_golden() -> None:
    """Scale 2^-12, half 2^14; byte 0 has the values 0, 2, 4, 6: 1 + 9 + 27; byte 1 has 1, 3, 5: 2 + 2 x 9."""
    vector = np.array([4, -4, 0, 0, 4, -4, 4], np.float32)
    part = Int2(7, 4096).encode_part(vector, 0)
    assert part.hex() == "0000803900742514"
    assert np.array_equal(decode(Int2(7, 4096), [part]), vector)


def least_error(group: np.ndarray) -> float:
    """The least squared error of a ternary group, by trying every number of values that aren't zero."""
    ranked = np.sort(np.abs(group.astype(np.float64)))[::-1]
    return float((ranked**2).sum() - max(ranked[:count].sum() ** 2 / count for count in range(1, group.size + 1)))


@given(vectors(100, moderate))
@settings(max_examples=150, deadline=None)
def test_no_scale_would_lose_less(vector: np.ndarray) -> None:
    """The squared error of every group is the least possible, but for the scale's rounding."""
    codec = Int2(vector.size, 4096)
    decoded = decode(codec, encode(codec, vector)).astype(np.float64)
    for start in range(0, vector.size, 32):
        group = vector[start : start + 32].astype(np.float64)
        error = np.sum((decoded[start : start + 32] - group) ** 2)
        rounding = np.sum(group**2) * 1e-3 + (np.abs(vector.astype(np.float64)).max() * 2.0**-16) ** 2
        assert error <= least_error(group) + rounding


def test_a_normal_update_loses_less_than_a_fifth() -> None:
    """0.178 of the energy; the textbook threshold of 0.7 x mean loses 0.182."""
    vector = normal(1 << 16)
    decoded = decode(Int2(1 << 16, 1 << 15), encode(Int2(1 << 16, 1 << 15), vector))
    assert np.sum((decoded - vector) ** 2) / np.sum(vector**2) < 0.18


@given(arrays(np.int8, st.integers(1, 200), elements=st.integers(-1, 1)))
@settings(max_examples=100, deadline=None)
def test_packing_loses_nothing(integers: np.ndarray) -> None:
    """Five trits to a byte and back, for every length."""
    codec = Int2(integers.size, 4096)
    packed = codec.pack(integers)
    assert len(packed) == codec.packed_bytes(integers.size)
    trits = [byte // 3**place % 3 for place in range(5) for byte in packed]
    assert [trit - 3 * (trit == 2) for trit in trits][: integers.size] == integers.tolist()
    assert np.array_equal(codec.unpack(np.frombuffer(packed, np.uint8), integers.size)[: integers.size], integers)


@pytest.mark.parametrize("byte", [243, 244, 250, 255])
def test_bytes_above_242_are_rejected(byte: int) -> None:
    """Five trits have 243 values."""
    is_rejected(Int2(5, 4096), struct.pack("<fHB", 1.0, 0x3C00, byte), "out of range")
    assert Int2(5, 4096).decode_part(struct.pack("<fHB", 1.0, 0x3C00, 242), 0).tolist() == [-1] * 5


@pytest.mark.parametrize(("values", "byte"), [(1, 3), (4, 81), (2, 18)])
def test_padding_that_isnt_zero_is_rejected(values: int, byte: int) -> None:
    """Trits behind the last value are zero."""
    is_rejected(Int2(values, 4096), struct.pack("<fHB", 1.0, 0x3C00, byte), "out of range")


def test_values_under_a_scale_of_zero_are_rejected() -> None:
    """They would be zeros in other bytes."""
    is_rejected(Int2(5, 4096), struct.pack("<fHB", 1.0, 0, 1), "scale is zero")
