"""Planted contributions: their leaves are made up on purpose, so that whoever lets one pass can be shown not to have looked.

A made-up leaf is noise that follows from 32 secret bytes. Nobody whose own computing gives anything can have come near it, so the
bytes, once told, prove that who signed "passed" didn't compute. Leaves still add up to the update, which is honest: only to
compute again tells. Audits that look find it wrong, and its author is suspended like any cheat: it takes a key of no other use.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace

import numpy as np

from peer.leaves import Leaf, Sketch
from peer.sketch import BLOCKS, WIDTH

NONCE_BYTES = 32
MOST_OFF = 1e-3


@dataclass(frozen=True)
class Place:
    """Whose contribution to which round of which run."""

    run_id: bytes
    round_index: int
    peer_id: str


def planted(leaves: tuple[Leaf, ...], nonce: bytes, place: Place, *, by_samples: bool) -> tuple[Leaf, ...]:
    """The leaves with all but one made up, each as large as it was; that one keeps their sum, weighted by samples in `sync`.

    The same leaves where there is only one, or nothing has moved.
    """
    if len(leaves) < 2 or not all(np.linalg.norm(leaf.sketch) for leaf in leaves):
        return leaves
    kept = 1 + nonce[0] % (len(leaves) - 1)  # not the first, which is looked at in every audit of `diloco`
    shares = [leaf.samples / leaves[kept].samples if by_samples else 1.0 for leaf in leaves]
    rest = leaves[kept].sketch.astype(np.float64)
    made = list(leaves)
    for index, leaf in enumerate(leaves):
        if index != kept:
            false = noise(nonce, place, index) * np.linalg.norm(leaf.sketch)
            rest += shares[index] * (leaf.sketch - false)
            made[index] = replace(leaf, sketch=false.astype(np.float32))
    made[kept] = replace(leaves[kept], sketch=rest.astype(np.float32))
    return tuple(made)


def noise(nonce: bytes, place: Place, leaf: int) -> Sketch:
    """What a made-up leaf is but for its size, [BLOCKS, WIDTH]: nearly normal values of norm 1, the same everywhere."""
    about = b"swarm.planted" + nonce + place.run_id + place.round_index.to_bytes(8, "big") + leaf.to_bytes(4, "big")
    drawn = hashlib.shake_256(about + place.peer_id.encode()).digest(BLOCKS * WIDTH * 8)
    values = np.frombuffer(drawn, dtype="<u2").astype(np.float64).reshape(BLOCKS, WIDTH, 4).sum(axis=2) - 2 * 65535
    return np.asarray(values / np.linalg.norm(values))


def is_planted(leaf: Leaf, nonce: bytes, place: Place, index: int) -> bool:
    """Whether a leaf is what the secret bytes say it is."""
    expected, claimed = noise(nonce, place, index), leaf.sketch.astype(np.float64)
    size = float(np.vdot(expected, claimed))
    return len(nonce) == NONCE_BYTES and size > 0 and float(np.linalg.norm(claimed - size * expected)) <= MOST_OFF * size
