"""Training in a round: from theta and an assignment to an update."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from peer.batches import Batch, Plan
from peer.data import ShardReader, sample_indices
from peer.model import FlatParameters, build_model, initial_theta
from peer.optimizer import lr_factor, make_inner
from peer.sketch import Sketcher, sketch_seed
from peer.trainer import Early, Joined, Progress, TrainedUpdate, Trainer
from swarm.errors import DataInvalid, OutOfMemory
from swarm.manifest import UNAUDITED, DiLoCo, Manifest, Shard

CPU = torch.device("cpu")
PEER = "12D3KooWpeer"
Runs = Callable[..., Any]
SEQUENCE_LENGTH = 32


def trainer(run: Any, micro_batch: int | None = 4, **options: Any) -> Trainer:
    return Trainer(run.manifest, CPU, run.train, run.validation, micro_batch=micro_batch, **options)


def theta_of(run: Any) -> np.ndarray:
    return initial_theta(run.manifest.model)


def assigned(run: Any, start: int, count: int, round_number: int = 0) -> torch.Tensor:
    reader = run.train
    return reader.batch(sample_indices(run.manifest.run_id, round_number, PEER, start, count, len(reader)))


def loss_of(network: Any, batch: torch.Tensor) -> torch.Tensor:
    logits = network(input_ids=batch[:, :-1]).logits
    return functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())


def gradient_of(run: Any, theta: np.ndarray, batch: torch.Tensor) -> tuple[np.ndarray, float]:
    """The gradient of the mean loss over one whole batch, and that loss."""
    network = build_model(run.manifest.model)
    flat = FlatParameters(network)
    flat.write(network, theta)
    loss = loss_of(network, batch)
    torch.autograd.backward(loss)
    return flat.read_gradients(network), loss.item()


def stop_after(calls: int, reason: str = "paused") -> Callable[[], str | None]:
    left = iter(range(calls))
    return lambda: None if next(left, None) is not None else reason


@pytest.mark.parametrize("micro_batch", [1, 3, 8, None])
def test_sync_gives_the_mean_gradient_of_the_assigned_samples(small_run: Runs, micro_batch: int | None) -> None:
    """However it is cut into micro-batches, the update is the gradient over the first `quota` assigned samples."""
    run = small_run("sync")
    theta = theta_of(run)
    result = trainer(run, micro_batch).train_round(theta, 0, PEER, quota=8, tokens_so_far=0)
    expected, loss = gradient_of(run, theta, assigned(run, 0, 8))
    assert np.allclose(result.update, expected, atol=1e-6)
    assert result.loss_mean == pytest.approx(loss, rel=1e-5)
    assert (result.samples, result.tokens, result.stopped, result.error) == (8, 8 * SEQUENCE_LENGTH, None, None)
    assert result.seconds > 0


def test_different_peers_and_rounds_use_different_samples(small_run: Runs) -> None:
    """The update depends on who trains and when."""
    run = small_run("sync")
    theta, one = theta_of(run), trainer(run)
    updates = [one.train_round(theta, number, peer, 4, 0).update for number, peer in ((0, "a"), (0, "b"), (1, "a"))]
    assert not np.array_equal(updates[0], updates[1])
    assert not np.array_equal(updates[0], updates[2])


def test_a_peer_trains_on_the_private_shards_that_it_has(small_run: Runs, tmp_path: Path) -> None:
    """The update is the one of a run that has nothing but these."""
    run = small_run("sync")
    first, second = run.manifest.data.train[:2]
    (tmp_path / second.root).symlink_to(run.directory / second.root)

    def holding(*train: Shard) -> Trainer:
        data = {**run.manifest.data.model_dump(mode="json"), "train": train, "order": "same"}
        for shard in data["validation"]:
            shard["private"] = True
        people = {"admission": {"kind": "invitation"}, "audit": UNAUDITED, "data": data}
        manifest = Manifest.model_validate({**run.manifest.model_dump(mode="json"), **people})
        return Trainer.open(manifest, CPU, tmp_path, micro_batch=4)

    theta = theta_of(run)
    updates = [
        holding(*(shard.model_copy(update={"private": True}) for shard in train)).train_round(theta, 1, "me", 8, 0).update
        for train in ((first, second), (second,))
    ]
    assert updates[0].any()
    assert np.array_equal(*updates)
    assert math.isnan(holding(second).evaluate(theta))


def test_runs_of_one_order_draw_the_same_samples(small_run: Runs) -> None:
    """Runs that differ by their codec alone train on the same samples only where their manifests say so."""

    def update(codec: str, order: str) -> np.ndarray:
        run = small_run("sync")
        values = run.manifest.model_dump(mode="json")
        values["codec"]["kind"], values["data"]["order"] = codec, order
        other = Trainer(Manifest.model_validate(values), CPU, run.train, micro_batch=4)
        return other.train_round(theta_of(run), 0, PEER, 4, 0).update

    assert np.array_equal(update("fp16", "compared"), update("int8", "compared"))
    assert not np.array_equal(update("fp16", ""), update("int8", ""))
    assert not np.array_equal(update("fp16", "compared"), update("fp16", "another"))


def reference_inner_steps(run: Any, theta: np.ndarray, steps: int, tokens: int) -> np.ndarray:
    strategy = run.manifest.strategy
    assert isinstance(strategy, DiLoCo)
    network = build_model(run.manifest.model)
    flat = FlatParameters(network)
    flat.write(network, theta)
    inner = make_inner(strategy.inner, network)
    for step in range(steps):
        torch.autograd.backward(loss_of(network, assigned(run, step * 4, 4)))
        torch.nn.utils.clip_grad_norm_(network.parameters(), strategy.clip_norm)
        inner.set_factor(lr_factor(strategy.schedule, tokens + (step + 1) * 4 * SEQUENCE_LENGTH))
        for part in inner.parts:
            part.step()
        inner.zero_grad()
    return theta - flat.read(network)


@pytest.mark.parametrize("inner", [{"kind": "adamw", "lr": 1e-2}, {"kind": "muon"}], ids=["adamw", "muon"])
def test_diloco_gives_theta_minus_where_inner_steps_lead(small_run: Runs, inner: dict[str, Any]) -> None:
    """Three inner steps equal a plain loop with the same optimizer, clipping and schedule."""
    run = small_run("diloco", inner=inner)
    theta = theta_of(run)
    result = trainer(run).train_round(theta, 0, PEER, quota=3, tokens_so_far=500_000)
    assert np.allclose(result.update, reference_inner_steps(run, theta, 3, 500_000), atol=1e-5)
    assert (result.samples, result.steps, result.skipped_steps) == (12, 3, 0)
    assert result.loss_first == pytest.approx(gradient_of(run, theta, assigned(run, 0, 4))[1], rel=1e-5)


@pytest.mark.parametrize("strategy", ["sync", "diloco"])
def test_a_replay_gives_the_same_bits(small_run: Runs, strategy: str) -> None:
    """A fresh trainer with the same assignment makes the same update, dropout included."""
    run = small_run(strategy, "gpt2")
    theta = theta_of(run)
    first = trainer(run).train_round(theta, 2, PEER, 4, 0)
    torch.randn(5)
    second = trainer(run).train_round(theta, 2, PEER, 4, 0)
    assert np.array_equal(first.update, second.update)


def test_stopping_early_in_sync_gives_the_gradient_of_what_was_done(small_run: Runs) -> None:
    """A peer that pauses contributes its samples so far with their right weight."""
    run = small_run("sync")
    theta = theta_of(run)
    result = trainer(run, 2).train_round(theta, 0, PEER, 8, 0, should_stop=stop_after(3))
    expected, _ = gradient_of(run, theta, assigned(run, 0, 6))
    assert np.allclose(result.update, expected, atol=1e-6)
    assert (result.samples, result.stopped, result.error) == (6, "paused", None)


def test_stopping_early_in_diloco_keeps_whole_steps_only(small_run: Runs) -> None:
    """Half a step is dropped: the update is that of the two steps before."""
    run = small_run("diloco")
    theta = theta_of(run)
    result = trainer(run, 2).train_round(theta, 0, PEER, 3, 0, should_stop=stop_after(5))
    assert np.allclose(result.update, reference_inner_steps(run, theta, 2, 0), atol=1e-5)
    assert (result.samples, result.steps, result.stopped) == (8, 2, "paused")


@pytest.mark.parametrize("strategy", ["sync", "diloco"])
def test_stopping_at_once_gives_an_empty_update(small_run: Runs, strategy: str) -> None:
    """Nothing done is no error, and is worth nothing."""
    run = small_run(strategy)
    result = trainer(run).train_round(theta_of(run), 0, PEER, 3, 0, should_stop=lambda: "too_hot")
    assert (result.samples, result.tokens, result.stopped, result.error) == (0, 0, "too_hot", None)
    assert not result.update.any()
    assert math.isnan(result.loss_mean)


def test_after_a_stop_the_next_round_is_not_affected(small_run: Runs) -> None:
    """No gradient of an interrupted round leaks into the next."""
    run = small_run("sync")
    theta, one = theta_of(run), trainer(run, 2)
    one.train_round(theta, 0, PEER, 8, 0, should_stop=stop_after(2))
    assert np.array_equal(one.train_round(theta, 1, PEER, 8, 0).update, trainer(run, 2).train_round(theta, 1, PEER, 8, 0).update)


@pytest.mark.parametrize("strategy", ["sync", "diloco"])
def test_values_that_arent_finite_come_back_as_an_error(small_run: Runs, strategy: str) -> None:
    """A broken theta or device doesn't end the process and isn't sent."""
    run = small_run(strategy)
    theta = theta_of(run)
    theta[:] = 1e30
    result = trainer(run).train_round(theta, 0, PEER, 2, 0)
    assert (result.error, result.samples, result.tokens) == ("non_finite", 0, 0)
    assert not result.update.any()


def test_progress_is_told_after_every_micro_batch(small_run: Runs) -> None:
    """Samples count up to the quota; the loss is that of the micro-batch before."""
    run = small_run("sync")
    seen: list[Progress] = []
    result = trainer(run, 3).train_round(theta_of(run), 0, PEER, 8, 0, progress=seen.append)
    assert [(item.samples, item.samples_total) for item in seen] == [(3, 8), (6, 8), (8, 8)]
    assert seen[0].loss is None
    assert seen[1].loss == pytest.approx(result.loss_first)


class Cramped(Trainer):
    """A trainer on a device that holds `room` samples at once, and twice as many with recomputation."""

    room = 1.0
    tried: list[tuple[int, bool]]

    def _losses(self, batch: Batch, relabel: Any = None) -> torch.Tensor:
        recomputes = any(getattr(module, "gradient_checkpointing", False) for module in self._network.modules())
        self.tried.append((len(batch), recomputes))
        if len(batch) > self.room * (2 if recomputes else 1):
            raise torch.OutOfMemoryError("full")
        return super()._losses(batch)


def cramped(run: Any, room: float) -> Cramped:
    one = Cramped(run.manifest, CPU, run.train, run.validation, micro_batch=8)
    one.room, one.tried = room, []
    return one


@pytest.mark.parametrize("strategy", ["sync", "diloco"])
def test_running_out_of_memory_halves_the_micro_batch_and_starts_over(small_run: Runs, strategy: str) -> None:
    """The result is the one of a trainer that had known the right size, and the size is remembered."""
    run = small_run(strategy)
    theta, one = theta_of(run), cramped(run, room=2)
    result = one.train_round(theta, 0, PEER, 8, 0)
    assert one.micro_batch == 2
    assert np.allclose(result.update, trainer(run, 2).train_round(theta, 0, PEER, 8, 0).update, atol=1e-6)
    assert result.samples == (8 if strategy == "sync" else 32)


def test_one_sample_is_recomputed_when_it_doesnt_fit_otherwise(small_run: Runs) -> None:
    """Gradient checkpointing is the last thing tried, and gives the same gradient."""
    run = small_run("sync")
    theta, one = theta_of(run), cramped(run, room=0.5)
    result = one.train_round(theta, 0, PEER, 4, 0)
    assert np.allclose(result.update, gradient_of(run, theta, assigned(run, 0, 4))[0], atol=1e-6)
    assert one.tried[-1] == (1, True)


class Probing(Trainer):
    """A trainer that probes a pretended GPU, which holds `room` samples and twice as many with recomputation."""

    room = 1.0

    def _find_plan(self) -> Plan:
        return self._probe()

    def _fits(self, plan: Plan) -> bool:
        return plan.samples <= self.room * (2 if plan.checkpointing else 1)


@pytest.mark.parametrize(("room", "expected"), [(100, (8, False)), (5, (4, False)), (1, (1, False)), (0.5, (1, True))])
def test_probing_doubles_until_the_device_is_full(small_run: Runs, room: float, expected: tuple[int, bool]) -> None:
    """The largest power of two that fits is used, at most a whole batch; recomputation only where nothing fits without."""
    run = small_run("sync")
    one = Probing(run.manifest, CPU, run.train)
    one.room = room
    one.train_round(theta_of(run), 0, PEER, 1, 0)
    recomputes = any(getattr(module, "gradient_checkpointing", False) for module in one._network.modules())
    assert (one.micro_batch, recomputes) == expected


def test_probing_ends_where_nothing_fits(small_run: Runs) -> None:
    """A GPU that is too small is found before training."""
    run = small_run("sync")
    one = Probing(run.manifest, CPU, run.train)
    one.room = 0.1
    with pytest.raises(OutOfMemory, match="one sample"):
        one.train_round(theta_of(run), 0, PEER, 1, 0)


def test_other_errors_of_torch_are_not_taken_for_memory(small_run: Runs) -> None:
    """A real fault isn't retried away."""

    class Broken(Trainer):
        def _losses(self, batch: Batch, relabel: Any = None) -> torch.Tensor:
            raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    run = small_run("sync")
    with pytest.raises(RuntimeError, match="mat1"):
        Broken(run.manifest, CPU, run.train, micro_batch=4).train_round(theta_of(run), 0, PEER, 4, 0)


