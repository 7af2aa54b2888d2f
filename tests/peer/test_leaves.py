"""Leaves: what a peer shows of its work, computed again by others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peer.device import PRECISIONS
from peer.judging import adds_up, distance, judge_leaves, judge_update, promised, tolerance, what_to_look_at
from peer.leaves import MAX_LEAVES_BYTES, MOST_LEAVES, Leaf, leaf_ends, pack, unpack
from peer.model import initial_theta
from peer.sketch import BLOCKS, ROW, WIDTH, Sketcher, sketch_seed
from peer.trainer import TrainedUpdate, Trainer
from swarm.errors import Rejected

CPU = torch.device("cpu")
Runs = Callable[..., Any]
STRATEGIES = [
    ("sync", {}, 40),
    ("diloco", {"inner_state": "fresh"}, 20),
    ("diloco", {"inner_state": "fresh", "inner": {"kind": "adamw"}}, 5),
]
SIZES = st.integers(1, 5 * ROW + 7)


def worked(
    small_run: Runs, strategy: str, changes: dict[str, Any], quota: int
) -> tuple[Any, np.ndarray, Sketcher, TrainedUpdate]:
    """A run, the weights and the sketcher of its third round, and what a peer made in it."""
    run = small_run(strategy, **changes)
    assert run.manifest.is_audited
    theta = initial_theta(run.manifest.model)
    sketcher = Sketcher(sketch_seed(b"r" * 32, 3, b"b" * 32), theta.size)
    made = Trainer(run.manifest, CPU, run.train, micro_batch=4).train_round(theta, 3, "peer", quota, 1000, sketcher=sketcher)
    return run, theta, sketcher, made


@pytest.mark.parametrize(("strategy", "changes", "quota"), STRATEGIES)
def test_another_peer_comes_to_the_same_leaves(small_run: Runs, strategy: str, changes: dict[str, Any], quota: int) -> None:
    """With other micro-batches, each leaf is within the tolerance, and a neighbour's isn't."""
    run, theta, sketcher, made = worked(small_run, strategy, changes, quota)
    lengths, most = [leaf.samples for leaf in made.leaves], tolerance(run.manifest)
    assert adds_up(made.leaves, made.samples, 1 if strategy == "sync" else 4)
    assert len(made.leaves) >= 4
    auditor = Trainer(run.manifest, CPU, run.train, micro_batch=3)
    for leaf in (0, 2, len(lengths) - 1):
        first = leaf if strategy == "sync" else 0
        again = auditor.replay(theta, 3, "peer", 1000, lengths, leaf, sketcher)
        assert again is not None
        assert len(again) == leaf + 1 - first
        assert judge_leaves(made.leaves, again, first, most).finding == "passed"
        forged = [*made.leaves[:leaf], replace(made.leaves[leaf], sketch=made.leaves[leaf - 1].sketch), *made.leaves[leaf + 1 :]]
        judged = judge_leaves(forged, again, first, most)
        assert (judged.finding, judged.reason, judged.leaf) == ("failed", "leaf", leaf)
        assert judged.distance > most
    wrong = [replace(leaf, loss=leaf.loss * 0.9) for leaf in made.leaves]
    assert judge_leaves(wrong, again, first, most).reason == "loss"


@pytest.mark.parametrize(("strategy", "changes", "quota"), STRATEGIES)
def test_leaves_amount_to_the_update(small_run: Runs, strategy: str, changes: dict[str, Any], quota: int) -> None:
    """Their sketches add up to that of what is sent; its opposite, noise and a multiple of it are found out."""
    run, _, sketcher, made = worked(small_run, strategy, changes, quota)
    expected = promised(run.manifest, made.leaves)
    assert np.allclose(expected, sketcher.of_vector(made.update), rtol=1e-3, atol=1e-5)
    assert sum(leaf.loss * leaf.samples for leaf in made.leaves) == pytest.approx(made.loss_mean * made.samples)
    noise = np.random.default_rng(0).standard_normal(made.update.size, dtype=np.float32)
    noise *= np.linalg.norm(made.update) / np.linalg.norm(noise)
    for kind in ("fp16", "int8", "int4", "int2"):
        assert judge_update(kind, expected, sketcher.of_vector(made.update)).finding == "passed"
        for other in (-made.update, made.update * 1000, noise, 0 * made.update):
            assert judge_update(kind, expected, sketcher.of_vector(other)).reason == "update"


def test_an_interrupted_round_shows_what_was_done(small_run: Runs) -> None:
    """The leaves end where the work ended."""
    run = small_run("sync")
    theta, left = initial_theta(run.manifest.model), iter(range(5))
    sketcher = Sketcher(b"s" * 32, theta.size)
    trainer = Trainer(run.manifest, CPU, run.train, micro_batch=4)
    made = trainer.train_round(
        theta, 3, "peer", 64, 0, lambda: None if next(left, None) is not None else "paused", sketcher=sketcher
    )
    assert 0 < made.samples < 64
    assert adds_up(made.leaves, made.samples, 1)
    assert np.allclose(promised(run.manifest, made.leaves), sketcher.of_vector(made.update), rtol=1e-3, atol=1e-6)


def test_a_replay_stops_when_asked_and_refuses_broken_steps(small_run: Runs) -> None:
    """A pause comes first."""
    run, theta, sketcher, made = worked(small_run, *STRATEGIES[1])
    auditor = Trainer(run.manifest, CPU, run.train, micro_batch=4)
    lengths = [leaf.samples for leaf in made.leaves]
    assert auditor.replay(theta, 3, "peer", 1000, lengths, 2, sketcher, lambda: "paused") is None
    with pytest.raises(ValueError, match="broken"):
        auditor.replay(theta, 3, "peer", 1000, [lengths[0] - 1, *lengths[1:]], 2, sketcher)


def test_training_with_leaves_gives_the_same_update(small_run: Runs) -> None:
    """Showing the work doesn't change it, but for the order of additions."""
    for strategy, changes, quota in STRATEGIES:
        run, theta, _, made = worked(small_run, strategy, changes, quota)
        plain = Trainer(run.manifest, CPU, run.train, micro_batch=4).train_round(theta, 3, "peer", quota, 1000)
        assert plain.leaves == ()
        assert np.allclose(plain.update, made.update, rtol=1e-2, atol=1e-4)


