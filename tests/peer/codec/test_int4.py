"""int4's bytes and what it loses."""

from __future__ import annotations

import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from peer.codec import decode, encode
from peer.codec.int4 import Int4
from tests.peer.codec.codec_cases import is_rejected, moderate, vectors


def test_bytes_are_golden() -> None:
    """Scale 2^-14, half 2^14; nibbles 7, -3 (d), 0, 1, 2, -7 (9), the even one in the low half; an odd last one is alone."""
    vector = np.array([7, -3, 0, 1, 2, -7, 5], np.float32)
    assert Int4(6, 4096).encode_part(vector[:6], 0).hex() == "000080380074d71092"
    assert Int4(7, 4096).encode_part(vector, 0).hex() == "000080380074d7109205"
    assert np.array_equal(decode(Int4(7, 4096), encode(Int4(7, 4096), vector)), vector)


@given(vectors(300, moderate))
@settings(max_examples=150, deadline=None)
def test_every_value_is_within_half_a_step(vector: np.ndarray) -> None:
    """A step is 1/7 of the group's largest magnitude."""
    codec = Int4(vector.size, 4096)
    decoded = decode(codec, encode(codec, vector)).astype(np.float64)
    for start in range(0, vector.size, 64):
        group = vector[start : start + 64].astype(np.float64)
        allowed = np.abs(group).max() / 7 * (0.5 + 7 * 2.0**-11) + np.abs(vector).max() * 2.0**-30
        assert (np.abs(decoded[start : start + 64] - group) <= allowed).all()


@given(arrays(np.int8, st.integers(1, 200), elements=st.integers(-7, 7)))
@settings(max_examples=100, deadline=None)
def test_packing_loses_nothing(integers: np.ndarray) -> None:
    """Two nibbles to a byte and back, for even and odd lengths."""
    codec = Int4(integers.size, 4096)
    packed = codec.pack(integers)
    nibbles = [nibble for byte in packed for nibble in (byte & 15, byte >> 4)]
    assert [nibble - 16 * (nibble > 7) for nibble in nibbles][: integers.size] == integers.tolist()
    assert np.array_equal(codec.unpack(np.frombuffer(packed, np.uint8), integers.size)[: integers.size], integers)


@pytest.mark.parametrize("byte", [0x08, 0x80, 0x18, 0x81])
def test_minus_8_is_rejected(byte: int) -> None:
    """Integers are symmetric."""
    is_rejected(Int4(2, 4096), struct.pack("<fHB", 1.0, 0x3C00, byte), "out of range")


def test_padding_that_isnt_zero_is_rejected() -> None:
    """Behind an odd number of values there is a zero."""
    is_rejected(Int4(3, 4096), struct.pack("<fHBB", 1.0, 0x3C00, 0x11, 0x11), "out of range")


def test_values_under_a_scale_of_zero_are_rejected() -> None:
    """They would be zeros in other bytes."""
    is_rejected(Int4(65, 4096), struct.pack("<fHH", 1.0, 0x3C00, 0) + b"\x11" * 32 + b"\x01", "scale is zero")
