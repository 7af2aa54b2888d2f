"""Leaves that are made up on purpose: they add up, and no audit that looks lets them pass."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from peer.judging import distance, promised
from peer.leaves import Leaf
from peer.planting import Place, is_planted, noise, planted
from peer.sketch import BLOCKS, WIDTH
from tests.world import manifest

PLACE = Place(b"r" * 32, 7, "somebody")
FRESH = {"kind": "diloco", "inner_steps": 4, "batch_samples": 4, "inner_state": "fresh", "schedule": {"total_tokens": 100_000}}
nonces = st.binary(min_size=32, max_size=32)


def leaves_of(samples: list[int], seed: int = 0) -> tuple[Leaf, ...]:
    """Honest leaves with so many samples each."""
    random = np.random.default_rng(seed)
    return tuple(Leaf(count, 2.0, random.standard_normal((BLOCKS, WIDTH)).astype(np.float32)) for count in samples)


@given(nonces, st.lists(st.integers(1, 40), min_size=2, max_size=16), st.booleans())
def test_made_up_leaves_amount_to_the_same_update(nonce: bytes, samples: list[int], shared: bool) -> None:
    """So what is sent gives nothing away; each leaf by itself is far from what computing it again gives."""
    run = manifest() if shared else manifest(strategy=FRESH)
    honest = leaves_of(samples)
    made = planted(honest, nonce, PLACE, by_samples=shared)
    assert promised(run, made) == pytest.approx(promised(run, honest), rel=1e-3, abs=1e-3)
    assert [(leaf.samples, leaf.loss) for leaf in made] == [(leaf.samples, leaf.loss) for leaf in honest]
    assert min(distance(its.sketch, ours.sketch) for its, ours in zip(made, honest, strict=True)) > 0.5
    told = [is_planted(leaf, nonce, PLACE, index) for index, leaf in enumerate(made)]
    assert told[0]
    assert told.count(False) == 1


@given(nonces)
def test_what_was_computed_is_never_taken_for_made_up(nonce: bytes) -> None:
    """Whatever somebody says it follows from; nor what follows from it for another leaf, round, peer or run."""
    honest = leaves_of([4, 4, 4])
    assert not any(is_planted(leaf, nonce, PLACE, index) for index, leaf in enumerate(honest))
    made = planted(honest, nonce, PLACE, by_samples=False)
    places = [replace(PLACE, run_id=bytes(32)), replace(PLACE, round_index=8), replace(PLACE, peer_id="else")]
    assert not any(is_planted(made[0], nonce, place, 0) for place in places)
    assert not is_planted(made[0], nonce, PLACE, 1)


def test_noise_is_golden() -> None:
    """Peers of different versions must agree on what follows from a secret."""
    values = noise(bytes(32), PLACE, 0)
    assert np.linalg.norm(values) == pytest.approx(1.0)
    assert values[0, :3] == pytest.approx([-0.066308348, 0.072704366, -0.022528761])


def test_nothing_is_planted_where_it_would_show() -> None:
    """One leaf can't keep the sum, and a leaf of nothing has no size to hide behind."""
    alone = leaves_of([4])
    assert planted(alone, bytes(32), PLACE, by_samples=False) is alone
    still = (*leaves_of([4]), Leaf(4, 2.0, np.zeros((BLOCKS, WIDTH), dtype=np.float32)))
    assert planted(still, bytes(32), PLACE, by_samples=False) is still
