"""`swarm witness` beside a running coordinator, an honest one and one that rewrites its history."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from coordinator.server import Coordinator
from coordinator.witnesses import PINNED_S, Witnessed
from swarm.cli.main import run
from swarm.clock import ManualClock
from swarm.config import CoordinatorSettings
from swarm.errors import LedgerInvalid, Rejected, UsageError
from swarm.identity import Identity
from swarm.ledger import Checkpoint, origin_of, sign_checkpoint, verify_checkpoint
from swarm.rpc.client import CoordinatorClient
from swarm.witness import Witness, cosignature, cosigners
from tests.world import COORDINATOR, NOW_S, OTHER_ROOT, ROOT, World, identity

WORLD = World()
PEERS = [identity(number) for number in range(3)]
WITNESSES = [identity(50), identity(51)]
STRANGER = identity(52)
NOTE = sign_checkpoint(COORDINATOR, Checkpoint("swarm/x", 5, ROOT))


def settings(folder: Path) -> CoordinatorSettings:
    """Two witnesses are named."""
    keys = ", ".join(witness.peer_id for witness in WITNESSES)
    return CoordinatorSettings(listen="127.0.0.1:0", state_dir=folder, db="memory://", witnesses=keys)


@asynccontextmanager
async def coordinator(folder: Path, rounds: int, root: bytes = ROOT) -> AsyncIterator[Coordinator]:
    """A coordinator whose ledger has so many rounds; in the same folder it has the same key and another ledger."""
    clock = ManualClock(NOW_S)
    async with Coordinator.serve([WORLD.signed_manifest], settings(folder), clock) as running:
        async with await CoordinatorClient.connect(running.link) as client:
            await add_rounds(client, 0, rounds, root)
        yield running


async def add_rounds(client: CoordinatorClient, first: int, count: int, root: bytes = ROOT) -> None:
    """Everybody reports."""
    for peer in PEERS:
        await client.announce(WORLD.announcement(peer))
    for number in range(first, first + count):
        proposal, reports = WORLD.round(PEERS, number, root=root)
        for report in reports:
            await client.submit_report(report, proposal)


async def look(witness: Witness, running: Coordinator) -> tuple[Checkpoint, int]:
    """One look."""
    async with await CoordinatorClient.connect(running.link) as client:
        return await witness.look(client, NOW_S)


async def test_witnesses_cosign_the_same_checkpoint(tmp_path: Path) -> None:
    """Although the ledger has grown between their looks; a verifier gets it with both signatures."""
    one, other = (Witness(key, tmp_path / key.peer_id) for key in WITNESSES)
    async with coordinator(tmp_path / "state", 1) as running:
        first, count = await look(one, running)
        assert count == 1
        async with await CoordinatorClient.connect(running.link) as client:
            await add_rounds(client, 1, 1)
            second, count = await look(other, running)
            assert (second, count) == (first, 2)
            checkpoint, note, _ = await client.checkpoint(cosigned=True)
            assert checkpoint == first
            assert cosigners(note) == {witness.peer_id: int(NOW_S) for witness in WITNESSES}
            newest, plain, _ = await client.checkpoint()
            assert newest.size > first.size
            assert cosigners(plain) == {}


async def test_a_rewritten_ledger_is_not_cosigned(tmp_path: Path) -> None:
    """Both signed checkpoints are kept, and the memory isn't replaced."""
    witness = Witness(WITNESSES[0], tmp_path / "memory")
    async with coordinator(tmp_path / "state", 2) as running:
        await look(witness, running)
    remembered = witness.path.read_text()
    async with coordinator(tmp_path / "state", 3, OTHER_ROOT) as running:
        with pytest.raises(LedgerInvalid, match="don't extend"):
            await look(witness, running)
        async with await CoordinatorClient.connect(running.link) as client:
            assert cosigners((await client.checkpoint(cosigned=True))[1]) == {}
            signer = (await client.get_run()).coordinator
    kept = json.loads((tmp_path / "memory.conflict").read_text())
    sizes = [verify_checkpoint(kept[when], origin_of(WORLD.run_id), signer).size for when in ("before", "after")]
    assert sizes[0] < sizes[1]
    assert witness.path.read_text() == remembered
    async with coordinator(tmp_path / "state", 1) as running:
        with pytest.raises(LedgerInvalid, match="shrunk"):
            await look(witness, running)


