"""Reports on their way to the coordinator: nothing is lost, nothing is sent for ever."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from peer.folders import write_atomically
from peer.reports import Outbox, Reporter
from peer.rounds.engine import RoundReport
from peer.rounds.values import BallotNumber, ProposalFacts
from swarm.errors import CoordinatorUnreachable, LedgerInvalid, Rejected, SwarmError
from swarm.ledger import Checkpoint
from swarm.merkle import MerkleTree, leaf_hash
from swarm.messages import parse, seal
from swarm.protocol import MAX_REPORTS
from swarm.rpc.v1.coordinator_pb2 import SubmitReportRequest
from swarm.rpc.v1.ledger_pb2 import Receipt, Report
from swarm.rpc.v1.signed_pb2 import Signed
from tests.waiting import eventually
from tests.world import COORDINATOR, World, identity

WORLD = World()
PEER = identity(1)


@dataclass
class FakeCoordinator:
    """Answers reports with receipts, or with whatever `answer` raises."""

    answer: Callable[[int], None] = lambda number: None
    tree: MerkleTree = field(default_factory=MerkleTree)
    rounds: list[int] = field(default_factory=list)
    calls: int = 0
    at_once: int = 0
    most_at_once: int = 0

    async def submit_reports(self, requests: Sequence[SubmitReportRequest]) -> list[Signed | Rejected | LedgerInvalid]:
        self.calls += 1
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        await asyncio.sleep(0)
        self.at_once -= 1
        outcomes: list[Signed | Rejected | LedgerInvalid] = []
        for request in requests:
            try:
                outcomes.append(self._receipt(request.report))
            except (Rejected, LedgerInvalid) as error:
                outcomes.append(error)
            except CoordinatorUnreachable:
                if not outcomes:
                    raise
                break
        return outcomes

    def _receipt(self, report: Signed) -> Signed:
        number = parse(Report, report.payload).round
        self.answer(number)
        self.rounds.append(number)
        index = self.tree.append(leaf_hash(report.payload))
        size, root = len(self.tree), self.tree.root()
        receipt = Receipt(run_id=WORLD.run_id, round=number, ledger_index=index, ledger_size=size, ledger_root=root)
        return seal(COORDINATOR, receipt)

    async def checkpoint(self, old_size: int) -> tuple[Checkpoint, str, list[bytes]]:
        if old_size > len(self.tree):
            raise Rejected("malformed", "the ledger is shorter")
        proof = self.tree.consistency_proof(old_size)
        return Checkpoint("swarm/test", len(self.tree), self.tree.root()), "", proof


def finished(number: int) -> RoundReport:
    """A round in which our contribution counted."""
    commit = WORLD.commit(PEER, number)
    proposal = WORLD.proposal(PEER, number, [commit])
    facts = ProposalFacts(b"h" * 32, BallotNumber(0, 0), PEER.peer_id, b"b" * 32, (), (), False, proposal)
    result = WORLD.result(PEER, number, proposal)
    return RoundReport(number, facts, commit, result, b"r" * 32, 4, 256, 256, 2.0, 1.0, 0.1, 1)


def reporter(directory: Path, coordinator: FakeCoordinator | None) -> tuple[Reporter, list[str]]:
    """A reporter to a coordinator, or to one that is away, and the outcomes that it tells."""
    outcomes: list[str] = []

    async def connected() -> FakeCoordinator:
        if coordinator is None:
            raise CoordinatorUnreachable("away")
        return coordinator

    return Reporter(WORLD.run_id, Outbox(directory), connected, outcomes.append), outcomes  # type: ignore[arg-type]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


async def test_a_report_becomes_a_receipt(tmp_path: Path) -> None:
    """Posted reports leave the outbox, in the order of their rounds, and their receipts stay."""
    coordinator = FakeCoordinator()
    posting, outcomes = reporter(tmp_path, coordinator)
    for number in (12, 3, 7):
        await posting.add(PEER, finished(number))
    assert await posting.post_all()
    assert coordinator.rounds == [3, 7, 12]
    assert names(tmp_path / "outbox") == []
    assert names(tmp_path / "receipts") == [f"{number:012d}.receipt" for number in (3, 7, 12)]
    assert outcomes == ["accepted"] * 3


async def test_many_reports_go_in_few_calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After an outage reports go together, as many as a call takes by number and bytes; where it stops, the rest waits."""
    coordinator = FakeCoordinator()
    posting, outcomes = reporter(tmp_path, coordinator)
    for number in range(MAX_REPORTS + 3):
        await posting.add(PEER, finished(number))
    assert await posting.post_all()
    assert (coordinator.rounds, coordinator.calls) == (list(range(MAX_REPORTS + 3)), 2)
    monkeypatch.setattr("peer.reports.CALL_BYTES", 1)
    for number in (100, 101):
        await posting.add(PEER, finished(number))
    assert await posting.post_all()
    assert coordinator.calls == 4
    monkeypatch.undo()

    def busy(number: int) -> None:
        if number == 202:
            raise CoordinatorUnreachable("busy")

    coordinator.answer = busy
    for number in (200, 201, 202, 203):
        await posting.add(PEER, finished(number))
    assert not await posting.post_all()
    assert [int(path.stem) for path in posting.outbox.waiting()] == [202, 203]
    coordinator.answer = lambda number: None
    assert await posting.post_all()
    assert outcomes == ["accepted"] * (MAX_REPORTS + 9)


