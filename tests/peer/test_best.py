"""The best state is kept beside the newest ones: one at most, by what quorums agreed on or else by our own measurement."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from peer.best import BEST, RECORD, BestCheckpoint, Known
from peer.export import Provenance, model_card
from peer.model import initial_theta
from peer.outcome import best_weights, provenance
from peer.outer import initial_state
from peer.state import Snapshot
from swarm.errors import CheckpointCorrupt, DiskFull
from swarm.rpc.v1.coordinator_pb2 import AgreedEvaluation


@pytest.fixture
def run(small_run: Callable[..., Any]) -> Any:
    """A small run's manifest."""
    return small_run("diloco").manifest


def state_after(run: Any, round_index: int) -> Snapshot:
    state = initial_state(run.strategy, initial_theta(run.model))
    return Snapshot.from_state(replace(state, round=round_index + 1))


def known(number: int, loss: float, evaluators: int = 2) -> Known:
    return Known(round=number, loss=loss, evaluators=evaluators)


def told(number: int, loss: float, evaluators: int = 2) -> AgreedEvaluation:
    return AgreedEvaluation(round=number, loss=loss, evaluators=evaluators, statements=3)


def checkpoints(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / BEST).glob("round-*.safetensors"))


def test_the_best_replaces_the_one_before(run: Any, tmp_path: Path) -> None:
    """A worse state is not kept; a better one takes the place; a restart knows both."""
    best = BestCheckpoint.open(tmp_path, run)
    kept = [
        best.offer(state_after(run, number), known(number, loss)) for number, loss in ((2, 3.0), (4, 3.5), (6, 2.5), (8, 2.5))
    ]
    assert kept == [True, False, True, False]
    assert checkpoints(tmp_path) == ["round-000000000007.safetensors"]
    assert best_weights(tmp_path, run).root == state_after(run, 6).root
    again = BestCheckpoint.open(tmp_path, run)
    assert again.best == known(6, 2.5)
    assert not again.offer(state_after(run, 10), known(10, 2.6))


def test_agreed_losses_are_remembered_in_order(run: Any, tmp_path: Path) -> None:
    """Later words about a round count; what is no number doesn't; the export names the loss of its round."""
    best = BestCheckpoint.open(tmp_path, run)
    best.learn([told(4, 2.0), told(2, 3.0)])
    best.learn([told(4, 2.5, 3), told(6, float("nan")), told(8, float("inf")), told(10, -1.0)])
    assert best.agreed == [known(2, 3.0), known(4, 2.5, 3)]
    found = provenance(tmp_path, run, state_after(run, 4))
    assert (found.validation_loss, list(found.evaluations)) == (2.5, [(2, 3.0, 2), (4, 2.5, 3)])
    assert provenance(tmp_path, run, state_after(run, 5)).validation_loss is None
    assert best.describe()["newest"]["loss"] == 2.5


@pytest.mark.parametrize("content", [b"", b"[]", b'{"run_id": "another", "agreed": [], "best": null}', b"\xff"], ids=repr)
def test_a_damaged_record_is_begun_anew(run: Any, tmp_path: Path, content: bytes) -> None:
    """It costs what was known, and nothing else."""
    (tmp_path / RECORD).write_bytes(content)
    assert BestCheckpoint.open(tmp_path, run).agreed == []


def test_a_record_without_its_checkpoint_bars_nothing(run: Any, tmp_path: Path) -> None:
    """Whoever deletes the checkpoint gets the next one."""
    BestCheckpoint.open(tmp_path, run).offer(state_after(run, 2), known(2, 1.0))
    for path in (tmp_path / BEST).iterdir():
        path.unlink()
    with pytest.raises(CheckpointCorrupt, match="no checkpoint yet"):
        best_weights(tmp_path, run)
    assert BestCheckpoint.open(tmp_path, run).offer(state_after(run, 4), known(4, 2.0))


@pytest.mark.parametrize("failure", [DiskFull("no space left", "free some"), PermissionError("read-only")], ids=repr)
def test_a_full_disk_leaves_the_best_as_it_was(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: Exception
) -> None:
    """It is told in the log, and training goes on."""
    best = BestCheckpoint.open(tmp_path, run)
    best.offer(state_after(run, 2), known(2, 2.0))

    def full(*_: object, **__: object) -> None:
        raise failure

    monkeypatch.setattr("peer.best.save_checkpoint", full)
    assert not best.offer(state_after(run, 4), known(4, 1.0))
    assert best.best == known(2, 2.0)


def test_the_model_card_lists_evaluations(run: Any) -> None:
    """With round, loss, perplexity and how many agreed; without any there is no such section."""
    card = model_card(run, Provenance(5, 100, "ab" * 32, validation_loss=2.5, evaluations=[(2, 3.0, 2), (4, 2.5, 3)]))
    assert "| 4 | 2.5000 | 12.18 | 3 |" in card
    assert "## Evaluations" not in model_card(run, Provenance(5, 100, "ab" * 32))