def test_when_nothing_fits_memory_is_the_error(small_run: Runs) -> None:
    """A device that can't hold one sample says so."""
    run = small_run("sync")
    with pytest.raises(OutOfMemory, match="one sample"):
        cramped(run, room=0.1).train_round(theta_of(run), 0, PEER, 4, 0)


def test_inner_state_outlives_a_release(small_run: Runs) -> None:
    """Pausing frees the model, and training goes on as if nothing had happened."""
    run = small_run("diloco", inner={"kind": "muon"})
    theta = theta_of(run)
    through, paused = trainer(run), trainer(run)
    for one in (through, paused):
        one.train_round(theta, 0, PEER, 2, 0)
    paused.release()
    results = [one.train_round(theta, 1, PEER, 2, 0) for one in (through, paused)]
    assert np.array_equal(results[0].update, results[1].update)
    assert not np.array_equal(results[0].update, trainer(run).train_round(theta, 1, PEER, 2, 0).update)


@pytest.mark.parametrize("released", [False, True])
def test_a_forgotten_inner_state_is_a_fresh_one(small_run: Runs, released: bool) -> None:
    """After a skipped round the next trains as a peer's first does, also where the model was freed meanwhile."""
    run = small_run("diloco", inner={"kind": "muon"})
    theta, one = theta_of(run), trainer(run)
    one.train_round(theta, 0, PEER, 2, 0)
    if released:
        one.release()
    one.forget_inner()
    expected = trainer(run).train_round(theta, 1, PEER, 2, 0).update
    assert np.array_equal(one.train_round(theta, 1, PEER, 2, 0).update, expected)


