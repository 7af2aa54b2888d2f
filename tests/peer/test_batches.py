"""How many samples go through the model at once."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from peer.batches import CPU_MAX_SAMPLES, Batch, Plan, activation_bytes, feed, grouped, halved, plan_for_host

SETTINGS = SimpleNamespace(num_hidden_layers=4, hidden_size=128, num_attention_heads=4, vocab_size=257)


def test_recomputation_needs_less_memory() -> None:
    """Checkpointing keeps one layer's activations instead of all."""
    assert activation_bytes(SETTINGS, 128, checkpointing=True) < activation_bytes(SETTINGS, 128, checkpointing=False) / 2


def test_a_cpu_uses_as_many_samples_as_fit() -> None:
    """Plenty of memory is capped, less gives fewer samples, little gives recomputation, none gives nothing."""
    one = activation_bytes(SETTINGS, 128, checkpointing=False)
    assert plan_for_host(SETTINGS, 128, 1 << 40) == Plan(CPU_MAX_SAMPLES, checkpointing=False)
    assert plan_for_host(SETTINGS, 128, 2 * 3 * one) == Plan(3, checkpointing=False)
    assert plan_for_host(SETTINGS, 128, one) == Plan(1, checkpointing=True)
    assert plan_for_host(SETTINGS, 128, 1000) is None


def test_running_out_of_memory_halves_then_recomputes_then_gives_up() -> None:
    """There is an end to what is tried."""
    plans: list[Plan | None] = [Plan(5, checkpointing=False)]
    while plans[-1] is not None:
        plans.append(halved(plans[-1]))
    assert plans == [Plan(5, False), Plan(2, False), Plan(1, False), Plan(1, True), None]


@pytest.mark.parametrize("size", [1, 3, 10, 50])
def test_batches_hold_the_samples_in_order(small_run: Callable[..., Any], size: int) -> None:
    """Whatever the group size, the same samples come in the same order."""
    reader = small_run().train
    indices = np.array([7, 3, 100, 5, 5, 0, 12, 90, 33, 2])
    batches = list(feed(lambda group: Batch(reader.batch(group)), grouped(indices, size), torch.device("cpu")))
    assert [len(batch) for batch in batches[:-1]] == [size] * (len(batches) - 1)
    assert torch.equal(torch.cat([batch.rows for batch in batches]), reader.batch(indices))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_batches_are_copied_ahead_on_a_gpu(small_run: Callable[..., Any]) -> None:
    """The side stream delivers the same samples."""
    reader = small_run().train
    indices = np.arange(100)
    batches = list(feed(lambda group: Batch(reader.batch(group)), grouped(indices, 7), torch.device("cuda")))
    assert torch.equal(torch.cat([batch.rows for batch in batches]).cpu(), reader.batch(indices))


def test_nothing_to_feed_is_fine(small_run: Callable[..., Any]) -> None:
    """An empty assignment gives no batches."""
    reader = small_run().train
    assert list(feed(lambda group: Batch(reader.batch(group)), [], torch.device("cpu"))) == []
