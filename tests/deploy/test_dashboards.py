"""Dashboards come from the code, explain themselves, and ask only for metrics that exist."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import CollectorRegistry

ROOT = Path(__file__).resolve().parents[2]
DASHBOARDS = sorted((ROOT / "deploy" / "grafana" / "dashboards").glob("*.json"))
ALERTS = ROOT / "deploy" / "prometheus" / "alerts.yml"
METRIC = re.compile(r"\b(?:swarm|process)_[a-z0-9_]+")
by_name = pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)


def panels_of(path: Path) -> list[dict[str, Any]]:
    """Every panel that shows something."""
    return [panel for panel in json.loads(path.read_text())["panels"] if panel["type"] != "row"]


def exported_names() -> set[str]:
    """The series that coordinator and peers export."""
    from coordinator.metrics import Metrics as CoordinatorMetrics
    from peer.metrics import PeerMetrics

    registry = CollectorRegistry()
    CoordinatorMetrics(registry)
    PeerMetrics(registry)
    suffixes = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count"), "info": ("_info",)}
    return {family.name + suffix for family in registry.collect() for suffix in suffixes.get(family.type, ("",))}


def test_dashboards_are_fresh() -> None:
    """The files are what the code gives now."""
    command = [sys.executable, "-m", "deploy.dashboards", "--check"]
    check = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert check.returncode == 0, check.stdout + check.stderr


def test_the_dashboards_exist() -> None:
    """There is one for the run, one for a peer, one for the coordinator, and one for who cheats."""
    assert [path.stem for path in DASHBOARDS] == ["coordinator", "overview", "peer", "trust"]


@by_name
def test_every_panel_has_a_unit_and_a_description(path: Path) -> None:
    """Nobody has to guess what a number means."""
    for panel in panels_of(path):
        assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]
        assert panel["description"].endswith("."), panel["title"]
        assert panel["targets"], panel["title"]


@by_name
def test_panels_lie_side_by_side(path: Path) -> None:
    """No panel covers another, and none leaves the grid of 24 columns."""
    taken: set[tuple[int, int]] = set()
    for panel in panels_of(path):
        place = panel["gridPos"]
        columns = range(place["x"], place["x"] + place["w"])
        cells = {(x, y) for x in columns for y in range(place["y"], place["y"] + place["h"])}
        assert columns.stop <= 24, panel["title"]
        assert not cells & taken, panel["title"]
        taken |= cells


@by_name
def test_titles_are_unique_within_a_dashboard(path: Path) -> None:
    """A title names one panel."""
    titles = [panel["title"] for panel in panels_of(path)]
    assert len(set(titles)) == len(titles)


@by_name
def test_queries_ask_for_exported_metrics(path: Path) -> None:
    """Every metric in a dashboard is exported by the coordinator or by peers."""
    used = {name for panel in panels_of(path) for target in panel["targets"] for name in METRIC.findall(target["expr"])}
    assert used <= exported_names()


def test_rules_ask_for_exported_metrics() -> None:
    """Every metric in an alert or recording rule is exported by the coordinator or by peers."""
    groups = yaml.safe_load(ALERTS.read_text())["groups"]
    used = {name for group in groups for rule in group["rules"] for name in METRIC.findall(rule["expr"])}
    assert used <= exported_names()


def test_provisioning_points_at_the_dashboards_and_their_data_source() -> None:
    """Grafana finds the data source that the panels name, and reads the folder that compose mounts."""
    folder = ROOT / "deploy" / "grafana" / "provisioning"
    sources = yaml.safe_load((folder / "datasources" / "prometheus.yaml").read_text())["datasources"]
    providers = yaml.safe_load((folder / "dashboards" / "swarm.yaml").read_text())["providers"]
    used = {panel["datasource"]["uid"] for path in DASHBOARDS for panel in panels_of(path)}
    assert used == {source["uid"] for source in sources}
    compose = (ROOT / "deploy" / "compose" / "compose.yaml").read_text()
    assert all(f"../grafana/dashboards:{provider['options']['path']}:ro" in compose for provider in providers)
