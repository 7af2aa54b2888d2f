"""Learning from a teacher's logits: reading what it expected at each training token, and how far a student is from it.

A teacher's shard has, for each sample of the training shard of the same place, first the ids of the `top_k` likeliest next tokens
at each position, ascending, then their log-probabilities and, last, that of all other tokens together, in fp16. `peer.teaching`
writes them.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from peer.data import Indices, tree_path
from swarm.errors import DataInvalid
from swarm.manifest import Data, Teacher

ROUNDING = 0.01  # what probabilities may sum to more or less than 1, as their logarithms are rounded to fp16


@dataclass(frozen=True)
class Taught:
    """What a teacher expects after each token of some samples.

    `ids` are int64 [samples, sequence_length, top_k], `log_probabilities` float16 with one more: that of all other tokens.
    """

    ids: torch.Tensor
    log_probabilities: torch.Tensor


def divergence(logits: torch.Tensor, taught: Taught, temperature: float) -> torch.Tensor:
    """How far a student is from its teacher at every token, [samples, tokens], for logits [samples, tokens, vocabulary].

    Forward KL divergence between the two over `top_k` + 1 buckets, the teacher's likeliest tokens and all the others together,
    both softened by the temperature, times its square so that gradients keep their size (Hinton, Vinyals and Dean, 1503.02531).
    """
    total = logits.logsumexp(-1, keepdim=True)
    student = ((bucketed(logits, taught.ids) - total) / temperature).log_softmax(-1)
    teacher = (taught.log_probabilities.float() / temperature).log_softmax(-1)
    return temperature**2 * (teacher.exp() * (teacher - student)).sum(-1)


def bucketed(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """The logits of the tokens `ids`, [..., top_k], and after them the logarithm of the others' summed powers of e."""
    others = logits.scatter(-1, ids, -torch.inf).logsumexp(-1, keepdim=True)
    return torch.cat([logits.gather(-1, ids), others], -1)


class TeacherReader:
    """Random access to what a teacher expects, from local files whose content was verified before."""

    def __init__(self, teacher: Teacher, data: Data, directory: Path, vocabulary_size: int) -> None:
        if teacher.top_k >= vocabulary_size:
            raise DataInvalid(f"a teacher's {teacher.top_k} likeliest tokens leave none of a vocabulary of {vocabulary_size}")
        self._vocabulary_size = vocabulary_size
        row = row_type(data.sequence_length, teacher.top_k, teacher.token_bytes)
        self._ends = list(accumulate(shard.samples for shard in data.train))
        self._rows = [_map(tree_path(directory, tree), row, tree.size_bytes) for tree in teacher.shards]

    def batch(self, indices: Sequence[int] | Indices) -> Taught:
        """What it expects in these training samples. Raises `DataInvalid` for what no teacher can expect."""
        rows = np.stack([self._row(int(index)) for index in indices])
        ids, log_probabilities = rows["ids"].astype(np.int64), rows["log_probabilities"].astype(np.float16)
        if int(ids.max()) >= self._vocabulary_size or not (np.diff(ids) > 0).all():
            raise DataInvalid(f"a teacher's tokens aren't ascending within the vocabulary of {self._vocabulary_size}")
        sums = np.exp(np.minimum(log_probabilities, 1).astype(np.float32)).sum(axis=-1)
        if not np.isfinite(log_probabilities).all() or not (np.abs(sums - 1) <= ROUNDING).all():
            raise DataInvalid("a teacher's probabilities don't sum to 1")
        return Taught(torch.from_numpy(ids), torch.from_numpy(log_probabilities))

    def _row(self, index: int) -> NDArray[np.void]:
        if not 0 <= index < self._ends[-1]:
            raise IndexError(index)
        shard = bisect_right(self._ends, index)
        row: NDArray[np.void] = self._rows[shard][index - (self._ends[shard - 1] if shard else 0)]
        return row


def row_type(sequence_length: int, top_k: int, token_bytes: int) -> np.dtype[np.void]:
    """How a sample lies in a teacher's shard."""
    ids, log_probabilities = (sequence_length, top_k), (sequence_length, top_k + 1)
    return np.dtype([("ids", f"<u{token_bytes}", ids), ("log_probabilities", "<f2", log_probabilities)])


def _map(path: Path, row: np.dtype[np.void], size_bytes: int) -> NDArray[np.void]:
    try:
        if path.stat().st_size != size_bytes:
            raise DataInvalid(f"{path} doesn't have {size_bytes} bytes", "delete it; it will be fetched again")
        return np.memmap(path, dtype=row, mode="r")
    except OSError as error:
        raise DataInvalid(f"{path} can't be read: {error.strerror}") from error