async def test_reports_wait_while_the_coordinator_is_away(tmp_path: Path) -> None:
    """Without a connection, or with one that breaks, reports stay on disk, across a restart too, and are sent later."""
    posting, _ = reporter(tmp_path, None)
    await posting.add(PEER, finished(1))
    assert not await posting.post_all()

    def away(number: int) -> None:
        raise CoordinatorUnreachable("gone")

    posting, outcomes = reporter(tmp_path, FakeCoordinator(away))
    assert not await posting.post_all()
    assert (len(posting.outbox.waiting()), outcomes) == (1, [])
    posting, _ = reporter(tmp_path, FakeCoordinator())
    assert await posting.post_all()
    assert names(tmp_path / "receipts") == ["000000000001.receipt"]


async def test_a_refused_report_is_put_aside_with_its_reason(tmp_path: Path) -> None:
    """What the coordinator will never take doesn't hold up the rest, and isn't thrown away."""

    def refuse(number: int) -> None:
        if number == 1:
            raise Rejected("not_in_proposal", "")
        if number == 2:
            raise LedgerInvalid("the receipt is of another report")

    posting, outcomes = reporter(tmp_path, FakeCoordinator(refuse))
    for number in (1, 2, 3):
        await posting.add(PEER, finished(number))
    (tmp_path / "outbox" / "000000000000.pb").write_bytes(b"\xff\xff")
    assert await posting.post_all()
    assert outcomes == ["refused"] * 3 + ["accepted"]
    assert (tmp_path / "refused" / "000000000001.reason").read_text() == "not_in_proposal"
    assert names(tmp_path / "refused") == [f"{number:012d}.{end}" for number in (0, 1, 2) for end in ("pb", "reason")]


async def test_other_errors_leave_the_report_where_it_is(tmp_path: Path) -> None:
    """An error that says nothing about the report is tried again later."""

    def fail(number: int) -> None:
        raise SwarmError("unexpected")

    posting, outcomes = reporter(tmp_path, FakeCoordinator(fail))
    await posting.add(PEER, finished(1))
    assert not await posting.post_all()
    assert (len(posting.outbox.waiting()), outcomes) == (1, [])


async def test_leaving_and_the_background_task_do_not_post_twice(tmp_path: Path) -> None:
    """Two callers that post at the same time take turns, and each report is sent once."""
    coordinator = FakeCoordinator()
    posting, outcomes = reporter(tmp_path, coordinator)
    for number in range(5):
        await posting.add(PEER, finished(number))
    assert await asyncio.gather(posting.post_all(), posting.post_all(), posting.post_all()) == [True] * 3
    assert coordinator.rounds == [0, 1, 2, 3, 4]
    assert coordinator.most_at_once == 1
    assert outcomes == ["accepted"] * 5


