"""Training in one process with nothing of the swarm's: torch's own AdamW on the whole batch. What `sync` is held against."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from peer.data import Indices, ShardReader, sample_indices
from peer.model import FlatParameters, Vector, build_model
from peer.optimizer import lr_factor
from peer.trainer import Trainer
from swarm.manifest import Manifest, Shard, Sync


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Compute with so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute with one thread, as every peer does; several are slow where others use the processor too."""
    with threads(1):
        yield


@dataclass(frozen=True)
class Alone:
    """What one process reached: weights, [parameters], and the training loss of every step in nats per token."""

    theta: Vector
    losses: tuple[float, ...]
    samples: int


@one_thread()
def train_alone(manifest: Manifest, files: Path, batches: Iterable[Indices], samples: int) -> Alone:
    """One AdamW step per batch of sample indices until `samples` samples are used; clipping and schedule are the manifest's."""
    strategy, sequence_length = manifest.strategy, manifest.data.sequence_length
    if not isinstance(strategy, Sync):
        raise TypeError("one step per batch is what sync does")
    reader = open_shards(manifest, files, manifest.data.train)
    network: Any = build_model(manifest.model).train()
    settings = strategy.optimizer
    optimizer = torch.optim.AdamW(
        network.parameters(),
        lr=settings.lr,
        betas=(settings.beta1, settings.beta2),
        eps=settings.epsilon,
        weight_decay=settings.weight_decay,
    )
    losses: list[float] = []
    used = 0
    for indices in batches:
        if used >= samples:
            break
        batch = reader.batch(indices)
        used += len(indices)
        optimizer.param_groups[0]["lr"] = settings.lr * lr_factor(strategy.schedule, used * sequence_length)
        optimizer.zero_grad()
        logits = network(input_ids=batch[:, :-1], use_cache=False).logits
        loss = functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(network.parameters(), strategy.clip_norm)
        optimizer.step()
        losses.append(loss.item())
    return Alone(FlatParameters(network).read(network), tuple(losses), used)


def planned_batch(manifest: Manifest, peers: Iterable[str], round_index: int) -> Indices:
    """The samples that the whole swarm is given in a round of `sync` when all have equal quotas."""
    ordered = sorted(peers)
    quota, rest = divmod(manifest.strategy.batch_samples, len(ordered))
    if rest:
        raise ValueError("the batch is no multiple of the number of peers")
    total = manifest.data.train_samples
    return np.concatenate([sample_indices(manifest.order_key, round_index, peer, 0, quota, total) for peer in ordered])


@one_thread()
def held_out_loss(manifest: Manifest, files: Path, theta: Vector, samples: int) -> float:
    """The loss on the first `samples` held-out samples, in nats per token."""
    train, validation = (open_shards(manifest, files, shards) for shards in (manifest.data.train, manifest.data.validation))
    return Trainer(manifest, torch.device("cpu"), train, validation).evaluate(theta, samples)


def open_shards(manifest: Manifest, files: Path, shards: tuple[Shard, ...]) -> ShardReader:
    """Read some of the run's shards."""
    return ShardReader.open(shards, files, manifest.data.sequence_length, int(manifest.model.config["vocab_size"]))
