"""RFC 6962 trees, against golden roots and pymerkle as an independent oracle."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pymerkle import InmemoryTree

from swarm.merkle import EMPTY_ROOT, MerkleTree, leaf_hash, root_of, verify_consistency, verify_inclusion

ROOTS = {
    0: "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
    1: "db3426e878068d28d269b6c87172322ce5372b65756d0789001d34835f601c03",
    2: "cb00989d94a569c0a678ae042b63dcd4625db96440517f37a6eb7976ea24ed4b",
    3: "725d5230db68f557470dc35f1d8865813acd7ebb07ad152774141decbae71327",
    7: "a3e23b32ccb6bf96d092d165d8aa546e09829de8f03b0e8957581d1e16b92bdf",
}
LEAVES = st.lists(st.binary(max_size=8), min_size=1, max_size=40)


def tree_of(entries: list[bytes]) -> MerkleTree:
    """A tree over entries."""
    tree = MerkleTree()
    tree.extend(leaf_hash(entry) for entry in entries)
    return tree


@pytest.mark.parametrize(("size", "root"), ROOTS.items())
def test_golden_roots(size: int, root: str) -> None:
    """The roots over the decimal numbers are fixed, and the empty tree's is SHA-256 of nothing."""
    assert tree_of([b"%d" % number for number in range(7)]).root(size).hex() == root
    assert EMPTY_ROOT.hex() == ROOTS[0]


@given(LEAVES)
def test_agrees_with_pymerkle(entries: list[bytes]) -> None:
    """Roots of every size and inclusion proofs are those of an independent implementation."""
    oracle = InmemoryTree(algorithm="sha256")
    for item in entries:
        oracle.append_entry(item)
    tree = tree_of(entries)
    assert root_of(entries) == oracle.get_root()
    for size in range(1, len(entries) + 1):
        assert tree.root(size) == oracle.get_root(size)
        assert tree.inclusion_proof(size // 2, size) == oracle.prove_inclusion(size // 2 + 1, size).path[1:]


@given(LEAVES, st.data())
def test_inclusion(entries: list[bytes], data: st.DataObject) -> None:
    """A leaf's proof leads to the root; another index, leaf or a damaged proof does not."""
    tree = tree_of(entries)
    size = data.draw(st.integers(1, len(entries)))
    index = data.draw(st.integers(0, size - 1))
    proof, root = tree.inclusion_proof(index, size), tree.root(size)
    assert verify_inclusion(tree.leaf(index), index, size, proof, root)
    assert not verify_inclusion(leaf_hash(b"something else"), index, size, proof, root)
    assert not verify_inclusion(tree.leaf(index), index, size, [*proof, b"\0" * 32], root)
    assert not verify_inclusion(tree.leaf(index), size, size, proof, root)
    if proof:
        assert not verify_inclusion(tree.leaf(index), index, size, proof[:-1], root)


@given(LEAVES, st.data())
def test_consistency(entries: list[bytes], data: st.DataObject) -> None:
    """A longer tree proves that it extends a shorter one, and cannot prove it of another."""
    tree = tree_of(entries)
    size = data.draw(st.integers(1, len(entries)))
    old_size = data.draw(st.integers(1, size))
    proof = tree.consistency_proof(old_size, size)
    assert verify_consistency(old_size, tree.root(old_size), size, tree.root(size), proof)
    if old_size < size:
        assert not verify_consistency(old_size, leaf_hash(b"forged"), size, tree.root(size), proof)
        assert not verify_consistency(old_size, tree.root(old_size), size, leaf_hash(b"forged"), proof)


@given(LEAVES)
def test_the_last_leaf_in_one_pass(entries: list[bytes]) -> None:
    """Proof and root of the last leaf, taken along the left edge, are those that the general functions give."""
    tree = tree_of(entries)
    for size in range(1, len(entries) + 1):
        assert tree.last_proof(size) == (tree.inclusion_proof(size - 1, size), tree.root(size))
    with pytest.raises(IndexError):
        tree.last_proof(len(entries) + 1)


@given(st.lists(st.binary(max_size=8), max_size=40), st.lists(st.binary(max_size=8), max_size=9))
def test_levels_are_enough(entries: list[bytes], more: list[bytes]) -> None:
    """A tree made from another's levels goes on like it; levels that don't fit together are refused."""
    tree, again = tree_of(entries), MerkleTree.of_levels([bytes(level) for level in tree_of(entries).levels])
    for each in (tree, again):
        each.extend(leaf_hash(entry) for entry in more)
    assert (again.root(), again.levels) == (tree.root(), tree.levels)
    with pytest.raises(ValueError, match="don't fit"):
        MerkleTree.of_levels([*map(bytes, tree.levels), bytes(32)])
