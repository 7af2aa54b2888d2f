"""What the doctor measures: the work that the run asks for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from peer.doctor import measure_tokens_per_s
from peer.recipes import llama_config, tiny_manifest
from swarm.auto import read

EXAMPLES = Path(__file__).parents[2] / "examples"
CPU = torch.device("cpu")


def test_training_and_generating_are_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the run generates nothing is trained; either is a number of tokens per second."""
    training = tiny_manifest(tmp_path, 1)
    example, _ = read(EXAMPLES / "synthetic.yaml")
    config = llama_config(257, 64, 32, 2, 256)
    generating = example.model_copy(update={"model": example.model.model_copy(update={"config": config})})
    assert generating.generates
    backward = list[torch.Tensor]()
    real = torch.autograd.backward

    def noted(loss: torch.Tensor) -> None:
        backward.append(loss)
        real(loss)

    monkeypatch.setattr(torch.autograd, "backward", noted)
    assert measure_tokens_per_s(generating, CPU, 0.1) > 0
    assert not backward
    assert measure_tokens_per_s(training, CPU, 0.1) > 0
    assert backward
