"""How many samples go through the model at once, and getting them onto the device in time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from peer.data import Indices
from peer.distillation import Taught

CPU_MAX_SAMPLES = 32
MEMORY_SHARE = 0.5
MAX_PROBE_SAMPLES = 256
ACTIVATIONS_PER_LAYER = 34  # values per token and hidden unit that one transformer layer keeps (Korthikanti et al., 2205.05198)
ACTIVATIONS_PER_LOGIT, DISTILLED_PER_LOGIT = 3, 6


@dataclass(frozen=True)
class Plan:
    """`samples` per micro-batch; `checkpointing` recomputes activations to save memory."""

    samples: int
    checkpointing: bool


@dataclass(frozen=True)
class Batch:
    """Samples as shards have them, int64 [samples, sequence_length + 1], and what a teacher expects in them, if there is one."""

    rows: torch.Tensor
    taught: Taught | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
        """The same with every tensor changed."""
        taught = self.taught
        return Batch(change(self.rows), taught and Taught(change(taught.ids), change(taught.log_probabilities)))


Read = Callable[[Indices], Batch]


def activation_bytes(settings: Any, sequence_length: int, *, checkpointing: bool, per_logit: int = ACTIVATIONS_PER_LOGIT) -> int:
    """An estimate of what one fp32 sample keeps in memory between the forward and the backward pass of a transformers model."""
    layers, hidden = int(settings.num_hidden_layers), int(settings.hidden_size)
    per_layer = ACTIVATIONS_PER_LAYER * hidden
    kept = per_layer + layers * hidden if checkpointing else layers * per_layer
    scores = int(settings.num_attention_heads) * sequence_length * (1 if checkpointing else layers)
    return 4 * sequence_length * (kept + scores + per_logit * int(settings.vocab_size))


def plan_for_host(settings: Any, sequence_length: int, free_bytes: int, per_logit: int = ACTIVATIONS_PER_LOGIT) -> Plan | None:
    """The micro-batch that an estimate allows on a CPU, or None if not even one sample fits."""
    for checkpointing in (False, True):
        needed = activation_bytes(settings, sequence_length, checkpointing=checkpointing, per_logit=per_logit)
        fitting = int(free_bytes * MEMORY_SHARE) // needed
        if fitting >= 1:
            return Plan(min(CPU_MAX_SAMPLES, fitting), checkpointing)
    return None


def halved(plan: Plan) -> Plan | None:
    """What to try after the memory didn't suffice: half as many samples, then recomputation, then nothing."""
    if plan.samples > 1:
        return Plan(plan.samples // 2, plan.checkpointing)
    return None if plan.checkpointing else Plan(1, checkpointing=True)


def feed(read: Read, groups: Sequence[Indices], device: torch.device) -> Iterator[Batch]:
    """The batches, on the device.

    On a GPU each next batch is copied from pinned memory on a side stream while the present one is computed on.
    """
    if device.type != "cuda":
        for group in groups:
            yield read(group).each(lambda tensor: tensor.to(device))
        return
    stream: torch.cuda.Stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call] # torch gives no type
    ahead = _start_copy(read, groups[0], device, stream) if groups else None
    for following in (*groups[1:], None):
        if ahead is None:
            return
        batch, copied = ahead
        ahead = _start_copy(read, following, device, stream) if following is not None else None
        current = torch.cuda.current_stream(device)
        current.wait_event(copied)
        batch.each(partial(_recorded, stream=current))
        yield batch


def _recorded(tensor: torch.Tensor, stream: torch.cuda.Stream) -> torch.Tensor:
    tensor.record_stream(stream)
    return tensor


def _start_copy(read: Read, group: Indices, device: torch.device, stream: torch.cuda.Stream) -> tuple[Batch, torch.cuda.Event]:
    pinned = read(group).each(torch.Tensor.pin_memory)
    with torch.cuda.stream(stream):
        batch = pinned.each(lambda tensor: tensor.to(device, non_blocking=True))
        copied: torch.cuda.Event = torch.cuda.Event()  # type: ignore[no-untyped-call] # torch gives no type
        copied.record(stream)
    return batch, copied


def grouped(indices: Indices, size: int) -> list[Indices]:
    """`indices` in groups of `size`, the last one shorter."""
    return [indices[start : start + size] for start in range(0, len(indices), size)]
