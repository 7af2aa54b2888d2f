"""Drawing tokens so that anybody can check them: the noise of every draw follows from the run, the sample and the token's place.

By the Gumbel-max trick (Gumbel, 1954; Maddison, Tarlow and Minka, 2014) the token with the largest logit / temperature + Gumbel
noise is drawn with the probability that a softmax gives it. Whoever knows the noise recomputes the logits of a finished sample in
one forward pass and sees whether each token had the largest (compare TOPLOC, 2501.16007, which compares activations instead).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from swarm.manifest import Sampling

GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
MULTIPLIERS = (0xBF58476D1CE4E5B9 - (1 << 64), 0x94D049BB133111EB - (1 << 64))
SHIFTS = (30, 27, 31)
UNIFORM_BITS = 52
IMPOSSIBLE = 1e6
"""The gap of a token that can't be drawn at all."""


@dataclass(frozen=True)
class Leeway:
    """How far recomputed logits may be off: by `logit` in nats, and the probability of all likelier tokens by `share`."""

    logit: float = 0.0
    share: float = 0.0


def draw_key(run: bytes, index: int, place: int) -> int:
    """What the noise of token `place` of sample `index` is drawn by: 64 bits, signed as torch wants them."""
    message = run + index.to_bytes(8, "big") + place.to_bytes(8, "big")
    digest = hashlib.blake2b(message, digest_size=8, person=b"swarm.draw").digest()
    return int.from_bytes(digest, "big", signed=True)


def draw_keys(run: bytes, draws: Sequence[tuple[int, int]], device: torch.device) -> torch.Tensor:
    """The keys of several draws, each a sample's index and a place in it, int64 [draws]."""
    return torch.tensor([draw_key(run, index, place) for index, place in draws], dtype=torch.int64, device=device)


def gumbel(keys: torch.Tensor, vocabulary: int) -> torch.Tensor:
    """Gumbel noise, float32 [draws, vocabulary], the same everywhere but for the last bits of two logarithms.

    Value v of a draw is the v-th number of SplitMix64 (Steele, Lea and Flood, 2014) from the draw's key on.
    """
    steps = torch.arange(1, vocabulary + 1, dtype=torch.int64, device=keys.device) * GOLDEN
    words = _mixed(keys.unsqueeze(1) + steps)
    uniform = (_shifted(words, 64 - UNIFORM_BITS).double() + 0.5) * 2.0**-UNIFORM_BITS
    return -torch.log(-torch.log(uniform)).float()


def draw(logits: torch.Tensor, keys: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """The drawn tokens, int64 [draws], for logits, float32 [draws, vocabulary]."""
    scaled = logits / sampling.temperature
    outside = ~_drawable(scaled, sampling, Leeway())
    return (scaled + gumbel(keys, logits.shape[1])).masked_fill_(outside, -torch.inf).argmax(dim=1)


def gaps(logits: torch.Tensor, keys: torch.Tensor, tokens: torch.Tensor, sampling: Sampling, leeway: Leeway) -> torch.Tensor:
    """By how many nats of a logit each token, int64 [draws], lacks to be the drawn one, float32 [draws]; 0 where it is.

    Tokens near the edge of what can be drawn are given the benefit of the doubt, within `leeway`.
    """
    scaled = logits / sampling.temperature
    scores = scaled + gumbel(keys, logits.shape[1])
    narrow = Leeway(-leeway.logit, -leeway.share)
    best = scores.masked_fill(~_drawable(scaled, sampling, narrow), -torch.inf).amax(dim=1)
    chosen = tokens.unsqueeze(1)
    lacking = (best - scores.gather(1, chosen).squeeze(1)).clamp_(min=0) * sampling.temperature
    possible = _drawable(scaled, sampling, leeway).gather(1, chosen).squeeze(1)
    return torch.where(possible, lacking, IMPOSSIBLE)


def _drawable(scaled: torch.Tensor, sampling: Sampling, leeway: Leeway) -> torch.Tensor:
    """Which tokens can be drawn, [draws, vocabulary]; the likeliest always can. A negative leeway takes away from them."""
    largest, edge = scaled.amax(dim=1, keepdim=True), leeway.logit / sampling.temperature
    fine = torch.ones_like(scaled, dtype=torch.bool)
    if 0 < sampling.top_k < scaled.shape[1]:
        least = scaled.topk(sampling.top_k, dim=1).values[:, -1:]
        fine = scaled >= least - edge
    if sampling.top_p < 1:
        shares = scaled.masked_fill(~fine, -torch.inf).softmax(dim=1)
        ordered, places = shares.sort(dim=1, descending=True, stable=True)
        within = ordered.cumsum(dim=1) - ordered < sampling.top_p + leeway.share
        fine &= torch.zeros_like(fine).scatter_(1, places, within)
    return fine | (scaled == largest)


def _mixed(words: torch.Tensor) -> torch.Tensor:
    """SplitMix64's finaliser, modulo 2^64."""
    words = (words ^ _shifted(words, SHIFTS[0])) * MULTIPLIERS[0]
    words = (words ^ _shifted(words, SHIFTS[1])) * MULTIPLIERS[1]
    return words ^ _shifted(words, SHIFTS[2])


def _shifted(words: torch.Tensor, bits: int) -> torch.Tensor:
    """To the right, with zeros coming in: torch's own shift keeps the sign."""
    return (words >> bits) & ((1 << (64 - bits)) - 1)
