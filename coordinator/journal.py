"""The single writer: decides on events in order, makes what follows durable in groups, then lets the callers know.

Life of an event: bounded queue -> `decide` -> entries (signed here where the coordinator signs) -> folded into the credit state
-> one transaction for the whole group -> Merkle tree -> answer. No answer leaves before its entries are on disk. If the store
fails, the whole group fails and the state is read back from the store.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import structlog

from coordinator import orders
from coordinator.errors import StoreFailed
from coordinator.metrics import Metrics
from coordinator.orders import NO_ORDERS, Orders
from coordinator.presence import Presence
from coordinator.snapshot import restore
from coordinator.state import (
    Admit,
    Announced,
    Append,
    Audited,
    Decision,
    Evaluated,
    Event,
    GrantAsked,
    Now,
    Reported,
    RevocationAsked,
    State,
    decide,
)
from coordinator.store.interface import Found, Note, Row, Store
from swarm import tracing
from swarm.audits import beacon_of
from swarm.clock import Clock
from swarm.credits import CreditState, apply_entry
from swarm.entries import (
    Admission,
    Claim,
    Confirmation,
    Finding,
    Measurement,
    Nomination,
    Opened,
    Opening,
    Permission,
    Revocation,
)
from swarm.errors import DatabaseCorrupt, LedgerInvalid, Rejected
from swarm.identity import Identity
from swarm.ledger import Checkpoint, open_manifest, origin_of, sign_checkpoint
from swarm.merkle import MerkleTree, leaf_hash
from swarm.messages import payload_hash, seal
from swarm.protocol import OURS, Range
from swarm.rpc.v1.coordinator_pb2 import Announcement
from swarm.rpc.v1.ledger_pb2 import LedgerEntry, Receipt, RoundConfirmed, RunOpened
from swarm.rpc.v1.signed_pb2 import AdmissionToken, Grant, Signed

QUEUE_EVENTS = 8192
GROUP_EVENTS = 256
GATHER_S = 0.03  # for a group to grow, while many come
FOLLOW_ROWS = 500
ORDERS = "orders"
GENESIS = "genesis"
COORDINATOR = "coordinator"

log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class Outcome:
    """What became of an event: the decision, and the signed answer where there is one (a receipt or a grant)."""

    decision: Decision
    answer: Signed | None = None


@dataclass
class _Pending:
    """An event that waits for its group to be durable."""

    event: Event
    done: asyncio.Future[Outcome]
    decision: Decision | None = None
    group: int = 0
    rows: list[Row] = field(default_factory=list)


class Journal:
    """Owns the ledger's state, tree and store. Everything but `run` and the store's commits happens on the event loop."""

    def __init__(
        self,
        store: Store,
        identity: Identity,
        manifest: Signed,
        clock: Clock,
        metrics: Metrics,
        ttl_s: float,
        snapshot: Path | None = None,
    ) -> None:
        self._store = store
        self._identity = identity
        self._clock = clock
        self._metrics = metrics
        self._queue: asyncio.Queue[_Pending] = asyncio.Queue(QUEUE_EVENTS)
        self._signed_manifest = manifest
        self._snapshot = snapshot
        self._size = 0
        self._behind = False
        self._busy = asyncio.Lock()
        self.is_writer = True
        self.orders = NO_ORDERS
        self.spoken = OURS
        self.run_id = payload_hash(manifest)
        self.manifest = open_manifest(manifest)
        self.tree = MerkleTree()
        self.credits = CreditState(identity.peer_id)
        genesis = (store.value(GENESIS) or b"").decode()
        self.presence = Presence(ttl_s, clock.monotonic_s(), genesis)
        self._genesis_saved = genesis

    @property
    def state(self) -> State:
        """What decisions go by."""
        return State(self.run_id, self.manifest, self.credits, self.presence, self.orders, self.spoken)

    @property
    def is_healthy(self) -> bool:
        """Whether the last commit went through."""
        return not self._behind

    @property
    def waiting(self) -> int:
        """How many events wait to be decided on."""
        return self._queue.qsize()

    @property
    def audit_rate(self) -> float:
        """The share of the contributions that the next confirmed round has audited; 0 where the run isn't."""
        return (self.orders.audit_rate or self.manifest.audit.rate) if self.manifest.is_audited else 0.0

    @property
    def open_audits(self) -> tuple[int, int]:
        """How many audits aren't decided, and how many of these are overdue."""
        return self.credits.open_audits(self.run_id) if self.run_id in self.credits.run_ids else (0, 0)

    @property
    def suspended_by_audits(self) -> int:
        """How many keys the ledger suspends."""
        return len(self.credits.suspended(self.run_id)) if self.run_id in self.credits.run_ids else 0

    def signed_checkpoint(self) -> tuple[str, int]:
        """The coordinator's word for all entries so far, and how many they are."""
        checkpoint = Checkpoint(origin_of(self.run_id), len(self.tree), self.tree.root())
        return sign_checkpoint(self._identity, checkpoint), checkpoint.size

    def load(self) -> None:
        """Read the store back, from the snapshot on where there is one; open the run if it is new. Raises `DatabaseCorrupt`."""
        self._check_owner()
        self.read()
        if self.run_id not in self.credits.run_ids:
            self._open_run()

    def read(self) -> None:
        """Read the store back and change nothing in it. Raises `DatabaseCorrupt`."""
        self.orders = orders.load(self._store.value(ORDERS))
        self.tree, self.credits = restore(self._store, self._identity.peer_id, self._snapshot)
        self._size = len(self.tree)
        self._gauge()
        self._gauge_evaluations()

    async def follow(self) -> None:
        """Take in what another replica has appended. Raises `DatabaseCorrupt`."""
        async with self._busy:
            if self._behind:
                await asyncio.to_thread(self.read)
                self._behind = False
            while rows := await asyncio.to_thread(self._store_rows, len(self.tree)):
                for row in rows:
                    self._apply_row(row)
                self._size = len(self.tree)
                self._gauge()
                self._gauge_evaluations()

    async def take_over(self) -> None:
        """Write from now on: after everything that is in the store, and with nobody presumed dead. Raises `DatabaseCorrupt`."""
        async with self._busy:
            genesis = (await asyncio.to_thread(self._store.value, GENESIS) or b"").decode()
            self.presence = Presence(self.presence.ttl_s, self._clock.monotonic_s(), genesis)
            self._genesis_saved = genesis
            await asyncio.to_thread(self.load)
            self._behind = False

    def reload(self) -> None:
        """Trust nothing that isn't in the store: read it back before the next use."""
        self._behind = True

    def _store_rows(self, first: int) -> list[Row]:
        with closing(self._store.rows(first)) as rows:
            return list(islice(rows, FOLLOW_ROWS))

    def _apply_row(self, row: Row) -> None:
        try:
            apply_entry(self.credits, row.position, row.entry, check_signatures=False)
        except LedgerInvalid as error:
            raise DatabaseCorrupt(f"the database holds an invalid ledger: {error.message}", error.hint) from error
        self.tree.append(row.leaf_hash)

    async def submit(self, event: Event) -> Outcome:
        """Decide on `event` after all earlier ones, and return once it is durable. Raises `Rejected` or `StoreFailed`."""
        (outcome,) = await self.submit_all((event,))
        if isinstance(outcome, Rejected):
            raise outcome
        return outcome

    async def submit_all(self, events: Sequence[Event]) -> list[Outcome | Rejected]:
        """Decide on events in order, and return once all are durable that weren't refused. Raises `StoreFailed`."""
        loop = asyncio.get_running_loop()
        waiting = [_Pending(event, loop.create_future()) for event in events]
        for pending in waiting:
            try:
                self._queue.put_nowait(pending)
            except asyncio.QueueFull:
                pending.done.set_exception(Rejected("overloaded", "too many requests wait for the ledger"))
        with tracing.span("group_commit") as span:
            outcomes = await asyncio.gather(*(pending.done for pending in waiting), return_exceptions=True)
            group, entries = max((pending.group for pending in waiting), default=0), sum(len(pending.rows) for pending in waiting)
            span.set({"swarm.group_events": group, "swarm.entries": entries})
        return [_outcome(outcome) for outcome in outcomes]

    async def run(self) -> None:
        """Write group after group until cancelled."""
        group: list[_Pending] = []
        while True:
            busy = len(group) > 1
            group = [await self._queue.get()]
            if busy and self._queue.qsize() < GROUP_EVENTS:  # a commit costs as much as many entries: PostgreSQL's commit_delay
                await asyncio.sleep(GATHER_S)
            while len(group) < GROUP_EVENTS and not self._queue.empty():
                group.append(self._queue.get_nowait())
            try:
                async with self._busy:
                    await self._write(group)
            except Exception as error:  # noqa: BLE001 - the task's outermost boundary; counted, logged, and read back
                self._abandon(group, error)

    async def save_genesis(self) -> None:
        """Remember durably who starts the run, so that a restart names nobody else."""
        if self.presence.genesis != self._genesis_saved:
            self._genesis_saved = self.presence.genesis
            await asyncio.to_thread(self._store.set_value, GENESIS, self._genesis_saved.encode())

    async def order(self, changed: Orders, note: Note) -> None:
        """Make a command durable, then go by the orders that it led to. Raises `StoreFailed`."""
        value = None if changed == self.orders else (ORDERS, orders.dump(changed))
        await asyncio.to_thread(self._store.note, note, value)
        self.orders = changed

    def _check_owner(self) -> None:
        owner = self._store.value(COORDINATOR)
        if owner is None:
            self._store.set_value(COORDINATOR, self._identity.peer_id.encode())
        elif owner.decode() != self._identity.peer_id:
            raise DatabaseCorrupt(
                f"the database belongs to the coordinator key {owner.decode()}",
                "use the key that lies next to the database, or another database",
            )

    def _open_run(self) -> None:
        body = self._stamped(LedgerEntry(run_opened=RunOpened(run_id=self.run_id, manifest=self._signed_manifest)))
        row = self._row(body, None)
        self._store.append([row])
        self.credits.apply(Opening(self.run_id, self.manifest, self._signed_manifest.signer), body.appended_at_us)
        self._adopt([row])

    async def _write(self, group: list[_Pending]) -> None:
        await self._recover()
        for pending in group:
            pending.group = len(group)
            self._decide(pending)
        rows = [row for pending in group for row in pending.rows]
        await self._commit(rows)
        self._adopt(rows)
        if any(isinstance(pending.event, Evaluated) for pending in group):
            self._gauge_evaluations()
        for pending in group:
            await self._answer(pending)

    def _abandon(self, group: list[_Pending], error: Exception) -> None:
        """Nothing of the group was receipted; before the next one the state is read back from the store."""
        log.error("commit_failed", events=len(group), exc_info=error)
        self._metrics.commit_failures_total.inc()
        self._behind = True
        for pending in group:
            if not pending.done.done():
                pending.done.set_exception(StoreFailed("the ledger can't be written"))

    async def _recover(self) -> None:
        """After a failed commit, go back to what the store holds."""
        if self._behind:
            await asyncio.to_thread(self.load)
            self._behind = False

    def _decide(self, pending: _Pending) -> None:
        decision = decide(self.state, pending.event, self.now())
        for append in decision.append:
            body = self._stamped(self._body(append, pending.event))
            self.credits.apply(_opened(append, self.run_id, body), body.appended_at_us)
            if isinstance(append, Confirmation):
                self._metrics.audits_drawn_total.inc(self.credits.drawn_audits(self.run_id, append.round))
            if isinstance(append, Measurement) and self.credits.is_disputed(self.run_id, append.round):
                self._metrics.evaluations_disputed_total.inc()
                log.warning("evaluators_disagree", round=append.round)
            pending.rows.append(self._row(body, _key(append)))
        pending.decision = decision

    async def _commit(self, rows: list[Row]) -> None:
        if not rows:
            return
        started_s = time.perf_counter()
        await asyncio.to_thread(self._store.append, rows)
        self._metrics.commit_duration_seconds.observe(time.perf_counter() - started_s)

    def _adopt(self, rows: Iterable[Row]) -> None:
        self.tree.extend(row.leaf_hash for row in rows)
        self._gauge()

    async def _answer(self, pending: _Pending) -> None:
        decision = pending.decision
        if pending.done.done() or decision is None:
            return
        try:
            answer = await self._signed_answer(pending, decision) if decision.accepted else None
        except Rejected as error:
            pending.done.set_exception(error)
            return
        if not pending.done.done():
            pending.done.set_result(Outcome(decision, answer))

    async def _signed_answer(self, pending: _Pending, decision: Decision) -> Signed | None:
        match pending.event:
            case Reported() as event:
                if not decision.append:
                    return self._receipt(event, *await self._found_report(event))
                position, _, entry, _ = pending.rows[_place(decision.append)]
                return self._receipt(event, position, entry)
            case GrantAsked() as event:
                key = grant_key(self.run_id, event.request.round)
                _, entry = await self._found(key, pending.rows)
                return LedgerEntry.FromString(entry).granted
        return None

    def _receipt(self, event: Reported, position: int, entry: bytes) -> Signed:
        """The receipt of a report: always for the tree that ends with its entry, so that asking again gives the same."""
        claim = event.claim
        proof, root = self.tree.last_proof(position + 1)
        return seal(
            self._identity,
            Receipt(
                run_id=self.run_id,
                round=claim.round,
                peer_id=claim.peer_id,
                report_hash=payload_hash(event.report),
                ledger_index=position,
                ledger_size=position + 1,
                ledger_root=root,
                inclusion_proof=proof,
                entry=entry,
            ),
        )

    async def _found_report(self, event: Reported) -> Found:
        """The entry of a report that came before. Raises `Rejected` if that was another one."""
        claim = event.claim
        found = await self._found(report_key(claim.run_id, claim.round, claim.peer_id), [])
        if LedgerEntry.FromString(found.entry).reported.payload != event.report.payload:
            raise Rejected("already_reported", f"round {claim.round}", claim.peer_id)
        return found

    async def _found(self, key: bytes, rows: list[Row]) -> Found:
        """The entry under `key`: among those just committed, or else in the store."""
        for row in rows:
            if row.key == key:
                return Found(row.position, row.entry)
        found = await asyncio.to_thread(self._store.find, key)
        if found is None:
            raise StoreFailed("an entry that was appended is not in the database")
        return found

    def now(self) -> Now:
        """The time by both clocks."""
        return Now(self._clock.wall_s(), self._clock.monotonic_s())

    def _stamped(self, body: LedgerEntry) -> LedgerEntry:
        body.appended_at_us = int(self._clock.wall_s() * 1e6)
        return body

    def _row(self, body: LedgerEntry, key: bytes | None) -> Row:
        entry = body.SerializeToString(deterministic=True)
        self._size += 1
        return Row(self._size - 1, leaf_hash(entry), entry, key)

    def _body(self, append: Append, event: Event) -> LedgerEntry:
        match append:
            case Admit():
                return LedgerEntry(admitted=self._admission(append, event))
            case Revocation():
                return LedgerEntry(revoked=event.signed if isinstance(event, RevocationAsked) else None)
            case Nomination():
                return LedgerEntry(proposed=event.proposal if isinstance(event, Reported) else None)
            case Claim():
                return LedgerEntry(reported=event.report if isinstance(event, Reported) else None)
            case Finding():
                return LedgerEntry(audited=event.signed if isinstance(event, Audited) else None)
            case Measurement():
                return LedgerEntry(evaluated=event.signed if isinstance(event, Evaluated) else None)
            case Confirmation():
                message = RoundConfirmed(
                    run_id=append.run_id,
                    round=append.round,
                    proposal_hash=append.proposal_hash,
                    state_root=append.state_root,
                    audit_rate=append.audit_rate,
                )
                return LedgerEntry(confirmed=seal(self._identity, message))
            case Permission():
                issued_at = int(self._clock.wall_s())
                return LedgerEntry(granted=seal(self._identity, Grant(**append._asdict(), issued_at=issued_at)))

    def admission(self, peer_id: str, spoken: Range) -> Signed:
        """A token for an admitted key that says what it speaks. Raises `Rejected` for others."""
        account, _ = self.credits.account(self.run_id, peer_id)
        return self._token(peer_id, account, spoken=spoken)

    def _admission(self, admit: Admit, event: Event) -> Signed:
        """The token that stands in the ledger: for an account with the certificate, by invitation with the ticket."""
        said = event.announcement if isinstance(event, Announced) else Announcement()
        held = said.held if admit.expires_at else None
        return self._token(admit.peer_id, admit.account, held, said.ticket if admit.invited is not None else None)

    def _token(
        self, peer_id: str, account: str, held: Signed | None = None, ticket: Signed | None = None, spoken: Range | None = None
    ) -> Signed:
        now_s = int(self._clock.wall_s())
        token = AdmissionToken(
            run_id=self.run_id,
            peer_id=peer_id,
            account=account,
            held=held,
            ticket=ticket,
            issued_at=now_s,
            expires_at=now_s + self.manifest.admission.valid_s,
            newcomer=self.credits.is_newcomer(self.run_id, peer_id),
            protocol=spoken.message if spoken is not None else None,
        )
        return seal(self._identity, token)

    def _gauge(self) -> None:
        self._metrics.ledger_entries.set(len(self.tree))
        progress = self.credits.progress(self.run_id) if self.run_id in self.credits.run_ids else None
        if progress is not None and progress.state_root:
            self._metrics.confirmed_round.set(progress.confirmed_round)
            self._metrics.train_loss_nats.set(progress.loss)
            self._metrics.tokens_verified(progress.tokens, self.manifest.credit.flops_per_token)

    def _gauge_evaluations(self) -> None:
        """Only what evaluators say changes these; they are gone through one by one, so not with every group."""
        if self.run_id in self.credits.run_ids:
            self._metrics.evaluated(self.credits.agreed_evaluations(self.run_id))


