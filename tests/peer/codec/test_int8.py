"""int8's bytes and what it loses."""

from __future__ import annotations

import struct

import numpy as np
from hypothesis import given, settings

from peer.codec import decode, encode
from peer.codec.int8 import Int8
from tests.peer.codec.codec_cases import is_rejected, moderate, normal, vectors


def test_bytes_are_golden() -> None:
    """Scale 2^-20 as float32, 2^14 as half (their product is 1/64), then 64, -32, 16, 0 and 127."""
    codec = Int8(5, 4096)
    vector = np.array([1.0, -0.5, 0.25, 0, 127 / 64], np.float32)
    part = codec.encode_part(vector, 0)
    assert part.hex() == "00008035007440e010007f"
    assert np.array_equal(codec.decode_part(part, 0), vector)


@given(vectors(600, moderate))
@settings(max_examples=150, deadline=None)
def test_every_value_is_within_half_a_step(vector: np.ndarray) -> None:
    """A step is 1/127 of the group's largest magnitude; scales are rounded to 11 bits, or to 2^-38 of the part's largest."""
    codec = Int8(vector.size, 4096)
    decoded = decode(codec, encode(codec, vector)).astype(np.float64)
    for start in range(0, vector.size, 256):
        group = vector[start : start + 256].astype(np.float64)
        step = np.abs(group).max() / 127
        allowed = step * (0.5 + 127 * 2.0**-11) + np.abs(vector).max() * 2.0**-30
        assert (np.abs(decoded[start : start + 256] - group) <= allowed).all()


def test_halves_are_rounded_to_even() -> None:
    """127 makes the step 1, so that .5 lies in the middle."""
    codec = Int8(6, 4096)
    vector = np.array([127, 0.5, 1.5, 2.5, -0.5, -1.5], np.float32)
    assert decode(codec, encode(codec, vector)).tolist() == [127, 0, 2, 2, 0, -2]


def test_groups_have_their_own_scale() -> None:
    """256 large values don't cost the next 256 their digits."""
    vector = normal(1024)
    vector[:256] *= 1000
    decoded = decode(Int8(1024, 4096), encode(Int8(1024, 4096), vector))
    assert np.abs(decoded - vector)[256:].max() <= np.abs(vector[256:]).max() / 200


def test_minus_128_is_rejected() -> None:
    """Integers are symmetric."""
    is_rejected(Int8(2, 4096), struct.pack("<fHbb", 1.0, 0x3C00, 1, -128), "out of range")


def test_values_under_a_scale_of_zero_are_rejected() -> None:
    """They would be zeros in other bytes."""
    is_rejected(Int8(2, 4096), struct.pack("<fHbb", 1.0, 0, 0, 1), "scale is zero")
