"""What holds for every lossy codec: lengths, determinism, and refusal of what strangers send."""

from __future__ import annotations

import contextlib
import hashlib
import os
import struct
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from peer.codec import Codec, decode, encode, make_codec
from swarm import manifest
from swarm.errors import Rejected
from tests.peer.codec.codec_cases import allocating_at_most, damaged, is_rejected, normal, vectors

PART = 4096
KINDS = ("int8", "int4", "int2", "sparse")
LARGEST = float(np.finfo(np.float32).max)
flips = st.lists(st.tuples(st.integers(0, 1 << 20), st.integers(1, 255)), min_size=1, max_size=6)


def made(kind: str, values: int, part_values: int = PART) -> Codec:
    return make_codec(manifest.Codec.model_validate({"kind": kind, "part_values": part_values}), values)


@pytest.mark.parametrize(
    ("kind", "topology", "bits"), [("int8", "butterfly", 8.07), ("int4", "butterfly", 4.26), ("int2", "butterfly", 2.11),
                                   ("sparse", "all_gather", 0.165)]
)  # fmt: skip
def test_the_manifest_names_the_codec(kind: str, topology: str, bits: float) -> None:
    """Kind, topology, and bits per value with all headers at the default part size."""
    codec = made(kind, 3 << 17, 1 << 17)
    assert (codec.kind, codec.topology) == (kind, topology)
    assert sum(len(part) for part in encode(codec, normal(3 << 17))) * 8 / (3 << 17) <= bits


@pytest.mark.parametrize("changes", [{"kind": "int3"}, {"density_top_k": 3}, {"density_top_k": 1025}, {"part_values": 4097}])
def test_a_manifest_with_another_codec_isnt_valid(changes: dict[str, object]) -> None:
    """Kinds, densities and part sizes are those that every client has."""
    with pytest.raises(ValidationError):
        manifest.Codec.model_validate(changes)