async def test_the_background_task_posts_what_is_added(tmp_path: Path) -> None:
    """A report that is added wakes the task, and a round without a contribution of ours is no report."""
    coordinator = FakeCoordinator()
    posting, _ = reporter(tmp_path, coordinator)
    running = asyncio.create_task(posting.run())
    report = finished(4)
    await posting.add(PEER, RoundReport(**(vars(report) | {"commit": None})))
    await posting.add(PEER, report)
    await eventually(lambda: coordinator.rounds == [4], "posting", 10)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    assert names(tmp_path / "receipts") == ["000000000004.receipt"]


async def test_a_restored_coordinator_gets_lost_reports_again(tmp_path: Path) -> None:
    """A ledger that doesn't extend the history of our newest receipt gets every report again, even if it is longer by now."""
    first = FakeCoordinator()
    posting, _ = reporter(tmp_path, first)
    for number in (1, 2, 3, 4):
        await posting.add(PEER, finished(number))
    assert await posting.post_all()
    restored = FakeCoordinator()
    for number in range(9):
        restored.tree.append(leaf_hash(b"of others, %d" % number))
    posting, _ = reporter(tmp_path, restored)
    assert await posting.post_all()
    assert restored.rounds == [1, 2, 3, 4]


async def test_a_new_receipt_doesnt_hide_forgotten_ones(tmp_path: Path) -> None:
    """Where a restored coordinator has given a receipt before anybody looked, what it forgot before is still reported again."""
    first, restored = FakeCoordinator(), FakeCoordinator()
    for number in range(3):
        first.tree.append(leaf_hash(b"before the backup, %d" % number))
        restored.tree.append(leaf_hash(b"before the backup, %d" % number))
    posting, _ = reporter(tmp_path, first)
    for number in (1, 2):
        await posting.add(PEER, finished(number))
    assert await posting.post_all()
    for number in range(9):
        restored.tree.append(leaf_hash(b"of others, %d" % number))
    unaware, _ = reporter(tmp_path, restored)
    unaware._checked, unaware._checked_s = restored, unaware.clock.monotonic_s()  # type: ignore[assignment]
    await unaware.add(PEER, finished(3))
    assert await unaware.post_all()
    assert restored.rounds == [3]
    unaware._checked = None
    assert await unaware.post_all()
    assert sorted(set(restored.rounds)) == [1, 2, 3]


async def test_a_lost_receipt_is_asked_for_again(tmp_path: Path) -> None:
    """Of posted reports, the one whose receipt file is gone is posted once more, and no other."""
    coordinator = FakeCoordinator()
    posting, _ = reporter(tmp_path, coordinator)
    for number in (1, 2, 3):
        await posting.add(PEER, finished(number))
    assert await posting.post_all()
    (tmp_path / "receipts" / "000000000002.receipt").unlink()
    posting, _ = reporter(tmp_path, coordinator)
    assert await posting.post_all()
    assert coordinator.rounds == [1, 2, 3, 2]


async def test_a_full_disk_costs_neither_training_nor_reports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While nothing can be written reports wait in memory; receipts that can't be kept are asked for again."""
    coordinator = FakeCoordinator()
    posting, outcomes = reporter(tmp_path, coordinator)

    def full(path: Path, content: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("peer.reports.write_atomically", full)
        await posting.add(PEER, finished(1))
        await posting.add(PEER, finished(2))
        assert not await posting.post_all()
        assert names(tmp_path / "outbox") == []
    assert await posting.post_all()
    assert coordinator.rounds == [1, 2]
    await posting.add(PEER, finished(3))
    with monkeypatch.context() as patch:
        patch.setattr("peer.reports.write_atomically", full)
        assert not await posting.post_all()
    assert await posting.post_all()
    assert coordinator.rounds == [1, 2, 3, 3]
    assert len(names(tmp_path / "receipts")) == 3
    assert outcomes == ["accepted"] * 3


def test_a_write_is_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A write that fails leaves what was there before."""
    path = tmp_path / "file"
    write_atomically(path, b"before")

    def fail(descriptor: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="Input"):
        write_atomically(path, b"after")
    assert path.read_bytes() == b"before"
