"""Which generated samples are kept: by length, perplexity and repetition, and none that is nearly one that is kept already.

Near copies are found by MinHash (Broder, 1997) of their n-grams, in bands (Indyk and Motwani, 1998), so that no sample is
compared with all others. Everything follows from the samples and their order.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field
from functools import cache

import numpy as np
from numpy.typing import NDArray

from swarm.manifest import Filters

HASHES, BAND = 128, 4
REASONS = ("too_short", "too_long", "unfinished", "dull", "noisy", "repetitive", "copy", "near_copy")
MIX = np.uint64(0xBF58476D1CE4E5B9)
FOLD = np.uint64(31)

Ids = NDArray[np.int64]
Words = NDArray[np.uint64]


def n_grams(tokens: Ids, length: int) -> Words:
    """A hash of each n-gram, [n-grams]; none where there are fewer tokens."""
    if tokens.size < length:
        return np.empty(0, dtype=np.uint64)
    windows = np.lib.stride_tricks.sliding_window_view(tokens.astype(np.uint64), length)
    hashes = np.zeros(len(windows), dtype=np.uint64)
    for place in range(length):
        hashes = (hashes ^ (windows[:, place] + np.uint64(place + 1))) * MIX
        hashes ^= hashes >> FOLD
    return hashes


def repeated(tokens: Ids, length: int) -> float:
    """The share of n-grams that repeat an earlier one."""
    found = n_grams(tokens, length)
    return 1 - np.unique(found).size / found.size if found.size else 0.0


def signature(hashes: Words) -> Words:
    """MinHash of a set of hashes, [HASHES]: of two sets, so large a share agrees as they have in common."""
    factors, terms = _functions()
    mixed = np.unique(hashes)[:, None] * factors + terms
    smallest: Words = (mixed ^ (mixed >> FOLD)).min(axis=0)
    return smallest


@cache
def _functions() -> tuple[Words, Words]:
    """Odd factors and terms of as many hash functions, [HASHES] each."""
    drawn = np.random.Philox(0).random_raw(2 * HASHES)
    return drawn[:HASHES] | np.uint64(1), drawn[HASHES:]


@dataclass
class Sieve:
    """Decides sample by sample, in order, and counts."""

    filters: Filters
    counts: Counter[str] = field(default_factory=Counter)
    _copies: set[bytes] = field(default_factory=set)
    _signatures: list[Words] = field(default_factory=list)
    _bands: dict[tuple[int, bytes], list[int]] = field(default_factory=dict)

    def reason(self, prompt: Ids, tokens: Ids, loss: float, *, finished: bool) -> str:
        """Why a sample isn't kept; empty where it is. `loss` is in nats per token, under the model that wrote it."""
        found = self._reason(prompt, tokens, loss, finished)
        self.counts[found or "kept"] += 1
        return found

    def _reason(self, prompt: Ids, tokens: Ids, loss: float, finished: bool) -> str:
        limits = self.filters
        problems = {
            "too_short": tokens.size < limits.min_tokens,
            "too_long": tokens.size > limits.max_tokens,
            "unfinished": limits.only_finished and not finished,
            "dull": loss < math.log(limits.min_perplexity),
            "noisy": not loss <= math.log(limits.max_perplexity),
            "repetitive": repeated(tokens, limits.n_gram) > limits.max_repeated,
        }
        return next((reason for reason, holds in problems.items() if holds), "") or self._compared(prompt, tokens)

    def _compared(self, prompt: Ids, tokens: Ids) -> str:
        """Whether a kept sample is the same, or nearly; if not, this one is remembered."""
        whole = prompt.tobytes() + b"|" + tokens.tobytes()
        if whole in self._copies:
            return "copy"
        hashes = n_grams(tokens, self.filters.n_gram)
        if self.filters.max_overlap < 1 and hashes.size:
            mine = signature(hashes)
            bands = [(start, mine[start : start + BAND].tobytes()) for start in range(0, HASHES, BAND)]
            near = {place for band in bands for place in self._bands.get(band, ())}
            if any(float(np.mean(mine == self._signatures[place])) > self.filters.max_overlap for place in near):
                return "near_copy"
            for band in bands:
                self._bands.setdefault(band, []).append(len(self._signatures))
            self._signatures.append(mine)
        self._copies.add(whole)
        return ""
