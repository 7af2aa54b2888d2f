"""Pieces: what somebody has generated in one go, samples with consecutive numbers, as bytes that others get by their hash."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from peer.device import PRECISIONS
from peer.generating import Sample, is_whole
from swarm.errors import Rejected
from swarm.manifest import Sampling
from swarm.messages import parse
from swarm.rpc.v1.signed_pb2 import Piece as Message

TOKEN_BYTES, SAMPLE_BYTES, HEAD_BYTES = 4, 16, 64
MAX_INDEX = 1 << 62
LOSS_ROUNDING = 1e-4


@dataclass(frozen=True)
class Piece:
    """Samples in the order of their numbers, and what their author computed in."""

    samples: tuple[Sample, ...]
    precision: str

    @property
    def first(self) -> int:
        """The number of the first one."""
        return self.samples[0].index

    @property
    def tokens(self) -> int:
        """How many tokens they have together."""
        return sum(sample.tokens.size for sample in self.samples)

    @property
    def loss(self) -> float:
        """The mean loss of all tokens in nats."""
        return sum(sample.loss * sample.tokens.size for sample in self.samples) / self.tokens


def most_bytes(tokens: int, samples: int) -> int:
    """What a piece of so many tokens and samples takes at most."""
    return HEAD_BYTES + TOKEN_BYTES * tokens + SAMPLE_BYTES * samples


def is_promised(piece: Piece, span: tuple[int, int], weight: int, loss: float) -> bool:
    """Whether a piece has the samples from `span`'s first on, no more than its count, and the commit's tokens and mean loss."""
    first, count = span
    fits = piece.first == first and len(piece.samples) <= count and piece.tokens == weight
    return fits and abs(piece.loss - loss) <= LOSS_ROUNDING * max(1.0, abs(loss))


def pack(samples: Sequence[Sample], precision: str) -> bytes:
    """The bytes of a piece of samples with consecutive numbers."""
    message = Message(
        first=samples[0].index,
        lengths=[sample.tokens.size for sample in samples],
        losses=[sample.loss for sample in samples],
        tokens=np.concatenate([sample.tokens for sample in samples]).astype("<u4").tobytes(),
        precision=precision,
    )
    return message.SerializeToString(deterministic=True)


def unpack(raw: bytes, sampling: Sampling, vocabulary: int, author: str = "") -> Piece:
    """The samples in a piece, each whole. Raises `Rejected` for whatever else it is."""
    message = parse(Message, raw, author)
    lengths = np.array(message.lengths, dtype=np.int64)
    count = len(lengths)
    listed = len(message.losses) == count and len(message.tokens) == TOKEN_BYTES * int(lengths.sum())
    if not count or not listed or message.precision not in PRECISIONS or message.first > MAX_INDEX:
        raise Rejected("bad_piece", f"{count} samples", author)
    tokens = np.frombuffer(message.tokens, dtype="<u4").astype(np.int64)
    cut = np.split(tokens, np.cumsum(lengths)[:-1])
    found = zip(cut, message.losses, strict=True)
    samples = tuple(Sample(message.first + place, ids, loss) for place, (ids, loss) in enumerate(found))
    if not all(is_whole(sample, sampling, vocabulary) for sample in samples):
        raise Rejected("bad_piece", "a sample isn't whole", author)
    return Piece(samples, message.precision)
