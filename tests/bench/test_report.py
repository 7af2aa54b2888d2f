"""The frame of the benchmarks writes what the acceptance run reads and what people need to judge a figure."""

import io
import json
import math
from pathlib import Path

import pytest
from rich.console import Console

from bench.report import Figure, Report, package_versions, quantile, run


def measured(out: Report) -> None:
    out.figure("stall_s", 0.25, "median of 9", "<= 0.3")
    out.figure("rounds", out.choose(100, 10), "counted")
    out.row("peers", peer="a", tokens=1000)
    out.row("peers", peer="b", tokens=2000, late=True)


def outcome_of(path: Path) -> dict[str, object]:
    content: dict[str, object] = json.loads(path.read_text())
    return content


def test_the_json_has_figures_rows_machine_and_versions(tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    assert run("example", None, {"all": measured}, ["--json", str(path)]) == 0
    outcome = outcome_of(path)
    assert outcome["figures"] == {"stall_s": 0.25, "rounds": 100}
    assert outcome["how"] == {"stall_s": "median of 9", "rounds": "counted"}
    assert outcome["goals"] == {"stall_s": "<= 0.3"}
    assert outcome["rows"] == [
        {"table": "peers", "peer": "a", "tokens": 1000},
        {"table": "peers", "peer": "b", "tokens": 2000, "late": True},
    ]
    assert {"cpu", "cores", "memory_bytes", "os", "python", "load"} <= set(outcome["machine"])
    assert {"swarm-train", "torch", "hivemind", "transformers", "grpcio"} <= set(outcome["versions"])
    assert list(outcome["seconds"]) == ["all"]
    assert outcome["failures"] == {}


def test_quick_is_passed_on_and_noted(tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    run("example", None, {"all": measured}, ["--quick", "--json", str(path)])
    outcome = outcome_of(path)
    assert outcome["quick"] is True
    assert outcome["figures"]["rounds"] == 10


def test_coroutines_are_sections_too(tmp_path: Path) -> None:
    async def section(out: Report) -> None:
        out.figure("awaited", 1, "counted")

    path = tmp_path / "out.json"
    assert run("example", None, {"all": section}, ["--json", str(path)]) == 0
    assert outcome_of(path)["figures"] == {"awaited": 1}


def test_a_failing_section_is_noted_and_the_others_still_count(tmp_path: Path) -> None:
    def failing(out: Report) -> None:
        raise RuntimeError("peer-1 ended")

    path = tmp_path / "out.json"
    assert run("example", None, {"broken": failing, "whole": measured}, ["--json", str(path)]) == 1
    outcome = outcome_of(path)
    assert outcome["failures"] == {"broken": "RuntimeError: peer-1 ended"}
    assert outcome["figures"]["stall_s"] == 0.25


def test_only_the_named_sections_run(tmp_path: Path) -> None:
    def other(out: Report) -> None:
        out.figure("other", 1, "counted")

    path = tmp_path / "out.json"
    run("example", None, {"all": measured, "other": other}, ["--only", "other", "--json", str(path)])
    assert outcome_of(path)["figures"] == {"other": 1}


def test_a_missed_goal_is_shown_and_is_no_failure(capsys: pytest.CaptureFixture[str]) -> None:
    def slow(out: Report) -> None:
        out.figure("stall_s", 4.0, "median of 9", "<= 0.3")

    assert run("example", None, {"all": slow}, []) == 0
    printed = capsys.readouterr().out
    assert "SHORT" in printed
    assert "median of 9" in printed


def test_people_see_every_table_and_the_machine() -> None:
    report = Report("example")
    measured(report)
    console = Console(width=120, record=True, file=io.StringIO())
    report.show(console)
    printed = console.export_text()
    assert all(text in printed for text in ("peers", "tokens", "2,000", "stall_s", "met", report.machine["python"]))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_figure_that_is_not_finite_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match="finite"):
        Report("example").figure("loss", value, "measured")


def test_a_figure_is_noted_once_and_can_be_counted_together() -> None:
    report = Report("example")
    report.figure("loss", 1.0, "measured")
    with pytest.raises(ValueError, match="once"):
        report.figure("loss", 2.0, "measured")
    report.add("differing", 0, "counted", "== 0")
    report.add("differing", 2, "counted", "== 0")
    assert report.figures["differing"] == Figure(2, "counted", "== 0")
    assert report.figures["differing"].met is False


@pytest.mark.parametrize(
    ("goal", "value", "met"),
    [
        ("<= 0.3", 0.3, True),
        ("<= 0.3", 0.31, False),
        (">= 60", 60, True),
        ("< 2e8", 2e8, False),
        ("== 0", 0, True),
        ("", 1, None),
    ],
)
def test_goals_are_read_as_the_acceptance_run_does(goal: str, value: float, met: bool | None) -> None:
    assert Figure(value, "measured", goal).met is met


def test_quantiles_are_interpolated() -> None:
    assert quantile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert quantile([0.0, 10.0], 0.95) == pytest.approx(9.5)
    assert quantile([7.0], 0.95) == 7.0
    with pytest.raises(ValueError, match="no values"):
        quantile([], 0.5)


def test_packages_that_are_not_installed_are_left_out() -> None:
    assert list(package_versions(["no-such-package-here", "rich"])) == ["rich"]


def test_plots_are_in_the_json_and_drawn(tmp_path: Path) -> None:
    """Every series with its points; files are named after the benchmark and the plot."""

    def section(out: Report) -> None:
        out.plot("loss against bytes", {"int4": [(22.3, 1.55)], "fp16": [(82.2, 1.54), (82.5, 1.56)]}, x="MB", y="loss", log="x")

    path, folder = tmp_path / "out.json", tmp_path / "plots"
    assert run("example", None, {"all": section}, ["--json", str(path), "--plots", str(folder)]) == 0
    series = {"int4": [[22.3, 1.55]], "fp16": [[82.2, 1.54], [82.5, 1.56]]}
    assert outcome_of(path)["plots"] == [{"title": "loss against bytes", "x": "MB", "y": "loss", "log": "x", "series": series}]
    drawn = (folder / "example-loss-against-bytes.svg").read_text()
    assert drawn.startswith("<?xml")
    assert run("example", None, {"all": measured}, ["--plots", str(tmp_path / "none")]) == 0
    assert list((tmp_path / "none").iterdir()) == []
