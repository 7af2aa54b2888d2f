"""From a peer's folder to a model that anybody loads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoModelForCausalLM

from peer.export import Provenance
from peer.model import initial_theta
from peer.outcome import CHECKPOINTS, export, held_out_losses, newest_weights, sample
from peer.outer import initial_state
from peer.state import Snapshot, save_checkpoint
from swarm.errors import CheckpointCorrupt


@pytest.fixture
def trained(small_run: Callable[..., object], tmp_path: Path) -> tuple[object, Snapshot]:
    """A run and a checkpoint of it in `tmp_path`."""
    run = small_run("diloco")
    theta = initial_theta(run.manifest.model)
    snapshot = Snapshot.from_state(initial_state(run.manifest.strategy, theta))
    save_checkpoint(tmp_path / CHECKPOINTS, snapshot, run.manifest.run_id)
    return run, snapshot


def test_the_newest_whole_checkpoint_is_taken(trained, tmp_path: Path) -> None:
    """What is exported has the root of the state that was saved."""
    run, snapshot = trained
    assert newest_weights(tmp_path, run.manifest).root == snapshot.root


def test_without_a_whole_checkpoint_there_is_nothing_to_export(trained, tmp_path: Path) -> None:
    """A missing folder and a damaged file each say so, by name."""
    run, _ = trained
    with pytest.raises(CheckpointCorrupt, match="no checkpoint yet"):
        newest_weights(tmp_path / "elsewhere", run.manifest)
    for path in (tmp_path / CHECKPOINTS).rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(CheckpointCorrupt, match="nothing to export"):
        newest_weights(tmp_path, run.manifest)


def test_the_held_out_loss_is_measured_before_and_after(trained) -> None:
    """The initial weights give the first figure; the same weights give the same one, others another."""
    run, snapshot = trained
    same = held_out_losses(run.manifest, run.directory, snapshot.state.theta, 8)
    assert same.first == same.last
    assert 4.0 < same.first < 7.0
    other = held_out_losses(run.manifest, run.directory, snapshot.state.theta + np.float32(0.05), 8)
    assert other.first == same.first
    assert other.last != same.last


def test_the_export_loads_and_writes(trained, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The directory loads with transformers alone, has our weights, generates text, and no progress bar is shown."""
    run, snapshot = trained
    provenance = Provenance(snapshot.round, snapshot.state.tokens, snapshot.root_hex)
    folder = export(run.manifest, run.directory, snapshot, tmp_path / "model", provenance)
    assert isinstance(sample(folder), str)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert sum(parameter.numel() for parameter in model.parameters()) == run.manifest.model.parameters
    assert snapshot.root_hex in (folder / "README.md").read_text()
    assert "it/s]" not in capfd.readouterr().err