def test_on_the_command_line(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A witness looks once, and a ledger is verified with its cosignature, online and from a file; a stranger's isn't taken."""
    WITNESSES[0].save(home / "witness.key")
    STRANGER.save(home / "stranger.key")

    def check(link: str) -> None:
        assert run(["witness", link, "--once", "--identity", "witness.key", "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["cosignatures"] == 1
        for witness, code in ((WITNESSES[0], 0), (WITNESSES[1], 42)):
            assert run(["ledger", "verify", link, "--witness", witness.peer_id, "--json"]) == code
        assert "hasn't cosigned" in capsys.readouterr().err
        assert run(["ledger", "export", link, "--to", "copy", "--cosigned"]) == 0
        assert run(["ledger", "verify", "--file", "copy", "--witness", WITNESSES[0].peer_id]) == 0
        assert run(["witness", link, "--once", "--identity", "stranger.key"]) != 0
        assert "hasn't named this key" in capsys.readouterr().err

    async def work() -> None:
        async with coordinator(home / "state", 1) as running:
            await asyncio.to_thread(check, str(running.link))

    asyncio.run(work())


async def test_a_witness_that_isnt_a_key(tmp_path: Path) -> None:
    """The coordinator says so at its start."""
    wrong = CoordinatorSettings(listen="127.0.0.1:0", state_dir=tmp_path, db="memory://", witnesses="somebody")
    with pytest.raises(UsageError, match="not a witness's key: 'somebody'"):
        async with Coordinator.serve([WORLD.signed_manifest], wrong, ManualClock(NOW_S)):
            pass


def cosigned(witness: Identity, note: str = NOTE, time_s: int = 7) -> str:
    text, _, _ = note.rpartition("\n\n")
    return cosignature(witness, text + "\n", time_s)


def test_a_cosignature_is_over_the_text_and_the_time() -> None:
    """A changed byte of either, or a line of another note, is not valid; other signers' lines are left alone."""
    line = cosigned(WITNESSES[0])
    assert cosigners(NOTE + line) == {WITNESSES[0].peer_id: 7}
    assert cosigners(NOTE) == {}
    other = sign_checkpoint(COORDINATOR, Checkpoint("swarm/x", 6, ROOT))
    with pytest.raises(LedgerInvalid, match="not valid"):
        cosigners(other + line)
    for place in range(len(line) - 120, len(line) - 8, 7):
        changed = line[:place] + ("A" if line[place] != "A" else "B") + line[place + 1 :]
        with pytest.raises(LedgerInvalid):
            cosigners(NOTE + changed)


def test_what_a_coordinator_takes() -> None:
    """Only lines of named witnesses, one each, for the checkpoint that is open; a new one is opened after a minute."""
    witnessed = Witnessed(frozenset(witness.peer_id for witness in WITNESSES))
    with pytest.raises(Rejected, match="stale"):
        witnessed.add(cosigned(WITNESSES[0]))
    assert witnessed.to_cosign(lambda: (NOTE, 5), 0, 0.0) == (NOTE, 5)
    assert witnessed.cosigned() is None
    line = cosigned(WITNESSES[0])
    assert [witnessed.add(line), witnessed.add(line)] == [1, 1]
    for bad in (line + line, line[:-1], "", "x" * 1000 + "\n", cosigned(STRANGER)):
        with pytest.raises(Rejected):
            witnessed.add(bad)
    newer = sign_checkpoint(COORDINATOR, Checkpoint("swarm/x", 9, ROOT))
    assert witnessed.to_cosign(lambda: (newer, 9), 0, PINNED_S) == (NOTE + line, 5)
    assert witnessed.to_cosign(lambda: (newer, 9), 0, PINNED_S + 1) == (newer, 9)
    assert witnessed.cosigned() == (NOTE + line, 5)
    with pytest.raises(Rejected, match="bad_signature"):
        witnessed.add(line)
    assert witnessed.add(cosigned(WITNESSES[1], newer)) == 1
    assert witnessed.cosigned() is not None
    assert witnessed.to_cosign(lambda: (newer, 12), 10, PINNED_S + 2) == (newer, 12)
