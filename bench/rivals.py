"""What the trainers of other systems have in common: our model, data and sample order, and the notes that they take."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from bench.children import say
from peer.data import ShardReader, sample_indices
from peer.model import FlatParameters
from peer.optimizer import lr_factor
from swarm.manifest import AdamW, Manifest


def batches(manifest: Manifest, files: Path, name: str) -> Iterator[torch.Tensor]:
    """The samples of one trainer, a batch at a time, [batch_samples, sequence_length + 1]; without an end."""
    data, samples = manifest.data, manifest.training.batch_samples
    reader = ShardReader.open(data.train, files, data.sequence_length, int(manifest.model.config["vocab_size"]))
    position = 0
    while True:
        yield reader.batch(sample_indices(manifest.order_key, 0, name, position, samples, len(reader)))
        position += samples


def accumulate(network: nn.Module, batch: torch.Tensor, clip_norm: float) -> float:
    """Add the clipped gradient of a batch; its mean loss in nats per token."""
    logits = network(input_ids=batch[:, :-1], use_cache=False).logits
    loss = functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
    torch.autograd.backward(loss)
    nn.utils.clip_grad_norm_(network.parameters(), clip_norm)
    return loss.item()


def adamw(manifest: Manifest, parameters: Any) -> torch.optim.AdamW:
    """torch's AdamW with the manifest's values."""
    inner = manifest.training.optimizer if manifest.training.kind == "sync" else manifest.training.inner
    if not isinstance(inner, AdamW):
        raise TypeError("the comparison is with AdamW inside")
    return torch.optim.AdamW(
        parameters, lr=inner.lr, betas=(inner.beta1, inner.beta2), eps=inner.epsilon, weight_decay=inner.weight_decay
    )


def set_rate(manifest: Manifest, optimizer: torch.optim.Optimizer, tokens: int) -> None:
    """The manifest's schedule after so many tokens of all trainers together."""
    inner = manifest.training.optimizer if manifest.training.kind == "sync" else manifest.training.inner
    optimizer.param_groups[0]["lr"] = inner.lr * lr_factor(manifest.training.schedule, tokens)


class Notes:
    """Says what was done after each synchronisation, and keeps the weights where `record` names a folder."""

    def __init__(self, network: nn.Module, record: str | None) -> None:
        self._network, self._flat = network, FlatParameters(network)
        self._folder = Path(record) if record else None
        if self._folder is not None:
            self._folder.mkdir(parents=True, exist_ok=True)

    def take(self, index: int, steps: int, computed_s: float, loss: float) -> None:
        """After synchronisation `index` and `steps` steps of this trainer, `computed_s` of which were spent computing."""
        at_s = time.time()
        if self._folder is not None:
            np.save(self._folder / f"round-{index}.npy", self._flat.read(self._network))
        say(at_s=at_s, round=index, steps=steps, computed_s=computed_s, loss=loss)
