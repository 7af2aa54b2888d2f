"""Parts that are nearly right: what is accepted is in range, and decoding never takes much memory."""

from __future__ import annotations

import contextlib
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peer.codec import Codec, make_codec
from peer.codec.sparse import CHUNK_VALUES, Sparse
from swarm import manifest
from swarm.errors import Rejected
from tests.peer.codec.codec_cases import allocating_at_most, damaged, normal

VALUES = 1 << 20
VALUE_BYTES = 4 * VALUES
KINDS = (
    *((kind, 64) for kind in ("fp16", "int8", "int4", "int2", "sparse", "sparse without zeros")),
    ("sparse", 8),
    ("sparse", 1024),
)
places = st.lists(st.tuples(st.integers(0, 1 << 22), st.integers(1, 255)), min_size=1, max_size=12)


@cache
def honest(kind: str, top_k: int) -> tuple[Codec, bytes]:
    """A codec with one large part, and that part as an honest peer makes it."""
    settings = {"kind": kind.split(maxsplit=1)[0], "density_top_k": top_k, "part_values": VALUES, "leave_out_zeros": " " in kind}
    codec = make_codec(manifest.Codec.model_validate(settings), VALUES)
    return codec, codec.encode_part(normal(VALUES), 0)


@pytest.mark.parametrize(("kind", "top_k"), KINDS)
def test_a_whole_part_takes_a_few_times_its_values(kind: str, top_k: int) -> None:
    """The bound under which the damaged ones are decoded, too."""
    codec, part = honest(kind, top_k)
    with allocating_at_most(6 * VALUE_BYTES):
        assert codec.decode_part(part, 0).shape == (VALUES,)


@pytest.mark.parametrize(("kind", "top_k"), KINDS)
@given(flips=places)
@settings(max_examples=15, deadline=None)
def test_a_damaged_large_part_takes_no_more_memory(kind: str, top_k: int, flips: list[tuple[int, int]]) -> None:
    """Neither accepted nor refused parts allocate by what their bytes say."""
    codec, part = honest(kind, top_k)
    with allocating_at_most(6 * VALUE_BYTES), contextlib.suppress(Rejected):
        assert np.isfinite(codec.decode_part(damaged(part, flips), 0)).all()


@pytest.mark.parametrize("top_k", [8, 64, 1024])
@given(flips=places, size=st.sampled_from([CHUNK_VALUES, 3 * CHUNK_VALUES, 2 * CHUNK_VALUES + 1500]))
@settings(max_examples=60, deadline=None)
def test_accepted_indices_are_few_distinct_and_in_range(top_k: int, flips: list[tuple[int, int]], size: int) -> None:
    """Whatever the bits are: as many indices as the density says, each once, in order, within the part."""
    codec = Sparse(size, 4 * CHUNK_VALUES, top_k)
    part = codec.encode_part(normal(size), 0)
    with contextlib.suppress(Rejected):
        indices, values = codec.decode_pairs(damaged(part, flips), 0)
        assert indices.size == values.size == size // CHUNK_VALUES * top_k + -(-(size % CHUNK_VALUES) * top_k // CHUNK_VALUES)
        assert (np.diff(indices) > 0).all()
        assert 0 <= indices[0] <= indices[-1] < size
        assert np.isfinite(values).all()


@pytest.mark.parametrize(("kind", "top_k"), KINDS)
@given(cut=st.integers(0, 4000))
@settings(max_examples=15, deadline=None)
def test_tables_of_another_codec_are_refused(kind: str, top_k: int, cut: int) -> None:
    """A part of one codec, cut or filled up to the length of another's, is decoded within bounds or refused."""
    codec, _ = honest(kind, top_k)
    for other_kind, other_top_k in KINDS:
        _, foreign = honest(other_kind, other_top_k)
        limit = codec.part_size_limit(0)
        content = (foreign[cut:] + bytes(limit))[:limit]
        with allocating_at_most(6 * VALUE_BYTES), contextlib.suppress(Rejected):
            assert np.isfinite(codec.decode_part(content, 0)).all()
