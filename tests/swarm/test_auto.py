"""`auto`: valid and explicit settings for every draft, more exchange over faster links, and reasons."""

from __future__ import annotations

import json
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from peer.codec import make_codec
from swarm import auto
from swarm.auto import Draft, Plan, plan, resolve
from swarm.errors import ManifestInvalid
from swarm.manifest import Codec, DiLoCo, Manifest
from tests.world import manifest

KINDS = ("fp16", "int8", "int4", "int2", "sparse")

sizes = st.integers(1000, 10**11)
links = st.floats(0.1, 1e5)
drafts = st.builds(
    Draft,
    parameters=sizes,
    sequence_length=st.integers(8, 8192),
    tokens=st.integers(1, 10**12),
    batch_samples=st.integers(1, 512),
    peers=st.integers(1, 64),
    upload_mbit=links,
    download_mbit=links,
    step_s=st.floats(1e-3, 1e3),
    traffic_share=st.floats(1e-4, 1.0),
    codec=st.sampled_from([None, *KINDS]),
    inner_steps=st.one_of(st.none(), st.integers(1, 10_000)),
)


def values() -> dict[str, Any]:
    """The fields of a manifest without a strategy."""
    return {name: value for name, value in manifest().model_dump(mode="json").items() if name != "strategy"}


def traffic_per_step(made: Plan) -> float:
    """Payload bytes that a peer sends over the whole run, by inner step."""
    draft = made.draft
    sent = (item.rounds * auto.round_bytes(item.codec, draft.parameters, draft.peers) for item in made.segments)
    return sum(sent) / made.steps


@given(drafts)
def test_every_plan_is_a_valid_manifest_that_covers_the_budget(draft: Draft) -> None:
    """Whatever the draft, the manifest is valid and explicit, and its rounds use up the budget to within one step."""
    made = plan(draft)
    value = Manifest.model_validate(made.applied(values()))
    assert isinstance(value.strategy, DiLoCo)
    lengths = [value.phase(index + 1).inner_steps for index in (0, value.rounds.total - 1)]
    assert lengths == [made.segments[0].inner_steps, made.segments[-1].inner_steps]
    assert made.steps == draft.steps
    assert 0 <= made.steps * draft.tokens_per_step - draft.tokens < draft.tokens_per_step
    assert value.strategy.schedule.total_tokens >= draft.tokens
    assert value.rounds.max_peers >= min(draft.peers, 32)
    assert len(made.why) == len(set(made.why)) == 8


@given(drafts)
def test_phases_are_the_segments(draft: Draft) -> None:
    """The manifest's phases give every segment its rounds, its inner steps and its codec."""
    made = plan(draft)
    value = Manifest.model_validate(made.applied(values()))
    start = 1
    for segment in made.segments:
        for index in (start, start + segment.rounds - 1):
            phase = value.phase(index)
            assert (phase.inner_steps, phase.codec.kind) == (segment.inner_steps, segment.codec.kind)
        start += segment.rounds
    assert start - 1 == value.rounds.total


@given(drafts, st.floats(1.0, 100.0), st.floats(1.0, 100.0))
def test_a_faster_link_never_means_less_exchange(draft: Draft, up: float, down: float) -> None:
    """With a faster link there are as many bits per step or more, and as many rounds or more."""
    draft = draft.model_copy(update={"codec": None, "inner_steps": None, "tokens": min(draft.tokens, 10**8)})
    faster = draft.model_copy(update={"upload_mbit": draft.upload_mbit * up, "download_mbit": draft.download_mbit * down})
    slow, fast = plan(draft), plan(faster)
    if draft.steps < auto.LONG_RUN_STEPS:
        assert traffic_per_step(fast) >= traffic_per_step(slow) * (1 - 1e-9)
        assert fast.rounds >= slow.rounds