def _outcome(result: Outcome | BaseException) -> Outcome | Rejected:
    if isinstance(result, Outcome | Rejected):
        return result
    raise result


def report_key(run_id: bytes, number: int, peer_id: str) -> bytes:
    """Under which a report is found again."""
    return _name("reported", run_id.hex(), str(number), peer_id)


def grant_key(run_id: bytes, number: int) -> bytes:
    """Under which a round's grant is found again."""
    return _name("granted", run_id.hex(), str(number))


def _key(append: Append) -> bytes | None:
    match append:
        case Claim():
            return report_key(append.run_id, append.round, append.peer_id)
        case Permission():
            return grant_key(append.run_id, append.round)
    return None


def _place(append: Sequence[Append]) -> int:
    """Where among an event's entries the claim is."""
    return next(place for place, item in enumerate(append) if isinstance(item, Claim))


def _name(*parts: str) -> bytes:
    return hashlib.blake2b("/".join(parts).encode(), digest_size=16).digest()


def _opened(append: Append, run_id: bytes, body: LedgerEntry) -> Opened:
    if isinstance(append, Admit):
        return Admission(run_id, append.peer_id, append.account, 0, append.expires_at, append.invited)
    if isinstance(append, Confirmation):
        return append._replace(beacon=beacon_of(body.confirmed))
    return append
