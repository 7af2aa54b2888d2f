"""The doctor's lines, each against the real thing it is about."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from peer import doctor
from peer.doctor import architecture_problem, clock, disk, memory, python_version, version
from peer.recipes import tiny_manifest
from swarm.errors import NetworkBroken, NotAdmitted
from swarm.identity import Identity
from swarm.local import LocalSwarm
from swarm.manifest import Manifest
from swarm.messages import JoinLink, seal
from swarm.rpc.client import CoordinatorClient
from swarm.rpc.v1.coordinator_pb2 import Announcement
from swarm.scenario import write_run
from tests.runs import LiveRun, Outcome, run_command
from tests.waiting import eventually
from tests.world import manifest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
NOWHERE = JoinLink("127.0.0.1", 1, bytes(32), bytes(32))


async def examine(link: JoinLink | str | None, folder: Path, *options: str) -> tuple[Outcome, dict[str, dict[str, Any]]]:
    """Run `swarm doctor --json`; its lines by name."""
    arguments = ["doctor", *([str(link)] if link else []), "--dir", str(folder), "--json", *options]
    done = await run_command(*arguments, environment={"SWARM_CONFIG": str(folder / "none.toml")}, timeout_s=250)
    return done, {line["name"]: line for line in map(json.loads, done.out.splitlines())}


async def test_a_machine_that_can_join(two_peer_run: LiveRun, tmp_path: Path) -> None:
    """Beside two training peers everything is well: admitted, connected, dialled back, measured, and a verdict."""
    done, lines = await examine(two_peer_run.link, tmp_path, "--cpu", "--listen", "127.0.0.1:0")
    assert done.code == 0, done.out + done.err
    wanted = ["python", "device", "key", "dns", "tcp", "coordinator", "version", "memory", "disk", "libp2p", "admission", "clock"]
    assert [name for name in lines if name in wanted] == wanted
    assert lines["peers"]["text"].startswith("2 of ")
    assert lines["inbound"]["text"] == "a peer has dialled back"
    assert "Mbit/s" in lines["upload"]["text"]
    assert "Mbit/s" in lines["download"]["text"]
    assert lines["verdict"]["text"].startswith("you can join; others can dial you; about ")
    assert "credits an hour" in lines["verdict"]["text"]


async def test_beside_a_peer_that_runs(two_peer_run: LiveRun) -> None:
    """Its key is in use: the look ends before it would disturb the peer, which goes on."""
    folder = two_peer_run.peer_folders[1]
    done, lines = await examine(two_peer_run.link, folder, "--cpu", "--listen", "127.0.0.1:0")
    assert done.code == 0, done.out + done.err
    assert list(lines)[-1] == "running"
    assert "swarm finish" in lines["running"]["hint"]
    before = (await two_peer_run.statuses())[1]

    async def further() -> bool:
        return bool((await two_peer_run.statuses())[1]["rounds"] > before["rounds"] + 1)

    await eventually(further, "rounds of the peer", 60)


@pytest.fixture
async def lone_coordinator(tmp_path: Path) -> AsyncIterator[Callable[..., Awaitable[str]]]:
    """Starts a coordinator without peers, for a run with such rules of admission; its link."""
    async with LocalSwarm(tmp_path / "lone") as swarm:

        async def start(**admission: Any) -> str:
            made = tiny_manifest(tmp_path / "files", 2).model_dump(mode="json")
            await swarm.start_coordinator(*write_run(tmp_path, Manifest.model_validate(made | {"admission": admission})))
            return swarm.link

        yield start


async def test_a_key_that_the_coordinator_refuses(lone_coordinator: Any, tmp_path: Path) -> None:
    """The run admits only those on its list."""
    link = await lone_coordinator(kind="allow_list", allow=[Identity.generate().peer_id])
    done, lines = await examine(link, tmp_path, "--cpu", "--listen", "127.0.0.1:0")
    assert (done.code, lines["admission"]["status"]) == (NotAdmitted.exit_code, "FAIL")
    assert lines["admission"]["hint"]


async def test_peers_that_can_not_be_reached(lone_coordinator: Any, tmp_path: Path) -> None:
    """Somebody has announced an address where nobody is."""
    link = JoinLink.parse(await lone_coordinator(kind="open"))
    told = Announcement(
        run_id=link.run_id, addresses=["/ip4/127.0.0.1/tcp/1"], issued_at=int(time.time()), client_version="0.1.0", reachable=True
    )
    async with await CoordinatorClient.connect(link) as client:
        await client.announce(seal(Identity.generate(), told))
    done, lines = await examine(link, tmp_path, "--cpu", "--listen", "127.0.0.1:0")
    assert (done.code, lines["peers"]["status"]) == (NetworkBroken.exit_code, "FAIL")
    assert "outgoing TCP" in lines["peers"]["hint"]


async def test_a_folder_that_can_not_be_made(two_peer_run: LiveRun, tmp_path: Path) -> None:
    """A file stands where the folder should be."""
    (tmp_path / "file").write_text("")
    done, lines = await examine(two_peer_run.link, tmp_path, "--cpu", "--dir", str(tmp_path / "file" / "folder"))
    assert (done.code, lines["key"]["status"]) == (2, "FAIL")


async def test_lines_for_people(tmp_path: Path) -> None:
    """Without a link only the machine is looked at; a line that fails names a hint, its exit code and the help page."""
    environment = {"SWARM_CONFIG": str(tmp_path / "none.toml")}
    done = await run_command("doctor", "--cpu", "--dir", str(tmp_path), environment=environment)
    assert done.code == 0, done.err
    assert "no join link" in done.out
    done = await run_command("doctor", str(NOWHERE), "--cpu", "--dir", str(tmp_path), environment=environment)
    assert done.code == 11
    assert "FAIL  tcp" in done.out
    assert "hint: " in done.out
    assert "exit code 11: docs/reference/exit-codes.md" in done.out


async def test_a_name_without_an_address(tmp_path: Path) -> None:
    """DNS that doesn't know the host."""
    done, lines = await examine(JoinLink("nowhere.invalid", 4300, bytes(32), bytes(32)), tmp_path, "--cpu")
    assert (done.code, lines["dns"]["status"]) == (11, "FAIL")


