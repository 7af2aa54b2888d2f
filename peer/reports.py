"""Reports to the coordinator: kept on disk until the receipt is there, then the receipt is kept for good."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import structlog

from peer.folders import write_atomically
from peer.rounds.engine import RoundReport
from swarm import tracing
from swarm.clock import Clock, SystemClock
from swarm.errors import CoordinatorUnreachable, LedgerInvalid, Rejected, SwarmError
from swarm.identity import Identity
from swarm.merkle import verify_consistency
from swarm.messages import parse, seal
from swarm.protocol import MAX_REPORTS
from swarm.rpc.client import CoordinatorClient
from swarm.rpc.v1.coordinator_pb2 import SubmitReportRequest
from swarm.rpc.v1.ledger_pb2 import Receipt, Report
from swarm.rpc.v1.signed_pb2 import Signed

RETRY_S = 5.0
LAST_RETRY_S = 0.5
LOOKED_AT = 64
CHECK_EVERY_S = 30.0
MAX_UNSAVED = 1000
CALL_BYTES = 2 << 20  # half of the largest message
KEPT_REPORTS = 10_000
OF_ANOTHER_HISTORY = frozenset({"already_reported", "round_closed"})
"""Refusals that say only that the ledger knows these rounds otherwise, as after a restart of everybody from older checkpoints."""

log = structlog.get_logger(__name__)


@dataclass
class Outbox:
    """Reports that wait, one file each, named by round: `<directory>/outbox/<round>.pb`; receipts beside it."""

    directory: Path

    def __post_init__(self) -> None:
        self.outbox = self.directory / "outbox"
        self.receipts = self.directory / "receipts"
        self.refused = self.directory / "refused"
        self.posted = self.directory / "posted"
        for folder in (self.outbox, self.receipts, self.refused, self.posted):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)

    def add(self, round_index: int, report: Signed, proposal: Signed) -> None:
        """Queue a report; whole or not at all."""
        request = SubmitReportRequest(report=report, proposal=proposal)
        write_atomically(self.outbox / f"{round_index:012d}.pb", request.SerializeToString())

    def waiting(self) -> list[Path]:
        """Reports that have no receipt yet, oldest first."""
        return sorted(self.outbox.glob("*.pb"))

    def settle(self, path: Path, receipt: Signed) -> None:
        """Keep the receipt, and the report for as long as a coordinator restored from a backup might have forgotten it."""
        write_atomically(self.receipts / f"{path.stem}.receipt", receipt.SerializeToString())
        path.replace(self.posted / path.name)
        for old in sorted(self.posted.glob("*.pb"))[:-KEPT_REPORTS]:
            old.unlink(missing_ok=True)

    def post_again(self, *, everything: bool) -> int:
        """Queue posted reports once more: those whose receipt is lost, or all of them; how many."""
        again = [
            path
            for path in sorted(self.posted.glob("*.pb"))
            if everything or not (self.receipts / f"{path.stem}.receipt").exists()
        ]
        for path in again:
            path.replace(self.outbox / path.name)
        return len(again)

    def newest_receipts(self, after: str) -> dict[str, Receipt]:
        """The last receipts of reports that could be posted again, by name, from `after` on; damaged ones are left out."""
        found = {}
        for path in sorted(self.receipts.glob("*.receipt"))[-LOOKED_AT:]:
            if path.stem < after or not (self.posted / f"{path.stem}.pb").exists():
                continue
            try:
                found[path.stem] = parse(Receipt, parse(Signed, read(path)).payload)
            except (OSError, Rejected) as error:
                log.warning("receipt_damaged", receipt=path.stem, error=str(error))
        return found

    def last_refusal(self) -> str:
        """Why the newest refused report was refused, those apart that only another history made void."""
        newest_first = sorted(self.refused.glob("*.reason"), reverse=True)
        reasons = (read(path).decode(errors="replace")[:200] for path in newest_first)
        return next((reason for reason in reasons if reason not in OF_ANOTHER_HISTORY), "")

    def refuse(self, path: Path, reason: str) -> None:
        """Put a report aside that the coordinator refused, with the reason."""
        write_atomically(self.refused / f"{path.stem}.reason", reason.encode())
        path.replace(self.refused / path.name)


def read(path: Path) -> bytes:
    """A small file's content."""
    return path.read_bytes()


