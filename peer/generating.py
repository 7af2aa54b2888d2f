"""A model writes samples, and checks those that others say it has written. Plain synchronous code; which ones others decide.

Every token is drawn as `peer.sampling` says, so that one forward pass over a finished sample shows whether the model wrote it.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from peer.corpus import load_tokenizer
from peer.data import tree_path
from peer.device import PRECISIONS, autocast, autocast_dtype, empty_cache, precision_of, ran_out
from peer.model import frozen_base, store_frozen
from peer.prompts import Ids, Prompts
from peer.sampling import Leeway, draw, draw_keys, gaps
from swarm import manifest
from swarm.errors import DataInvalid, OutOfMemory
from swarm.manifest import Sampling

ROWS_AT_ONCE = 32
MICRO_BATCH, GPU_MICRO_BATCH = 16, 64
UNBOUNDED = 1 << 30
LEEWAYS = {"fp32": Leeway(0.02, 0.01), "bf16": Leeway(0.75, 0.2), "fp16": Leeway(0.15, 0.05)}
MEAN_GAPS = {"fp32": 0.002, "bf16": 0.05, "fp16": 0.01}
"""What honest samples are off by, several times over: `python -m bench.generating`. Another model's are off by nats."""
LOSS_TOLERANCES = {"fp32": 0.01, "bf16": 0.1, "fp16": 0.03}

ShouldStop = Callable[[], str | None]


@dataclass(frozen=True)
class Sample:
    """What the model wrote as sample `index` of a run: int64 [tokens], and their mean loss in nats under the model itself.

    The loss is that of all tokens at temperature 1, whatever could be drawn.
    """

    index: int
    tokens: Ids
    loss: float


@dataclass(frozen=True)
class Check:
    """How far a sample is from what the model would have written, in nats of a logit, and what its loss is."""

    worst: float
    mean: float
    loss: float

    def problem(self, sample: Sample, precision: str) -> str:
        """Why the model in this precision can't have written it; empty where it can.

        Means are allowed one token that is as far off as any may be: in short samples chance doesn't even out.
        """
        spare = LEEWAYS[precision].logit / sample.tokens.size
        if not (self.worst <= LEEWAYS[precision].logit and self.mean <= MEAN_GAPS[precision] + spare):
            return "tokens"
        return "" if abs(self.loss - sample.loss) <= LOSS_TOLERANCES[precision] + spare else "loss"


def is_whole(sample: Sample, sampling: Sampling, vocabulary: int) -> bool:
    """Whether a sample ends where it has to: with the first token that ends one, or after the last that is allowed."""
    tokens = sample.tokens
    if not 0 < tokens.size <= sampling.max_tokens or not math.isfinite(sample.loss):
        return False
    if int(tokens.min()) < 0 or int(tokens.max()) >= vocabulary:
        return False
    ends = np.isin(tokens, sampling.stop)
    return not ends[:-1].any() and bool(ends[-1] or tokens.size == sampling.max_tokens)


def never_stop() -> str | None:
    """Write to the end."""
    return None


def micro_batch(device: torch.device) -> int:
    """How many samples a device writes at once, unless they don't fit."""
    return GPU_MICRO_BATCH if device.type == "cuda" else MICRO_BATCH