def test_evaluation_is_the_mean_over_the_first_validation_samples(small_run: Runs) -> None:
    """Nats per token over whole samples in order, the same for any micro-batch."""
    run = small_run("sync")
    theta = theta_of(run)
    _, expected = gradient_of(run, theta, run.validation.batch(range(10)))
    losses = [trainer(run, size).evaluate(theta, 10) for size in (1, 4, 10)]
    assert losses == pytest.approx([expected] * 3, rel=1e-6)
    assert trainer(run).evaluate(theta) != pytest.approx(expected, rel=1e-9)


def test_evaluation_doesnt_disturb_training(small_run: Runs) -> None:
    """Dropout is off in evaluation and on again afterwards."""
    run = small_run("sync", "gpt2")
    theta, one = theta_of(run), trainer(run)
    assert one.evaluate(theta, 4) == one.evaluate(theta, 4)
    assert np.array_equal(one.train_round(theta, 0, PEER, 4, 0).update, trainer(run).train_round(theta, 0, PEER, 4, 0).update)


def test_without_validation_data_the_loss_is_unknown(small_run: Runs) -> None:
    """No data is no number."""
    run = small_run("sync")
    assert math.isnan(Trainer(run.manifest, CPU, run.train).evaluate(theta_of(run)))


def test_bad_data_is_an_error(small_run: Runs) -> None:
    """A token outside the vocabulary ends the round, it isn't trained on."""
    run = small_run("sync")
    narrow = ShardReader.open(run.manifest.data.train, run.directory, SEQUENCE_LENGTH, vocabulary_size=50)
    with pytest.raises(DataInvalid, match="vocabulary"):
        Trainer(run.manifest, CPU, narrow, micro_batch=4).train_round(theta_of(run), 0, PEER, 4, 0)


