"""Two people train one model on data that neither shows the other, by the commands of docs/recipes/private.md."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from peer.dataset import FILE, Dataset, read
from swarm.local import LocalPeer, LocalSwarm
from tests.runs import agreed_roots, printed_by

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

ROUNDS = 3
LENGTH = 32


def write_texts(folder: Path, name: str) -> Path:
    """Texts that nobody else has."""
    folder.mkdir()
    for number in range(40):
        (folder / f"{number}.txt").write_text(
            f"{name} writes {number}: " + " ".join(str(number * factor) for factor in range(90))
        )
    return folder


def shortened(path: Path) -> None:
    values = yaml.safe_load(path.read_text())
    values["rounds"] |= {"total": ROUNDS, "min_peers": 2}
    values["strategy"] |= {"inner_steps": 2, "batch_samples": 2, "phases": []}
    path.write_text(yaml.safe_dump(values))


def rows_of(folder: Path, made: Dataset) -> list[bytes]:
    """The first row of each private shard, as it lies in the file."""
    return [(folder / tree.root).read_bytes()[: 2 * (LENGTH + 1)] for tree in made.data.private_trees]


def holds(peer: LocalPeer, row: bytes) -> bool:
    """Whether it lies anywhere in the peer's own folder; links to where its owner keeps it don't count."""
    files = (path for path in peer.directory.rglob("*") if path.is_file() and not path.is_symlink())
    return any(row in path.read_bytes() for path in files)


async def test_two_peers_train_on_what_neither_shows_the_other(tmp_path: Path) -> None:
    """The owner knows names and counts; the peers agree on every state, and no row of one is anywhere in the other's folder."""
    made = {}
    await printed_by(
        "data", "tokenizer", str(write_texts(tmp_path / "public", "somebody")), "--vocabulary", "300", "--to", str(tmp_path / "t")
    )
    for name in ("anna", "ben"):
        texts, to = write_texts(tmp_path / f"{name}-texts", name), tmp_path / name
        options = ("--tokenizer", str(tmp_path / "t"), "--held-out", "0.2", "--sequence-length", str(LENGTH), "--private")
        await printed_by("data", "build", str(texts), *options, "--to", str(to))
        made[name] = read(to)
        (tmp_path / f"{name}.yaml").write_bytes((to / FILE).read_bytes())
    descriptions = [str(tmp_path / f"{name}.yaml") for name in made]
    run, signed, key = tmp_path / "run.yaml", tmp_path / "run.signed", tmp_path / "owner.key"
    await printed_by("data", "combine", *descriptions, "--tokenizer", str(tmp_path / "t"), "--to", str(tmp_path / "data"))
    small = ("--hidden-size", "32", "--layers", "1", "--strategy", "diloco", "--codec", "int8", "--tokens", "100000")
    await printed_by("run", "init", str(run), "--data", str(tmp_path / "data"), *small)
    shortened(run)
    await printed_by("run", "sign", str(run), "--to", str(signed), "--owner-key", str(key))
    ticket = ("--ticket", (await printed_by("run", "invite", str(signed), "--uses", "2", "--owner-key", str(key))).strip())
    async with LocalSwarm(tmp_path / "swarm") as live:
        await live.start_coordinator(signed, key)
        files = ("--files", str(tmp_path / "data"))
        peers = {
            "anna": await live.join("anna", "--data", str(tmp_path / "anna"), *files, *ticket),
            "ben": await live.join("ben", "--data", str(tmp_path / "ben"), *ticket),
        }
        for peer in peers.values():
            assert await peer.wait(120) == 0, peer.log()[-3000:]
        assert set(agreed_roots([peer.history() for peer in peers.values()])) == set(range(ROUNDS + 1))
    for name, peer in peers.items():
        assert all(line["tokens"] for line in peer.history() if line["round"])
        (used,) = peer.events("private_shards")
        assert used["samples"] == made[name].data.train_samples
        rows = [row for holder, data in made.items() for row in rows_of(tmp_path / holder, data)]
        assert not any(holds(peer, row) for row in rows)
        assert {path.resolve().parent for path in (peer.directory / "files").iterdir() if path.is_symlink()} == {tmp_path / name}
