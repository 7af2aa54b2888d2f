"""Draws are as a softmax has them, follow from their keys alone, and can be told from other tokens."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from peer.sampling import IMPOSSIBLE, Leeway, draw, draw_key, draw_keys, gaps, gumbel
from swarm.manifest import Sampling

CPU = torch.device("cpu")
RUN = b"r" * 32
VOCABULARY = 50


def keys(count: int, index: int = 0) -> torch.Tensor:
    return draw_keys(RUN, [(index, place) for place in range(count)], CPU)


def logits(rows: int, seed: int = 0) -> torch.Tensor:
    return torch.randn((rows, VOCABULARY), generator=torch.Generator().manual_seed(seed)) * 2


def test_noise_is_the_published_sequence() -> None:
    """The words behind the noise are SplitMix64's, computed here with whole numbers."""
    key = draw_key(RUN, 7, 3)
    found = gumbel(torch.tensor([key]), 4)[0].double()
    expected, state = [], key % 2**64
    for _ in range(4):
        state = (state + 0x9E3779B97F4A7C15) % 2**64
        word = state
        word = (word ^ (word >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        word = (word ^ (word >> 27)) * 0x94D049BB133111EB % 2**64
        word ^= word >> 31
        expected.append(-math.log(-math.log(((word >> 12) + 0.5) / 2**52)))
    assert torch.allclose(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-6)


def test_noise_has_the_gumbel_distribution() -> None:
    """By the test of Kolmogorov and Smirnov, over many keys."""
    values = np.sort(gumbel(keys(100), 200).flatten().numpy().astype(np.float64))
    found, expected = np.arange(1, values.size + 1) / values.size, np.exp(-np.exp(-values))
    assert np.abs(found - expected).max() < 1.95 / math.sqrt(values.size)


def test_keys_differ_in_run_sample_and_place() -> None:
    """Nothing is drawn twice with the same noise."""
    found = {draw_key(run, index, place) for run in (RUN, b"s" * 32) for index in range(20) for place in range(20)}
    assert len(found) == 800


def test_tokens_are_drawn_as_often_as_a_softmax_says() -> None:
    """Over many places, at a temperature other than 1."""
    row, sampling, count = logits(1)[0], Sampling(temperature=1.5), 20_000
    drawn = draw(row.expand(count, -1), keys(count), sampling)
    expected = (row / 1.5).softmax(0).numpy() * count
    found = np.bincount(drawn.numpy(), minlength=VOCABULARY)
    common = expected > 5
    squares = float(((found - expected)[common] ** 2 / expected[common]).sum())
    freedom = int(common.sum())
    assert squares < freedom + 5 * math.sqrt(2 * freedom)


@pytest.mark.parametrize("sampling", [Sampling(top_k=3), Sampling(top_p=0.4), Sampling(top_k=5, top_p=0.5), Sampling(top_p=1e-6)])
def test_only_the_likeliest_are_drawn(sampling: Sampling) -> None:
    """No token outside of the `top_k`, nor beyond the fewest that have `top_p`."""
    rows = logits(400)
    drawn = draw(rows, keys(400), sampling)
    ranks = (rows > rows.gather(1, drawn[:, None])).sum(dim=1)
    likelier = torch.where(rows > rows.gather(1, drawn[:, None]), rows.softmax(1), 0).sum(dim=1)
    if sampling.top_k:
        assert int(ranks.max()) < sampling.top_k
    if sampling.top_p < 1 and not sampling.top_k:
        assert float(likelier.max()) < sampling.top_p


def test_a_drawn_token_has_no_gap() -> None:
    """Whoever computes the same logits finds each draw to be the largest."""
    sampling = Sampling(temperature=0.7, top_p=0.9, top_k=20)
    rows = logits(300)
    assert float(gaps(rows, keys(300), draw(rows, keys(300), sampling), sampling, Leeway()).max()) == 0


def test_logits_that_are_nearly_the_same_leave_gaps_within_that() -> None:
    """The gap is at most twice what the logits are off by, near the edges of what can be drawn as elsewhere."""
    sampling, off = Sampling(temperature=0.7, top_p=0.9, top_k=20), 1e-3
    rows = logits(3000)
    noisy = rows + (torch.rand(rows.shape, generator=torch.Generator().manual_seed(1)) * 2 - 1) * off
    found = gaps(noisy, keys(3000), draw(rows, keys(3000), sampling), sampling, Leeway(2 * off, 2 * off))
    assert 0 < float(found.max()) <= 2 * off * 1.01


def test_other_tokens_and_other_noise_show() -> None:
    """Tokens drawn with other keys, and those that can't be drawn."""
    sampling, rows = Sampling(top_k=10), logits(200)
    elsewhere = gaps(rows, keys(200), draw(rows, keys(200, index=1), sampling), sampling, Leeway(0.1, 0.1))
    assert float(elsewhere.mean()) > 0.5
    assert float(gaps(rows, keys(200), rows.argmin(1), sampling, Leeway(0.1, 0.1)).min()) == IMPOSSIBLE