async def test_another_key_than_the_links(two_peer_run: LiveRun, tmp_path: Path) -> None:
    """The coordinator's fingerprint is compared with the link."""
    link = JoinLink.parse(two_peer_run.link)
    done, lines = await examine(JoinLink(link.host, link.port, link.run_id, bytes(32)), tmp_path, "--cpu")
    assert (done.code, lines["coordinator"]["status"]) == (12, "FAIL")


async def test_a_run_that_is_not_there(two_peer_run: LiveRun, tmp_path: Path) -> None:
    """The coordinator doesn't know the link's run."""
    link = JoinLink.parse(two_peer_run.link)
    done, lines = await examine(JoinLink(link.host, link.port, bytes(32), link.fingerprint), tmp_path, "--cpu")
    assert (done.code, lines["coordinator"]["status"]) == (13, "FAIL")


async def test_a_key_that_others_can_read(tmp_path: Path) -> None:
    """File modes are looked at."""
    path = tmp_path / "identity.key"
    Identity.generate().save(path)
    path.chmod(0o644)
    done, lines = await examine(None, tmp_path, "--cpu")
    assert (done.code, lines["key"]["status"]) == (21, "FAIL")


async def test_no_gpu(tmp_path: Path) -> None:
    """A GPU that isn't there."""
    done, lines = await examine(None, tmp_path, "--gpu", "63")
    assert (done.code, lines["device"]["status"]) == (30, "FAIL")
    assert lines["device"]["hint"]


async def test_a_port_that_is_taken(two_peer_run: LiveRun, tmp_path: Path) -> None:
    """libp2p can't listen where another program does."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done, lines = await examine(two_peer_run.link, tmp_path, "--cpu", "--listen", f"127.0.0.1:{port}")
    assert done.code in (33, 34), done.out
    assert lines["libp2p"]["status"] == "FAIL"


@pytest.mark.parametrize("found", [(3, 9), (3, 10), (3, 14)])
def test_python_that_is_too_old_or_too_new(found: tuple[int, int]) -> None:
    """Only versions that the libraries are built for."""
    assert python_version(found).exit_code == 2
    assert python_version((3, 12)).exit_code == 0


@pytest.mark.parametrize(
    ("capability", "built_for", "word"),
    [
        ((9, 0), ["sm_80", "sm_90"], ""),
        ((8, 9), ["sm_80", "sm_86", "sm_90"], ""),
        ((12, 0), ["sm_80", "sm_90"], "too new"),
        ((12, 0), ["sm_80", "compute_90"], ""),
        ((6, 1), ["sm_75", "sm_90a"], "too old"),
    ],
)
def test_cards_that_this_torch_cannot_use(capability: tuple[int, int], built_for: list[str], word: str) -> None:
    """A binary for the same major architecture or PTX for an older one is needed."""
    found = architecture_problem(capability, built_for)
    assert word in found
    assert bool(found) == bool(word)


def test_memory_disk_version_and_clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Too little of either, an old version and a wrong clock are told with what is there."""
    run = manifest()
    assert memory(run, 10).exit_code == 31
    assert memory(run, 1 << 40).exit_code == 0
    assert disk(run, tmp_path / "not" / "yet").exit_code == 0
    evaluated = manifest(evaluation={}, model={**run.model.model_dump(mode="json"), "parameters": 10**9})
    plain = manifest(model=evaluated.model.model_dump(mode="json"))
    assert [disk(each, tmp_path).text.split()[0] for each in (plain, evaluated)] == ["24.3", "36.3"]
    monkeypatch.setattr(doctor, "RESERVE_BYTES", 1 << 60)
    assert disk(run, tmp_path).exit_code == 32
    assert version(manifest(min_client_version="99.0.0")).exit_code == 15
    assert clock(3600.0).hint
    assert not clock(1.0).hint
