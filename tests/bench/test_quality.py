"""The settings that are compared, and the rounds that are played in one process."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from bench import settings
from bench.settings import AUTO, PEERS, SYNC, TUNED_MUON, made
from bench.simulate import simulate
from swarm.manifest import DiLoCo, Manifest, Sync

STEPS = 60


@pytest.fixture(autouse=True)
def little_data(monkeypatch: pytest.MonkeyPatch) -> None:
    """The settings don't depend on how much text there is."""
    monkeypatch.setattr(settings, "DATA_BYTES", 300_000)


def steps_of(value: Manifest) -> int:
    """Inner steps of every peer over the whole run."""
    return sum(value.phase(index + 1).inner_steps for index in range(value.rounds.total))


def test_all_settings_spend_the_same_tokens(tmp_path: Path) -> None:
    """Codec, interval and strategy differ, but not steps, batch, model, data and length of the schedule."""
    values = {name: made(setting, tmp_path, 0, STEPS) for name, setting in settings.settings().items()}
    assert {steps_of(value) for value in values.values()} == {STEPS}
    assert len({value.model_dump_json(include={"model", "data"}) for value in values.values()}) == 1
    assert {value.strategy.schedule.total_tokens for value in values.values()} == {STEPS * PEERS * 8 * 128}
    batches = {value.strategy.batch_samples for value in values.values() if isinstance(value.strategy, DiLoCo)}
    assert batches == {8}
    sync = values[SYNC].strategy
    assert isinstance(sync, Sync)
    assert sync.batch_samples == PEERS * 8
    assert not any(value.rounds.scale_to_speed for value in values.values())


def test_muon_rows_differ_from_auto_in_traffic_only(tmp_path: Path) -> None:
    """The tuned reference with Muon has the inner optimizer and the learning rates of `auto`."""
    ours, reference = (made(settings.settings()[name], tmp_path, 0, STEPS).strategy for name in (AUTO, TUNED_MUON))
    assert isinstance(ours, DiLoCo)
    assert isinstance(reference, DiLoCo)
    assert ours.inner == reference.inner
    assert ours.schedule == reference.schedule


def test_a_simulation_depends_on_the_manifest_only(tmp_path: Path) -> None:
    """Two simulations of a short run end with the same bits, and count the payload that the codec makes."""
    manifest = made(settings.settings()[AUTO], tmp_path, 0, 9)
    first, second = (simulate(manifest, tmp_path, 2) for _ in range(2))
    assert np.array_equal(first.theta, second.theta)
    assert first.steps == steps_of(manifest) == 9
    bits = first.payload_bytes_per_peer * 8 / first.rounds / manifest.model.parameters
    assert bits == pytest.approx(4.25, rel=0.02)
