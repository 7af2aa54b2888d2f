"""Manifests: one canonical form, all problems at once, and no way to make a peer run code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from swarm.errors import ManifestInvalid
from swarm.manifest import Manifest
from tests.world import manifest

SIDES = ("train", "validation")


def parse(**changes: object) -> Manifest:
    """The tiny manifest with changes, through JSON."""
    return Manifest.parse(json.dumps(manifest().model_dump(mode="json") | changes).encode())


def test_run_id_depends_on_content_only() -> None:
    """YAML layout, key order and written-out defaults don't change the run id."""
    value = manifest()
    shuffled = dict(reversed(list(value.model_dump(mode="json").items())))
    assert Manifest.parse(json.dumps(shuffled, indent=3).encode()).run_id == value.run_id
    assert parse(name="other").run_id != value.run_id


def test_every_problem_is_listed() -> None:
    """Several mistakes are told at once, each with its place."""
    with pytest.raises(ManifestInvalid) as caught:
        parse(name="UPPER", nonsense=1, credit={"flops_per_token": 0})
    assert len(caught.value.problems) == 3
    assert any(problem.startswith("credit.flops_per_token") for problem in caught.value.problems)


@pytest.mark.parametrize("key", ["auto_map", "trust_remote_code"])
def test_no_code_in_a_manifest(key: str) -> None:
    """Configuration keys that make transformers load code are refused."""
    with pytest.raises(ManifestInvalid, match="run code"):
        parse(model={"config": {"model_type": "llama", key: True}, "parameters": 1})


@pytest.mark.parametrize("raw", [b"\xff\xfe\x00", b"[1]", b"a: [", b"!!python/object:os.system {}", b"x" * ((1 << 20) + 1)])
def test_what_is_no_manifest(raw: bytes) -> None:
    """Binary, lists, broken YAML, YAML tags and huge files are refused."""
    with pytest.raises(ManifestInvalid):
        Manifest.parse(raw)


def test_shard_sizes_must_fit(tmp_path: Path) -> None:
    """A shard's bytes follow from its samples, and a missing file is a problem, not a crash."""
    data = manifest().model_dump(mode="json")["data"]
    data["train"][0]["samples"] += 1
    with pytest.raises(ManifestInvalid, match="size_bytes"):
        parse(data=data)
    with pytest.raises(ManifestInvalid, match="can't be read"):
        Manifest.read(tmp_path / "missing.yaml")


def marked_data(**changes: object) -> dict[str, object]:
    """The tiny manifest's data in the other layout."""
    data = manifest().model_dump(mode="json")["data"]
    shards = {
        side: [{**shard, "token_bytes": 4, "size_bytes": shard["size_bytes"] * 2} for shard in data[side]] for side in SIDES
    }
    return {**data, **shards, "layout": "marked", "counted_tokens": 5, **changes}


def test_layouts_are_told_apart_and_leave_older_runs_their_ids() -> None:
    """What a plain run's manifest says is what it said before there was another layout."""
    assert not {"layout", "counted_tokens", "chat_template"} & manifest().model_dump(mode="json")["data"].keys()
    value = parse(data=marked_data())
    assert value.data.counted_per_sample == 5 / value.data.train_samples
    assert manifest().data.counted_per_sample == manifest().data.sequence_length
    assert Manifest.parse(value.canonical_bytes) == value


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"counted_tokens": 0}, "counted_tokens"),
        ({"counted_tokens": 1 << 40}, "counted_tokens"),
        ({"layout": "plain"}, "every token counts"),
        ({"train": manifest().model_dump(mode="json")["data"]["train"]}, "token_bytes 4"),
        ({"layout": "other"}, "data.layout"),
        ({"chat_template": "x" * 70_000}, "chat_template"),
    ],
)
def test_a_marked_layout_that_cant_be(changes: dict[str, object], problem: str) -> None:
    """Sizes, counts and layout have to fit each other."""
    with pytest.raises(ManifestInvalid, match=problem):
        parse(data=marked_data(**changes))


def test_documents_must_stay_apart() -> None:
    """An architecture for which that isn't known can't train on the layout that needs it."""
    model = {"config": {"model_type": "mamba"}, "parameters": 1}
    with pytest.raises(ManifestInvalid, match="mamba can't train"):
        parse(data=marked_data(), model=model)
    assert parse(model=model).data.layout == "plain"


def taught_data(**teacher: object) -> dict[str, object]:
    """The tiny manifest's data with a teacher's shards."""
    data = manifest().model_dump(mode="json")["data"]
    sizes = [shard["samples"] * data["sequence_length"] * (3 * 4 + 2) for shard in data["train"]]
    shards = [{"root": "11" * 32, "size_bytes": size} for size in sizes]
    return {**data, "teacher": {"shards": shards, "top_k": 3, **teacher}}


PRIVATE = {"admission": {"kind": "invitation"}, "audit": {"rate": 0.0, "first": 0}}


