"""What a model writes follows from its weights and the place, and leaves everything else as it was."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from peer.model import initial_theta
from peer.trainer import Trainer
from peer.writing import continuation, draw, drawn_numbers
from swarm.evaluations import agree_on
from swarm.manifest import Evaluation

KEY = b"a run and a round"


def test_numbers_follow_from_run_round_and_place() -> None:
    """The same for everybody, others at another place, and longer ones begin alike."""
    numbers = drawn_numbers(KEY, 0, 8)
    assert numbers == drawn_numbers(KEY, 0, 16)[:8]
    assert numbers != drawn_numbers(KEY, 1, 8)
    assert all(0 <= number < 1 for number in numbers)


def test_a_token_is_drawn_by_what_is_expected() -> None:
    """As often as the model expects it at the temperature; never beyond the vocabulary."""
    logits = np.array([0.0, 0.7 * math.log(3.0), -math.inf], dtype=np.float32)
    drawn = [draw(logits, number) for number in drawn_numbers(KEY, 0, 4000)]
    assert 0.72 < drawn.count(1) / len(drawn) < 0.78
    assert drawn.count(2) == 0
    assert draw(logits, 1.0) < 3


def test_a_text_ends_at_its_end_and_sees_so_much() -> None:
    """The end token isn't part of it; only the last tokens are looked at; nothing comes after nothing."""
    seen: list[list[int]] = []

    def logits_after(ids: Any) -> Any:
        seen.append(list(ids))
        return np.array([-9e9, -9e9, 0.0 if len(seen) < 3 else -9e9, 0.0 if len(seen) == 3 else -9e9], dtype=np.float32)

    assert continuation(logits_after, [7, 8, 9], [0.5] * 9, 3, 4) == [2, 2]
    assert seen == [[7, 8, 9], [7, 8, 9, 2], [8, 9, 2, 2]]
    assert continuation(logits_after, [], [0.5], 3, 4) == []


def test_devices_that_round_otherwise_agree(small_run: Callable[..., Any]) -> None:
    """The loss in fp32 and in bf16 is the same to far less than what new runs tolerate."""
    run = small_run("diloco")
    theta = initial_theta(run.manifest.model)
    trainers = [
        Trainer(run.manifest, torch.device("cpu"), run.train, run.validation, micro_batch=size, dtype=dtype)
        for size, dtype in ((4, torch.float32), (3, torch.bfloat16))
    ]
    theta = theta - trainers[0].train_round(theta, 1, "somebody", 30, 0).update
    losses = [trainer.held_out_loss(theta) for trainer in trainers]
    assert agree_on(dict(zip("ab", losses, strict=True)), 2, Evaluation().tolerance / 5) is not None
    assert losses[0] != losses[1]


def test_evaluating_leaves_the_network_as_it_was(small_run: Callable[..., Any]) -> None:
    """A round that was begun early goes on from where it is; what is told is the same each time, and nothing when stopped."""
    run = small_run("diloco")
    trainer = Trainer(run.manifest, torch.device("cpu"), run.train, run.validation, micro_batch=4)
    theta = initial_theta(run.manifest.model)
    other = theta + np.float32(0.01)
    trainer.train_round(theta, 1, "somebody", 2, 0)
    before = trainer.parameters.read(trainer._network)
    losses = [trainer.held_out_loss(each, 6) for each in (theta, other, theta)]
    texts = [trainer.continuations(each, [[1, 2], [3]], 5, KEY, None) for each in (theta, other, theta)]
    assert np.array_equal(trainer.parameters.read(trainer._network), before)
    assert trainer._network.training
    assert losses[0] == losses[2] == trainer.evaluate(theta, 6) != losses[1]
    assert texts[0] == texts[2]
    assert [len(text) for text in texts[0] or ()] == [5, 5]
    assert trainer.held_out_loss(theta, 6, lambda: "paused") is None
    assert trainer.continuations(theta, [[1]], 5, KEY, None, lambda: "paused") is None
