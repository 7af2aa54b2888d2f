"""Training in a round: from `theta` and an assignment of samples to an update. Plain synchronous code for a worker thread.

It knows nothing of other peers: exchange, merge and the outer step are elsewhere.
"""

from __future__ import annotations

import gc
import itertools
import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional

from peer.batches import (
    ACTIVATIONS_PER_LOGIT,
    DISTILLED_PER_LOGIT,
    MAX_PROBE_SAMPLES,
    Batch,
    Plan,
    feed,
    grouped,
    halved,
    plan_for_host,
)
from peer.data import Indices, ShardReader, assignment_seed, present, sample_indices
from peer.device import PRECISIONS, autocast, autocast_dtype, empty_cache, free_bytes, precision_of, ran_out
from peer.distillation import Taught, TeacherReader, divergence
from peer.experts import balance_coefficient, is_routed, routes_of
from peer.leaves import MOST_GRADIENT_LEAVES, MOST_LEAVES, Leaf, Tracer, leaf_ends
from peer.marks import IGNORED, STARTS, Lesson, lesson
from peer.model import FlatParameters, build_model, store_frozen
from peer.optimizer import InnerOptimizer, lr_factor, make_inner
from peer.routing import ExpertLoad
from peer.sketch import Sketcher
from peer.writing import continuation, drawn_numbers
from swarm import manifest
from swarm.errors import DataInvalid, OutOfMemory

Vector = NDArray[np.float32]
T = TypeVar("T")
ShouldStop = Callable[[], str | None]
Relabel = Callable[[torch.Tensor], torch.Tensor]

NOT_FINITE = "non_finite"
STOP_CHECK_S = 0.1
FIRST_LOSS_SCALE = 2.0**14
MAX_SCALE_TRIALS = 24
GPU_SHARE = 0.92
OUT_OF_MEMORY_HINT = "close other programs that use the device, or join a run with a smaller model"


@dataclass(frozen=True)
class Progress:
    """How far a round has come.

    Samples done, out of `samples_total`; `loss` in nats per token is that of the micro-batch before.
    """

    samples: int
    samples_total: int
    loss: float | None


@dataclass(frozen=True)
class TrainedUpdate:
    """What a peer made in a round. `update`, [parameters], is the mean gradient (`sync`) or `theta - theta_local` (`diloco`).

    Losses are in nats per token. `stopped` is the reason why it ended before its quota, `error` why it must not be sent
    (then `update` is zero and `samples` 0). The samples used are the first `samples` positions of the peer's
    assignment. `leaves` are what others can check, where that was asked for. `experts` is how a mixture's were used. Where a run
    generates, `samples` are tokens, and `piece` holds them.
    """

    update: Vector
    samples: int
    tokens: int
    loss_first: float
    loss_mean: float
    loss_last: float
    seconds: float
    steps: int = 0
    skipped_steps: int = 0
    stopped: str | None = None
    error: str | None = None
    leaves: tuple[Leaf, ...] = ()
    experts: ExpertLoad | None = None
    piece: bytes = b""


@dataclass(frozen=True)
class Joined:
    """What a round that was begun early goes on from: the agreed weights, [parameters], and the work that it has been given."""

    theta: Vector
    quota: int
    tokens: int


class Early:
    """The start of a round before the one before it is merged: the training thread runs ahead and waits here at the end."""

    def __init__(self) -> None:
        self._joined: Joined | None = None
        self._set = threading.Event()
        self.waited_s = 0.0

    def join(self, joined: Joined) -> None:
        """Tell the training thread how the round before ended."""
        self._joined = joined
        self._set.set()

    def look(self) -> Joined | None:
        """How it ended, if it has."""
        return self._joined

    def wait(self, should_stop: ShouldStop) -> Joined | None:
        """Wait for that; None when we are stopped first."""
        started = time.monotonic()
        while not self._set.wait(STOP_CHECK_S) and should_stop() is None:
            pass
        self.waited_s += time.monotonic() - started
        return self._joined


def never_stop() -> str | None:
    """Train to the end of the quota."""
    return None


def ignore_progress(progress: Progress) -> None:
    """Tell nobody."""


@dataclass(frozen=True)
class _Assignment:
    order_key: str
    round: int
    peer_id: str
    total: int