@pytest.mark.parametrize("strategy", ["sync", "diloco"])
def test_fp16_scales_losses_and_agrees_with_fp32(small_run: Runs, strategy: str) -> None:
    """Half precision gives nearly the same loss and direction; overflowed attempts are skipped, not sent."""
    run = small_run(strategy)
    theta = theta_of(run)
    half = trainer(run, dtype=torch.float16).train_round(theta, 0, PEER, 4, 0)
    full = trainer(run).train_round(theta, 0, PEER, 4, 0)
    assert half.error is None
    assert half.loss_mean == pytest.approx(full.loss_mean, rel=0.02)
    assert cosine(half.update, full.update) > (0.99 if strategy == "sync" else 0.8)


def cosine(left: np.ndarray, right: np.ndarray) -> float:
    return float(left @ right / np.linalg.norm(left) / np.linalg.norm(right))


class Overflowing(Trainer):
    """A trainer whose loss scale starts so high that gradients overflow."""

    def raise_scale(self) -> Trainer:
        self._scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
        return self


@pytest.mark.parametrize("strategy", ["sync", "diloco"])
def test_an_overflowing_loss_scale_comes_down(small_run: Runs, strategy: str) -> None:
    """Steps whose gradient overflows are skipped until the scale fits; `sync` computes the gradient again."""
    run = small_run(strategy)
    one = Overflowing(run.manifest, CPU, run.train, dtype=torch.float16, micro_batch=4).raise_scale()
    result = one.train_round(theta_of(run), 0, PEER, 40, 0)
    assert result.error is None
    assert result.skipped_steps > 0
    assert result.update.any()


