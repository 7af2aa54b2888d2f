"""sparse: which values travel, their bytes, and what is refused."""

from __future__ import annotations

import struct

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from peer.codec import decode, encode, make_codec
from peer.codec import sparse as module
from peer.codec.sparse import CHUNK_VALUES, Sparse, strongest
from peer.merge import merge_pairs, merge_part, weighted_mean
from swarm import manifest
from swarm.manifest import Mean
from tests.peer.codec.codec_cases import is_rejected, normal

densities = st.sampled_from([4, 5, 64, 100, 1000, 1024])


def test_bytes_are_golden() -> None:
    """Top-4 of 4096: 8 at 3, 2 at 7, -2 at 100, -8 at 4095.

    Scale 2^-11; levels 2^12 and 2^14; (upper, negative) 10 00 01 11; ten low bits each of 3, 7, 100, 1023; ones at 0, 1, 2
    and 3 + 3 for the high rests 0, 0, 0, 3.
    """
    codec = Sparse(CHUNK_VALUES, CHUNK_VALUES, 4)
    vector = np.zeros(CHUNK_VALUES, np.float32)
    vector[[3, 7, 100, 4095]] = [8, 2, -2, -8]
    part = codec.encode_part(vector, 0)
    assert part.hex() == "0000003a006c0074e1031c40c6ff47"
    assert np.array_equal(codec.decode_part(part, 0), vector)