def test_how_runs_are_audited(small_run: Runs) -> None:
    """By computing again; by the loss where a state is kept or rounds overlap; not at all where the owner wants none."""
    assert small_run("diloco", inner_state="fresh").manifest.audited_by == "replay"
    assert small_run("diloco").manifest.audited_by == "loss"
    assert small_run("diloco", inner_state="fresh", overlap="on").manifest.audited_by == "loss"
    assert not small_run("sync", "gpt2").manifest.is_audited
    manifest = small_run("sync").manifest
    unwanted = manifest.model_copy(update={"audit": manifest.audit.model_copy(update={"rate": 0.0, "first": 0})})
    assert not unwanted.is_audited
    assert "are 0" in unwanted.why_not_audited


@given(st.integers(1, 5000), st.integers(1, 40))
@settings(max_examples=200, deadline=None)
def test_leaves_cut_a_round_into_few_equal_pieces(units: int, unit: int) -> None:
    """Of whole units, at most sixteen of them, and nothing is left over."""
    ends = leaf_ends(units * unit, unit)
    lengths = np.diff([0, *ends])
    assert ends[-1] == units * unit
    assert len(ends) <= MOST_LEAVES
    assert (lengths % unit == 0).all()
    assert len(set(lengths[:-1])) <= 1
    assert 0 < lengths[-1] <= lengths[0]


@given(SIZES, st.integers(0, 2**32), st.data())
@settings(max_examples=60, deadline=None)
def test_sketches_are_linear_and_dont_depend_on_the_pieces(size: int, seed: int, data: st.DataObject) -> None:
    """Cut anywhere, scaled and added, the sketch follows; blocks are those of their stretch alone."""
    draw = np.random.default_rng(seed)
    one, other = draw.standard_normal((2, size), dtype=np.float32)
    sketcher, cut = Sketcher(seed.to_bytes(32, "big"), size), data.draw(st.integers(0, size))
    whole = sketcher.of_vector(one)
    assert whole.shape == (BLOCKS, WIDTH)
    pieces = sketcher.of_vector(one[:cut]) + sketcher.of_vector(one[cut:], cut)
    assert np.allclose(whole, pieces, rtol=1e-3, atol=1e-3)
    assert np.allclose(sketcher.of_vector(2 * one - other), 2 * whole - sketcher.of_vector(other), rtol=1e-3, atol=2e-3)
    for block in range(BLOCKS):
        start, end = sketcher.span(block)
        assert np.allclose(sketcher.of_vector(one[start:end], start)[block], whole[block], atol=1e-3)
    assert sketcher.span(0)[0] == 0
    assert sketcher.span(BLOCKS - 1)[1] == size


def test_sketches_keep_norms_and_differ_by_seed() -> None:
    """In expectation; and a sketch under another seed says nothing."""
    vector = np.random.default_rng(1).standard_normal(100_000, dtype=np.float32)
    ratios = [
        np.linalg.norm(Sketcher(bytes([number]) * 32, vector.size).of_vector(vector)) / np.linalg.norm(vector)
        for number in range(30)
    ]
    assert abs(float(np.mean(ratios)) - 1) < 0.05
    one, other = (Sketcher(bytes([number]) * 32, vector.size).of_vector(vector) for number in (1, 2))
    assert distance(one, other) > 1