@pytest.mark.parametrize(
    ("strategy", "changes"), [("sync", {"optimizer": {"lr": 3e-3}}), ("diloco", {"inner": {"kind": "muon"}})]
)
def test_the_loss_falls(small_run: Runs, strategy: str, changes: dict[str, Any]) -> None:
    """Twelve rounds of real training make the held-out loss clearly smaller."""
    from peer.outer import apply, initial_state

    run = small_run(strategy, **changes)
    one = trainer(run, 8)
    state = initial_state(run.manifest.strategy, theta_of(run))
    before = one.evaluate(state.theta)
    for number in range(12):
        result: TrainedUpdate = one.train_round(state.theta, number, PEER, 8, state.tokens)
        state = apply(run.manifest.strategy, state, result.update, result.tokens)
    assert before > 5
    assert one.evaluate(state.theta) < before - 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("strategy", ["sync", "diloco"])
def test_a_gpu_agrees_with_the_cpu(small_run: Runs, strategy: str) -> None:
    """Probing finds a micro-batch, and the update points where the CPU's does."""
    run = small_run(strategy)
    theta = theta_of(run)
    one = Trainer(run.manifest, torch.device("cuda"), run.train, run.validation)
    result = one.train_round(theta, 0, PEER, 4, 0)
    reference = trainer(run).train_round(theta, 0, PEER, 4, 0)
    assert one.micro_batch is not None
    assert result.loss_mean == pytest.approx(reference.loss_mean, rel=0.02)
    assert cosine(result.update, reference.update) > (0.98 if strategy == "sync" else 0.7)
    one.release()
    assert torch.cuda.memory_allocated() < 1 << 27  # workspaces of cuBLAS


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_half_precision_on_a_gpu_scales_its_loss(small_run: Runs) -> None:
    """As on cards before compute capability 8.0: the update is the CPU's, also when the first scale overflows."""
    run = small_run("sync")
    theta = theta_of(run)
    one = Trainer(run.manifest, torch.device("cuda"), run.train, run.validation, dtype=torch.float16)
    result = one.train_round(theta, 0, PEER, 4, 0)
    assert result.error is None
    assert cosine(result.update, trainer(run).train_round(theta, 0, PEER, 4, 0).update) > 0.98


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_that_others_fill_meanwhile(small_run: Runs) -> None:
    """Smaller micro-batches, then recomputation, and the same samples; with no room at all a clear error."""
    run = small_run("sync", batch_samples=256)
    theta, device = theta_of(run), torch.device("cuda", 0)
    one = Trainer(run.manifest, device, run.train, run.validation)
    before = one.train_round(theta, 0, PEER, 256, 0)
    roomy = one.micro_batch
    total = torch.cuda.get_device_properties(device).total_memory
    try:
        peak = torch.cuda.max_memory_allocated(device)
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_allocated(device) + peak) / 2 / total, device)
        torch.cuda.empty_cache()
        after = one.train_round(theta, 0, PEER, 256, 0)
        torch.cuda.set_per_process_memory_fraction(torch.cuda.memory_allocated(device) / total, device)
        torch.cuda.empty_cache()
        with pytest.raises(OutOfMemory, match="not even one sample fits"):
            one.train_round(theta, 1, PEER, 256, 0)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)
    assert roomy is not None
    assert one.micro_batch is not None
    assert one.micro_batch < roomy
    assert after.samples == before.samples == 256
    assert cosine(after.update, before.update) > 0.98


