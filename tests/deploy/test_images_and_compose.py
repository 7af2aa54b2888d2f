"""Images and the compose file pass their linters and keep the promises made to volunteers."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from swarm import __version__

ROOT = Path(__file__).resolve().parents[2]
TOOLS = Path(sys.executable).parent
IMAGES = sorted((ROOT / "deploy" / "docker").glob("*.Dockerfile"))
COMPOSE = ROOT / "deploy" / "compose" / "compose.yaml"
POSTGRESQL = ROOT / "deploy" / "compose" / "postgresql.yaml"
YAML_FILES = sorted(
    path for pattern in ("*.yaml", "*.yml") for path in (ROOT / "deploy").rglob(pattern) if path.parent.name != "templates"
)
each_image = pytest.mark.parametrize("path", IMAGES, ids=lambda path: path.stem)


def services() -> dict[str, dict[str, Any]]:
    """The services of both compose files, anchors resolved."""
    found: dict[str, dict[str, Any]] = yaml.safe_load(COMPOSE.read_text())["services"]
    added: dict[str, dict[str, Any]] = yaml.safe_load(POSTGRESQL.read_text())["services"]
    return {**found, "postgresql": added["postgresql"]}


@each_image
def test_hadolint_accepts(path: Path) -> None:
    """The Dockerfile has none of the usual faults."""
    done = subprocess.run([TOOLS / "hadolint", path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@each_image
def test_image_is_small_and_unprivileged(path: Path) -> None:
    """Two stages, a numeric user that is not root, a health check, and a signal that lets a round finish."""
    lines = path.read_text().splitlines()
    assert sum(line.startswith("FROM ") for line in lines) == 2
    assert "USER 10001:10001" in lines
    assert "STOPSIGNAL SIGTERM" in lines
    assert any(line.startswith("HEALTHCHECK ") for line in lines)


def test_coordinator_image_has_no_torch() -> None:
    """The coordinator moves no tensors."""
    installs = [
        line for line in (ROOT / "deploy/docker/coordinator.Dockerfile").read_text().splitlines() if "pip install" in line
    ]
    assert installs == ["RUN pip install -c constraints.txt '.[coordinator,otel]'"]


def test_build_context_holds_only_sources() -> None:
    """Nothing of a developer's machine gets into an image: everything is left out but what is named."""
    lines = (ROOT / ".dockerignore").read_text().split()
    assert lines[0] == "*"
    assert {"!swarm/", "!peer/", "!coordinator/", "!pyproject.toml", "!constraints.txt"} <= set(lines)


def test_compose_fits_its_schema() -> None:
    """The compose files are such."""
    command = [str(TOOLS / "check-jsonschema"), "--builtin-schema", "vendor.compose-spec", str(COMPOSE), str(POSTGRESQL)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_compose_has_the_whole_swarm() -> None:
    """Coordinator, Prometheus and Grafana; PostgreSQL with a file of its own, and three peers with a profile."""
    peers = {"peer-1", "peer-2", "peer-3"}
    assert set(services()) == {"coordinator", "prometheus", "grafana", "postgresql"} | peers
    assert {name for name, service in services().items() if service.get("profiles")} == peers


def test_only_the_coordinator_reaches_the_database() -> None:
    """They have a network of their own, from which nothing leads outside; the password stands in no file of ours."""
    document = yaml.safe_load(POSTGRESQL.read_text())
    members = {name for name, service in document["services"].items() if "database" in service["networks"]}
    assert members == {"coordinator", "postgresql"}
    assert document["networks"]["database"]["internal"] is True
    assert document["services"]["postgresql"]["networks"] == ["database"]
    assert "ports" not in document["services"]["postgresql"]
    settings = document["services"]["coordinator"]["environment"]
    assert re.fullmatch(r"postgresql://swarm:\$\{POSTGRES_PASSWORD:\?[^}]+\}@postgresql/swarm", settings["SWARM_COORDINATOR_DB"])
    assert {name for name, service in services().items() if "database" in service.get("networks", [])} == {"postgresql"}


def test_versions_are_the_packages() -> None:
    """What compose builds is named after what it is made of."""
    ours = {service["image"] for service in services().values() if service["image"].startswith("swarm-")}
    assert {image.partition(":")[2] for image in ours} == {__version__}


def test_prometheus_looks_for_the_composed_peers() -> None:
    """By their names and their metrics port; those that don't run are no targets."""
    jobs = yaml.safe_load((ROOT / "deploy" / "prometheus" / "prometheus.yml").read_text())["scrape_configs"]
    ((found,),) = [job["dns_sd_configs"] for job in jobs if job["job_name"] == "peer"]
    peers = {name: service for name, service in services().items() if name.startswith("peer-")}
    assert set(found["names"]) == set(peers)
    assert {tuple(service["expose"]) for service in peers.values()} == {(str(found["port"]),)}


@pytest.mark.parametrize("name", services())
def test_services_are_hardened(name: str) -> None:
    """No service can write its own program, gain privileges, or take the machine's memory."""
    service = services()[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["mem_limit"]
    assert "latest" not in service["image"]


@pytest.mark.parametrize("name", services())
def test_published_ports_are_local(name: str) -> None:
    """Nothing is reachable from outside unless its operator says so."""
    assert all(port.startswith("127.0.0.1:") for port in services()[name].get("ports", []))


def test_every_named_volume_is_declared() -> None:
    """Compose refuses an undeclared volume only when it starts; this says so before."""
    declared = [name for path in (COMPOSE, POSTGRESQL) for name in yaml.safe_load(path.read_text())["volumes"]]
    used = {volume.split(":")[0] for service in services().values() for volume in service.get("volumes", [])}
    assert {name for name in used if not name.startswith(".")} == set(declared)


@pytest.mark.parametrize("path", YAML_FILES, ids=lambda path: str(path.relative_to(ROOT / "deploy")))
def test_yaml_parses(path: Path) -> None:
    """Every YAML file under deploy/ is YAML."""
    assert yaml.safe_load(path.read_text())
