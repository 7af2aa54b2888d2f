"""Recipes that no other test trains end to end: their examples, shortened, with two real peers."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from swarm.identity import Identity
from swarm.local import LocalSwarm
from tests.maker import MAKER
from tests.runs import agreed_roots

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

ROUNDS = 2


@pytest.mark.parametrize("name", ["finetuning", "qlora", "experts"])
async def test_two_peers_train_an_example(tmp_path: Path, name: str) -> None:
    """One brings the files, the other fetches them; after every round both have the same state."""
    folder = tmp_path / name
    MAKER.make(name, folder)
    path = folder / "run.yaml"
    values = yaml.safe_load(path.read_text())
    values["rounds"] |= {"total": ROUNDS, "min_peers": 2}
    values["strategy"] |= {"inner_steps": 2}
    path.write_text(yaml.safe_dump(values))
    Identity.generate().save(folder / "owner.key")
    async with LocalSwarm(tmp_path / "swarm") as live:
        await live.start_coordinator(path, folder / "owner.key")
        peers = [await live.join("bringing", "--files", str(folder / "data")), await live.join("fetching")]
        for peer in peers:
            assert await peer.wait(150) == 0, peer.log()[-3000:]
        assert set(agreed_roots([peer.history() for peer in peers])) == set(range(ROUNDS + 1))
        assert all(line["tokens"] for peer in peers for line in peer.history() if line["round"])