@pytest.mark.parametrize("kind", KINDS)
@given(size=st.integers(1, 9000), seed=st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_every_length_travels(kind: str, size: int, seed: int) -> None:
    """Parts have exactly the announced size, and decode to the right number of values."""
    codec, vector = made(kind, size), normal(size, seed)
    parts = encode(codec, vector)
    assert [len(part) for part in parts] == [codec.part_size_limit(index) for index in range(codec.part_count)]
    decoded = decode(codec, parts)
    assert decoded.shape == vector.shape
    assert decoded.dtype == np.float32
    assert np.sum((decoded - vector).astype(np.float64) ** 2) <= np.sum(vector.astype(np.float64) ** 2)


@pytest.mark.parametrize("kind", KINDS)
@given(vector=vectors(300))
@example(vector=np.full(3, LARGEST, np.float32))
@example(vector=np.full(70, -LARGEST, np.float32))
@example(vector=np.array([LARGEST, 1e-45, -0.0], np.float32))
@settings(max_examples=80, deadline=None)
def test_whatever_is_encoded_can_be_decoded(kind: str, vector: np.ndarray) -> None:
    """No finite vector makes a part that a receiver refuses, or values that aren't finite."""
    codec = made(kind, vector.size)
    decoded = decode(codec, encode(codec, vector))
    assert np.isfinite(decoded).all()
    assert float(np.abs(decoded).max()) <= float(np.abs(vector).max()) * (1 + 2.0**-10) + 2.0**-149


@pytest.mark.parametrize("kind", KINDS)
def test_zeros_travel_as_zeros(kind: str) -> None:
    """A joiner's empty update is nothing but zeros."""
    assert not decode(made(kind, 5000), encode(made(kind, 5000), np.zeros(5000, np.float32))).any()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("magnitude", [1e-36, 1e-20, 1e-6, 1.0, 1e30])
def test_magnitude_doesnt_matter(kind: str, magnitude: float) -> None:
    """An update and the same one times a power of two lose the same share."""
    power = np.float32(2.0 ** round(np.log2(magnitude)))
    codec, vector = made(kind, 5000), normal(5000, scale=1.0)
    assert np.array_equal(decode(codec, encode(codec, vector * power)), decode(codec, encode(codec, vector)) * power)


@pytest.mark.parametrize("kind", KINDS)
def test_encoding_depends_on_the_values_only(kind: str) -> None:
    """The same values give the same bytes: in any thread, from any memory layout, at any alignment."""
    vector = normal(1 << 15)
    codec = made(kind, vector.size)
    shifted = np.concatenate([np.zeros(1, np.float32), vector])[1:]
    strided = np.repeat(vector, 2)[::2]
    with ThreadPoolExecutor(4) as pool:
        encoded = list(pool.map(lambda values: encode(codec, values), [vector, shifted, strided] * 3))
    assert all(parts == encoded[0] for parts in encoded)


DIGESTS = {
    "int8": "164772c4f13b678eec2a129025ecb751",
    "int4": "bc0ec93e405ee7d4bd7b21aea1e7fd54",
    "int2": "941453f8762720a950f1d31ddf13d87d",
    "sparse": "7847e464d7a7eacf9f12537902d02b73",
}


def digest(kind: str) -> str:
    """Of 100,000 encoded values, exact in float32, of very different magnitude and with repetitions."""
    state = (np.arange(100_000, dtype=np.uint64) * np.uint64(2862933555777941757) + np.uint64(3037000493)) >> np.uint64(44)
    base = (state.astype(np.float32) - np.float32(1 << 19)) * np.float32(2.0**-30)
    vector = base * base * base
    return hashlib.blake2b(b"".join(encode(made(kind, vector.size, 1 << 15), vector)), digest_size=16).hexdigest()


@pytest.mark.parametrize("kind", KINDS)
def test_many_values_have_golden_bytes(kind: str) -> None:
    """Steps are IEEE operations in a fixed order, so that every machine has to agree."""
    assert digest(kind) == DIGESTS[kind]


def test_processors_without_vector_units_encode_alike() -> None:
    """The same with all of numpy's optional instruction sets switched off."""
    found = np.show_config(mode="dicts")["SIMD Extensions"]["found"]
    if not found:
        pytest.skip("numpy uses no optional instruction sets here")
    program = f"from {Path(__file__).stem} import KINDS, digest; print(*map(digest, KINDS))"
    environment = os.environ | {"NPY_DISABLE_CPU_FEATURES": " ".join(found), "PYTHONPATH": str(Path(__file__).parent)}
    result = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert result.stdout.split() == [DIGESTS[kind] for kind in KINDS]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_an_update_that_isnt_finite_isnt_sent(kind: str, value: float) -> None:
    """The sender notices before anyone else."""
    vector = np.zeros(500, np.float32)
    vector[77] = value
    with pytest.raises(ValueError, match="not finite"):
        encode(made(kind, 500), vector)


@pytest.mark.parametrize("kind", KINDS)
def test_a_part_of_another_length_isnt_encoded(kind: str) -> None:
    """Part 1 of 5000 values has 904."""
    with pytest.raises(ValueError, match="904 values"):
        made(kind, 5000).encode_part(np.zeros(905, np.float32), 1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", [float("nan"), float("inf"), 0.0, -1.0, 3.0, 2.0**113, 2.0**-127])
def test_a_scale_that_no_honest_sender_makes_is_rejected(kind: str, scale: float) -> None:
    """The part's scale is a power of two in range."""
    part = encode(made(kind, 500), normal(500))[0]
    is_rejected(made(kind, 500), struct.pack("<f", scale) + part[4:], "power of two")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("half", [0x7C00, 0x7E00, 0x8000, 0x8001, 0xBC00, 0xFFFF])
def test_a_groups_scale_is_finite_and_not_negative(kind: str, half: int) -> None:
    """Infinity, NaN, -0, negative numbers."""
    part = encode(made(kind, 500), normal(500))[0]
    is_rejected(made(kind, 500), part[:4] + struct.pack("<H", half) + part[6:], "negative or not finite")


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_scales_whose_product_overflows_are_rejected(kind: str) -> None:
    """Each scale is allowed, the values together would be infinite."""
    part = encode(made(kind, 500), normal(500))[0]
    is_rejected(made(kind, 500), struct.pack("<fH", 2.0**112, 0x7BFF) + part[6:], "not finite")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", ["none", "one_less", "one_more", "a_bomb"])
def test_another_length_is_rejected_before_memory_is_taken(kind: str, size: str) -> None:
    """Every part has one length."""
    codec = made(kind, 1 << 21, 1 << 21)
    limit = codec.part_size_limit(0)
    content = bytes({"none": 0, "one_less": limit - 1, "one_more": limit + 1, "a_bomb": 16 * limit}[size])
    with allocating_at_most(100_000):
        is_rejected(codec, content, f"bytes instead of {limit}")


def decoded_or_rejected(codec: Codec, content: bytes, index: int) -> None:
    with contextlib.suppress(Rejected):
        values = codec.decode_part(content, index)
        start, end = codec.part_span(index)
        assert values.shape == (end - start,)
        assert values.dtype == np.float32
        assert np.isfinite(values).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("byte", [0x00, 0x55, 0xFF])
def test_no_part_takes_much_memory(kind: str, byte: int) -> None:
    """Decoding takes at most a few times the memory of the values, whatever the bytes are."""
    codec = made(kind, 1 << 20, 1 << 20)
    content = struct.pack("<f", 1.0) + bytes([byte]) * (codec.part_size_limit(0) - 4)
    with allocating_at_most(5 * (4 << 20)):
        decoded_or_rejected(codec, content, 0)


@pytest.mark.parametrize("kind", KINDS)
@given(content=st.binary(max_size=400), index=st.integers(0, 1))
@settings(max_examples=80, deadline=None)
def test_arbitrary_bytes_decode_or_are_rejected(kind: str, content: bytes, index: int) -> None:
    """No bytes from a stranger raise anything but `Rejected`."""
    decoded_or_rejected(made(kind, PART + 40), content, index)


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data(), size=st.sampled_from([1, 7, 40, 257, 4095]))
@settings(max_examples=80, deadline=None)
def test_arbitrary_bytes_of_the_right_length_decode_or_are_rejected(kind: str, data: st.DataObject, size: int) -> None:
    """The same where the length and the scale give nothing away."""
    codec = made(kind, size)
    length = codec.part_size_limit(0) - 4
    seed = data.draw(st.integers(0, 1 << 32))
    body = data.draw(st.binary(min_size=length, max_size=length)) if length < 300 else np.random.default_rng(seed).bytes(length)
    decoded_or_rejected(codec, struct.pack("<f", 2.0 ** data.draw(st.integers(-126, 112))) + body, 0)


@pytest.mark.parametrize("kind", KINDS)
@given(flips=flips, cut=st.integers(-3, 3), size=st.sampled_from([1, 33, 4096, 4200]))
@settings(max_examples=80, deadline=None)
def test_damaged_parts_decode_or_are_rejected(kind: str, flips: list[tuple[int, int]], cut: int, size: int) -> None:
    """A few changed, missing or added bytes."""
    codec = made(kind, size)
    for index, part in enumerate(encode(codec, normal(size))):
        content = damaged(part, flips)
        decoded_or_rejected(codec, content[:cut] if cut < 0 else content + bytes(cut), index)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", [bytes, bytearray, memoryview])
def test_any_buffer_is_decoded(kind: str, form: type) -> None:
    """Blobs come as bytes, or as views of something larger."""
    codec, vector = made(kind, 500), normal(500)
    part = codec.encode_part(vector, 0)
    assert np.array_equal(codec.decode_part(form(part), 0), codec.decode_part(part, 0))
