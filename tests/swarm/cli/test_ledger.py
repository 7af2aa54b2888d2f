"""`swarm ledger`, `credits` and `leaderboard` against a running coordinator and against files."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from coordinator.server import Coordinator
from swarm.cli.main import run
from swarm.clock import ManualClock
from swarm.config import CoordinatorSettings
from swarm.ledger import Checkpoint, origin_of, sign_checkpoint
from swarm.ledger_copy import LedgerCopy
from swarm.merkle import root_of
from swarm.rpc.client import CoordinatorClient
from tests.world import COORDINATOR, NOW_S, OTHER_ROOT, World, entry, identity, manifest

WORLD = World()
PEERS = [identity(number) for number in range(3)]
Check = Callable[[str, Path], None]


def with_coordinator(folder: Path, check: Check) -> None:
    """Run two rounds, keep the receipts in a folder, and call `check` (in a thread) with the link."""

    @asynccontextmanager
    async def filled() -> object:
        settings = CoordinatorSettings(listen="127.0.0.1:0", state_dir=folder / "state", db="memory://")
        async with Coordinator.serve([WORLD.signed_manifest], settings, ManualClock(NOW_S)) as coordinator:
            (folder / "receipts").mkdir()
            async with await CoordinatorClient.connect(coordinator.link) as client:
                for peer in PEERS:
                    await client.announce(WORLD.announcement(peer))
                for number in range(2):
                    proposal, reports = WORLD.round(PEERS, number)
                    receipt, *_ = [await client.submit_report(report, proposal) for report in reports]
                    (folder / "receipts" / f"{number}.receipt").write_bytes(receipt.SerializeToString())
            yield coordinator

    async def work() -> None:
        async with filled() as coordinator:
            await asyncio.to_thread(check, str(coordinator.link), folder)

    asyncio.run(work())


def test_against_a_coordinator(home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Verify, export, credits and leaderboard agree with each other, online and from the exported file."""

    def check(link: str, folder: Path) -> None:
        assert run(["ledger", "verify", link, "--receipts", str(folder / "receipts"), "--json"]) == 0
        online = json.loads(capsys.readouterr().out)
        assert (online["verified"], online["entries"], online["receipts"], online["confirmed_round"]) == (True, 14, 2, 1)
        monkeypatch.setenv("SWARM_LINK", link)
        assert run(["ledger", "export", "--to", "copy", "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["entries"] == 14
        assert run(["ledger", "verify", "--file", "copy", "--receipts", str(folder / "receipts"), "--json"]) == 0
        assert json.loads(capsys.readouterr().out) == online
        assert online["badges"] == {peer.peer_id: ["pioneer:10"] for peer in PEERS}
        assert run(["leaderboard", "--json"]) == 0
        board = json.loads(capsys.readouterr().out)
        assert sorted(board, key=lambda item: item["account"]) == sorted(online["balances"], key=lambda item: item["account"])
        assert run(["credits", "--peer", PEERS[0].peer_id, "--json"]) == 0
        assert json.loads(capsys.readouterr().out) in board
        assert run(["credits"]) == 21
        for command in (["ledger", "verify"], ["leaderboard"], ["credits", "--peer", PEERS[0].peer_id]):
            assert run(command) == 0
            assert "0.512" in capsys.readouterr().out
        assert run(["ledger", "verify", link[:-3] + "aaa"]) == 12
        assert run(["ledger", "verify", "--receipts", str(folder / "state")]) == 2
        assert run(["ledger", "verify", "nonsense"]) == 10

    with_coordinator(home, check)


def write_copy(path: Path, entries: list[bytes], note_over: list[bytes] | None = None, world: World = WORLD) -> None:
    """A file with a checkpoint that the coordinator's key signed."""
    over = entries if note_over is None else note_over
    note = sign_checkpoint(COORDINATOR, Checkpoint(origin_of(world.run_id), len(over), root_of(over)))
    LedgerCopy(world.run_id, COORDINATOR.peer_id, note, entries).write(path)


def test_held_out_losses_follow_from_the_ledger(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What a quorum agreed on is computed from its statements, offline; one that breaks a rule is a fault."""
    world = World(manifest(evaluation={"every": 1, "evaluators": 3}))
    entries = world.ledger(PEERS, 1)
    told = [entry(evaluated=world.evaluation(peer, 0, loss)) for peer, loss in zip(PEERS, (2.0, 2.0, 9.0), strict=True)]
    write_copy(home / "good", [*entries, *told], world=world)
    assert run(["ledger", "verify", "--file", "good"]) == 0
    assert "2.0000 after round 0, best 2.0000 after round 0" in capsys.readouterr().out
    assert run(["ledger", "verify", "--file", "good", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [(each["round"], each["loss"], each["evaluators"]) for each in found["evaluations"]] == [(0, 2.0, 2)]
    other = entry(evaluated=world.evaluation(PEERS[0], 0, state_root=OTHER_ROOT))
    write_copy(home / "bad", [*entries, other], world=world)
    assert run(["ledger", "verify", "--file", "bad"]) == 42
    assert f"entry {len(entries)}: wrong_state" in capsys.readouterr().err


def test_faults_are_named(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A ledger that was cut, rewritten or breaks a rule fails with code 42 and names the first fault."""
    good = WORLD.ledger(PEERS, 2)
    proposal, reports = WORLD.round(PEERS, 0, root=OTHER_ROOT)
    cases = {
        "promises 14 entries": (good[:-1], good),
        "not the signed one": ([*good[:5], good[6], good[5], *good[7:]], good),
        "entry 14: already_reported": ([*good, entry(reported=reports[1])], None),
        "entry 0: unknown_run": (good[1:], None),
        "doesn't open the run": ([], None),
    }
    assert proposal
    for fault, (entries, over) in cases.items():
        write_copy(home / "copy", entries, over)
        assert run(["ledger", "verify", "--file", "copy"]) == 42
        assert fault in capsys.readouterr().err


def test_lost_receipt_is_named(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A receipt that the ledger doesn't hold any more is named by its file."""

    def check(link: str, folder: Path) -> None:
        assert run(["ledger", "export", link, "--to", "copy"]) == 0

    with_coordinator(home, check)
    copy = LedgerCopy.read(home / "copy")
    shorter = copy.entries[:9]
    from swarm.identity import Identity

    key = Identity.load(home / "state" / "coordinator.key")
    note = sign_checkpoint(key, Checkpoint(origin_of(WORLD.run_id), 9, root_of(shorter)))
    LedgerCopy(WORLD.run_id, key.peer_id, note, shorter).write(home / "cut")
    assert run(["ledger", "verify", "--file", "cut", "--receipts", "receipts"]) == 42
    assert "1.receipt" in capsys.readouterr().err


def test_unreachable(home: Path, unused_tcp_port: int) -> None:
    """Without a coordinator the commands end with code 11, and without a link with code 10."""
    assert run(["leaderboard"]) == 10
    link = f"swarm://127.0.0.1:{unused_tcp_port}/{'a' * 52}#{'a' * 52}"
    assert run(["leaderboard", link]) == 11
