"""How many samples go through the model at once, and getting them onto the device in time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from peer.data import Indices, ShardReader

CPU_MAX_SAMPLES = 32
MEMORY_SHARE = 0.5
MAX_PROBE_SAMPLES = 256
ACTIVATIONS_PER_LAYER = 34  # values per token and hidden unit that one transformer layer keeps (Korthikanti et al., 2205.05198)
ACTIVATIONS_PER_LOGIT = 3


@dataclass(frozen=True)
class Plan:
    """`samples` per micro-batch; `checkpointing` recomputes activations to save memory."""

    samples: int
    checkpointing: bool


def activation_bytes(settings: Any, sequence_length: int, *, checkpointing: bool) -> int:
    """An estimate of what one fp32 sample keeps in memory between the forward and the backward pass of a transformers model."""
    layers, hidden = int(settings.num_hidden_layers), int(settings.hidden_size)
    per_layer = ACTIVATIONS_PER_LAYER * hidden
    kept = per_layer + layers * hidden if checkpointing else layers * per_layer
    scores = int(settings.num_attention_heads) * sequence_length * (1 if checkpointing else layers)
    return 4 * sequence_length * (kept + scores + ACTIVATIONS_PER_LOGIT * int(settings.vocab_size))


def plan_for_host(settings: Any, sequence_length: int, free_bytes: int) -> Plan | None:
    """The micro-batch that an estimate allows on a CPU, or None if not even one sample fits."""
    for checkpointing in (False, True):
        fitting = int(free_bytes * MEMORY_SHARE) // activation_bytes(settings, sequence_length, checkpointing=checkpointing)
        if fitting >= 1:
            return Plan(min(CPU_MAX_SAMPLES, fitting), checkpointing)
    return None


def halved(plan: Plan) -> Plan | None:
    """What to try after the memory didn't suffice: half as many samples, then recomputation, then nothing."""
    if plan.samples > 1:
        return Plan(plan.samples // 2, plan.checkpointing)
    return None if plan.checkpointing else Plan(1, checkpointing=True)


def feed(reader: ShardReader, groups: Sequence[Indices], device: torch.device) -> Iterator[torch.Tensor]:
    """The batches of token ids, each int64 [samples, sequence_length + 1], on the device.

    On a GPU each next batch is copied from pinned memory on a side stream while the present one is computed on.
    """
    if device.type != "cuda":
        for group in groups:
            yield reader.batch(group).to(device)
        return
    stream: torch.cuda.Stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call] # torch gives no type
    ahead = _start_copy(reader, groups[0], device, stream) if groups else None
    for following in (*groups[1:], None):
        if ahead is None:
            return
        batch, copied = ahead
        ahead = _start_copy(reader, following, device, stream) if following is not None else None
        current = torch.cuda.current_stream(device)
        current.wait_event(copied)
        batch.record_stream(current)
        yield batch


def _start_copy(
    reader: ShardReader, group: Indices, device: torch.device, stream: torch.cuda.Stream
) -> tuple[torch.Tensor, torch.cuda.Event]:
    pinned = reader.batch(group).pin_memory()
    with torch.cuda.stream(stream):
        batch = pinned.to(device, non_blocking=True)
        copied: torch.cuda.Event = torch.cuda.Event()  # type: ignore[no-untyped-call] # torch gives no type
        copied.record(stream)
    return batch, copied


def grouped(indices: Indices, size: int) -> list[Indices]:
    """`indices` in groups of `size`, the last one shorter."""
    return [indices[start : start + size] for start in range(0, len(indices), size)]
