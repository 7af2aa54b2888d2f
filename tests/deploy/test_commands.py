"""What units, images, compose and the chart start is a command that exists, with options that it has."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from typer.exceptions import TyperException

from deploy import charts
from swarm.cli.main import app

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"


def commands() -> Iterator[tuple[str, list[str]]]:
    """Where a command stands, and its arguments after `swarm`."""
    for path in sorted((DEPLOY / "systemd").rglob("*.service")):
        for line in re.findall(r"^ExecStart=\S*/swarm (.*)$", path.read_text(), re.MULTILINE):
            yield str(path.relative_to(DEPLOY)), shlex.split(line)
    for path in sorted((DEPLOY / "docker").glob("*.Dockerfile")):
        for line in re.findall(r"^CMD (\[.*\])$", path.read_text(), re.MULTILINE):
            yield path.name, json.loads(line)
        for line in re.findall(r'CMD (\["swarm", .*\])$', path.read_text(), re.MULTILINE):
            yield f"{path.name} health", json.loads(line)[1:]
    services: dict[str, Any] = yaml.safe_load((DEPLOY / "compose" / "compose.yaml").read_text())["services"]
    for name, service in services.items():
        if service["image"].startswith("swarm-"):
            yield f"compose {name}", service["command"]
    for case in charts.CASES:
        for document in charts.rendered(charts.values_of(case)):
            if document["kind"] in ("Deployment", "DaemonSet"):
                container = document["spec"]["template"]["spec"]["containers"][0]
                yield f"{case.name} {document['metadata']['name']}", container["args"]
                probe = container["livenessProbe"].get("exec")
                if probe is not None:
                    yield f"{case.name} {document['metadata']['name']} health", probe["command"][1:]


@pytest.mark.parametrize(("place", "arguments"), [pytest.param(*each, id=each[0]) for each in commands()])
def test_the_command_exists(place: str, arguments: list[str]) -> None:
    """It is parsed, and not run: an unknown command or option is a usage error."""
    command: Any = typer.main.get_command(app)
    while hasattr(command, "list_commands") and arguments and not arguments[0].startswith("-"):
        command, arguments = command.get_command(command.context_class(command), arguments[0]), arguments[1:]
        assert command is not None
    command.make_context("swarm", list(arguments))


def test_all_places_are_looked_at() -> None:
    """So that the test above can fail."""
    places = " ".join(place for place, _ in commands())
    for place in (
        "systemd/swarm-coordinator",
        "systemd/user/",
        "peer.Dockerfile health",
        "compose peer-3",
        "gpu-peers.yaml",
        "cpu-peers.yaml",
    ):
        assert place in places
    with pytest.raises(TyperException, match="--gpus"):
        test_the_command_exists("nowhere", ["join", "--gpus=1"])
