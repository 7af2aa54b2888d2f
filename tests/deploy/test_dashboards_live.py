"""A real Prometheus scrapes a real run in which things go wrong: every query of the dashboards and every rule answers."""

from __future__ import annotations

import json
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from peer.model import count_parameters
from peer.recipes import tiny_manifest
from swarm.errors import Rejected, UnknownRun
from swarm.local import LocalSwarm
from swarm.manifest import Manifest
from swarm.messages import JoinLink
from swarm.rpc.client import CoordinatorClient
from swarm.scenario import Scenario, write_run
from tests.runs import LoopThread
from tests.world import World, identity

ROOT = Path(__file__).resolve().parents[2]
DASHBOARDS = sorted((ROOT / "deploy" / "grafana" / "dashboards").glob("*.json"))
ALERTS = ROOT / "deploy" / "prometheus" / "alerts.yml"
METRIC = re.compile(r"\b(?:swarm|process)_[a-z0-9_]+")
RECORDED = re.compile(r"\bswarm:[a-z0-9_:]+")
SCRAPES = 8
SETTLE_S = 200
NO_GPU = re.compile(r"swarm_peer_gpu_")
PEERS, STRANGER = 3, identity(7)
FAULTS = {"p1": "at round 4 after apply: flip_bit"}
TAMPERING = ("env", "SWARM_ATTACK=tamper")
ENVIRONMENT = {"SWARM_CHECK_TRAFFIC": "100", "SWARM_MONTHLY_QUOTA": "200GB"}
EXPERTS = {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}
AUDITED = {"rate": 0.5, "first": 2, "within_rounds": 10}
EVALUATED = {"every": 3, "evaluators": 2, "samples": 8}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(500),
    pytest.mark.skipif(shutil.which("prometheus") is None, reason="prometheus is missing: apt-get install prometheus"),
]


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


@dataclass(frozen=True)
class Run:
    """A coordinator and audited peers; `host:port` of their metrics endpoints."""

    loop: LoopThread
    scenario: Scenario
    targets: list[str]

    def join_a_cheat(self) -> None:
        """One more peer, which merges wrongly."""
        self.loop.run(self.scenario.join("cheat", prefix=TAMPERING))


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    """Three peers, of which one has had a bit flipped; and a stranger has called."""
    loop = LoopThread()
    swarm = LocalSwarm(tmp_path / "swarm", ENVIRONMENT)
    try:
        yield loop.run(_start(loop, swarm, tmp_path / "run"), 170)
    finally:
        loop.run(swarm.close())
        loop.close()


async def _start(loop: LoopThread, swarm: LocalSwarm, source: Path) -> Run:
    swarm.directory.mkdir()
    write_run(source, _mixture(source / "files"))
    scenario = Scenario(swarm, source)
    await scenario.start(PEERS, faults=FAULTS)
    await scenario.until_round(6)
    await _call_as_a_stranger(scenario.link)
    return Run(loop, scenario, [swarm.metrics, *[(await peer.status())["metrics"] for peer in swarm.peers]])


def _mixture(files: Path) -> Manifest:
    """An audited and evaluated run with experts, so that what is told of all these is there."""
    values = tiny_manifest(files, PEERS).model_dump(mode="json")
    config = values["model"]["config"] | EXPERTS
    model = {**values["model"], "config": config, "parameters": count_parameters(config)}
    return Manifest.model_validate({**values, "model": model, "audit": AUDITED, "evaluation": EVALUATED})


async def _call_as_a_stranger(link: JoinLink) -> None:
    """Be refused for another run; be admitted, ask for a grant that nobody needs, and leave."""
    world, now_s = World(), time.time()
    async with await CoordinatorClient.connect(link) as client:
        with pytest.raises(UnknownRun):
            await client.announce(world.announcement(STRANGER, now_s))
        await client.announce(world.announcement(STRANGER, now_s, run_id=link.run_id, state="paused"))
        with pytest.raises(Rejected):
            await client.request_grant(world.grant_request(STRANGER, 1, [STRANGER], run_id=link.run_id, issued_at=int(now_s)))
        await client.announce(world.announcement(STRANGER, now_s + 1, run_id=link.run_id, leaving=True))


@pytest.fixture
def prometheus(run: Run, tmp_path: Path) -> Iterator[Prometheus]:
    """A Prometheus that has scraped the run a few times."""
    port = free_port()
    (tmp_path / "prometheus.yml").write_text(configuration(run.targets))
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
        wait_until(lambda: server.scraped(len(run.targets)), 60, "scraping")
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


def inputs_of(rule: dict[str, Any]) -> list[str]:
    """The series that a rule looks at."""
    return sorted({*METRIC.findall(rule["expr"]), *RECORDED.findall(rule["expr"])} | ({"up"} & set(rule["expr"].split("{"))))


def test_every_query_and_rule_answers(prometheus: Prometheus, run: Run) -> None:
    """Dashboards show data, rules have what they look at, every metric that they name is exported, and the fraud is told."""
    queries = [(path.stem, *query) for path in DASHBOARDS for query in queries_of(path)]
    rules = [rule for group in yaml.safe_load(ALERTS.read_text())["groups"] for rule in group["rules"]]
    asked = [*queries, *((rule.get("alert", rule.get("record")), name, name) for rule in rules for name in inputs_of(rule))]
    asked += [("recorded", rule["record"], rule["record"]) for rule in rules if "record" in rule]

    def alarms() -> set[str]:
        return {alert["labels"]["alertname"] for alert in prometheus.get("alerts")["alerts"] if alert["state"] == "firing"}

    run.join_a_cheat()
    silent = [query for query in asked if not NO_GPU.search(query[-1])]
    deadline = time.monotonic() + SETTLE_S
    while (silent or "SwarmFraudProven" not in alarms()) and time.monotonic() < deadline:
        time.sleep(1)
        silent = [query for query in silent if not prometheus.query(query[-1])]
    assert silent == []
    assert "SwarmFraudProven" in alarms()
    critical = {rule["alert"] for rule in rules if rule.get("labels", {}).get("severity") == "critical"}
    assert alarms() & critical == set()

    loaded = [rule for group in prometheus.get("rules")["groups"] for rule in group["rules"]]
    assert len(loaded) == len(rules)
    assert [rule["name"] for rule in loaded if rule["health"] != "ok" or rule.get("lastError")] == []
    for rule in rules:
        prometheus.query(rule["expr"])

    text = "\n".join(exposition(target) for target in run.targets)
    exported = set(re.findall(r"^# TYPE (\S+)", text, re.MULTILINE))
    used = {name for _, _, asks in asked for name in METRIC.findall(asks)}
    assert {name for name in used if re.sub(r"_(bucket|sum|count)$", "", name) not in exported} == set()