def test_leaves_survive_the_wire() -> None:
    """What is packed is unpacked, and how precisely it was computed."""
    sketches = np.random.default_rng(0).standard_normal((3, BLOCKS, WIDTH), dtype=np.float32)
    leaves = [Leaf(4, 1.5, sketches[0]), Leaf(4, 2.5, sketches[1]), Leaf(1, 0.5, sketches[2])]
    read, precision = unpack(pack(leaves, "bf16"))
    assert precision == "bf16"
    assert [(leaf.samples, leaf.loss) for leaf in read] == [(4, 1.5), (4, 2.5), (1, 0.5)]
    assert all(np.array_equal(leaf.sketch, sketch) for leaf, sketch in zip(read, sketches, strict=True))


@given(st.binary(max_size=400))
@settings(max_examples=200, deadline=None)
def test_rubbish_isnt_leaves(raw: bytes) -> None:
    """Whatever it is, it is refused."""
    with pytest.raises(Rejected):
        unpack(raw)


def test_leaves_that_break_a_bound_are_refused() -> None:
    """Too many, too few, not finite, without samples, of another precision, too long."""
    good = Leaf(4, 1.5, np.ones((BLOCKS, WIDTH), dtype=np.float32))
    for leaves in (
        [],
        [good] * (MOST_LEAVES + 1),
        [replace(good, loss=float("nan"))],
        [replace(good, samples=0)],
        [replace(good, sketch=good.sketch * np.inf)],
    ):
        with pytest.raises(Rejected, match="bad_leaves"):
            unpack(pack(leaves, "fp32"))
    with pytest.raises(Rejected, match="bad_leaves"):
        unpack(pack([good], "fp64"))
    with pytest.raises(Rejected, match="bad_leaves"):
        unpack(bytes(MAX_LEAVES_BYTES + 1))
    assert len(pack([good] * MOST_LEAVES, "fp32")) <= MAX_LEAVES_BYTES


def test_what_an_audit_looks_at_varies_with_its_seed() -> None:
    """Every leaf and every stretch in turn."""
    looks = {what_to_look_at(bytes([number]) * 32, 5) for number in range(250)}
    assert {leaf for leaf, _ in looks} == set(range(5))
    assert {block for _, block in looks} == set(range(BLOCKS))


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize(("strategy", "changes", "quota"), STRATEGIES)
def test_work_in_half_precision_is_computed_again_in_the_same(
    small_run: Runs, strategy: str, changes: dict[str, Any], quota: int, precision: str
) -> None:
    """By an auditor that itself computes in another, and goes on in its own: half precision is far off the full one."""
    run = small_run(strategy, **changes)
    theta = initial_theta(run.manifest.model)
    sketcher = Sketcher(sketch_seed(b"r" * 32, 3, b"b" * 32), theta.size)
    author = Trainer(run.manifest, CPU, run.train, micro_batch=4, dtype=PRECISIONS[precision])
    made = author.train_round(theta, 3, "peer", quota, 1000, sketcher=sketcher)
    lengths, last = [leaf.samples for leaf in made.leaves], len(made.leaves) - 1
    auditor = Trainer(run.manifest, CPU, run.train, micro_batch=4)
    first = last if strategy == "sync" else 0
    far = [
        judge_leaves(
            made.leaves, auditor.replay(theta, 3, "peer", 1000, lengths, last, sketcher, precision=how) or (), first, 1.0
        ).distance
        for how in (precision, "fp32", "")
    ]
    assert far[0] < tolerance(run.manifest, precision) / 10
    assert far[0] < far[1] == far[2]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize(("strategy", "changes", "quota"), STRATEGIES)
def test_a_processor_audits_a_gpu(small_run: Runs, strategy: str, changes: dict[str, Any], quota: int) -> None:
    """What a GPU computes in half precision is within the tolerance for that."""
    run = small_run(strategy, **changes)
    theta = initial_theta(run.manifest.model)
    sketcher = Sketcher(sketch_seed(b"r" * 32, 3, b"b" * 32), theta.size)
    author = Trainer(run.manifest, torch.device("cuda"), run.train)
    made = author.train_round(theta, 3, "peer", quota, 1000, sketcher=sketcher)
    lengths, last = [leaf.samples for leaf in made.leaves], len(made.leaves) - 1
    auditor = Trainer(run.manifest, CPU, run.train, micro_batch=4)
    again = auditor.replay(theta, 3, "peer", 1000, lengths, last, sketcher, precision=author.precision)
    assert again is not None
    first = last if strategy == "sync" else 0
    assert judge_leaves(made.leaves, again, first, tolerance(run.manifest, author.precision)).finding == "passed"
