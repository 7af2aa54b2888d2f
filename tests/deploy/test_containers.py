"""The images, really built and run: `make images`, on a machine with podman, runc and root.

Where the base image can't be pulled it is made of Debian's own packages by debootstrap. `SWARM_BUILD_OPTIONS` is added to
`podman build`, for example to mount a folder of wheels.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from swarm.local import LocalSwarm
from tests.runs import REPOSITORY, make_run
from tests.waiting import eventually

BASE = "docker.io/library/python:3.11-slim-bookworm"
PACKAGES = "python3,python3-venv,python3-pip,ca-certificates"
IMAGES = ("peer", "coordinator")
LIMITS = '[containers]\ndefault_ulimits = ["nofile=1024:20000", "nproc=10000:10000"]\n'
MISSING = [name for name in ("podman", "runc") if shutil.which(name) is None]

pytestmark = [
    pytest.mark.container,
    pytest.mark.timeout(3000),
    pytest.mark.skipif(bool(MISSING) or os.geteuid() != 0, reason=f"needs root, podman and runc; missing: {MISSING or 'root'}"),
]


def podman(*arguments: str, check: bool = True, timeout_s: float = 1800.0) -> str:
    """What a podman command says."""
    command = ["podman", "--runtime", "runc", *arguments]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=timeout_s, check=False)
    assert done.returncode == 0 or not check, f"{shlex.join(command)}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout if done.returncode == 0 else ""


@pytest.fixture(scope="module")
def limits(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """podman asks for no more than this machine may give."""
    path = tmp_path_factory.mktemp("podman") / "containers.conf"
    path.write_text(LIMITS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CONTAINERS_CONF", str(path))
        yield


@pytest.fixture(scope="module")
def images(limits: None, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Both images by name."""
    if not podman("images", "--quiet", BASE) and not podman("pull", "--quiet", BASE, check=False):
        _make_base(tmp_path_factory.mktemp("base"))
    options = shlex.split(os.environ.get("SWARM_BUILD_OPTIONS", ""))
    tags = {name: f"localhost/swarm-{name}:test" for name in IMAGES}
    for name, tag in tags.items():
        file = f"deploy/docker/{name}.Dockerfile"
        podman("build", "--isolation=chroot", "--network=host", "--format=docker", *options, "-f", file, "-t", tag, ".")
    return tags


def _make_base(folder: Path) -> None:
    if shutil.which("debootstrap") is None:
        pytest.skip(f"{BASE} can't be pulled, and there is no debootstrap to make it")
    root = folder / "root"
    command = ["debootstrap", "--variant=minbase", f"--include={PACKAGES}", "bookworm", str(root)]
    subprocess.run(command, check=True, capture_output=True)
    (root / "usr/bin/python").symlink_to("python3")
    archive = folder / "base.tar"
    with tarfile.open(archive, "w") as made:
        made.add(root, arcname=".")
    podman("import", "--quiet", str(archive), BASE)


@pytest.mark.parametrize("name", IMAGES)
def test_an_image_keeps_its_promises(images: dict[str, str], name: str, record_property: Any) -> None:
    """An unprivileged user by number, a health check, SIGTERM to stop; its size goes into the report."""
    found = json.loads(podman("image", "inspect", images[name]))[0]
    record_property("size_MB", round(found["Size"] / 1e6))
    assert found["Config"]["User"] == "10001:10001"
    assert found["Config"]["StopSignal"] == "SIGTERM"
    assert found["Healthcheck"]["Test"]
    assert (found["Size"] < 500e6) or name == "peer"
    assert "swarm" in podman("run", "--rm", "--read-only", "--network=none", images[name], "--version")


async def test_a_peer_in_a_container_trains_with_one_outside(images: dict[str, str], tmp_path: Path) -> None:
    """On a read-only file system, without privileges: it joins, is well, contributes, and SIGTERM finishes its round."""
    name = f"swarm-test-{uuid4().hex[:8]}"
    run = make_run(tmp_path / "run")
    confined = ("--read-only", "--tmpfs=/tmp", "--cap-drop=ALL", "--security-opt=no-new-privileges", "--network=host")
    async with LocalSwarm(tmp_path / "swarm") as swarm:
        await swarm.start_coordinator(run.path, run.owner_key)
        outside = await swarm.join("outside", "--files", str(run.files))
        settings = {"SWARM_LINK": swarm.link, "SWARM_LISTEN": "127.0.0.1:0", "SWARM_THREADS": "1"}
        given = [f"--env={key}={value}" for key, value in settings.items()]
        try:
            podman(
                "run", "--detach", f"--name={name}", f"--volume={name}:/data", *confined, *given, images["peer"], "join", "--cpu"
            )
            await eventually(lambda: any(line["roster_size"] == 2 for line in outside.history()), "a round together", 180)
            await eventually(lambda: _status(name).get("rounds", 0) >= 2, "its contributions", 120)
            peer_id = _status(name)["peer_id"]
            podman("healthcheck", "run", name)
            podman("stop", "--time=120", name)
            ended = json.loads(podman("inspect", name))[0]["State"]
            assert ended["ExitCode"] == 0, podman("logs", name, check=False)[-3000:]
            podman("start", name)
            await eventually(lambda: _status(name).get("peer_id") == peer_id, "the same key after a restart", 60)
        finally:
            podman("rm", "--force", "--time=10", name, check=False)
            podman("volume", "rm", "--force", name, check=False)


def _status(name: str) -> dict[str, Any]:
    answer = podman("exec", name, "swarm", "status", "--json", check=False)
    return dict(json.loads(answer)) if answer else {}