@given(drafts)
def test_traffic_stays_within_its_share(draft: Draft) -> None:
    """Unless codec or interval are given, a plan keeps to its share of fp16 traffic, but for the rounds of a very short run."""
    draft = draft.model_copy(update={"codec": None, "inner_steps": None})
    least = min(auto.traffic_share(draft, rung) for rung in auto.ladder(draft))
    if draft.peers > 1 and draft.steps >= 10_000 and draft.traffic_share >= least:
        reference = auto.round_bytes(Codec(kind="fp16"), draft.parameters, draft.peers)
        assert traffic_per_step(plan(draft)) / reference <= draft.traffic_share * 1.1


def test_home_links_get_int4_and_slow_ones_less() -> None:
    """About 1 M parameters on a home link take int4 every 11 steps on average; 124 M on the same link fewer bits."""
    small = plan(Draft(parameters=870_000, sequence_length=128, tokens=300 * 4096))
    large = plan(Draft(parameters=124_000_000, sequence_length=1024, tokens=10**8))
    assert {item.codec.kind for item in small.segments} == {"int4"}
    assert small.steps / small.rounds == pytest.approx(11, rel=0.05)
    assert large.segments[0].codec.kind == "int2"
    assert large.strategy.overlap == "auto"


def test_few_rounds_dont_overlap() -> None:
    """Over a link that makes peers wait, a run of 8 rounds waits, a long one trains on; both say why."""
    slow = {"parameters": 870_000, "sequence_length": 128, "upload_mbit": 1.2, "download_mbit": 6.0, "step_s": 0.2}
    few, many = plan(Draft(tokens=160 * 4096, **slow)), plan(Draft(tokens=5000 * 4096, **slow))
    assert (few.rounds, few.strategy.overlap) == (8, "off")
    assert any("with 8 rounds late results cost more" in why for why in few.why)
    assert many.strategy.overlap == "auto"


def test_sparse_is_for_long_runs_over_slow_links() -> None:
    """Where int2 every 30 steps is too much, a long run takes `sparse`, a short one rarer int2."""
    slow = {"parameters": 10**9, "sequence_length": 1024, "upload_mbit": 20.0}
    assert plan(Draft(tokens=10**12, **slow)).segments[0].codec.kind == "sparse"
    assert plan(Draft(tokens=10**8, **slow)).segments[0].codec.kind == "int2"


def test_a_local_network_may_exchange_after_every_step() -> None:
    """Who allows the traffic and has the link gets fp16 after every step."""
    made = plan(
        Draft(parameters=10**6, sequence_length=128, tokens=10**7, upload_mbit=1e4, download_mbit=1e4, step_s=10, traffic_share=1)
    )
    assert {(item.inner_steps, item.codec.kind) for item in made.segments} == {(1, "fp16")}


def test_what_is_given_is_kept() -> None:
    """A codec and an interval that were given are used in all rounds."""
    made = plan(Draft(parameters=10**6, sequence_length=128, tokens=10**7, codec="int8", inner_steps=7))
    assert [item.inner_steps for item in made.segments] == [7, made.draft.steps % 7]
    assert {item.codec.kind for item in made.segments} == {"int8"}
    assert "as given" in made.why[1]
    short = plan(Draft(parameters=10**6, sequence_length=128, tokens=10**7, inner_steps=2, upload_mbit=100))
    assert {(item.inner_steps, item.codec.kind) for item in short.segments[:1]} == {(2, "int4")}


@pytest.mark.parametrize("kind", KINDS)
def test_bits_are_those_of_the_codecs(kind: Any) -> None:
    """The sizes that plans reckon with are those that the codecs make, to 3 %."""
    codec = Codec(kind=kind)
    real = make_codec(codec, 1 << 20)
    size = sum(real.part_size_limit(index) for index in range(real.part_count))
    sent = auto.round_bytes(codec, 1 << 20, 2)
    assert sent == pytest.approx(size, rel=0.03)


