"""Scrape configuration, alerts and recording rules hold before Prometheus itself."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "deploy" / "prometheus"
RULES = [rule for group in yaml.safe_load((FOLDER / "alerts.yml").read_text())["groups"] for rule in group["rules"]]
ALERTS = [rule for rule in RULES if "alert" in rule]
needs_promtool = pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is missing: apt-get install prometheus")


def promtool(*arguments: str) -> None:
    """Run promtool in the folder of the configuration."""
    done = subprocess.run(["promtool", *arguments], cwd=FOLDER, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@needs_promtool
def test_configuration_is_valid() -> None:
    """promtool accepts the scrape configuration and the rules."""
    promtool("check", "config", "prometheus.yml")


@needs_promtool
def test_rules_do_what_they_say() -> None:
    """promtool's unit tests of alerts and recording rules pass."""
    promtool("test", "rules", "alerts_test.yml")


@pytest.mark.parametrize("rule", ALERTS, ids=lambda rule: str(rule["alert"]))
def test_every_alert_is_tested_and_has_a_runbook(rule: dict[str, dict[str, str]]) -> None:
    """An alert says what happened, what it means, and where help stands; and a unit test fires it."""
    name = str(rule["alert"])
    assert rule["labels"]["severity"] in {"info", "warning", "critical"}
    assert {"summary", "description", "runbook"} <= rule["annotations"].keys()
    page, _, anchor = rule["annotations"]["runbook"].partition("#")
    headings = re.findall(r"^#+ (.*)$", (ROOT / page).read_text(), re.MULTILINE)
    assert anchor == name.lower()
    assert name in headings
    assert f"alertname: {name}" in (FOLDER / "alerts_test.yml").read_text()


def test_every_runbook_belongs_to_an_alert() -> None:
    """The operator's page has a section for each alert, and none for an alert that is gone."""
    sections = (ROOT / "docs" / "operations.md").read_text().partition("\n## Alerts\n")[2]
    assert sorted(re.findall(r"^### (.*)$", sections, re.MULTILINE)) == sorted(str(rule["alert"]) for rule in ALERTS)


def test_recording_rules_are_named_by_level_metric_and_operation() -> None:
    """Recording rules follow Prometheus' convention level:metric:operations."""
    assert all(re.fullmatch(r"swarm:[a-z0-9_]+:[a-z0-9_]+", rule["record"]) for rule in RULES if "record" in rule)
