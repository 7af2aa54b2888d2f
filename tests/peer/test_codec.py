"""How updates travel: the contract of codecs, and fp16's bytes."""

from __future__ import annotations

import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from peer.codec import decode, encode, make_codec
from peer.codec.fp16 import Fp16
from swarm import manifest
from swarm.errors import Rejected

PART = 4096
finite = st.floats(width=32, allow_nan=False, allow_infinity=False)
vectors = st.integers(1, 40).flatmap(lambda size: arrays(np.float32, size, elements=finite))


def small(values: int, part_values: int = 16) -> Fp16:
    return Fp16(values, part_values)


def test_the_manifests_codec_is_made() -> None:
    """The manifest decides kind and part size."""
    codec = make_codec(manifest.Codec(kind="fp16", part_values=PART), 3 * PART + 1)
    assert (codec.kind, codec.topology, codec.part_count) == ("fp16", "butterfly", 4)
    assert [codec.part_span(index) for index in (0, 3)] == [(0, PART), (3 * PART, 3 * PART + 1)]
    assert [codec.part_size_limit(index) for index in (0, 3)] == [4 + 2 * PART, 6]


def test_fp16_bytes_are_golden() -> None:
    """Scale 2^-13 as float32, then the halves 8192, -16384 and 4096, all little-endian."""
    codec = small(3)
    part = codec.encode_part(np.array([1.0, -2.0, 0.5], np.float32), 0)
    assert part.hex() == "00000039007000f4006c"
    assert codec.decode_part(part, 0).tolist() == [1.0, -2.0, 0.5]


@given(vectors)
@settings(max_examples=150, deadline=None)
def test_decoding_is_close_in_relation_to_the_largest_value(vector: np.ndarray) -> None:
    """Every value is within 2^-11 of itself or 2^-39 of the part's largest, unless float32 itself runs out."""
    codec = small(vector.size)
    decoded = decode(codec, encode(codec, vector))
    for index in range(codec.part_count):
        span = slice(*codec.part_span(index))
        largest = np.abs(vector[span].astype(np.float64)).max()
        allowed = np.maximum(np.abs(vector[span].astype(np.float64)) * 2**-11, largest * 2.0**-38) + 2.0**-149
        assert (np.abs(decoded[span].astype(np.float64) - vector[span]) <= allowed).all()


@given(vectors)
@settings(max_examples=80, deadline=None)
def test_a_decoded_vector_encodes_to_the_same_values(vector: np.ndarray) -> None:
    """What has travelled once travels again without loss, so that a relayed merge has the same bits."""
    codec = small(vector.size)
    once = decode(codec, encode(codec, vector))
    assert np.array_equal(decode(codec, encode(codec, once)), once)


@given(vectors)
@settings(max_examples=80, deadline=None)
def test_parts_never_exceed_their_size_limit(vector: np.ndarray) -> None:
    """A receiver knows the size before it asks."""
    codec = small(vector.size)
    parts = encode(codec, vector)
    assert all(len(part) <= codec.part_size_limit(index) for index, part in enumerate(parts))


@pytest.mark.parametrize("magnitude", [1e-30, 1e-12, 1e-5, 1.0, 1e10, 3.4e38])
def test_no_magnitude_underflows_or_overflows(magnitude: float) -> None:
    """The scale follows the part, so that gradients of 1e-30 keep three digits."""
    vector = np.array([1.0, -0.5, 0.013], np.float32) * np.float32(magnitude)
    decoded = decode(small(3), encode(small(3), vector))
    assert np.isfinite(decoded).all()
    assert np.allclose(decoded, vector, rtol=1e-3, atol=0)


def test_zeros_and_subnormal_values_travel() -> None:
    """A joiner's empty update is fine, and so are the smallest numbers."""
    codec = small(3)
    assert decode(codec, encode(codec, np.zeros(3, np.float32))).tolist() == [0, 0, 0]
    tiny = np.array([2.0**-140, 0, -(2.0**-149)], np.float32)
    assert np.array_equal(decode(codec, encode(codec, tiny)), tiny)


