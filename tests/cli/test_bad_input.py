"""What a user can do wrong: one line that says what, one that says what to do, a documented exit code, and nothing lost."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from swarm.identity import Identity
from swarm.local import LocalSwarm
from swarm.messages import JoinLink
from swarm.rpc.v1.coordinator_pb2 import GetRunResponse
from tests.runs import LiveRun, Outcome, Run, run_command
from tests.world import manifest, sign_manifest

pytestmark = pytest.mark.timeout(300)

NOWHERE = "127.0.0.1:1"


@pytest.fixture(autouse=True)
def no_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty home and none of the user's own settings."""
    for name in [name for name in os.environ if name.startswith(("SWARM_", "XDG_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


@pytest.fixture
def taken() -> Iterator[str]:
    """An address of this machine where somebody else listens."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield f"127.0.0.1:{listener.getsockname()[1]}"


@pytest.fixture
def link(two_peer_run: LiveRun) -> JoinLink:
    """The link of a run that is going on."""
    return JoinLink.parse(two_peer_run.link)


def expect(outcome: Outcome, code: int, *words: str, hint: str = "") -> None:
    """One error line with these words, a hint, the code, and no traceback."""
    lines = outcome.err.splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    hints = [line for line in lines if line.startswith("hint: ")]
    assert outcome.code == code, outcome
    assert "Traceback" not in outcome.err
    assert "Traceback" not in outcome.out
    assert len(errors) == 1, outcome
    assert len(hints) == 1, outcome
    for word in words:
        assert word in errors[0]
    assert hint in hints[0]


def join(link: JoinLink | str, folder: Path, *options: str) -> tuple[str, ...]:
    """The arguments of a peer on the processor in a folder."""
    return ("join", str(link), "--cpu", "--dir", str(folder), "--listen", "127.0.0.1:0", *options)


def changed(link: JoinLink, **changes: object) -> JoinLink:
    """A link that differs in one place."""
    return JoinLink(**(vars(link) | changes))  # type: ignore[arg-type]


async def test_a_wrong_link() -> None:
    """A link that is none, cut short or missing ends with 10 and says what one looks like, whichever command gets it."""
    for text in ("http://example.org", "swarm://host:4300/abc#def", f"swarm://{NOWHERE}/{'a' * 52}#{'a' * 51}"):
        expect(await run_command("join", "--cpu", text), 10, "link", hint="52 characters")
    for command in (("credits",), ("leaderboard",), ("ledger", "verify")):
        expect(await run_command(*command, "swarm://nowhere"), 10, "link", hint="52 characters")
    expect(await run_command("join", "--cpu"), 10, "no join link", hint="SWARM_LINK")


async def test_a_link_in_a_file(tmp_path: Path) -> None:
    """A file that holds something else than a link is a wrong link, too."""
    (tmp_path / "link").write_text("nothing\n")
    expect(await run_command("join", "--cpu", "--dir", str(tmp_path / "p"), "--link-file", str(tmp_path / "link")), 10, "link")


async def test_an_unreachable_coordinator(tmp_path: Path) -> None:
    """Where nothing answers, the address is named, with 11, and the key that was made stays."""
    link = JoinLink("127.0.0.1", 1, b"\x01" * 32, b"\x02" * 32)
    expect(await run_command(*join(link, tmp_path)), 11, NOWHERE, hint="firewall")
    key = (tmp_path / "identity.key").read_bytes()
    expect(await run_command(*join(link, tmp_path)), 11, NOWHERE)
    assert (tmp_path / "identity.key").read_bytes() == key
    expect(await run_command("leaderboard", str(link)), 11, NOWHERE)
    expect(await run_command("ledger", "verify", str(link)), 11, NOWHERE)


async def test_something_else_answers(tmp_path: Path, link: JoinLink) -> None:
    """A server with another key than the link's is not talked to: 12."""
    wrong = changed(link, fingerprint=b"\x03" * 32)
    expect(await run_command(*join(wrong, tmp_path)), 12, link.address, hint="owner")
    expect(await run_command("leaderboard", str(wrong)), 12, link.address)


async def test_an_unknown_run(tmp_path: Path, link: JoinLink) -> None:
    """A run that the coordinator doesn't serve ends with 13."""
    wrong = changed(link, run_id=b"\x03" * 32)
    expect(await run_command(*join(wrong, tmp_path)), 13, "run", hint="owner")
    expect(await run_command("leaderboard", str(wrong)), 13, "run")


async def test_a_manifest_with_several_errors(tmp_path: Path) -> None:
    """Every problem is listed at once, with its place, by `validate` and by the coordinator: 20."""
    values = manifest().model_dump(mode="json")
    values["name"], values["rounds"]["min_peers"], values["surprise"] = "Not A Name!", 0, 1
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(values))
    for command in (("run", "validate", str(path)), ("coordinator", "--run", str(path))):
        expect(await run_command(*command), 20, "3 problems", "name:", "rounds.min_peers:", "surprise:", hint="manifest")
    expect(await run_command("run", "validate", str(tmp_path / "none.yaml")), 20, "can't be read")


async def test_no_gpu(tmp_path: Path) -> None:
    """Without a GPU it says so and offers --cpu: 30."""
    link = JoinLink("127.0.0.1", 1, b"\x01" * 32, b"\x02" * 32)
    arguments = ("join", str(link), "--dir", str(tmp_path))
    for options in (("--gpu", "0"), ("--gpu", "auto"), ()):
        outcome = await run_command(*arguments, *options, environment={"CUDA_VISIBLE_DEVICES": ""})
        expect(outcome, 30, "GPU", hint="--cpu")
    expect(await run_command(*arguments, "--gpu", "first"), 2, "first")


async def test_busy_ports(tmp_path: Path, small_run: Run, link: JoinLink, taken: str) -> None:
    """An address that is taken ends with 33 and names the option, for the coordinator and for a peer; nothing stays behind."""
    serve = (
        "coordinator",
        "--run",
        str(small_run.path),
        "--owner-key",
        str(small_run.owner_key),
        "--state-dir",
        str(tmp_path / "c"),
    )
    expect(await run_command(*serve, "--listen", taken), 33, taken.rpartition(":")[2])
    expect(await run_command(*serve, "--listen", "127.0.0.1:0", "--metrics", taken), 33, taken.rpartition(":")[2])
    peer = ("join", str(link), "--cpu", "--dir", str(tmp_path / "p"))
    expect(await run_command(*peer, "--listen", taken), 33, "taken", hint="--listen")
    expect(await run_command(*peer, "--listen", "127.0.0.1:0", "--metrics", taken), 33, taken, hint="--metrics")
    assert not (tmp_path / "p" / "control.sock").exists()


@pytest.mark.parametrize("option", ["--listen", "--metrics", "--announce"])
async def test_addresses_that_are_none(tmp_path: Path, option: str) -> None:
    """What isn't host:port is a wrong argument: 2."""
    link = JoinLink("127.0.0.1", 1, b"\x01" * 32, b"\x02" * 32)
    for address in ("nonsense", "127.0.0.1:port", "127.0.0.1:99999"):
        expect(await run_command("join", str(link), "--cpu", "--dir", str(tmp_path), option, address), 2, address, hint=":4400")


async def test_a_key_that_others_can_read(tmp_path: Path) -> None:
    """A key file that is readable by others, broken or no file is not used: 21, with the command that helps."""
    link = JoinLink("127.0.0.1", 1, b"\x01" * 32, b"\x02" * 32)
    key = tmp_path / "identity.key"
    Identity.generate().save(key)
    key.chmod(0o644)
    expect(await run_command(*join(link, tmp_path)), 21, "readable by others", hint=f"chmod 600 {key}")
    content = key.read_bytes()
    key.chmod(0o600)
    key.write_bytes(content[:-1])
    expect(await run_command(*join(link, tmp_path)), 21, "not an Ed25519 key", hint="restore")
    (tmp_path / "folder.key").mkdir()
    expect(await run_command(*join(link, tmp_path, "--identity", str(tmp_path / "folder.key"))), 21, "folder.key")


async def test_a_corrupted_database(tmp_path: Path, small_run: Run) -> None:
    """A database that can't be read ends with 41, and the file is left for rescue."""
    database = tmp_path / "coordinator.db"
    database.write_bytes(b"not a database, " * 1000)
    serve = ("coordinator", "--run", str(small_run.path), "--owner-key", str(small_run.owner_key), "--listen", "127.0.0.1:0")
    expect(await run_command(*serve, "--state-dir", str(tmp_path)), 41, "database")
    assert database.read_bytes() == b"not a database, " * 1000


async def test_corrupted_checkpoints(tmp_path: Path, two_peer_run: LiveRun) -> None:
    """`export` names each checkpoint that it had to skip: 40; a folder where nothing ever ran is a missing link: 10."""
    folder = tmp_path / "peer"
    shutil.copytree(two_peer_run.peer_folders[0] / "checkpoints", folder / "checkpoints")
    shutil.copy(two_peer_run.peer_folders[0] / "run.pb", folder)
    damaged = [path for path in (folder / "checkpoints").rglob("*") if path.is_file()]
    assert damaged
    for path in damaged:
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2])
    outcome = await run_command("export", "--to", str(tmp_path / "model"), "--dir", str(folder))
    expect(outcome, 40, "nothing to export")
    assert not (tmp_path / "model").exists()
    expect(await run_command("export", "--to", str(tmp_path / "model"), "--dir", str(tmp_path / "empty")), 10, "ever run")
    (folder / "run.pb").write_bytes(b"\xff" * 10)
    expect(await run_command("export", "--to", str(tmp_path / "model"), "--dir", str(folder)), 1, "damaged")