@dataclass
class Reporter:
    """Posts what waits in the outbox, in order, for as long as it takes."""

    run_id: bytes
    outbox: Outbox
    client: Callable[[], Awaitable[CoordinatorClient]]
    on_outcome: Callable[[str], None] = lambda outcome: None
    clock: Clock = SystemClock()

    def __post_init__(self) -> None:
        self._wake = asyncio.Event()
        self._posting = asyncio.Lock()
        self._saving = threading.Lock()
        self._unsaved: dict[int, tuple[Signed, Signed]] = {}
        self._traces: dict[int, str] = {}
        self._checked: CoordinatorClient | None = None
        self._checked_s = 0.0
        self._highest_index = -1
        self._checked_to = ""

    async def add(self, identity: Identity, report: RoundReport) -> None:
        """Queue the report of a round in which our contribution counted."""
        if report.commit is None or report.result is None:
            return
        message = Report(
            run_id=self.run_id,
            round=report.round_index,
            commit=report.commit,
            result=report.result,
            proposal_hash=report.proposal.proposal_hash,
            issued_at=int(self.clock.wall_s()),
        )
        self._unsaved[report.round_index] = (seal(identity, message), report.proposal.signed)
        self._note_trace(report.round_index)
        await asyncio.to_thread(self._save)
        self._wake.set()

    async def run(self) -> None:
        """Post for ever."""
        while True:
            self._wake.clear()
            emptied = await self.post_all()
            try:
                async with asyncio.timeout(None if emptied else RETRY_S):
                    await self._wake.wait()
            except TimeoutError:
                continue

    async def post_all(self) -> bool:
        """Post what waits now; whether nothing is left."""
        async with self._posting:
            return await self._post_all()

    def _note_trace(self, round_index: int) -> None:
        """Remember to which span the round's report will belong, where there is one."""
        if name := tracing.traceparent():
            self._traces[round_index] = name
            while len(self._traces) > MAX_UNSAVED:
                del self._traces[min(self._traces)]

    def _save(self) -> None:
        """Write queued reports to disk; while that is full they wait in memory, the oldest of very many being lost."""
        with self._saving:
            for round_index, (report, proposal) in sorted(self._unsaved.items()):
                try:
                    self.outbox.add(round_index, report, proposal)
                except OSError as error:
                    log.warning("report_not_saved", round=round_index, waiting=len(self._unsaved), error=error.strerror)
                    break
                del self._unsaved[round_index]
            while len(self._unsaved) > MAX_UNSAVED:
                del self._unsaved[min(self._unsaved)]

    async def _post_all(self) -> bool:
        if self._unsaved:
            await asyncio.to_thread(self._save)
        try:
            client = await self.client()
        except SwarmError as error:
            log.info("coordinator_away", error=error.message)
            return False
        if client is not self._checked or self.clock.monotonic_s() > self._checked_s + CHECK_EVERY_S:
            await self._check_ledger(client)
        for paths in _calls(self.outbox.waiting()):
            if not await self._post(client, paths):
                return False
        return not self._unsaved

    async def post_until_empty(self) -> None:
        """Post again and again until nothing waits; meant to be cancelled by whoever has waited long enough."""
        self._checked = None
        while True:
            if await self.post_all():
                return
            await asyncio.sleep(LAST_RETRY_S)

    async def _check_ledger(self, client: CoordinatorClient) -> None:
        """Hold the ledger against our receipts since the last look: if it lacks a history that one names, report all again.

        A coordinator that was restored from a backup has forgotten what we hold receipts for, and may have given new ones since;
        so each is looked at, not only the last. Reporting twice does no harm.
        """
        receipts = await asyncio.to_thread(self.outbox.newest_receipts, self._checked_to)
        try:
            rewritten = False
            for receipt in receipts.values():
                rewritten = rewritten or not await _extends(client, receipt)
        except SwarmError:
            return
        again = await asyncio.to_thread(lambda: self.outbox.post_again(everything=rewritten))
        if rewritten:
            log.warning("ledger_rewritten", reports_again=again)
        self._checked_to = "" if rewritten else max(receipts, default=self._checked_to)
        self._checked, self._checked_s = client, self.clock.monotonic_s()

    async def _post(self, client: CoordinatorClient, paths: Sequence[Path]) -> bool:
        """Post some reports in one call; whether all of them are settled. One alone belongs to the trace of its round."""
        rounds = [int(path.stem) for path in paths]
        parent = self._traces.get(rounds[0], "") if len(rounds) == 1 else ""
        with tracing.span("report", {"swarm.round": rounds[0], "swarm.reports": len(rounds)}, parent=parent) as span:
            try:
                outcomes = await _submitted(client, paths)
            except CoordinatorUnreachable:
                return False
            except SwarmError as error:
                log.warning("reports_not_sent", first=paths[0].stem, reports=len(paths), error=error.message)
                return False
            settled = [self._settle(path, outcome, span) for path, outcome in zip(paths, outcomes, strict=False)]
        for number in rounds[: len(settled)]:
            self._traces.pop(number, None)
        return all(settled) and len(settled) == len(paths)

    def _settle(self, path: Path, outcome: Signed | Rejected | LedgerInvalid, span: tracing.Span) -> bool:
        """Put a report where its outcome belongs; False where that can't be written."""
        if not isinstance(outcome, Signed):
            reason = outcome.reason if isinstance(outcome, Rejected) else outcome.message
            span.set({"swarm.reason": reason})
            log.warning("report_refused", report=path.stem, reason=reason)
            self.outbox.refuse(path, reason)
            self.on_outcome("superseded" if reason in OF_ANOTHER_HISTORY else "refused")
            return True
        try:
            self.outbox.settle(path, outcome)
        except OSError as error:
            log.warning("receipt_not_saved", report=path.stem, error=error.strerror)
            return False
        self._notice_shrinking(outcome)
        self.on_outcome("accepted")
        return True

    def _notice_shrinking(self, receipt: Signed) -> None:
        """A place before one that we have seen: the ledger was put back, and what came after must be looked at again."""
        index = parse(Receipt, receipt.payload).ledger_index
        if index < self._highest_index:
            self._checked = None
            self._wake.set()
        self._highest_index = index


