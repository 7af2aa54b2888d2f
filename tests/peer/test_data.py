"""Which samples a peer uses, and reading them."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peer.data import (
    ShardReader,
    assignment_seed,
    chunk_hashes,
    chunk_roots_match,
    permuted_index,
    permuted_indices,
    sample_indices,
    tree_of_file,
    verify_tree_file,
)
from peer.marks import NO_LOSS, STARTS
from swarm.errors import DataInvalid
from swarm.manifest import Shard, Tree
from swarm.merkle import root_of

SEED = bytes(range(32))
RUN = "ab" * 32
MASK = (1 << 64) - 1


def reference_permutation(seed: bytes, position: int, size: int) -> int:
    """The documented construction in plain integers."""
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    value = position
    while True:
        left, right = value >> half, value & ((1 << half) - 1)
        for number in range(8):
            digest = hashlib.blake2b(bytes([number]), digest_size=8, key=seed, person=b"swarm.permute").digest()
            mixed = right ^ int.from_bytes(digest, "big")
            mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & MASK
            mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & MASK
            left, right = right, left ^ ((mixed ^ (mixed >> 31)) & ((1 << half) - 1))
        value = left << half | right
        if value < size:
            return value


@given(st.binary(min_size=1, max_size=64), st.integers(1, 3000))
@settings(max_examples=60, deadline=None)
def test_a_permutation_is_a_bijection(seed: bytes, size: int) -> None:
    """Every sample is used once before any is used twice."""
    assert sorted(permuted_indices(seed, 0, size, size).tolist()) == list(range(size))


@given(st.binary(min_size=32, max_size=32), st.integers(1, 1 << 62), st.data())
@settings(max_examples=60, deadline=None)
def test_a_permutation_is_the_documented_construction(seed: bytes, size: int, data: st.DataObject) -> None:
    """The vectorised form equals plain integers, at any size."""
    position = data.draw(st.integers(0, size - 1))
    assert permuted_index(seed, position, size) == reference_permutation(seed, position, size)


@given(st.integers(1, 500), st.data())
@settings(max_examples=40, deadline=None)
def test_a_slice_of_a_permutation_is_computed_alone(size: int, data: st.DataObject) -> None:
    """A verifier recomputes any piece without the rest."""
    start = data.draw(st.integers(0, size))
    count = data.draw(st.integers(0, size - start))
    whole = permuted_indices(SEED, 0, size, size)
    assert permuted_indices(SEED, start, count, size).tolist() == whole[start : start + count].tolist()


def test_the_permutation_is_golden() -> None:
    """Peers of different versions must use the same samples."""
    assert permuted_indices(SEED, 0, 8, 1000).tolist() == [263, 566, 968, 182, 691, 722, 579, 555]


@pytest.mark.parametrize(("start", "count", "size"), [(0, 1, 0), (0, 6, 5), (-1, 1, 5), (5, 1, 5), (0, 1, 1 << 63)])
def test_positions_outside_a_permutation_are_refused(start: int, count: int, size: int) -> None:
    """There is no sample past the end."""
    with pytest.raises(ValueError, match="permutation"):
        permuted_indices(SEED, start, count, size)


def test_a_permutation_looks_random() -> None:
    """Neighbours don't stay neighbours, and the images spread evenly."""
    images = permuted_indices(SEED, 0, 10_000, 1 << 20)
    assert np.mean(np.abs(np.diff(images)) < 1000) < 0.01
    counts = np.bincount(images // (1 << 16), minlength=16)
    assert counts.min() > 500
    assert counts.max() < 750


def test_assignments_differ_by_run_round_and_peer() -> None:
    """Changing any one of the three gives another assignment."""
    seeds = {
        assignment_seed(run, number, peer) for run in (RUN, "cd" * 32) for number in (0, 1) for peer in ("12D3KooWa", "12D3KooWb")
    }
    assert len(seeds) == 8


@given(st.integers(1, 50), st.integers(0, 120), st.integers(0, 120))
@settings(max_examples=50, deadline=None)
def test_samples_wrap_after_the_whole_data_set(total: int, start: int, count: int) -> None:
    """Each lap uses every sample once, in its own order, and pieces join up."""
    laps = sample_indices(RUN, 3, "peer", 0, 3 * total, total).reshape(3, total)
    assert all(sorted(lap) == list(range(total)) for lap in laps.tolist())
    long = sample_indices(RUN, 3, "peer", 0, start + count, total)
    assert sample_indices(RUN, 3, "peer", start, count, total).tolist() == long[start:].tolist()


def test_laps_have_different_orders() -> None:
    """The second lap is keyed anew."""
    first, second = sample_indices(RUN, 0, "peer", 0, 200, 100).reshape(2, 100).tolist()
    assert first != second


def test_a_files_tree_is_the_merkle_root_of_its_chunk_hashes(tmp_path: Path) -> None:
    """The root is RFC 6962 over BLAKE2b-256 of each chunk, the last one shorter."""
    path = tmp_path / "file"
    path.write_bytes(b"a" * 10 + b"b" * 10 + b"c" * 3)
    tree = tree_of_file(path, chunk_bytes=10)
    expected = [hashlib.blake2b(part, digest_size=32).digest() for part in (b"a" * 10, b"b" * 10, b"c" * 3)]
    assert chunk_hashes(path, 10) == expected
    assert tree == Tree(root=root_of(expected).hex(), size_bytes=23, chunk_bytes=10)
    verify_tree_file(path, tree)


def test_a_list_of_chunk_hashes_is_checked_against_the_tree() -> None:
    """A stranger's list is believed only if it gives the root and has the right length."""
    hashes = [bytes([number]) * 32 for number in range(3)]
    tree = Tree(root=root_of(hashes).hex(), size_bytes=25, chunk_bytes=10)
    assert chunk_roots_match(hashes, tree)
    assert not chunk_roots_match(hashes[::-1], tree)
    assert not chunk_roots_match([*hashes[:2], b"short"], tree)
    assert not chunk_roots_match(hashes, tree.model_copy(update={"size_bytes": 31}))


@pytest.mark.parametrize(
    ("content", "problem"), [(b"x" * 22, "22 bytes"), (b"x" * 24, "24 bytes"), (b"x" * 22 + b"y", "damaged")]
)
def test_a_file_with_other_content_doesnt_verify(tmp_path: Path, content: bytes, problem: str) -> None:
    """A short, long or changed file is told apart from the named one."""
    path = tmp_path / "file"
    path.write_bytes(b"x" * 23)
    tree = tree_of_file(path, chunk_bytes=10)
    path.write_bytes(content)
    with pytest.raises(DataInvalid, match=problem):
        verify_tree_file(path, tree)


def test_a_missing_file_doesnt_verify(tmp_path: Path) -> None:
    """A file that isn't there is invalid data, not a crash."""
    with pytest.raises(DataInvalid, match="can't be read"):
        verify_tree_file(tmp_path / "none", Tree(root="00" * 32, size_bytes=1))


def shard_file(path: Path, rows: np.ndarray, token_bytes: int = 2) -> Shard:
    path.write_bytes(rows.astype(f"<u{token_bytes}").tobytes())
    tree = tree_of_file(path)
    return Shard.model_validate({**tree.model_dump(), "samples": len(rows), "token_bytes": token_bytes})


@pytest.fixture
def reader(tmp_path: Path) -> ShardReader:
    """Samples 0 to 4 in two shards of different token sizes; sample i starts with the token 10 i."""
    rows = np.arange(5)[:, None] * 10 + np.arange(9)
    shards = [shard_file(tmp_path / "a", rows[:2]), shard_file(tmp_path / "b", rows[2:], token_bytes=4)]
    return ShardReader(shards, [tmp_path / "a", tmp_path / "b"], sequence_length=8, vocabulary_size=60)


def test_samples_are_found_across_shards(reader: ShardReader) -> None:
    """A batch has the rows in the given order, as int64."""
    batch = reader.batch([4, 0, 2, 1])
    assert batch.dtype == torch.int64
    assert batch.shape == (4, 9)
    assert batch[:, 0].tolist() == [40, 0, 20, 10]
    assert reader.sample(3).tolist() == list(range(30, 39))
    assert len(reader) == 5


@pytest.mark.parametrize("index", [-1, 5])
def test_a_sample_outside_the_data_is_an_error(reader: ShardReader, index: int) -> None:
    """Negative indices don't count from the end."""
    with pytest.raises(IndexError):
        reader.batch([index])


def test_a_token_outside_the_vocabulary_is_refused(tmp_path: Path) -> None:
    """A shard with an unknown token never reaches the model."""
    shard = shard_file(tmp_path / "a", np.full((1, 9), 60))
    reader = ShardReader([shard], [tmp_path / "a"], sequence_length=8, vocabulary_size=60)
    with pytest.raises(DataInvalid, match="token 60"):
        reader.batch([0])


def test_marked_values_are_checked_by_their_ids(tmp_path: Path) -> None:
    """Marks come through; an unknown token or an unknown mark doesn't, nor do marks where the layout has none."""
    good = np.arange(9) | STARTS | NO_LOSS
    rows = np.stack([good, np.full(9, 60 | NO_LOSS), np.full(9, 1 | 1 << 28)])
    shard = shard_file(tmp_path / "a", rows, token_bytes=4)
    reader = ShardReader([shard], [tmp_path / "a"], sequence_length=8, vocabulary_size=60, layout="marked")
    assert reader.sample(0).tolist() == good.tolist()
    with pytest.raises(DataInvalid, match="token 60"):
        reader.batch([0, 1])
    with pytest.raises(DataInvalid, match="mark"):
        reader.batch([2])
    with pytest.raises(DataInvalid, match="outside the vocabulary"):
        ShardReader([shard], [tmp_path / "a"], sequence_length=8, vocabulary_size=60).batch([0])


def test_a_shard_of_another_size_is_refused(tmp_path: Path) -> None:
    """A truncated file is found before training."""
    shard = shard_file(tmp_path / "a", np.zeros((2, 9)))
    (tmp_path / "a").write_bytes(b"\0" * 20)
    with pytest.raises(DataInvalid, match="36 bytes"):
        ShardReader([shard], [tmp_path / "a"], 8, 60)


def test_a_missing_shard_is_refused(tmp_path: Path) -> None:
    """A shard that wasn't fetched is invalid data."""
    shard = shard_file(tmp_path / "a", np.zeros((2, 9)))
    with pytest.raises(DataInvalid, match="can't be read"):
        ShardReader.open([shard], tmp_path, 8, 60)