def test_a_manifest_may_leave_its_strategy_to_us() -> None:
    """`strategy: auto` with a budget becomes the plan's explicit manifest; the budget itself is gone."""
    budget = {"tokens": 10**7, "peers": 3}
    raw = yaml.safe_dump({**values(), "strategy": "auto", "budget": budget}).encode()
    value, made = resolve(raw)
    assert made is not None
    assert value == Manifest.model_validate(made.applied(values()))
    assert Manifest.parse(value.canonical_bytes) == value
    assert resolve(value.canonical_bytes) == (value, None)


@pytest.mark.parametrize(
    ("budget", "problem"),
    [
        (None, "budget: strategy auto needs a budget"),
        ({}, "budget.tokens: field required"),
        ({"tokens": 0}, "budget.tokens"),
        ({"tokens": 1, "upload_mbit": float("nan")}, "budget.upload_mbit"),
        ({"tokens": 1, "typo": 1}, "budget.typo"),
    ],
)
def test_a_budget_is_checked(budget: Any, problem: str) -> None:
    """A missing or wrong budget is told with its place."""
    fields = {**values(), "strategy": "auto"} | ({} if budget is None else {"budget": budget})
    with pytest.raises(ManifestInvalid) as caught:
        resolve(yaml.safe_dump(fields).encode())
    assert any(found.startswith(problem) for found in caught.value.problems)


def test_other_problems_of_an_automatic_manifest_are_told_too() -> None:
    """What is wrong elsewhere is listed as in any manifest, and a budget without `auto` is unknown."""
    fields = {**values(), "strategy": "auto", "budget": {"tokens": 10**6}, "name": "UPPER"}
    with pytest.raises(ManifestInvalid, match="name"):
        resolve(json.dumps(fields).encode())
    with pytest.raises(ManifestInvalid, match=r"model\.parameters"):
        resolve(json.dumps({**fields, "model": {}}).encode())
    with pytest.raises(ManifestInvalid, match="budget"):
        resolve(json.dumps({**manifest().model_dump(mode="json"), "budget": {"tokens": 1}}).encode())


@pytest.mark.parametrize(
    ("changes", "inner_state", "audited_by"),
    [
        ({"upload_mbit": 1000.0, "download_mbit": 1000.0, "step_s": 4.0}, "fresh", "replay"),
        ({"tokens": 1_000_000_000}, "kept", "loss"),
        ({"upload_mbit": 1000.0, "download_mbit": 1000.0, "tokens": 1_000_000}, "kept", ""),
        ({"upload_mbit": 1e4, "download_mbit": 1e4, "step_s": 60.0, "traffic_share": 1.0}, "kept", "loss"),
    ],
)
def test_how_runs_are_audited(changes: dict[str, Any], inner_state: str, audited_by: str) -> None:
    """By computing again, unless rounds overlap or are short, as a fresh state costs much then; not at all where they are few."""
    home = {"parameters": 124_000_000, "sequence_length": 1024, "tokens": 100_000_000, "peers": 8}
    made = plan(Draft.model_validate(home | changes))
    assert made.strategy.inner_state == inner_state
    base = manifest(audit={"rate": 0.05, "first": 10}).model_dump(mode="json")
    assert Manifest.model_validate(made.applied(base)).audited_by == audited_by
    words = {"replay": "others can compute", "loss": "audits go by", "": "nobody audits"}
    assert any(words[audited_by] in reason for reason in made.why)


@pytest.mark.parametrize(("tokens", "lr"), [(655_360, 1.9e-2), (1_228_800, 1.6e-2), (4_915_200, 1.1e-2), (10**12, 5.3e-3)])
def test_longer_runs_learn_more_slowly(tokens: int, lr: float) -> None:
    """With the fourth root of the steps, but not without end."""
    made = plan(Draft(parameters=870_000, sequence_length=128, tokens=tokens, batch_samples=8, peers=4))
    assert made.strategy.inner.lr == pytest.approx(lr)