def reference(codec: Sparse, part: bytes) -> list[float]:
    """Part 0 decoded value by value, as the module's description says."""
    length = codec.part_length(0)
    out = [0.0] * length
    (scale,) = struct.unpack_from("<f", part)
    place = 4
    whole, rest = divmod(length, CHUNK_VALUES)
    sections = [(0, whole, CHUNK_VALUES, codec.top_k)] if whole else []
    sections += [(whole * CHUNK_VALUES, 1, rest, -(-rest * codec.top_k // CHUNK_VALUES))] if rest else []
    for start, chunks, chunk_length, kept in sections:
        low_bits = int(np.floor(np.log2(chunk_length / kept)))
        width = kept + ((chunk_length - 1) >> low_bits)
        levels = struct.unpack_from(f"<{2 * chunks}e", part, place)
        place += 4 * chunks
        tables = []
        for count in (2 * chunks * kept, low_bits * chunks * kept, chunks * width):
            raw = part[place : place + -(-count // 8)]
            tables.append([raw[bit // 8] >> bit % 8 & 1 for bit in range(count)])
            place += len(raw)
        pairs, low, high = tables
        for chunk in range(chunks):
            ones = [bit for bit in range(width) if high[chunk * width + bit]]
            for nth, one in enumerate(ones):
                value = chunk * kept + nth
                index = (one - nth << low_bits) + sum(low[value * low_bits + bit] << bit for bit in range(low_bits))
                level = levels[2 * chunk + pairs[2 * value]] * scale
                out[start + chunk * chunk_length + index] = -level if pairs[2 * value + 1] else level
    assert place == len(part)
    return out


@given(st.integers(1, 3 * CHUNK_VALUES), densities, st.integers(0, 9))
@example(CHUNK_VALUES, 1024, 0)
@example(1, 4, 0)
@settings(max_examples=30, deadline=None)
def test_bytes_mean_what_the_description_says(size: int, top_k: int, seed: int) -> None:
    """A slow decoder written from the description agrees, for every length and density."""
    codec = Sparse(size, 1 << 14, top_k)
    part = codec.encode_part(normal(size, seed), 0)
    assert codec.decode_part(part, 0).tolist() == reference(codec, part)


@given(st.integers(1, 3), st.sampled_from([4096, 500]), densities, st.integers(1, 1000), st.integers(0, 99))
@example(2, 4096, 64, 1, 0)
@settings(max_examples=80, deadline=None)
def test_the_strongest_are_those_of_a_stable_sort(chunks: int, length: int, top_k: int, different: int, seed: int) -> None:
    """Of equal magnitudes the lowest indices travel, with few or many of them."""
    kept = min(top_k, length)
    magnitudes = np.random.default_rng(seed).integers(0, different, (chunks, length)).astype(np.float32)
    expected = np.sort(np.argsort(-magnitudes, axis=1, kind="stable")[:, :kept], axis=1)
    assert np.array_equal(strongest(magnitudes, kept), expected)
    assert np.array_equal(module._strongest_by_threshold(magnitudes, kept), expected)


def test_strong_values_may_lie_close_together() -> None:
    """All of the strongest in one column of a matrix of width 256, which the search for candidates takes for one group."""
    magnitudes = np.abs(normal(CHUNK_VALUES)).reshape(1, -1)
    magnitudes[0, 5::256] = 1
    magnitudes[0, 64:120] = 2
    expected = np.sort(np.argsort(-magnitudes, axis=1, kind="stable")[:, :64], axis=1)
    assert np.array_equal(strongest(magnitudes, 64), expected)


@given(st.integers(1, 9000), densities, st.integers(0, 9))
@settings(max_examples=40, deadline=None)
def test_the_right_number_of_values_travels(size: int, top_k: int, seed: int) -> None:
    """`top_k` of each whole chunk; of a shorter one as many per value, rounded up."""
    codec = Sparse(size, 8192, top_k)
    sent = np.count_nonzero(decode(codec, encode(codec, normal(size, seed))))
    assert sent == size // CHUNK_VALUES * top_k + -(-(size % CHUNK_VALUES) * top_k // CHUNK_VALUES)


def test_signs_are_kept_and_magnitudes_nearly() -> None:
    """Two levels lose half a percent of the energy of the strongest 64 of 4096 normal values."""
    vector = normal(1 << 16)
    decoded = decode(Sparse(1 << 16, 1 << 15), encode(Sparse(1 << 16, 1 << 15), vector))
    sent = decoded != 0
    assert np.array_equal(np.sign(decoded[sent]), np.sign(vector[sent]))
    assert np.sum((decoded - vector)[sent] ** 2) / np.sum(vector[sent] ** 2) < 0.006


def test_bits_per_parameter_grow_with_the_density() -> None:
    """All headers included: 0.25 would be allowed at top-64."""
    sizes = {top_k: Sparse(1 << 17, 1 << 17, top_k).part_size_limit(0) * 8 / (1 << 17) for top_k in (16, 64, 256)}
    assert sizes[16] < 0.06
    assert sizes[64] < 0.165
    assert sizes[256] < 0.53


@given(st.lists(st.integers(0, 99), min_size=1, max_size=6), st.integers(1, 9000))
@settings(max_examples=40, deadline=None)
def test_merging_pairs_gives_the_bits_of_the_dense_mean(weights: list[int], size: int) -> None:
    """Where no norm is clipped, entries alone come to the same as whole vectors."""
    codec = Sparse(size, 1 << 14)
    parts = [codec.encode_part(normal(size, seed), 0) for seed in range(len(weights))]
    merged = merge_pairs([codec.decode_pairs(part, 0) for part in parts], weights, Mean(clip_ratio=10), size)
    assert merged.tobytes() == weighted_mean([codec.decode_part(part, 0) for part in parts], weights).tobytes()


def test_merging_pairs_clips_norms() -> None:
    """What is a thousand times as large as the others counts for no more than the manifest's multiple of their median."""
    codec = Sparse(9000, 1 << 14)
    vectors = [normal(9000, seed) * (1000 if seed == 2 else 1) for seed in range(3)]
    parts = [codec.encode_part(vector, 0) for vector in vectors]
    rule = Mean(clip_ratio=2.0)
    merged = merge_pairs([codec.decode_pairs(part, 0) for part in parts], [1, 1, 1], rule, 9000)
    dense = merge_part([codec.decode_part(part, 0) for part in parts], [1, 1, 1], rule)
    assert np.allclose(merged, dense, rtol=1e-6, atol=0)
    assert np.linalg.norm(merged) < np.linalg.norm(vectors[0]) * 2


def test_pairs_are_the_values_that_travelled() -> None:
    """Ascending places, over whole chunks and the shorter last one."""
    codec = Sparse(10_000, 1 << 14)
    part = codec.encode_part(normal(10_000), 0)
    places, values = codec.decode_pairs(part, 0)
    assert (np.diff(places) > 0).all()
    assert np.array_equal(codec.decode_part(part, 0)[places], values)


# --- zeros left out ---------------------------------------------------------------------------------------------------------


def without_zeros(size: int, top_k: int = 64) -> Sparse:
    return Sparse(size, 1 << 17, top_k, leave_out_zeros=True)


@given(st.lists(st.booleans(), min_size=1, max_size=12), st.integers(1, CHUNK_VALUES), densities)
@example([False], 5, 64)
@example([True], CHUNK_VALUES, 64)
@settings(max_examples=60, deadline=None)
def test_zeros_left_out_change_nothing_but_the_size(travels: list[bool], last: int, top_k: int) -> None:
    """The values are those of the plain codec; a chunk of zeros takes a bit."""
    size = (len(travels) - 1) * CHUNK_VALUES + last
    vector = normal(size)
    for chunk, travelling in enumerate(travels):
        if not travelling:
            vector[chunk * CHUNK_VALUES : (chunk + 1) * CHUNK_VALUES] = 0
    codec, plain = without_zeros(size, top_k), Sparse(size, 1 << 17, top_k)
    part, all_of_it = codec.encode_part(vector, 0), plain.encode_part(vector, 0)
    assert np.array_equal(codec.decode_part(part, 0), plain.decode_part(all_of_it, 0))
    places, values = codec.decode_pairs(part, 0)
    assert (np.diff(places) > 0).all()
    assert np.array_equal(codec.decode_part(part, 0)[places], values)
    bits = -(-len(travels) // 8)
    assert len(part) <= codec.part_size_limit(0) == plain.part_size_limit(0) + bits
    if all(travels):
        assert part[:4] + part[4 + bits :] == all_of_it
    if not any(travels):
        assert len(part) == 4 + bits


def test_a_part_of_zeros_takes_a_few_bytes() -> None:
    """Eight for 131,072 values, where all tables take thousands."""
    vector = np.zeros(1 << 17, np.float32)
    assert len(without_zeros(1 << 17).encode_part(vector, 0)) == 8
    assert len(Sparse(1 << 17, 1 << 17).encode_part(vector, 0)) > 2500


def test_bytes_without_zeros_are_golden() -> None:
    """The second chunk of three is that of the golden one above: bits 010."""
    codec, vector = without_zeros(3 * CHUNK_VALUES, 4), np.zeros(3 * CHUNK_VALUES, np.float32)
    vector[CHUNK_VALUES + np.array([3, 7, 100, 4095])] = [8, 2, -2, -8]
    assert codec.encode_part(vector, 0).hex() == "0000003a02006c0074e1031c40c6ff47"


def test_bits_that_do_not_fit_the_tables_are_rejected() -> None:
    """More or fewer chunks than there are tables for, chunks beyond the part, and parts that end before the bits."""
    codec = without_zeros(3 * CHUNK_VALUES, 4)
    part = codec.encode_part(np.concatenate([normal(CHUNK_VALUES), np.zeros(2 * CHUNK_VALUES, np.float32)]), 0)
    assert part[4] == 0b001
    for bits in (0b000, 0b011, 0b111):
        is_rejected(codec, part[:4] + bytes([bits]) + part[5:], "bytes instead of")
    is_rejected(codec, part[:4] + bytes([0b1001]) + part[5:], "padding")
    is_rejected(codec, part[:4], "or more")
    is_rejected(codec, part + b"\0", "bytes instead of")


def test_earlier_runs_keep_their_bytes_and_their_id() -> None:
    """Only a manifest that says so leaves zeros out."""
    plain = manifest.Codec(kind="sparse")
    assert "leave_out_zeros" not in plain.model_dump(mode="json")
    assert make_codec(plain, 9000) == Sparse(9000, plain.part_values)
    chosen = manifest.Codec(kind="sparse", leave_out_zeros=True)
    assert make_codec(chosen, 9000) == Sparse(9000, plain.part_values, leave_out_zeros=True)


# --- one chunk, top-4: scale 4, levels 4, values 1, low bits 5, high bits 1 byte -------------------------------------------

ONE = Sparse(CHUNK_VALUES, CHUNK_VALUES, 4)


def handmade(indices: tuple[int, ...], levels: tuple[float, float] = (1.0, 2.0), high: int | None = None) -> bytes:
    """A part with these indices, in this order; `high` replaces the last table."""
    low = sum((index & 1023) << 10 * nth for nth, index in enumerate(indices))
    ones = sum(1 << (index >> 10) + nth for nth, index in enumerate(indices)) if high is None else high
    return struct.pack("<fee", 1.0, *levels) + b"\xe1" + low.to_bytes(5, "little") + bytes([ones])


def test_a_handmade_part_is_accepted() -> None:
    """What the refused ones differ from."""
    assert np.flatnonzero(ONE.decode_part(handmade((0, 5, 1024, 4095)), 0)).tolist() == [0, 5, 1024, 4095]


@pytest.mark.parametrize("indices", [(5, 5, 7, 9), (7, 5, 9, 11), (0, 1, 1030, 1030), (0, 0, 0, 0)])
def test_repeated_or_unsorted_indices_are_rejected(indices: tuple[int, ...]) -> None:
    """A value can't be counted twice, and there is one order only."""
    is_rejected(ONE, handmade(indices), "repeated, unsorted")


@pytest.mark.parametrize("high", [0, 0b111, 0b1011111, 0b1111111])
def test_another_number_of_values_is_rejected(high: int) -> None:
    """Four, neither more nor fewer."""
    is_rejected(ONE, handmade((0, 1, 2, 3), high=high), "another number of values")


def test_padding_that_isnt_zero_is_rejected() -> None:
    """The eighth bit of the last byte belongs to nobody."""
    is_rejected(ONE, handmade((0, 1, 2, 3), high=0b10001111), "padding")


def test_indices_beyond_a_shorter_chunk_are_rejected() -> None:
    """Two of 1500 values: nine low bits and three high ones reach to 1535."""
    codec = Sparse(1500, CHUNK_VALUES, 4)
    good = codec.encode_part(normal(1500), 0)
    table = good[:9]
    assert np.flatnonzero(codec.decode_part(table + (0 | 475 << 9).to_bytes(3, "little") + b"\x09", 0)).tolist() == [0, 1499]
    is_rejected(codec, table + (0 | 476 << 9).to_bytes(3, "little") + b"\x09", "out of range")


def test_levels_in_the_wrong_order_are_rejected() -> None:
    """The upper level isn't below the lower one."""
    is_rejected(ONE, handmade((0, 1, 2, 3), (2.0, 1.0)), "wrong order")


@given(arrays(np.uint16, 4, elements=st.integers(0, 4095)))
@settings(max_examples=100, deadline=None)
def test_there_is_one_encoding_of_a_set_of_indices(indices: np.ndarray) -> None:
    """What is accepted has strictly ascending indices, and they are those that were packed."""
    chosen = tuple(int(index) for index in indices)
    if sorted(set(chosen)) == list(chosen):
        assert ONE.decode_pairs(handmade(chosen), 0)[0].tolist() == list(chosen)