class _Loss:
    """A loss on its way to the host, so that asking for it doesn't wait for what the GPU was given to do since."""

    def __init__(self, loss: torch.Tensor) -> None:
        self._value = loss.detach()
        self._copied: torch.cuda.Event | None = None
        if loss.is_cuda:
            pinned = torch.empty((), dtype=loss.dtype, pin_memory=True)
            self._value = pinned.copy_(self._value, non_blocking=True)
            self._copied = torch.cuda.current_stream(loss.device).record_event()

    def __float__(self) -> float:
        if self._copied is not None:
            self._copied.synchronize()
        return float(self._value)


@dataclass
class _Run:
    """What has been done of a round so far."""

    assignment: _Assignment
    quota_samples: int
    should_stop: ShouldStop
    progress: Callable[[Progress], None]
    tracer: Tracer | None = None
    relabel: Relabel | None = None
    done: int = 0
    losses: list[tuple[_Loss, int]] = field(default_factory=list)
    stopped: str | None = None
    steps: int = 0
    skipped_steps: int = 0

    def note(self, loss: torch.Tensor, samples: int) -> None:
        """Count a micro-batch and report the loss of the one before, which the device has finished."""
        before = float(self.losses[-1][0]) if self.losses else None
        self.losses.append((_Loss(loss), samples))
        self.done += samples
        self.progress(Progress(self.done, self.quota_samples, before))

    def mark(self) -> tuple[int, int]:
        """A moment to return to with `rewind`."""
        return self.done, len(self.losses)

    def rewind(self, mark: tuple[int, int]) -> None:
        """Forget what was done after `mark`."""
        self.done = mark[0]
        del self.losses[mark[1] :]
        if self.tracer is not None:
            self.tracer.forget_after(self.done)