def test_training_ahead_folds_the_merged_round_in(small_run: Runs) -> None:
    """Steps taken before the round before is merged stay on top of the agreed weights; the update is relative to these."""
    run = small_run(strategy="diloco")
    first, theta = trainer(run), theta_of(run)
    before = first.train_round(theta, 1, PEER, 2, 0)
    agreed = theta - np.float32(0.5) * before.update
    early = Early()
    steps = iter(range(100))

    def join_after_two_micro_batches() -> None:
        if next(steps) == 2:
            early.join(Joined(agreed, 3, 64))
        return

    ahead = first.train_ahead(early, 2, PEER, 1, 64, should_stop=join_after_two_micro_batches)
    assert ahead.steps == 3
    assert ahead.error is None
    local = first.parameters.read(first._network)
    assert np.allclose(agreed - ahead.update, local, atol=1e-6)
    assert np.linalg.norm(ahead.update) > 0


def test_a_round_begun_early_counts_nothing_without_its_base(small_run: Runs) -> None:
    """If the round before is never merged, what was trained on top of it is no contribution."""
    run = small_run(strategy="diloco")
    first = trainer(run)
    first.train_round(theta_of(run), 1, PEER, 2, 0)
    stops = iter([None] * 4 + ["cancelled"] * 100)
    ahead = first.train_ahead(Early(), 2, PEER, 1, 64, should_stop=lambda: next(stops))
    assert (ahead.samples, ahead.stopped) == (0, None)
    assert not ahead.update.any()


def test_an_audit_that_was_stopped_before_it_began_loads_nothing(small_run: Runs) -> None:
    """A paused peer's device stays free, whatever had been asked for by then."""
    run = small_run("sync")
    auditor = trainer(run)
    sketcher = Sketcher(sketch_seed(bytes(32), 0, bytes(32)), theta_of(run).size)
    assert auditor.replay(theta_of(run), 0, PEER, 0, [4], 0, sketcher, lambda: "pause") is None
    assert auditor.losses(theta_of(run), np.arange(4), lambda: "pause") is None
    assert not auditor.is_loaded