async def test_too_little_memory(tmp_path: Path) -> None:
    """A model that can't fit is refused before anything is loaded: 31."""
    values = manifest().model_dump(mode="json")
    values["model"]["parameters"] = 10**11
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    async with LocalSwarm(tmp_path / "swarm") as swarm:
        await swarm.start_coordinator(tmp_path / "run.yaml", tmp_path / "owner.key")
        expect(await run_command(*join(swarm.link, tmp_path / "p")), 31, "GB of memory", hint="smaller model")


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MB."""
    place = tmp_path / "tiny"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(place)], capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip(f"mounting needs root: {mounted.stderr.decode().strip()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", str(place)], check=True)


def fill(path: Path) -> None:
    """Take all the space that is left."""
    with contextlib.suppress(OSError), path.open("wb", buffering=0) as file:
        while file.write(bytes(4096)):
            pass


async def test_too_little_disk(tmp_path: Path, tiny_disk: Path, link: JoinLink) -> None:
    """Too little space for the run is said before anything is fetched, a full disk at once: 32."""
    expect(await run_command(*join(link, tiny_disk / "p")), 32, "GB free", hint="--dir")
    fill(tiny_disk / "filler")
    expect(await run_command(*join(link, tiny_disk / "p")), 32, "No space left", hint="--dir")


async def test_folders_that_can_not_be_used(tmp_path: Path) -> None:
    """A file where a folder should be, and a folder for files that isn't there, are wrong arguments: 2."""
    link = JoinLink("127.0.0.1", 1, b"\x01" * 32, b"\x02" * 32)
    (tmp_path / "file").touch()
    expect(await run_command(*join(link, tmp_path / "file")), 2, "file", hint="--dir")
    expect(await run_command(*join(link, tmp_path / "p", "--files", str(tmp_path / "none"))), 2, "none", hint="data files")


