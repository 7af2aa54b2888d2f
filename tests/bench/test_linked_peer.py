"""What stands in for a peer's own parts in benchmarks has their shape."""

from __future__ import annotations

import inspect

import pytest

from bench.linked_peer import WaitingTrainer
from peer.trainer import Trainer


@pytest.mark.parametrize("name", ["train_round", "train_ahead", "release"])
def test_emulated_training_is_called_like_training(name: str) -> None:
    """The engine knows no difference."""
    ours, its = (inspect.signature(getattr(kind, name)).parameters for kind in (WaitingTrainer, Trainer))
    assert list(ours.items()) == list(its.items())


def test_emulated_training_tells_what_training_tells() -> None:
    """For the status and for auditors."""
    assert all(hasattr(WaitingTrainer, name) for name in ("is_loaded", "precision"))
