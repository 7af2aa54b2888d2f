"""Rows whose values say more than a token: which tokens have no loss, and where a document starts.

A value has 32 bits. The lower 28 are the token's id, `NO_LOSS` says that predicting it isn't learned, `STARTS` that a document
begins with it. So what is trained on is covered by the shard's hash.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from swarm.errors import DataInvalid

ID_BITS = 28
MAX_ID = (1 << ID_BITS) - 1
NO_LOSS, STARTS = 1 << 31, 1 << 30
IGNORED = -100
"""The label of a token without a loss: what torch's cross-entropy leaves out."""

Values = NDArray[np.int64]


@dataclass(frozen=True)
class Lesson:
    """What a model is shown, and what it is to say; each int64 [samples, sequence_length].

    `positions` count from the start of each document, `labels` are `IGNORED` where nothing is learned.
    """

    ids: torch.Tensor
    labels: torch.Tensor
    positions: torch.Tensor


def marked(ids: Values, counts: NDArray[np.bool_]) -> Values:
    """One document's values, [tokens]: `counts` says which have a loss. The first has none, as nothing precedes it."""
    values = ids | np.where(counts, 0, NO_LOSS)
    values[:1] |= STARTS | NO_LOSS
    return values


def token_ids(values: Values) -> Values:
    """The ids in marked values. Raises `DataInvalid` where a bit is set that has no meaning."""
    ids = values & ~(NO_LOSS | STARTS)
    if ids.size and int(ids.max()) > MAX_ID:
        raise DataInvalid("a value in the data has a mark without a meaning", "the data was made by a later version: update")
    return ids


def lesson(rows: torch.Tensor) -> Lesson:
    """What rows of marked values, int64 [samples, sequence_length + 1], teach; a row's first always starts a document."""
    ids, starts = rows & MAX_ID, rows & STARTS != 0
    unlearned = starts | (rows & NO_LOSS != 0)
    places = torch.arange(rows.shape[1] - 1, device=rows.device).expand(len(rows), -1)
    begun = torch.where(starts[:, :-1], places, 0).cummax(dim=1).values
    return Lesson(ids[:, :-1], ids[:, 1:].masked_fill(unlearned[:, 1:], IGNORED), places - begun)
