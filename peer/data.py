"""Which samples a peer uses, and reading them from shards that were verified before. Nothing here fetches or writes.

The assignment is a keyed permutation of (run, round, peer): any verifier can tell which samples a peer had to use.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from peer.marks import token_ids
from swarm.errors import DataInvalid
from swarm.manifest import Data, Layout, Shard, Tree
from swarm.merkle import HASH_BYTES, blob_hash, root_of

Indices = NDArray[np.int64]
Words = NDArray[np.uint64]

FEISTEL_ROUNDS = 8
MAX_POPULATION = 1 << 62
MULTIPLIERS = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))
SHIFTS = (np.uint64(30), np.uint64(27), np.uint64(31))


def assignment_seed(order_key: str, round_number: int, peer_id: str) -> bytes:
    """32 bytes: BLAKE2b over the bytes of `Manifest.order_key`, the round as eight big-endian bytes, and the peer id."""
    message = bytes.fromhex(order_key) + round_number.to_bytes(8, "big") + peer_id.encode()
    return hashlib.blake2b(message, digest_size=32, person=b"swarm.assign").digest()


def permuted_index(seed: bytes, position: int, size: int) -> int:
    """Where the keyed permutation of `range(size)` puts `position`."""
    return int(permuted_indices(seed, position, 1, size)[0])


def permuted_indices(seed: bytes, start: int, count: int, size: int) -> Indices:
    """The images of `start .. start + count - 1` under a keyed permutation of `range(size)`, [count].

    A balanced Feistel network of eight rounds over the smallest even number of bits that holds `size`, with cycle
    walking (Black and Rogaway, 2002). Round keys are BLAKE2b of (seed, round); the round function is SplitMix64's
    finaliser.
    """
    if not 0 < size <= MAX_POPULATION or start < 0 or count < 0 or start + count > size:
        raise ValueError(f"positions {start} to {start + count} are not in a permutation of {size}")
    half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
    keys = _round_keys(seed)
    values = _feistel(np.arange(start, start + count, dtype=np.uint64), keys, half_bits)
    outside = np.flatnonzero(values >= size)
    while outside.size:
        values[outside] = _feistel(values[outside], keys, half_bits)
        outside = outside[values[outside] >= size]
    return values.astype(np.int64)


def _round_keys(seed: bytes) -> list[np.uint64]:
    digests = (
        hashlib.blake2b(bytes([index]), digest_size=8, key=seed, person=b"swarm.permute").digest()
        for index in range(FEISTEL_ROUNDS)
    )
    return [np.uint64(int.from_bytes(digest, "big")) for digest in digests]


def _feistel(values: Words, keys: Sequence[np.uint64], half_bits: int) -> Words:
    shift, mask = np.uint64(half_bits), np.uint64((1 << half_bits) - 1)
    left, right = values >> shift, values & mask
    for key in keys:
        left, right = right, left ^ (_mix(right ^ key) & mask)
    return (left << shift) | right


def _mix(values: Words) -> Words:
    """SplitMix64's finaliser (Steele, Lea and Flood, 2014), modulo 2^64."""
    values = (values ^ (values >> SHIFTS[0])) * MULTIPLIERS[0]
    values = (values ^ (values >> SHIFTS[1])) * MULTIPLIERS[1]
    return values ^ (values >> SHIFTS[2])


def sample_indices(order_key: str, round_number: int, peer_id: str, start: int, count: int, total: int) -> Indices:
    """The samples at positions `start .. start + count - 1` of a peer's round, [count], out of `total`.

    After the whole data set the next lap begins, under its own key.
    """
    seed = assignment_seed(order_key, round_number, peer_id)
    pieces: list[Indices] = []
    position, end = start, start + count
    while position < end:
        lap, offset = divmod(position, total)
        length = min(end - position, total - offset)
        key = hashlib.blake2b(lap.to_bytes(8, "big"), digest_size=32, key=seed).digest()
        pieces.append(permuted_indices(key, offset, length, total))
        position += length
    return np.concatenate(pieces) if pieces else np.empty(0, dtype=np.int64)


def tree_path(directory: Path, tree: Tree) -> Path:
    """Where the file of `tree` lies: named by its root."""
    return directory / tree.root


def present(data: Data, directory: Path) -> Data:
    """The data without the private shards that don't lie in a folder."""
    return data.held(lambda tree: tree_path(directory, tree).exists())