def private_data(*, validation: bool = False) -> dict[str, Any]:
    """The tiny manifest's data with two shards for training, of which the first is private."""
    data: dict[str, Any] = manifest().model_dump(mode="json")["data"]
    first = data["train"][0]
    data["train"] = [{**first, "private": True}, {**first, "root": "03" * 32}]
    data["validation"][0]["private"] = validation
    return data


def test_private_shards_are_none_of_the_files_that_travel() -> None:
    """A run without any keeps its id; those that a peer lacks are none of its samples."""
    data = manifest().model_dump(mode="json")["data"]
    for shard in (*data["train"], *data["validation"]):
        shard["private"] = False
    assert parse(data=data).run_id == manifest().run_id
    run = parse(data=private_data(validation=True), **PRIVATE)
    private, public = run.data.train
    assert run.files == (run.tokenizer, public)
    assert run.data.private_trees == (private, *run.data.validation)
    assert run.data.held(lambda tree: False).train == (public,)
    assert run.data.held(lambda tree: tree == private).train == (private, public)
    assert run.data.held(lambda tree: False).validation == ()


def test_what_a_teacher_expects_in_a_private_shard_is_private_too() -> None:
    """It tells what is in it, and goes with the shard."""
    data = private_data()
    per_token = 2 * 4 + 2
    lesson = {"size_bytes": 100 * data["sequence_length"] * per_token}
    data["teacher"] = {"shards": [{**lesson, "root": "0a" * 32}, {**lesson, "root": "0b" * 32}], "top_k": 2}
    run = parse(data=data, distillation={}, **PRIVATE)
    assert [tree.root[:2] for tree in run.data.private_trees] == ["01", "0a"]
    held = run.data.held(lambda tree: False)
    assert held.teacher is not None
    assert [tree.root[:2] for tree in held.teacher.shards] == ["0b"]


@pytest.mark.parametrize(
    ("changes", "problem"),
    [({"admission": {"kind": "open"}}, "by invitation"), ({"audit": {"rate": 0.1, "first": 0}}, "nobody can audit")],
)
def test_private_shards_are_for_people_who_know_each_other(changes: dict[str, object], problem: str) -> None:
    """An open run, or one that promises audits, can't have any."""
    with pytest.raises(ManifestInvalid, match=problem):
        parse(data=private_data(), **{**PRIVATE, **changes})


def test_a_teacher_and_distillation_are_there_together() -> None:
    """Peers neither fetch what they don't use nor lack what they need; and who has neither keeps its run id."""
    value = parse(data=taught_data(), distillation={"temperature": 2})
    assert Manifest.parse(value.canonical_bytes) == value
    assert value.data.trees[-1].root == "11" * 32
    assert manifest().data.trees == (*manifest().data.train, *manifest().data.validation)
    assert "distillation" not in manifest().model_dump(mode="json")
    for changes in ({"data": taught_data()}, {"distillation": {}}):
        with pytest.raises(ManifestInvalid, match="only there together"):
            parse(**changes)


@pytest.mark.parametrize(
    ("teacher", "problem"),
    [({"top_k": 4}, "size"), ({"token_bytes": 4}, "size"), ({"shards": []}, "shards"), ({"top_k": 0}, "top_k")],
)
def test_a_teachers_shards_must_fit(teacher: dict[str, object], problem: str) -> None:
    """One for each training shard, of as many samples."""
    with pytest.raises(ManifestInvalid, match=problem):
        parse(data=taught_data(**teacher), distillation={})


@pytest.mark.parametrize("settings", [{"share": 0}, {"share": 1.5}, {"temperature": 0}, {"temperature": 1000}, {"other": 1}])
def test_distillation_that_cant_be(settings: dict[str, float]) -> None:
    """Shares and temperatures have limits."""
    with pytest.raises(ManifestInvalid, match="distillation"):
        parse(data=taught_data(), distillation=settings)


def test_phases_hold_from_their_round_on() -> None:
    """Inner steps and codec are those of the last phase that has begun, and phases come in order."""
    codecs = [{"kind": kind} for kind in ("int4", "int2")]
    phases = [
        {"from_round": start, "inner_steps": steps, "codec": codec}
        for start, steps, codec in zip((3, 9), (5, 10), codecs, strict=True)
    ]
    strategy = {"kind": "diloco", "inner_steps": 1, "batch_samples": 8, "schedule": {"total_tokens": 1000}, "phases": phases}
    value = parse(strategy=strategy)
    found = [(value.phase(index).inner_steps, value.phase(index).codec.kind) for index in (0, 1, 2, 3, 8, 9, 100)]
    assert found == [(1, "fp16")] * 3 + [(5, "int4")] * 2 + [(10, "int2")] * 2
    assert value.most_inner_steps == 10
    with pytest.raises(ManifestInvalid, match="order"):
        parse(strategy=strategy | {"phases": phases[::-1]})