class Writer:
    """One model on one device, and how many samples it writes at once. Not for several threads at once."""

    def __init__(
        self,
        model: manifest.Model,
        files: Path,
        vocabulary: int,
        sampling: Sampling,
        run: bytes,
        device: torch.device,
        *,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.sampling, self.vocabulary = sampling, vocabulary
        self.micro_batch = micro_batch(device)
        self._model, self._files, self._run, self._device = model, files, run, device
        self._dtype = autocast_dtype(device) if dtype is None else dtype
        self._loaded_as: torch.dtype | None = None
        self._network: Any = None

    @classmethod
    def open(
        cls, model: manifest.Model, tokenizer: manifest.Tree, files: Path, sampling: Sampling, run: bytes, device: torch.device
    ) -> Writer:
        """That of a model and a tokenizer, which lie in `files` by their roots and were verified before. Raises `DataInvalid`."""
        vocabulary = min(len(load_tokenizer(tree_path(files, tokenizer))), model.vocabulary_size)
        return cls(model, files, vocabulary, sampling, run, device)

    @property
    def precision(self) -> str:
        """What matrix products are computed in."""
        return precision_of(self._dtype)

    @property
    def is_loaded(self) -> bool:
        """Whether the model takes memory on the device."""
        return self._network is not None

    def release(self) -> None:
        """Free the model's and the device's memory."""
        self._network = self._loaded_as = None
        gc.collect()
        empty_cache(self._device)

    def load(self, precision: str = "") -> Any:
        """The model, computing in that precision, our own by default. Raises `DataInvalid` and `OutOfMemory`."""
        dtype = PRECISIONS[precision] if precision else self._dtype
        if self._network is None or self._loaded_as != dtype:
            self.release()
            network = frozen_base(self._model, self._files)
            store_frozen(network, dtype)
            try:
                self._network = network.to(self._device)
            except torch.OutOfMemoryError as error:
                raise OutOfMemory("the model doesn't fit on the device", "generate with a smaller base") from error
            self._loaded_as = dtype
        return self._network

    def write(self, prompts: Sequence[Ids], first: int, should_stop: ShouldStop = never_stop) -> list[Sample] | None:
        """The samples from `first` on, one for each prompt, all at once; None when stopped.

        Raises `OutOfMemory` where they don't fit, `DataInvalid` for a model that doesn't give finite numbers.
        """
        network = self.load()
        try:
            with torch.inference_mode(), self._autocast():
                return self._written(network, prompts, first, should_stop)
        except RuntimeError as error:
            if not ran_out(error):
                raise
            raise OutOfMemory("not even one sample fits on the device", "generate shorter samples") from error

    def check(self, prompt: Ids, sample: Sample, precision: str = "") -> Check:
        """How far a sample that `is_whole` is from what the model writes for a prompt, computed in the author's precision."""
        network = self.load(precision)
        leeway = LEEWAYS[precision or self.precision]
        ids = torch.from_numpy(np.concatenate([prompt, sample.tokens[:-1]])).to(self._device)
        tokens = torch.from_numpy(sample.tokens).to(self._device)
        keys = draw_keys(self._run, [(sample.index, place) for place in range(tokens.numel())], self._device)
        lacking, losses = [], []
        with torch.inference_mode(), self._autocast():
            out = network(input_ids=ids[None], use_cache=False, logits_to_keep=tokens.numel())
            for rows in (slice(at, at + ROWS_AT_ONCE) for at in range(0, tokens.numel(), ROWS_AT_ONCE)):
                logits = self._expected(out.logits[0, rows])
                lacking.append(gaps(logits, keys[rows], tokens[rows], self.sampling, leeway))
                losses.append(_losses(logits, tokens[rows]))
        gap = torch.cat(lacking)
        return Check(float(gap.max()), float(gap.double().mean()), float(torch.cat(losses).mean()))

    def _written(self, network: Any, prompts: Sequence[Ids], first: int, should_stop: ShouldStop) -> list[Sample] | None:
        ids, mask = _padded(prompts, self._device)
        positions = (mask.cumsum(dim=1) - 1).clamp_(min=0)
        stop = torch.tensor(self.sampling.stop, dtype=torch.int64, device=self._device)
        writing = torch.ones(len(prompts), dtype=torch.bool, device=self._device)
        tokens, losses, lengths, cache = [], [], torch.zeros_like(ids[:, 0]), None
        for place in range(self.sampling.max_tokens):
            if should_stop() is not None:
                return None
            out = network(
                input_ids=ids,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            logits, cache = self._expected(out.logits[:, -1]), out.past_key_values
            keys = draw_keys(self._run, [(first + row, place) for row in range(len(prompts))], self._device)
            drawn = draw(logits, keys, self.sampling)
            tokens.append(drawn)
            losses.append(_losses(logits, drawn))
            lengths += writing
            writing &= ~torch.isin(drawn, stop)
            if not writing.any():
                break
            ids, positions = drawn[:, None], positions[:, -1:] + 1
            mask = torch.cat([mask, torch.ones_like(ids)], dim=1)
        return _samples(first, torch.stack(tokens, dim=1), torch.stack(losses, dim=1), lengths)

    def _expected(self, logits: torch.Tensor) -> torch.Tensor:
        """What the model expects, float32 [rows, vocabulary]. Raises `DataInvalid` where that is no number."""
        found = logits[:, : self.vocabulary].float()
        if not bool(torch.isfinite(found).all()):
            raise DataInvalid("the base doesn't give finite numbers", "take another one, or compute in another precision")
        return found

    def _autocast(self) -> AbstractContextManager[Any]:
        return autocast(self._device, self._loaded_as or self._dtype)


def _padded(prompts: Sequence[Ids], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts side by side with their ends together, and where they are; both int64 [prompts, longest]."""
    longest = max(prompt.size for prompt in prompts)
    ids, mask = (np.zeros((len(prompts), longest), dtype=np.int64) for _ in range(2))
    for row, prompt in enumerate(prompts):
        ids[row, longest - prompt.size :], mask[row, longest - prompt.size :] = prompt, 1
    return torch.from_numpy(ids).to(device), torch.from_numpy(mask).to(device)


def _losses(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """The loss of each token in nats, float64 [rows]."""
    return -logits.double().log_softmax(dim=1).gather(1, tokens[:, None]).squeeze(1)


def _samples(first: int, tokens: torch.Tensor, losses: torch.Tensor, lengths: torch.Tensor) -> list[Sample]:
    host, lost = tokens.cpu().numpy(), losses.cpu().numpy()
    return [
        Sample(first + row, host[row, :length].copy(), float(lost[row, :length].mean()))
        for row, length in enumerate(lengths.tolist())
    ]


def write_span(
    writer: Writer,
    prompts: Prompts,
    first: int,
    count: int,
    should_stop: ShouldStop = never_stop,
    on_samples: Callable[[Sequence[Sample]], None] = lambda samples: None,
) -> list[Sample]:
    """The samples from `first` on, as many as there are prompts for up to `count`, or fewer when stopped.

    They are written `writer.micro_batch` at a time, from then on less where the device's memory doesn't suffice. Raises what
    `Writer.write` raises.
    """
    done: list[Sample] = []
    end = min(first + count, prompts.samples)
    while (at := first + len(done)) < end:
        try:
            samples = writer.write(prompts.of(at, min(writer.micro_batch, end - at)), at, should_stop)
        except OutOfMemory:
            if writer.micro_batch == 1:
                raise
            writer.micro_batch //= 2
            continue
        if samples is None:
            break
        done += samples
        on_samples(samples)
    return done


def room(config: Mapping[str, Any], longest_prompt: int) -> int:
    """How many tokens the model can write after the longest prompt; a great many where its configuration doesn't say."""
    most = config.get("max_position_embeddings", config.get("n_positions"))
    return max(0, most - longest_prompt) if isinstance(most, int) else UNBOUNDED


def check_length(config: Mapping[str, Any], longest_prompt: int, sampling: Sampling) -> None:
    """Raise `DataInvalid` where the longest prompt and a sample together are more than the model reads."""
    left = room(config, longest_prompt)
    if sampling.max_tokens > left:
        hint = f"at most {left} tokens fit, or build the prompts with a smaller --sequence-length"
        problem = f"a prompt of {longest_prompt} tokens and {sampling.max_tokens} more are too long for the base"
        raise DataInvalid(problem, hint)