def chunk_hashes(path: Path, chunk_bytes: int = 1 << 20) -> list[bytes]:
    """BLAKE2b-256 of every chunk of the file."""
    with path.open("rb") as file:
        return [blob_hash(chunk) for chunk in iter(lambda: file.read(chunk_bytes), b"")]


def tree_of_file(path: Path, chunk_bytes: int = 1 << 20) -> Tree:
    """The name of the file's content."""
    size = path.stat().st_size
    return Tree(root=root_of(chunk_hashes(path, chunk_bytes)).hex(), size_bytes=size, chunk_bytes=chunk_bytes)


def verify_tree_file(path: Path, tree: Tree) -> None:
    """Raise `DataInvalid` unless the file's content is the one that `tree` names."""
    try:
        size = path.stat().st_size
        if size != tree.size_bytes:
            raise DataInvalid(f"{path} has {size} bytes instead of {tree.size_bytes}", "delete it; it will be fetched again")
        found = root_of(chunk_hashes(path, tree.chunk_bytes)).hex()
    except OSError as error:
        raise DataInvalid(f"{path} can't be read: {error.strerror}") from error
    if found != tree.root:
        raise DataInvalid(
            f"{path} is damaged: its root is {found[:12]}, not {tree.root[:12]}", "delete it; it will be fetched again"
        )


class ShardReader:
    """Random access to the samples of ordered shards, memory-mapped from local files whose content was verified before.

    But for the layout `plain` a sample's values are ids with marks, as `peer.marks` reads them.
    """

    def __init__(
        self,
        shards: Sequence[Shard],
        paths: Sequence[Path],
        sequence_length: int,
        vocabulary_size: int,
        layout: Layout = "plain",
    ) -> None:
        self.sequence_length = sequence_length
        self._is_marked = layout != "plain"
        self._vocabulary_size = vocabulary_size
        self._ends = list(accumulate(shard.samples for shard in shards))
        self._rows = [_map_rows(shard, path, sequence_length + 1) for shard, path in zip(shards, paths, strict=True)]

    @classmethod
    def open(
        cls,
        shards: Sequence[Shard],
        directory: Path,
        sequence_length: int,
        vocabulary_size: int,
        layout: Layout = "plain",
    ) -> ShardReader:
        """Read the shards from the files named by their roots in `directory`."""
        return cls(shards, [tree_path(directory, shard) for shard in shards], sequence_length, vocabulary_size, layout)

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def sample(self, index: int) -> torch.Tensor:
        """The token ids of one sample, int64 [sequence_length + 1]; with their marks where they have some."""
        return self.batch([index])[0]

    def batch(self, indices: Sequence[int] | Indices) -> torch.Tensor:
        """The token ids of several samples, int64 [len(indices), sequence_length + 1]; with their marks where they have some.

        Raises `DataInvalid` for an unknown token.
        """
        rows = np.empty((len(indices), self.sequence_length + 1), dtype=np.int64)
        for position, index in enumerate(indices):
            rows[position] = self._row(int(index))
        largest = int(token_ids(rows).max() if self._is_marked else rows.max()) if rows.size else 0
        if largest >= self._vocabulary_size:
            raise DataInvalid(f"token {largest} in the data is outside the vocabulary of {self._vocabulary_size}")
        return torch.from_numpy(rows)

    def _row(self, index: int) -> NDArray[np.unsignedinteger]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        shard = bisect_right(self._ends, index)
        first = self._ends[shard - 1] if shard else 0
        row: NDArray[np.unsignedinteger] = self._rows[shard][index - first]
        return row


def _map_rows(shard: Shard, path: Path, row_length: int) -> NDArray[np.unsignedinteger]:
    try:
        if path.stat().st_size != shard.size_bytes:
            raise DataInvalid(f"shard {path} doesn't have {shard.size_bytes} bytes", "delete it; it will be fetched again")
        return np.memmap(path, dtype=f"<u{shard.token_bytes}", mode="r", shape=(shard.samples, row_length))
    except OSError as error:
        raise DataInvalid(f"shard {path} can't be read: {error.strerror}") from error


def chunk_roots_match(hashes: Sequence[bytes], tree: Tree) -> bool:
    """Whether a stranger's list of chunk hashes is the one that `tree` names."""
    return (
        len(hashes) == tree.chunk_count and all(len(item) == HASH_BYTES for item in hashes) and root_of(hashes).hex() == tree.root
    )
