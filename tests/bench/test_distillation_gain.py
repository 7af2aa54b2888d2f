"""What a recipe gains is measured on runs that differ by the recipe alone."""

from __future__ import annotations

import pytest

from bench import recipes
from bench.report import Report
from swarm.manifest import AdamW

SMALL: dict[str, object] = {
    "QUICK_TEACHER_STEPS": 2,
    "QUICK_STUDENT_STEPS": 2,
    "TEACHER": recipes.Learner(32, 1, AdamW()),
    "STUDENT": recipes.Learner(32, 1, AdamW()),
    "VALIDATION_SAMPLES": 4,
    "TOP_K": 4,
}


def test_the_gain_is_the_difference_of_the_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """The teacher's row, two for each seed, and figures that follow from them."""
    for name, value in SMALL.items():
        monkeypatch.setattr(recipes, name, value)
    out = Report("recipes", quick=True)
    recipes.measure_distillation(out)
    students = [row for row in out.rows if "seed" in row]
    assert [row["seed"] for row in students] == [*recipes.SEEDS] * 2
    losses = [row["loss"] for row in students]
    gains = [alone - distilled for alone, distilled in zip(losses[:3], losses[3:], strict=True)]
    assert out.figures["distillation_gain"].value == pytest.approx(sum(gains) / 3)
    assert out.figures["distillation_gain_spread"].value == pytest.approx(max(gains) - min(gains))
    assert any(gains)