async def test_a_second_daemon(two_peer_run: LiveRun) -> None:
    """A folder that a peer uses is refused to another one, which goes on undisturbed: 51."""
    folder = two_peer_run.peer_folders[0]
    expect(await run_command(*join(two_peer_run.link, folder)), 51, str(folder), hint="swarm status")
    assert (await run_command("status", "--dir", str(folder), "--json")).code == 0


@pytest.mark.parametrize("verb", ["status", "pause", "resume", "finish", "stop"])
async def test_no_daemon(tmp_path: Path, verb: str) -> None:
    """Without a daemon every verb ends with 50 and says how to start one, even beside a dead one's socket."""
    expect(await run_command(verb, "--dir", str(tmp_path)), 50, str(tmp_path), hint="swarm join")
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(tmp_path / "control.sock"))
    expect(await run_command(verb, "--dir", str(tmp_path)), 50, str(tmp_path), hint="swarm join")


async def test_a_cached_run_that_was_changed(tmp_path: Path) -> None:
    """While the coordinator is away, a damaged copy of the run's manifest is named, not used."""
    link = JoinLink("127.0.0.1", 1, bytes.fromhex(manifest().run_id), b"\x02" * 32)
    forged = GetRunResponse(run_id=link.run_id, manifest=sign_manifest(manifest(name="other")), coordinator="x")
    (tmp_path / "run.pb").write_bytes(forged.SerializeToString())
    outcome = await run_command(*join(link, tmp_path))
    expect(outcome, 42, "run.pb", hint="delete it")
