"""Manifests of runs that generate: what they need, what they count, and that other runs don't know of them."""

from __future__ import annotations

from typing import Any

import pytest

from swarm.credit_records import Terms
from swarm.errors import ManifestInvalid
from swarm.manifest import Manifest
from tests.world import manifest

HASH = "ab" * 32


def values(**changes: Any) -> dict[str, Any]:
    """A run in which a base writes 20 samples a round for 30 prompts, 4 for each."""
    made = manifest().model_dump(mode="json")
    shard = {"root": HASH, "size_bytes": 30 * 17 * 4, "samples": 30, "token_bytes": 4}
    made |= {
        "model": {"config": {"model_type": "llama"}, "parameters": 1, "base": {"root": HASH, "size_bytes": 9}},
        "data": {"sequence_length": 16, "train": [shard], "validation": [shard], "layout": "prompts"},
        "strategy": {"kind": "generate", "batch_samples": 20, "samples_per_prompt": 4, "sampling": {"max_tokens": 50}},
        "codec": {"kind": "fp16"},
        "merge": {"kind": "mean"},
        "audit": {"rate": 0.5, "first": 3},
    }
    return made | changes


def test_weight_is_counted_in_tokens() -> None:
    """What is generated earns by the token, up to what a round's samples can have; anybody can compute it again."""
    made = Manifest.model_validate(values())
    assert (made.tokens_per_weight, made.most_round_weight, made.planned_tokens) == (1, 1000, 30 * 4 * 50)
    assert Terms.of(made)[:2] == (1, 1000)
    assert (made.generates, made.is_replayed, made.shows_work, made.most_inner_steps) == (True, True, True, 1)
    with pytest.raises(ValueError, match="generates"):
        _ = made.training


def test_samples_are_shown_even_where_nobody_audits() -> None:
    """Else nobody could collect them."""
    made = Manifest.model_validate(values(audit={"rate": 0.0, "first": 0}))
    assert (made.is_audited, made.is_replayed, made.shows_work) == (False, False, True)


def test_a_run_that_trains_counts_as_before() -> None:
    """Its weight is in samples."""
    made = manifest()
    assert (made.tokens_per_weight, made.generates) == (made.data.sequence_length, False)
    assert made.planned_tokens == made.training.schedule.total_tokens


STRATEGY = values()["strategy"]


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"data": {**values()["data"], "layout": "plain"}}, "only there together"),
        ({"strategy": manifest().model_dump(mode="json")["strategy"]}, "only there together"),
        ({"model": {**values()["model"], "parameters": 2}}, "parameters 1"),
        ({"model": {**values()["model"], "base": None}}, "parameters 1"),
        ({"model": {**values()["model"], "adapter": {}}}, "parameters 1"),
        ({"merge": {"kind": "centered_clip"}}, "merge mean"),
        ({"codec": {"kind": "int8"}}, "codec fp16"),
        ({"strategy": {**STRATEGY, "batch_samples": 1 << 20}}, "batch_samples x"),
        ({"strategy": {**STRATEGY, "sampling": {"temperature": 0}}}, "temperature"),
        ({"strategy": {**STRATEGY, "sampling": {"stop": [-1]}}}, "token ids"),
        ({"strategy": {**STRATEGY, "filters": {"max_overlap": 2}}}, "max_overlap"),
        ({"data": {**values()["data"], "counted_tokens": 5}}, "counted_tokens"),
    ],
)
def test_what_cant_be(changes: dict[str, Any], problem: str) -> None:
    """Each is told with its reason."""
    with pytest.raises(ManifestInvalid, match=problem):
        Manifest.from_values(values(**changes))


def test_prompts_have_marks() -> None:
    """And so 32 bits a value."""
    data = values()["data"]
    shard = {"root": HASH, "size_bytes": 30 * 17 * 2, "samples": 30}
    with pytest.raises(ManifestInvalid, match="token_bytes 4"):
        Manifest.from_values(values(data={**data, "train": [shard]}))


def test_stop_tokens_have_one_order() -> None:
    """So that they don't change a run's id."""
    ids = {
        Manifest.model_validate(values(strategy={**STRATEGY, "sampling": {"stop": stop}})).run_id
        for stop in ([3, 7], [7, 3], [3, 7, 3])
    }
    assert len(ids) == 1
