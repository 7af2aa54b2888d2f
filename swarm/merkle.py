"""RFC 6962 Merkle trees: roots, inclusion proofs and consistency proofs (section 2.1), and names of blobs.

`MerkleTree` appends in O(log n) and keeps every complete subtree's hash, so that proofs need no rehashing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

HASH_BYTES = 32
EMPTY_ROOT = hashlib.sha256(b"").digest()


def blob_hash(content: bytes | bytearray | memoryview) -> bytes:
    """The name of immutable bytes: BLAKE2b-256."""
    return hashlib.blake2b(content, digest_size=HASH_BYTES).digest()


def leaf_hash(entry: bytes) -> bytes:
    """SHA-256 of 0x00 || entry (RFC 6962, 2.1)."""
    return hashlib.sha256(b"\x00" + entry).digest()


def node_hash(left: bytes, right: bytes) -> bytes:
    """SHA-256 of 0x01 || left || right (RFC 6962, 2.1)."""
    return hashlib.sha256(b"\x01" + left + right).digest()


def root_of(entries: Sequence[bytes]) -> bytes:
    """The Merkle root over `entries`."""
    tree = MerkleTree()
    tree.extend(leaf_hash(entry) for entry in entries)
    return tree.root()


class MerkleTree:
    """An append-only tree over leaf hashes."""

    def __init__(self) -> None:
        self._levels: list[bytearray] = [bytearray()]

    @classmethod
    def of_levels(cls, levels: Sequence[bytes]) -> MerkleTree:
        """The tree that has these `levels`. Raises `ValueError` if their sizes don't fit; the hashes are believed."""
        tree = cls()
        tree._levels = [bytearray(level) for level in levels] or [bytearray()]
        size = len(tree)
        expected = [(size >> level) * HASH_BYTES for level in range(max(1, size.bit_length()))]
        if [len(level) for level in tree._levels] != expected:
            raise ValueError("the levels of the tree don't fit together")
        return tree

    @property
    def levels(self) -> Sequence[bytes | bytearray]:
        """The hashes of complete subtrees by height, each level joined."""
        return self._levels

    def __len__(self) -> int:
        return len(self._levels[0]) // HASH_BYTES

    def append(self, leaf: bytes) -> int:
        """Add a leaf hash and return its index."""
        index = len(self)
        self._levels[0] += leaf
        level, position = 0, index
        while position & 1:
            if level + 1 == len(self._levels):
                self._levels.append(bytearray())
            pair = bytes(self._levels[level][-2 * HASH_BYTES :])
            self._levels[level + 1] += node_hash(pair[:HASH_BYTES], pair[HASH_BYTES:])
            level, position = level + 1, position >> 1
        return index

    def extend(self, leaves: Iterable[bytes]) -> None:
        """Add several leaf hashes."""
        for leaf in leaves:
            self.append(leaf)

    def leaf(self, index: int) -> bytes:
        """The leaf hash at `index`."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        return bytes(self._levels[0][index * HASH_BYTES : (index + 1) * HASH_BYTES])

    def root(self, size: int | None = None) -> bytes:
        """The root over the first `size` leaves (all of them by default)."""
        size = len(self) if size is None else size
        if not 0 <= size <= len(self):
            raise IndexError(size)
        return self._subtree(0, size) if size else EMPTY_ROOT

    def inclusion_proof(self, index: int, size: int | None = None) -> list[bytes]:
        """`PATH(index, D[size])` of RFC 6962, 2.1.1."""
        size = len(self) if size is None else size
        if not 0 <= index < size <= len(self):
            raise IndexError(index)
        path = []
        start, end = 0, size
        while end - start > 1:
            middle = start + _split(end - start)
            if index < middle:
                path.append(self._subtree(middle, end))
                end = middle
            else:
                path.append(self._subtree(start, middle))
                start = middle
        return path[::-1]

    def last_proof(self, size: int) -> tuple[list[bytes], bytes]:
        """The inclusion proof of the last of the first `size` leaves, and the root over them: one pass over the left edge."""
        if not 0 < size <= len(self):
            raise IndexError(size)
        position, path = size - 1, []
        value = self.leaf(position)
        for level, hashes in enumerate(self._levels):
            if position >> level & 1:
                start = ((position >> level) - 1) * HASH_BYTES
                sibling = bytes(hashes[start : start + HASH_BYTES])
                path.append(sibling)
                value = node_hash(sibling, value)
        return path, value

    def consistency_proof(self, old_size: int, size: int | None = None) -> list[bytes]:
        """`PROOF(old_size, D[size])` of RFC 6962, 2.1.2."""
        size = len(self) if size is None else size
        if not 0 < old_size <= size <= len(self):
            raise IndexError(old_size)
        path = []
        start, end, whole = 0, size, True
        while old_size != end:
            middle = start + _split(end - start)
            if old_size <= middle:
                path.append(self._subtree(middle, end))
                end = middle
            else:
                path.append(self._subtree(start, middle))
                start, whole = middle, False
        if not whole:
            path.append(self._subtree(start, end))
        return path[::-1]

    def _subtree(self, start: int, end: int) -> bytes:
        size = end - start
        if size & (size - 1) == 0 and start % size == 0:
            level = size.bit_length() - 1
            position = start >> level
            return bytes(self._levels[level][position * HASH_BYTES : (position + 1) * HASH_BYTES])
        middle = start + _split(size)
        return node_hash(self._subtree(start, middle), self._subtree(middle, end))


def verify_inclusion(leaf: bytes, index: int, size: int, proof: Sequence[bytes], root: bytes) -> bool:
    """Whether `leaf` (a leaf hash) stands at `index` in the tree of `size` leaves with `root` (RFC 9162, 2.1.3.2)."""
    if not 0 <= index < size:
        return False
    position, last, value = index, size - 1, leaf
    for sibling in proof:
        if last == 0:
            return False
        if position & 1 or position == last:
            value = node_hash(sibling, value)
            while not position & 1 and position:
                position, last = position >> 1, last >> 1
        else:
            value = node_hash(value, sibling)
        position, last = position >> 1, last >> 1
    return last == 0 and value == root


def verify_consistency(old_size: int, old_root: bytes, size: int, root: bytes, proof: Sequence[bytes]) -> bool:
    """Whether the tree with `root` extends the one with `old_root` (RFC 9162, 2.1.4.2)."""
    if old_size == size:
        return not proof and old_root == root
    if not 0 < old_size < size or not proof:
        return False
    nodes = [old_root, *proof] if old_size & (old_size - 1) == 0 else list(proof)
    position, last = old_size - 1, size - 1
    while position & 1:
        position, last = position >> 1, last >> 1
    old_value = value = nodes[0]
    for node in nodes[1:]:
        if last == 0:
            return False
        if position & 1 or position == last:
            old_value, value = node_hash(node, old_value), node_hash(node, value)
            while not position & 1 and position:
                position, last = position >> 1, last >> 1
        else:
            value = node_hash(value, node)
        position, last = position >> 1, last >> 1
    return last == 0 and old_value == old_root and value == root


def _split(size: int) -> int:
    """The largest power of two smaller than `size`."""
    return 1 << (size - 1).bit_length() - 1