def test_parts_of_different_magnitude_have_their_own_scale() -> None:
    """A large part doesn't cost a small one its digits."""
    vector = np.concatenate([np.full(16, 1e20), np.full(16, 1e-20)]).astype(np.float32)
    assert np.allclose(decode(small(32), encode(small(32), vector)), vector, rtol=1e-3)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_an_update_that_isnt_finite_isnt_sent(value: float) -> None:
    """The sender notices before anyone else."""
    with pytest.raises(ValueError, match="not finite"):
        encode(small(2), np.array([1.0, value], np.float32))


@pytest.mark.parametrize("size", [1, 3])
def test_a_vector_of_another_length_isnt_encoded(size: int) -> None:
    """A vector of another model never becomes parts."""
    with pytest.raises(ValueError, match="2 values"):
        encode(small(2), np.zeros(size, np.float32))
    with pytest.raises(ValueError, match="2 values"):
        small(2).encode_part(np.zeros(size, np.float32), 0)


GOOD = small(2).encode_part(np.array([1.0, 2.0], np.float32), 0)
BAD_PARTS = {
    "empty": b"",
    "too_short": GOOD[:-1],
    "too_long": GOOD + b"\0",
    "infinite_value": GOOD[:4] + struct.pack("<HH", 0x7C00, 0),
    "nan_value": GOOD[:4] + struct.pack("<HH", 0, 0x7E00),
    "nan_scale": struct.pack("<f", float("nan")) + GOOD[4:],
    "infinite_scale": struct.pack("<f", float("inf")) + GOOD[4:],
    "zero_scale": struct.pack("<f", 0.0) + GOOD[4:],
    "negative_scale": struct.pack("<f", -1.0) + GOOD[4:],
    "scale_no_power_of_two": struct.pack("<f", 3.0) + GOOD[4:],
    "scale_that_overflows": struct.pack("<f", 2.0**113) + GOOD[4:],
    "subnormal_scale": struct.pack("<f", 2.0**-127) + GOOD[4:],
}


@pytest.mark.parametrize("name", BAD_PARTS)
def test_a_bad_part_is_rejected(name: str) -> None:
    """Wrong lengths, values that aren't finite and scales that no honest sender makes are refused at the edge."""
    with pytest.raises(Rejected) as raised:
        small(2).decode_part(BAD_PARTS[name], 0)
    assert raised.value.reason == "bad_part"


@given(st.binary(max_size=60), st.integers(0, 1))
@settings(max_examples=200, deadline=None)
def test_arbitrary_bytes_decode_to_finite_values_or_are_rejected(data: bytes, index: int) -> None:
    """No bytes from a stranger give anything but the right number of finite values."""
    codec = small(24)
    try:
        values = codec.decode_part(data, index)
    except Rejected:
        return
    start, end = codec.part_span(index)
    assert values.shape == (end - start,)
    assert np.isfinite(values).all()


@given(arrays(np.uint16, 8), st.integers(-126, 112))
@settings(max_examples=100, deadline=None)
def test_any_finite_halves_under_any_allowed_scale_stay_finite(halves: np.ndarray, exponent: int) -> None:
    """The bound on the scale is tight enough that decoding can't overflow."""
    halves = np.where((halves & 0x7C00) == 0x7C00, halves & 0x83FF, halves).astype("<u2")
    decoded = small(8).decode_part(struct.pack("<f", 2.0**exponent) + halves.tobytes(), 0)
    assert np.isfinite(decoded).all()


@pytest.mark.parametrize("index", [-1, 2])
def test_there_are_no_other_parts(index: int) -> None:
    """A part index from a stranger is checked."""
    with pytest.raises(IndexError):
        small(24).decode_part(b"", index)


def test_a_missing_part_is_rejected() -> None:
    """A vector needs all its parts."""
    codec = small(24)
    with pytest.raises(Rejected, match="1 parts instead of 2"):
        decode(codec, encode(codec, np.zeros(24, np.float32))[:1])
