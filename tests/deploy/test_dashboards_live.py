"""A real Prometheus scrapes a real run: every query of the dashboards and every rule answers."""

from __future__ import annotations

import json
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import httpx
import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
DASHBOARDS = sorted((ROOT / "deploy" / "grafana" / "dashboards").glob("*.json"))
ALERTS = ROOT / "deploy" / "prometheus" / "alerts.yml"
METRIC = re.compile(r"\b(?:swarm|process)_[a-z0-9_]+")
SCRAPES = 8
# Without a GPU, without faults, without strangers and without a quota there is nothing to count.
MAY_BE_EMPTY = re.compile(
    r"swarm_peer_gpu_|swarm_peer_quota_left_bytes|_rejected_messages_total|_repairs_total|swarm_peer_state\b"
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("prometheus") is None, reason="prometheus is missing: apt-get install prometheus"),
]


class Run(Protocol):
    """A coordinator and peers that train; `host:port` of every metrics endpoint."""

    metrics_urls: list[str]


class Prometheus:
    """The HTTP interface of a running Prometheus."""

    def __init__(self, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}"

    def get(self, path: str, **parameters: str) -> Any:
        """The data of a successful answer."""
        answer = httpx.get(f"{self.url}/api/v1/{path}", params=parameters, timeout=10)
        if answer.status_code == httpx.codes.SERVICE_UNAVAILABLE:
            raise httpx.ConnectError("still starting")
        body = answer.json()
        assert body["status"] == "success", body
        return body["data"]

    def query(self, expression: str) -> list[dict[str, Any]]:
        """The series that an instant query finds."""
        found: list[dict[str, Any]] = self.get("query", query=expression)["result"]
        return found

    def scraped(self, targets: int) -> bool:
        """Whether every target has been scraped often enough for rates."""
        try:
            return len(self.query(f"sum_over_time(up[5m]) >= {SCRAPES}")) == targets
        except httpx.TransportError:
            return False


def wait_until(condition: Callable[[], bool], timeout_s: float, what: str) -> None:
    """Look again and again; fail with a name for what didn't come."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not happen within {timeout_s} s"
        time.sleep(0.2)


def free_port() -> int:
    """A port on loopback that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def exposition(target: str) -> str:
    """What an endpoint shows."""
    return httpx.get(f"http://{target}/metrics", timeout=10).raise_for_status().text


def configuration(targets: list[str]) -> str:
    """The scrape configuration of the deployment, quicker and with the run's addresses."""
    jobs: dict[str, list[str]] = {"coordinator": [], "peer": []}
    for target in targets:
        jobs["coordinator" if "swarm_coordinator_build_info" in exposition(target) else "peer"].append(target)
    assert all(jobs.values()), jobs
    return yaml.safe_dump(
        {
            "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
            "rule_files": [str(ALERTS)],
            "scrape_configs": [{"job_name": job, "static_configs": [{"targets": addresses}]} for job, addresses in jobs.items()],
        }
    )


@pytest.fixture
def prometheus(two_peer_run: Run, tmp_path: Path) -> Iterator[Prometheus]:
    """A Prometheus that has scraped the run a few times."""
    port = free_port()
    (tmp_path / "prometheus.yml").write_text(configuration(two_peer_run.metrics_urls))
    log = (tmp_path / "prometheus.log").open("w")
    process = subprocess.Popen(
        [
            "prometheus",
            f"--config.file={tmp_path / 'prometheus.yml'}",
            f"--storage.tsdb.path={tmp_path / 'data'}",
            f"--web.listen-address=127.0.0.1:{port}",
        ],
        stdout=log,
        stderr=subprocess.STDOUT,
    )
    try:
        server = Prometheus(port)
        wait_until(lambda: server.scraped(len(two_peer_run.metrics_urls)), 60, "scraping")
        yield server
    finally:
        process.terminate()
        process.wait(10)
        log.close()


def queries_of(path: Path) -> list[tuple[str, str]]:
    """Title and expression of every query, with Grafana's variables filled in."""
    return [
        (panel["title"], target["expr"].replace("$__rate_interval", "1m").replace("$peer", ".*"))
        for panel in json.loads(path.read_text())["panels"]
        for target in panel.get("targets", [])
    ]


def test_every_query_and_rule_answers(prometheus: Prometheus, two_peer_run: Run) -> None:
    """Dashboards show data, rules evaluate, every metric that they name is exported, and nothing raises an alarm."""
    queries = [(path.stem, *query) for path in DASHBOARDS for query in queries_of(path)]
    silent = [
        (dashboard, title)
        for dashboard, title, expression in queries
        if not prometheus.query(expression) and not MAY_BE_EMPTY.search(expression)
    ]
    assert silent == []

    rules = [rule for group in prometheus.get("rules")["groups"] for rule in group["rules"]]
    expected = [rule for group in yaml.safe_load(ALERTS.read_text())["groups"] for rule in group["rules"]]
    assert len(rules) == len(expected)
    assert [rule["name"] for rule in rules if rule["health"] == "err" or rule.get("lastError")] == []
    for rule in expected:
        prometheus.query(rule["expr"])

    text = "\n".join(exposition(target) for target in two_peer_run.metrics_urls)
    exported = set(re.findall(r"^# TYPE (\S+)", text, re.MULTILINE))
    expressions = [expression for _, _, expression in queries] + [rule["expr"] for rule in expected]
    used = {name for expression in expressions for name in METRIC.findall(expression)}
    assert {name for name in used if re.sub(r"_(bucket|sum|count)$", "", name) not in exported} == set()

    alerts = prometheus.get("alerts")["alerts"]
    assert [alert["labels"]["alertname"] for alert in alerts if alert["labels"]["severity"] == "critical"] == []