class Trainer:
    """Trains one model on one device. Not for several threads at once."""

    def __init__(
        self,
        run: manifest.Manifest,
        device: torch.device,
        reader: ShardReader,
        validation: ShardReader | None = None,
        teacher: TeacherReader | None = None,
        *,
        dtype: torch.dtype | None = None,
        micro_batch: int | None = None,
        files: Path | None = None,
    ) -> None:
        self._manifest = run
        self._device = device
        self._reader = reader
        self._validation = validation
        self._files = files
        self._teacher = teacher
        self._dtype = autocast_dtype(device) if dtype is None else dtype
        self._plan = None if micro_batch is None else Plan(micro_batch, checkpointing=False)
        self._is_marked = run.data.layout == "marked"
        self._loss_scale = run.data.sequence_length / run.data.counted_per_sample
        self.relabel: Relabel | None = None
        """What a hostile peer trains on in the place of these labels; see `peer.attacks`."""
        self._network: Any = None
        self._flat: FlatParameters | None = None
        self._inner: InnerOptimizer | None = None
        self._kept_inner: list[dict[str, Any]] | None = None
        self._visits: torch.Tensor | None = None
        self._scaler = self._new_scaler()

    @classmethod
    def open(cls, run: manifest.Manifest, device: torch.device, files: Path, *, micro_batch: int | None = None) -> Trainer:
        """A trainer on the run's files, which lie in `files` by their roots and were verified before. Raises `DataInvalid`.

        Samples are those of the private shards that are there, and of all others.
        """
        data, vocabulary = present(run.data, files), run.model.vocabulary_size
        train, validation = (
            ShardReader.open(side, files, data.sequence_length, vocabulary, data.layout) for side in (data.train, data.validation)
        )
        teacher = TeacherReader(data.teacher, data, files, vocabulary) if data.teacher is not None else None
        return cls(run, device, train, validation, teacher, micro_batch=micro_batch, files=files)

    @property
    def micro_batch(self) -> int | None:
        """Samples per forward pass, once known."""
        return self._plan.samples if self._plan else None

    @property
    def precision(self) -> str:
        """What matrix products are computed in: `fp32`, `bf16` or `fp16`."""
        return precision_of(self._dtype)

    @property
    def is_loaded(self) -> bool:
        """Whether the model takes memory on the device."""
        return self._network is not None

    @property
    def parameters(self) -> FlatParameters:
        """The mapping to the flat vector."""
        self._load()
        return _present(self._flat)

    def train_round(
        self,
        theta: Vector,
        round_number: int,
        peer_id: str,
        quota: int,
        tokens_so_far: int,
        should_stop: ShouldStop = never_stop,
        progress: Callable[[Progress], None] = ignore_progress,
        sketcher: Sketcher | None = None,
    ) -> TrainedUpdate:
        """Train from `theta`, [parameters]: `quota` samples in `sync`, `quota` inner steps in `diloco`.

        With a `sketcher` the work is cut into leaves that others can check. `should_stop` is asked before every micro-batch and
        gives a reason to end early; only whole inner steps count. Raises `OutOfMemory` when one sample doesn't fit, `DataInvalid`
        for bad data. Values that are not finite come back as `error`.
        """
        started = time.monotonic()
        strategy = self._manifest.strategy
        samples = quota if isinstance(strategy, manifest.Sync) else quota * strategy.batch_samples
        assignment = _Assignment(self._manifest.order_key, round_number, peer_id, len(self._reader))
        tracer = Tracer(sketcher, self._leaf_ends(samples)) if sketcher is not None and samples else None
        run = _Run(assignment, samples, should_stop, progress, tracer, self.relabel)
        with self._seeded(assignment):
            self._prepare(theta)
            self._visits = None
            match strategy:
                case manifest.Sync():
                    update = self._gradient_round(run)
                case manifest.DiLoCo():
                    update = self._inner_round(strategy, run, theta, tokens_so_far)
        return self._report(run, update, time.monotonic() - started)

    def replay(
        self,
        theta: Vector,
        round_number: int,
        peer_id: str,
        tokens_so_far: int,
        lengths: Sequence[int],
        leaf: int,
        sketcher: Sketcher,
        should_stop: ShouldStop = never_stop,
        precision: str = "",
    ) -> tuple[Leaf, ...] | None:
        """Compute again what another peer says it has computed from `theta`, [parameters], in leaves of so many samples each.

        `sync`: leaf `leaf` alone. `diloco`: the leaves up to that one, of which each is where the next begins. None when stopped.
        `precision` is what the other peer's matrix products are computed in, empty for our own; slow where the device lacks it.
        Raises what `train_round` raises, and `ValueError` for leaves that aren't whole inner steps.
        """
        if any(length % self._unit for length in lengths):
            raise ValueError("leaves of broken inner steps")
        if should_stop() is not None:  # before the model is loaded
            return None
        strategy, ends = self._manifest.strategy, tuple(itertools.accumulate(lengths))
        start = ends[leaf] - lengths[leaf] if isinstance(strategy, manifest.Sync) else 0
        assignment = _Assignment(self._manifest.order_key, round_number, peer_id, len(self._reader))
        tracer = Tracer(sketcher, tuple(end - start for end in ends))
        run = _Run(assignment, ends[leaf] - start, should_stop, ignore_progress, tracer)
        with self._computing_in(precision or self.precision), self._seeded(assignment):
            self._prepare(theta)
            match strategy:
                case manifest.Sync():
                    self._accumulate_scaled(run, start)
                    self._zero_grad()
                case manifest.DiLoCo():
                    self._inner_steps(strategy, run, tokens_so_far)
        return self._leaves(run) if run.done == run.quota_samples else None

    def train_ahead(
        self,
        early: Early,
        round_number: int,
        peer_id: str,
        quota: int,
        tokens_so_far: int,
        should_stop: ShouldStop = never_stop,
        progress: Callable[[Progress], None] = ignore_progress,
    ) -> TrainedUpdate:
        """`diloco`: begin a round from where the last one left the network, while that one is still being exchanged.

        `quota` and `tokens_so_far` are guesses. When the round before is merged (`early.join`), the agreed weights take the place
        of what we started from and the steps taken since stay on top, so that our own part isn't counted twice; the update is
        relative to the agreed weights. `seconds` leaves waiting out. Raises what `train_round` raises.
        """
        strategy = self._manifest.strategy
        if not isinstance(strategy, manifest.DiLoCo):
            raise ValueError("only diloco trains ahead")
        started = time.monotonic()
        assignment = _Assignment(self._manifest.order_key, round_number, peer_id, len(self._reader))
        run = _Run(assignment, quota * strategy.batch_samples, should_stop, progress)
        self._visits = None
        with self._seeded(assignment):
            update = self._early_round(strategy, run, early, tokens_so_far)
        return self._report(run, update, time.monotonic() - started - early.waited_s)

    @property
    def sequence_length(self) -> int:
        """Tokens that a sample is trained on."""
        return self._reader.sequence_length

    def samples_of(self, round_number: int, peer_id: str, count: int) -> Indices:
        """The first `count` samples of a peer's assignment in a round, [count]."""
        return sample_indices(self._manifest.order_key, round_number, peer_id, 0, count, len(self._reader))

    def losses(self, theta: Vector, samples: Indices, should_stop: ShouldStop = never_stop) -> NDArray[np.float64] | None:
        """The loss of each of these training samples at `theta`, [parameters], in nats per token, [samples]; None when stopped.

        The network is left as it was, as a round that was begun early goes on from where it is. Raises what `train_round` raises.
        """
        if should_stop() is not None:  # before the model is loaded
            return None
        with self._looking_at(theta):
            return self._retried(lambda plan: self._losses_of(samples, plan, should_stop))

    def evaluate(self, theta: Vector, max_samples: int | None = None) -> float:
        """The mean loss in nats per token of the first `max_samples` validation samples (all by default)."""
        loss = self.held_out_loss(theta, max_samples)
        return math.nan if loss is None else loss

    def held_out_loss(self, theta: Vector, max_samples: int | None = None, should_stop: ShouldStop = never_stop) -> float | None:
        """The same; None when stopped. The network is left as it was. Raises what `train_round` raises."""
        if should_stop() is not None:  # before the model is loaded
            return None
        if self._validation is None or not len(self._validation):
            return math.nan
        count = len(self._validation) if max_samples is None else min(max_samples, len(self._validation))
        with self._looking_at(theta):
            return self._retried(lambda plan: self._evaluate(count, plan, should_stop))

    def continuations(
        self,
        theta: Vector,
        prompts: Sequence[Sequence[int]],
        tokens: int,
        key: bytes,
        end: int | None,
        should_stop: ShouldStop = never_stop,
    ) -> list[list[int]] | None:
        """What the model at `theta`, [parameters], goes on with after each prompt, as `peer.writing` draws it; None when stopped.

        The network is left as it was. Raises what `train_round` raises.
        """
        if should_stop() is not None:  # before the model is loaded
            return None
        with self._looking_at(theta), torch.no_grad():
            written = []
            for place, prompt in enumerate(prompts):
                numbers = drawn_numbers(key, place, tokens)
                written.append(continuation(self._logits_after, prompt, numbers, end, self.sequence_length))
                if should_stop() is not None:
                    return None
            return written

    @contextmanager
    def _looking_at(self, theta: Vector) -> Iterator[None]:
        """Have these weights, [parameters], in a network that doesn't train, and leave it as it was.

        A round that was begun early goes on from where the network is.
        """
        before = self.parameters.read(self._network)
        self._prepare(theta)
        self._network.eval()
        try:
            yield
        finally:
            self._network.train()
            self.parameters.write(self._network, before)

    def _logits_after(self, ids: Sequence[int]) -> Vector:
        """What is expected after these tokens, [vocabulary]."""
        logits, _ = self._forward(torch.tensor([list(ids)], device=self._device))
        return logits[0, -1].cpu().numpy()

    def release(self) -> None:
        """Free the model's and the device's memory; the inner optimizer's state is kept on the host for the next round."""
        if self._inner is not None:
            self._kept_inner = self._inner.state()
        self._network = self._flat = self._inner = None
        gc.collect()
        empty_cache(self._device)

    def forget_inner(self) -> None:
        """Begin the inner optimizer anew, as after a round that was skipped: what it has seen isn't to count."""
        strategy = self._manifest.strategy
        self._kept_inner = None
        if self._inner is not None and isinstance(strategy, manifest.DiLoCo):
            self._inner = make_inner(strategy.inner, self._network)

    def _load(self) -> None:
        if self._network is not None:
            return
        network = build_model(self._manifest.model, self._files)
        store_frozen(network, self._dtype)
        try:
            network = network.to(self._device)
        except torch.OutOfMemoryError as error:
            raise OutOfMemory("the model doesn't fit on the device", OUT_OF_MEMORY_HINT) from error
        network.train()
        self._network = network
        self._flat = FlatParameters(network)
        if isinstance(self._manifest.strategy, manifest.DiLoCo):
            self._inner = make_inner(self._manifest.strategy.inner, network)
            if self._kept_inner is not None:
                self._inner.load_state(self._kept_inner)
        if self._plan is not None:
            self._use(self._plan)

    def _prepare(self, theta: Vector) -> None:
        self.parameters.write(self._network, theta)
        self._zero_grad()
        if self._plan is None:
            self._use(self._find_plan())

    def _use(self, plan: Plan) -> Plan:
        if plan.checkpointing:
            _recompute_activations(self._network)
        self._plan = plan
        return plan

    def _find_plan(self) -> Plan:
        if self._device.type == "cuda":
            return self._probe()
        per_logit = ACTIVATIONS_PER_LOGIT if self._manifest.distillation is None else DISTILLED_PER_LOGIT
        settings, free = self._network.config.get_text_config(), free_bytes(self._device)
        plan = plan_for_host(settings, self._reader.sequence_length, free, per_logit)
        if plan is None:
            raise OutOfMemory("this machine has too little free memory for one sample", OUT_OF_MEMORY_HINT)
        return plan

    def _probe(self) -> Plan:
        """Double the micro-batch until the GPU is full; recompute activations if not even one sample fits."""
        for checkpointing in (False, True):
            plan = self._use(Plan(1, checkpointing))
            fitting = 0
            while plan.samples <= self._largest_useful() and self._fits(plan):
                fitting, plan = plan.samples, Plan(plan.samples * 2, checkpointing)
            if fitting:
                return self._use(Plan(fitting, checkpointing))
        raise OutOfMemory("not even one sample fits on the device", OUT_OF_MEMORY_HINT)

    def _largest_useful(self) -> int:
        return min(MAX_PROBE_SAMPLES, self._manifest.strategy.batch_samples)

    def _fits(self, plan: Plan) -> bool:
        """Whether a forward and a backward pass leave room for the inner optimizer's state."""
        try:
            torch.cuda.reset_peak_memory_stats(self._device)
            self._backward(self._blank(plan.samples), share=1.0)
            room = free_bytes(self._device) + torch.cuda.memory_allocated(self._device)
            needed = torch.cuda.max_memory_allocated(self._device) + self._missing_optimizer_bytes()
            return needed <= GPU_SHARE * room
        except torch.OutOfMemoryError:
            return False
        finally:
            self._zero_grad()
            empty_cache(self._device)

    def _missing_optimizer_bytes(self) -> int:
        has_state = self._inner is None or any(part.state for part in self._inner.parts)
        return 0 if has_state else 8 * self.parameters.size

    @property
    def _unit(self) -> int:
        """Of how many samples the smallest leaf is."""
        strategy = self._manifest.strategy
        return 1 if isinstance(strategy, manifest.Sync) else strategy.batch_samples

    def _leaf_ends(self, samples: int) -> tuple[int, ...]:
        """Where leaves end. A leaf of gradients bounds the micro-batch, and is all that an audit computes: few large ones."""
        sync = isinstance(self._manifest.strategy, manifest.Sync)
        return leaf_ends(samples, self._unit, MOST_GRADIENT_LEAVES if sync else MOST_LEAVES)

    def _accumulate_scaled(self, run: _Run, start: int) -> None:
        """Leave the mean gradient over the quota's samples, from position `start` on, in the network."""
        holder = torch.optim.SGD(self._network.parameters(), lr=0.0)
        for _ in range(MAX_SCALE_TRIALS):
            done = self._accumulate(run, start, run.quota_samples)
            self._trace_gradient(run, last=True)
            if done == 0 or self._unscale(holder):
                break
            run.skipped_steps += 1
            run.rewind((0, 0))

    def _gradient_round(self, run: _Run) -> Vector:
        """The mean gradient over the quota's samples, or over those that were done."""
        self._accumulate_scaled(run, 0)
        gradient = self.parameters.read_gradients(self._network)
        self._zero_grad()
        return gradient * np.float32(run.quota_samples / run.done) if 0 < run.done < run.quota_samples else gradient

    def _unscale(self, holder: torch.optim.Optimizer) -> bool:
        """Take the loss scale out of the gradients; False if they overflowed, and then the scale is halved."""
        if not self._scaler.is_enabled():
            return True
        before = self._scaler.get_scale()
        self._scaler.unscale_(holder)
        self._scaler.step(holder)
        self._scaler.update()
        return self._scaler.get_scale() >= before

    def _inner_round(self, strategy: manifest.DiLoCo, run: _Run, theta: Vector, tokens_so_far: int) -> Vector:
        """`theta` minus where the inner steps lead."""
        self._inner_steps(strategy, run, tokens_so_far)
        return self.parameters.read_difference(theta, self._network)

    def _inner_steps(self, strategy: manifest.DiLoCo, run: _Run, tokens_so_far: int) -> None:
        """Take the quota's inner steps, or as many as we may."""
        if strategy.inner_state == "fresh":
            self._inner = make_inner(strategy.inner, self._network)
        self._trace_weights(run)
        while run.done < run.quota_samples and self._whole_step(strategy, run, tokens_so_far):
            self._trace_weights(run)
        self._trace_weights(run, last=True)

    def _early_round(self, strategy: manifest.DiLoCo, run: _Run, early: Early, tokens_so_far: int) -> Vector:
        """The agreed weights minus where the inner steps lead; zero if the round before was never merged."""
        base = self.parameters.read(self._network)
        joined: Joined | None = None
        while True:
            if joined is None and (joined := early.look()) is not None:
                base = self._rebase(base, joined.theta)
                run.quota_samples, tokens_so_far = joined.quota * strategy.batch_samples, joined.tokens
            if run.done >= run.quota_samples:
                if joined is not None or early.wait(run.should_stop) is None:
                    break
                continue
            if not self._whole_step(strategy, run, tokens_so_far):
                break
        if joined is None:
            run.rewind((0, 0))
            return np.zeros_like(base)
        return self.parameters.read_difference(base, self._network)

    def _rebase(self, base: Vector, theta: Vector) -> Vector:
        """Keep what was trained since `base` and put it on top of `theta`; both [parameters]."""
        trained = self.parameters.read(self._network) - base
        self.parameters.write(self._network, theta + trained)
        return theta

    def _whole_step(self, strategy: manifest.DiLoCo, run: _Run, tokens_so_far: int) -> bool:
        """One inner step on `batch_samples` samples; False, with nothing changed, if we were stopped."""
        mark = run.mark()
        if self._accumulate(run, run.done, strategy.batch_samples) < strategy.batch_samples:
            run.rewind(mark)
            self._zero_grad()
            return False
        factor = lr_factor(strategy.schedule, tokens_so_far + run.done * self._reader.sequence_length)
        run.skipped_steps += not self._inner_step(factor, strategy.clip_norm)
        run.steps += 1
        return True

    def _inner_step(self, factor: float, clip_norm: float) -> bool:
        """One optimizer step on the accumulated gradient; False if it was skipped because the gradient overflowed."""
        inner = _present(self._inner)
        before = self._scaler.get_scale()
        inner.set_factor(factor)
        for part in inner.parts:
            self._scaler.unscale_(part)
        nn.utils.clip_grad_norm_(self._network.parameters(), clip_norm)
        for part in inner.parts:
            self._scaler.step(part)
        self._scaler.update()
        inner.zero_grad()
        return self._scaler.get_scale() >= before

    def _accumulate(self, run: _Run, start: int, count: int) -> int:
        """Add up the gradients of `count` samples from position `start` on, each with weight 1 / `count`.

        Returns how many were done.
        """
        mark = run.mark()
        place = run.assignment
        indices = sample_indices(place.order_key, place.round, place.peer_id, start, count, place.total)

        def attempt(plan: Plan) -> int:
            run.rewind(mark)
            self._zero_grad()
            self._trace_gradient(run)
            for batch in feed(self._taught, self._groups(run, indices, plan), self._device):
                run.stopped = run.should_stop()
                if run.stopped is not None:
                    break
                run.note(self._backward(batch, len(batch) / count, run.relabel), len(batch))
                self._trace_gradient(run)
            return run.done - mark[0]

        return self._retried(attempt)

    def _groups(self, run: _Run, indices: Indices, plan: Plan) -> list[Indices]:
        """The samples of each micro-batch; none reaches over the end of a leaf of gradients."""
        if run.tracer is None or isinstance(self._manifest.strategy, manifest.DiLoCo):
            return grouped(indices, plan.samples)
        return [group for leaf in np.split(indices, run.tracer.ends) for group in grouped(leaf, plan.samples)]

    def _trace_gradient(self, run: _Run, *, last: bool = False) -> None:
        if run.tracer is None or isinstance(self._manifest.strategy, manifest.DiLoCo):
            return
        scale = self._scaler.get_scale() if self._scaler.is_enabled() else 1.0
        run.tracer.note(run.done, self.parameters.pieces(self._network, gradients=True), last=last, scale=scale)

    def _trace_weights(self, run: _Run, *, last: bool = False) -> None:
        if run.tracer is not None:
            run.tracer.note(run.done, self.parameters.pieces(self._network), last=last)

    def _leaves(self, run: _Run) -> tuple[Leaf, ...]:
        if run.tracer is None:
            return ()
        losses = [(float(loss), samples) for loss, samples in run.losses]
        sync = isinstance(self._manifest.strategy, manifest.Sync)
        return run.tracer.leaves(losses, mean_over=run.quota_samples if sync else 0)

    def _losses_of(self, samples: Indices, plan: Plan, should_stop: ShouldStop) -> NDArray[np.float64] | None:
        found = [np.empty(0)]
        with torch.no_grad():
            for batch in feed(self._taught, grouped(samples, plan.samples), self._device):
                if should_stop() is not None:
                    return None
                found.append(self._losses(batch).double().mean(dim=1).cpu().numpy())
        return np.concatenate(found)

    def _evaluate(self, count: int, plan: Plan, should_stop: ShouldStop) -> float | None:
        total, counted = 0.0, 0
        with torch.no_grad():
            for batch in feed(self._held_out, grouped(np.arange(count), plan.samples), self._device):
                if should_stop() is not None:
                    return None
                total += float(self._losses(batch).double().sum()) / self._loss_scale
                counted += self._counted(batch)
        return total / counted if counted else math.nan

    def _retried(self, attempt: Callable[[Plan], T]) -> T:
        """What `attempt` gives, begun again with smaller micro-batches while the device's memory doesn't suffice."""
        plan: Plan | None = _present(self._plan)
        while plan is not None:
            try:
                return attempt(self._use(plan))
            except RuntimeError as error:
                if not ran_out(error):
                    raise
                plan = halved(plan)
            self._zero_grad()
            empty_cache(self._device)
        raise OutOfMemory("not even one sample fits on the device", OUT_OF_MEMORY_HINT)

    def _taught(self, samples: Indices) -> Batch:
        """Training samples, with what the teacher expects where the run distils. Raises `DataInvalid`."""
        rows = self._reader.batch(samples)
        if self._manifest.distillation is None:
            return Batch(rows)
        if self._teacher is None:
            raise DataInvalid("the run learns from a teacher, and its shards aren't here")
        return Batch(rows, self._teacher.batch(samples))

    def _held_out(self, samples: Indices) -> Batch:
        """Held-out samples, on which only labels count."""
        return Batch(_present(self._validation).batch(samples))

    def _backward(self, batch: Batch, share: float, relabel: Relabel | None = None) -> torch.Tensor:
        loss = self._losses(batch, relabel).mean()
        torch.autograd.backward(self._scaler.scale(loss * share))
        return loss

    def _losses(self, batch: Batch, relabel: Relabel | None = None) -> torch.Tensor:
        """The loss of every token in nats, [samples, sequence_length]; of what a teacher expects as well, where it is there.

        While a mixture of experts is trained, its balance loss is in it.
        In a marked layout tokens without a loss have 0, and the others' is divided by their mean share of all tokens.
        """
        rows = batch.rows
        if not self._is_marked:
            logits, balance = self._forward(rows[:, :-1])
            labels = rows[:, 1:] if relabel is None else relabel(rows[:, 1:])
            return self._mixed(logits, labels, batch.taught) + balance
        shown = lesson(rows)
        logits, balance = self._forward(shown.ids, position_ids=shown.positions)
        return self._mixed(logits, _relabelled(shown, relabel), batch.taught) * self._loss_scale + balance

    def _mixed(self, logits: torch.Tensor, labels: torch.Tensor, taught: Taught | None) -> torch.Tensor:
        """Cross-entropy of the labels, and the divergence from what a teacher expects."""
        losses, settings = _cross_entropy(logits, labels), self._manifest.distillation
        if taught is None or settings is None:
            return losses
        apart = divergence(logits, taught, settings.temperature).masked_fill(labels == IGNORED, 0.0)
        return (1 - settings.share) * losses + settings.share * apart

    def _forward(self, ids: torch.Tensor, **more: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | float]:
        """What the model expects after each token, float32 [samples, tokens, vocabulary], and what to add to every token's loss.

        That is 0, but for a mixture of experts that is trained, of which it is the balance loss, [samples, 1].
        """
        settings = self._network.config.get_text_config()
        routed = {"output_router_logits": True} if self._network.training and is_routed(settings) else {}
        with autocast(self._device, self._dtype):
            out = self._network(input_ids=ids, use_cache=False, **routed, **more)
        router_logits = [logits for logits in getattr(out, "router_logits", None) or () if logits is not None]
        if not routed or not router_logits:
            return out.logits.float(), 0.0
        balance, visits = routes_of(router_logits, len(ids), int(settings.num_experts_per_tok))
        self._visits = visits if self._visits is None else self._visits + visits
        coefficient = balance_coefficient(settings)
        return out.logits.float(), coefficient * balance.unsqueeze(1) if coefficient else 0.0

    def _counted(self, batch: Batch) -> int:
        """How many tokens of a batch have a loss."""
        if not self._is_marked:
            return batch.rows.numel() - len(batch)
        return int((lesson(batch.rows).labels != IGNORED).sum())

    def _blank(self, samples: int) -> Batch:
        """A batch that takes as much memory as any."""
        length, teacher = self._reader.sequence_length, self._manifest.data.teacher
        rows = torch.zeros((samples, length + 1), dtype=torch.int64, device=self._device)
        if self._is_marked:
            rows[:, ::2] |= STARTS
        if teacher is None:
            return Batch(rows)
        ids = torch.arange(teacher.top_k, device=self._device).repeat(samples, length, 1)
        even = torch.full((samples, length, teacher.top_k + 1), -math.log(teacher.top_k + 1), device=self._device)
        return Batch(rows, Taught(ids, even.half()))

    def _new_scaler(self) -> torch.amp.GradScaler:
        enabled = self._dtype == torch.float16
        return torch.amp.GradScaler(self._device.type, init_scale=FIRST_LOSS_SCALE, enabled=enabled)

    @contextmanager
    def _computing_in(self, precision: str) -> Iterator[None]:
        before, changed = (self._dtype, self._scaler), precision != self.precision
        if changed:
            self._dtype = PRECISIONS[precision]
            self._scaler = self._new_scaler()
            self._release_frozen()
        try:
            yield
        finally:
            self._dtype, self._scaler = before
            if changed:
                self._release_frozen()

    def _release_frozen(self) -> None:
        """Frozen weights are stored in the precision that they are used in: load them anew for another one."""
        if self._manifest.model.adapter is not None:
            self.release()

    @contextmanager
    def _seeded(self, assignment: _Assignment) -> Iterator[None]:
        """Draw dropout masks from the assignment, so that a replay sees the same ones."""
        seed = assignment_seed(assignment.order_key, assignment.round, assignment.peer_id)
        with torch.random.fork_rng([self._device] if self._device.type == "cuda" else []):
            torch.manual_seed(int.from_bytes(seed[:8], "big"))
            yield

    def _zero_grad(self) -> None:
        self._network.zero_grad(set_to_none=True)

    def _report(self, run: _Run, update: Vector, seconds: float) -> TrainedUpdate:
        losses = [(float(loss), samples) for loss, samples in run.losses]
        finite = _all_finite(update) and all(math.isfinite(loss) for loss, _ in losses)
        samples = run.done if finite else 0
        return TrainedUpdate(
            update=update if finite and samples else np.zeros_like(update),
            samples=samples,
            tokens=samples * self._reader.sequence_length,
            loss_first=losses[0][0] if losses else math.nan,
            loss_mean=sum(loss * count for loss, count in losses) / run.done if run.done else math.nan,
            loss_last=losses[-1][0] if losses else math.nan,
            seconds=seconds,
            steps=run.steps,
            skipped_steps=run.skipped_steps,
            stopped=run.stopped,
            error=None if finite else NOT_FINITE,
            leaves=self._leaves(run) if finite and samples else (),
            experts=None if self._visits is None else ExpertLoad.of(self._visits.tolist()),
        )


def _recompute_activations(network: Any) -> None:
    """Switch on gradient checkpointing. Raises `OutOfMemory` for a model that can't, as it is only asked for in need."""
    if not network.supports_gradient_checkpointing:
        raise OutOfMemory("not even one sample fits on the device", OUT_OF_MEMORY_HINT)
    enable = getattr(network, "activation_checkpointing_enable", None) or network.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def _cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The loss of every token in nats, [samples, tokens], for logits [samples, tokens, vocabulary]; 0 where it is `IGNORED`."""
    losses = functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none", ignore_index=IGNORED)
    return losses.view(labels.shape)


def _relabelled(shown: Lesson, relabel: Relabel | None) -> torch.Tensor:
    return shown.labels if relabel is None else torch.where(shown.labels == IGNORED, IGNORED, relabel(shown.labels))


def _all_finite(vector: Vector) -> bool:
    """The sum of squares tells at once; only if it overflowed, every value is looked at."""
    with np.errstate(over="ignore", invalid="ignore"):
        return math.isfinite(float(vector @ vector)) or bool(np.isfinite(vector).all())


def _present(value: T | None) -> T:
    """The value, which `_load` and `_prepare` have set."""
    if value is None:
        raise RuntimeError("the trainer is not prepared")
    return value