def _calls(paths: Iterable[Path]) -> Iterator[list[Path]]:
    """As many reports at a time as one call takes, by number and bytes."""
    batch: list[Path] = []
    size = 0
    for path in paths:
        added = path.stat().st_size
        if batch and (len(batch) == MAX_REPORTS or size + added > CALL_BYTES):
            yield batch
            batch, size = [], 0
        batch.append(path)
        size += added
    if batch:
        yield batch


async def _submitted(client: CoordinatorClient, paths: Sequence[Path]) -> list[Signed | Rejected | LedgerInvalid]:
    """What became of each report; of the first ones only, where the coordinator was busy on the way."""
    try:
        return await client.submit_reports([parse(SubmitReportRequest, read(path)) for path in paths])
    except Rejected as error:
        if len(paths) == 1:
            return [error]
    return [outcome for path in paths for outcome in await _submitted(client, [path])]


async def _extends(client: CoordinatorClient, receipt: Receipt) -> bool:
    """Whether the coordinator's present ledger contains the history that a receipt names (RFC 9162, 2.1.4)."""
    try:
        checkpoint, _, proof = await client.checkpoint(receipt.ledger_size)
    except Rejected:
        return False
    return verify_consistency(receipt.ledger_size, receipt.ledger_root, checkpoint.size, checkpoint.root, proof)
