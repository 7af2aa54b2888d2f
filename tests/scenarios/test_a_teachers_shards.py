"""Runs with more than texts: peers fetch what they need and agree."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM

from peer.corpus import TOKENIZER
from peer.dataset import FILE, Dataset
from peer.recipes import demo_manifest
from peer.teaching import teach
from swarm.local import LocalSwarm
from swarm.manifest import Distillation, Manifest
from swarm.scenario import Scenario, last_contribution, write_run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def taught_run(folder: Path) -> Manifest:
    """A run whose files are in `folder`/files, with a teacher that was never trained."""
    plain = demo_manifest(
        folder / "plain", sequence_length=32, data_bytes=100_000, peers=2, inner_steps=4, hidden_size=32, layers=2
    )
    made = Dataset(tokenizer=plain.tokenizer, data=plain.data, vocabulary_size=257, end_of_text=256)
    (folder / "plain" / FILE).write_text(yaml.safe_dump(made.model_dump(mode="json")))
    values = dict(plain.model.config)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(values.pop("model_type"), **values)).save_pretrained(folder / "teacher")
    (folder / "teacher" / TOKENIZER).write_bytes((folder / "plain" / plain.tokenizer.root).read_bytes())
    taught = teach(folder / "plain", folder / "files", folder / "teacher", 4, torch.device("cpu"), micro_batch=64)
    rounds = plain.rounds.model_copy(update={"total": 0})
    changes = {"data": taught.data, "distillation": Distillation(temperature=2.0), "rounds": rounds}
    return Manifest.model_validate({**plain.model_dump(mode="json"), **changes})


async def test_a_newcomer_fetches_the_teachers_shards_and_learns_from_them(tmp_path: Path) -> None:
    """By hash from other peers, like all files of a run."""
    manifest = taught_run(tmp_path / "run")
    write_run(tmp_path / "run", manifest)
    async with LocalSwarm(tmp_path / "swarm") as local:
        swarm = Scenario(local, tmp_path / "run")
        await swarm.start(2)
        await swarm.until_round(1)
        newcomer = await swarm.join("p2", with_files=False)
        await swarm.until(lambda: last_contribution(newcomer) >= 0, "the newcomer contributes", 400)
        assert all((newcomer.directory / "files" / tree.root).exists() for tree in manifest.data.trees)
        assert swarm.differing_roots() == []
