"""`PeerService` over gRPC: opens what peers sign, hands it to the journal, and answers. Decisions are made elsewhere."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, TypeVar

from coordinator.errors import StoreFailed
from coordinator.guard import Guard
from coordinator.journal import Journal, Outcome
from coordinator.limits import (
    ENTRIES_PER_CALL,
    ENTRIES_PER_MESSAGE_BYTES,
    MAX_LEADERBOARD,
    PEERS_PER_ANSWER,
)
from coordinator.metrics import Metrics
from coordinator.presence import NOT_PLAYING, Sighting
from coordinator.reports import Opener
from coordinator.signatures import SignatureChecker
from coordinator.state import Announced, Audited, Decision, Evaluated, Event, GrantAsked, Reported, RevocationAsked, decide
from coordinator.store.interface import Store
from coordinator.witnesses import Witnessed
from swarm import __version__, tracing
from swarm.accounts import open_held
from swarm.clock import Clock
from swarm.credits import Balance
from swarm.entries import Finding, Measurement, Revocation, open_evaluation, open_revocation, open_verdict
from swarm.errors import Rejected
from swarm.evaluations import Agreed
from swarm.identity import Identity
from swarm.merkle import HASH_BYTES
from swarm.messages import open_signed, payload_hash
from swarm.protocol import MAX_REPORTS, agree, spoken_by
from swarm.rpc.v1 import coordinator_pb2 as pb
from swarm.rpc.v1.coordinator_pb2_grpc import PeerServiceServicer
from swarm.rpc.v1.signed_pb2 import Signed
from swarm.tickets import open_ticket

READ_AHEAD_ENTRIES = 512
DEFAULT_LEADERBOARD = 20
MAX_SUSPENDED = 256
DEFAULT_EVALUATIONS, MAX_EVALUATIONS = 64, 1024
CHECK = "check_signatures"
M = TypeVar("M", pb.Announcement, pb.GrantRequest)
S = TypeVar("S", Finding, Measurement, Revocation)


class PeerService(PeerServiceServicer):
    """The calls of the control plane."""

    def __init__(
        self,
        journal: Journal,
        store: Store,
        identity: Identity,
        manifest: Signed,
        clock: Clock,
        metrics: Metrics,
        guard: Guard,
        checker: SignatureChecker,
        witnessed: Witnessed,
    ) -> None:
        self._journal = journal
        self._store = store
        self._identity = identity
        self._manifest = manifest
        self._clock = clock
        self._metrics = metrics
        self._guard = guard
        self._reports = Opener(journal, checker, guard)
        self._witnessed = witnessed

    async def GetRun(self, request: pb.GetRunRequest, context: Any) -> pb.GetRunResponse:  # noqa: N802
        """The run's manifest and the coordinator's key."""
        self._check_run(request.run_id)
        used = agree(spoken_by(request), self._journal.spoken)
        return pb.GetRunResponse(
            run_id=self._journal.run_id,
            manifest=self._manifest,
            coordinator=self._identity.peer_id,
            version=__version__,
            protocol=used.message,
        )

    async def Announce(self, request: pb.AnnounceRequest, context: Any) -> pb.AnnounceResponse:  # noqa: N802
        """Admission or its renewal, and who is alive."""
        signed = request.announcement
        announcement = self._open(signed, pb.Announcement)
        self._guard.take(signed.signer)
        certified = open_held(announcement.held, signed.signer) if announcement.HasField("held") else None
        invited = open_ticket(announcement.ticket, self._journal.run_id) if announcement.HasField("ticket") else None
        event = Announced(signed.signer, announcement, payload_hash(signed), certified, invited)
        decision = decide(self._journal.state, event, self._journal.now())
        if decision.append:
            if not self._journal.credits.is_admitted(self._journal.run_id, signed.signer):
                self._guard.take_new_key(context, certified.account if certified is not None else "")
            decision = (await self._journal.submit(event)).decision
        self._metrics.admissions_total.labels(decision.reason).inc()
        _raise_refusal(decision, signed.signer)
        twin = self._meet(event)
        genesis = self._note(event, decision)
        await self._journal.save_genesis()
        return self._announced(signed.signer, announcement, genesis, twin)

    async def SubmitReport(self, request: pb.SubmitReportRequest, context: Any) -> pb.SubmitReportResponse:  # noqa: N802
        """Append a report and return its receipt."""
        (receipt,) = await self._receipts((request,))
        if isinstance(receipt, Rejected):
            raise receipt
        return pb.SubmitReportResponse(receipt=receipt)

    async def SubmitReports(self, request: pb.SubmitReportsRequest, context: Any) -> pb.SubmitReportsResponse:  # noqa: N802
        """Append what has waited; a receipt or a refusal for each report."""
        if len(request.reports) > MAX_REPORTS:
            raise Rejected("too_large", f"at most {MAX_REPORTS} reports", request.reports[0].report.signer)
        return pb.SubmitReportsResponse(outcomes=map(_outcome, await self._receipts(request.reports)))

    async def RequestGrant(self, request: pb.RequestGrantRequest, context: Any) -> pb.RequestGrantResponse:  # noqa: N802
        """Permit a minority to go on, or say why not and when to ask again."""
        signed = request.request
        asked = self._open(signed, pb.GrantRequest)
        self._guard.take(signed.signer)
        self._journal.presence.heard(signed.signer, self._clock.monotonic_s())
        outcome = await self._journal.submit(GrantAsked(signed.signer, asked))
        decision = outcome.decision
        self._metrics.grants_total.labels(decision.reason).inc()
        if decision.retry_after_s:
            reason = f"{decision.reason}: {decision.detail}" if decision.detail else decision.reason
            return pb.RequestGrantResponse(retry_after_s=decision.retry_after_s, reason=reason)
        return pb.RequestGrantResponse(grant=_answer(outcome, signed.signer), reason=decision.reason)

    async def RevokeKey(self, request: pb.RevokeKeyRequest, context: Any) -> pb.RevokeKeyResponse:  # noqa: N802
        """An account takes back its word for a key."""
        signed = request.revocation
        decision = await self._decided("revocation", signed, open_revocation, RevocationAsked)
        _raise_refusal(decision, signed.signer)
        return pb.RevokeKeyResponse(repeated=not decision.append)

    async def ListAudits(self, request: pb.ListAuditsRequest, context: Any) -> pb.ListAuditsResponse:  # noqa: N802
        """What a peer is asked to audit, and who is suspended."""
        self._check_run(request.run_id)
        ledger, run_id = self._journal.credits, self._journal.run_id
        suspended = [*ledger.suspended(run_id), *self._journal.orders.suspended][-MAX_SUSPENDED:]
        duties = [pb.AuditDuty(**duty._asdict()) for duty in ledger.duties(run_id, request.peer_id)]
        return pb.ListAuditsResponse(duties=duties, suspended=suspended)

    async def SubmitAudit(self, request: pb.SubmitAuditRequest, context: Any) -> pb.SubmitAuditResponse:  # noqa: N802
        """Append what an auditor found."""
        signed = request.verdict
        decision = await self._decided("verdict", signed, open_verdict, Audited)
        self._metrics.audits_total.labels(decision.reason).inc()
        _raise_refusal(decision, signed.signer)
        return pb.SubmitAuditResponse()

    async def ListEvaluations(  # noqa: N802
        self, request: pb.ListEvaluationsRequest, context: Any
    ) -> pb.ListEvaluationsResponse:
        """What a peer is asked to measure, and what quorums have agreed on."""
        self._check_run(request.run_id)
        ledger, run_id = self._journal.credits, self._journal.run_id
        limit = min(request.limit or DEFAULT_EVALUATIONS, MAX_EVALUATIONS)
        panels = ledger.panels(run_id)
        due = ledger.evaluations_due(run_id, request.peer_id)
        return pb.ListEvaluationsResponse(
            duties=[pb.EvaluationDuty(round=panel.round, state_root=panel.state_root) for panel in due],
            agreed=map(_agreed, ledger.agreed_evaluations(run_id)[-limit:]),
            drawn_until=panels[-1].round + 1 if panels else 0,
        )

    async def SubmitEvaluation(  # noqa: N802
        self, request: pb.SubmitEvaluationRequest, context: Any
    ) -> pb.SubmitEvaluationResponse:
        """Append the held-out loss that a peer has measured."""
        signed = request.evaluation
        decision = await self._decided("evaluation", signed, open_evaluation, Evaluated)
        self._metrics.evaluations_total.labels(decision.reason).inc()
        _raise_refusal(decision, signed.signer)
        return pb.SubmitEvaluationResponse()

    async def GetCredits(self, request: pb.GetCreditsRequest, context: Any) -> pb.GetCreditsResponse:  # noqa: N802
        """One balance, or the leaderboard."""
        self._check_run(request.run_id)
        state, run_id = self._journal.credits, self._journal.run_id
        limit = min(request.limit or DEFAULT_LEADERBOARD, MAX_LEADERBOARD)
        balances = [state.balance(run_id, request.peer_id)] if request.peer_id else state.leaderboard(run_id, limit)
        size = len(self._journal.tree)
        return pb.GetCreditsResponse(balances=map(_balance, balances), ledger_size=size)

    async def GetProgress(self, request: pb.GetProgressRequest, context: Any) -> pb.GetProgressResponse:  # noqa: N802
        """The newest confirmed round."""
        self._check_run(request.run_id)
        progress = self._journal.credits.progress(self._journal.run_id)
        tree = self._journal.tree
        self._journal.presence.expire(self._clock.monotonic_s())
        return pb.GetProgressResponse(
            **progress._asdict(),
            peers_alive=len(self._journal.presence),
            ledger_size=len(tree),
            ledger_root=tree.root(),
        )

    async def ListEntries(  # noqa: N802
        self, request: pb.ListEntriesRequest, context: Any
    ) -> AsyncIterator[pb.ListEntriesResponse]:
        """Stream entries in order, at most a bounded number per call."""
        position = request.first
        end = min(len(self._journal.tree), position + min(request.limit or ENTRIES_PER_CALL, ENTRIES_PER_CALL))
        while position < end:
            limit = min(READ_AHEAD_ENTRIES, end - position)
            entries = _fitting(await asyncio.to_thread(self._store.entries, position, limit))
            if not entries:
                raise StoreFailed("entries are missing from the database")
            yield pb.ListEntriesResponse(first=position, entries=entries)
            position += len(entries)

    async def GetCheckpoint(self, request: pb.GetCheckpointRequest, context: Any) -> pb.GetCheckpointResponse:  # noqa: N802
        """The newest signed checkpoint or one that witnesses sign, and proof that it extends an older one."""
        tree, old_size = self._journal.tree, request.old_size
        if old_size > len(tree):
            raise Rejected("malformed", f"the ledger has {len(tree)} entries")
        note, size = self._note_asked_for(request)
        proof = tree.consistency_proof(old_size, size) if old_size and old_size <= size else []
        return pb.GetCheckpointResponse(note=note, consistency_proof=proof)

    def _note_asked_for(self, request: pb.GetCheckpointRequest) -> tuple[str, int]:
        if request.to_cosign:
            return self._witnessed.to_cosign(self._journal.signed_checkpoint, request.old_size, self._clock.monotonic_s())
        return (self._witnessed.cosigned() if request.cosigned else None) or self._journal.signed_checkpoint()

    async def AddCosignature(self, request: pb.AddCosignatureRequest, context: Any) -> pb.AddCosignatureResponse:  # noqa: N802
        """Keep a witness's cosignature."""
        return pb.AddCosignatureResponse(cosignatures=self._witnessed.add(request.line))

    def _open(self, signed: Signed, expected: type[M]) -> M:
        with tracing.span(CHECK):
            return open_signed(signed, expected, run_id=self._journal.run_id)

    async def _decided(
        self, what: str, signed: Signed, opened: Callable[[Signed], S], event: Callable[[S, Signed], Event]
    ) -> Decision:
        """Open what somebody has signed, and hand it to the journal. Raises `Rejected`, also for what is of another run."""
        with tracing.span(CHECK):
            said = opened(signed)
        if said.run_id != self._journal.run_id:
            raise Rejected("wrong_run", what, signed.signer)
        self._guard.take(signed.signer)
        return (await self._journal.submit(event(said, signed))).decision

    def _check_run(self, run_id: bytes) -> None:
        if run_id and run_id != self._journal.run_id:
            raise Rejected("unknown_run", run_id.hex()[:16])

    async def _receipts(self, requests: Sequence[pb.SubmitReportRequest]) -> list[Signed | Rejected]:
        """Append the reports that nothing speaks against, in order; for each its receipt, or why there is none."""
        opened = await self._reports.open(requests)
        events = [event for event in opened if isinstance(event, Reported)]
        outcomes = await self._journal.submit_all(events)
        for peer_id in {event.claim.peer_id for event in events}:
            self._journal.presence.heard(peer_id, self._clock.monotonic_s())
        answers = iter([self._receipt(outcome, event.claim.peer_id) for outcome, event in zip(outcomes, events, strict=True)])
        return [event if isinstance(event, Rejected) else next(answers) for event in opened]

    def _receipt(self, outcome: Outcome | Rejected, sender: str) -> Signed | Rejected:
        if isinstance(outcome, Rejected):
            return outcome
        decision = outcome.decision
        self._metrics.reports_total.labels(decision.reason).inc()
        return _answer(outcome, sender) if decision.accepted else Rejected(decision.reason, decision.detail, sender)

    def _meet(self, event: Announced) -> pb.Twin.ValueType:
        """Whether another machine announces under this key, and which of them counts."""
        presence, announcement, now_s = self._journal.presence, event.announcement, self._clock.monotonic_s()
        presence.expire(now_s)
        return presence.meet(event.peer_id, announcement.start, announcement.uptime_s, now_s)

    def _note(self, event: Announced, decision: Decision) -> bool:
        """Update who is alive; returns whether the peer starts the run."""
        presence, announcement, now_s = self._journal.presence, event.announcement, self._clock.monotonic_s()
        if not presence.counts(event.peer_id, announcement.start):
            presence.note_issue(event.peer_id, announcement.issued_at, event.payload_hash, announcement.start)
            return False
        if announcement.leaving:
            presence.left(event.peer_id, announcement.issued_at, event.payload_hash, announcement.start)
            return False
        if decision.reason != "repeated":
            sighting = Sighting(
                event.peer_id,
                tuple(announcement.addresses),
                announcement.round,
                now_s,
                announcement.state_root if len(announcement.state_root) == HASH_BYTES else b"",
                announcement.state not in NOT_PLAYING,
                announcement.reachable,
            )
            presence.announced(sighting, announcement.issued_at, event.payload_hash, announcement.start, announcement.uptime_s)
        self._metrics.peers_alive.set(len(presence))
        ledger, run_id = self._journal.credits, self._journal.run_id
        if announcement.state not in NOT_PLAYING:
            return False
        if not ledger.progress(run_id).state_root:
            return presence.choose_genesis(event.peer_id)
        return presence.choose_resumer(event.peer_id, lambda number: ledger.rosters(run_id, number), now_s)

    def _announced(
        self, peer_id: str, announcement: pb.Announcement, genesis: bool, twin: pb.Twin.ValueType
    ) -> pb.AnnounceResponse:
        spoken = spoken_by(announcement, peer_id)
        used = agree(spoken, self._journal.spoken, peer_id)
        self._metrics.announcements_total.labels(str(used)).inc()
        presence, now_s = self._journal.presence, self._clock.monotonic_s()
        progress = self._journal.credits.progress(self._journal.run_id)
        others = [] if announcement.leaving else presence.others(peer_id, PEERS_PER_ANSWER)
        return pb.AnnounceResponse(
            admission=self._journal.admission(peer_id, spoken),
            peers=[_peer_address(sighting, now_s) for sighting in others],
            genesis=genesis,
            confirmed_round=progress.confirmed_round,
            confirmed_root=progress.state_root,
            interval_s=presence.interval_s,
            coordinator_time_s=self._clock.wall_s(),
            run_state=self._journal.orders.state,
            twin=twin,
            protocol=used.message,
        )


def _raise_refusal(decision: Decision, sender: str) -> None:
    if not decision.accepted:
        raise Rejected(decision.reason, decision.detail, sender)


def _answer(outcome: Outcome, sender: str) -> Signed:
    _raise_refusal(outcome.decision, sender)
    if outcome.answer is None:
        raise StoreFailed("an accepted request without an answer")
    return outcome.answer


def _outcome(result: Signed | Rejected) -> pb.ReportOutcome:
    if isinstance(result, Signed):
        return pb.ReportOutcome(receipt=result)
    return pb.ReportOutcome(reason=result.reason, detail=result.detail)


def _peer_address(sighting: Sighting, now_s: float) -> pb.PeerAddress:
    return pb.PeerAddress(
        peer_id=sighting.peer_id,
        addresses=sighting.addresses,
        round=sighting.round,
        age_s=max(0.0, now_s - sighting.heard_s),
        reachable=sighting.reachable,
    )


def _agreed(agreed: Agreed) -> pb.AgreedEvaluation:
    return pb.AgreedEvaluation(round=agreed.round, loss=agreed.loss, evaluators=agreed.evaluators, statements=agreed.statements)


def _balance(balance: Balance) -> pb.Balance:
    return pb.Balance(
        peer_id=balance.peer_id,
        account=balance.account,
        pending_flops=str(balance.pending_flops),
        verified_flops=str(balance.verified_flops),
        final_flops=str(balance.final_flops),
        rounds=balance.rounds,
        tokens=balance.tokens,
    )


def _fitting(entries: list[bytes]) -> list[bytes]:
    """As many entries as one message should hold, and at least one."""
    size = 0
    for count, entry in enumerate(entries):
        size += len(entry)
        if count and size > ENTRIES_PER_MESSAGE_BYTES:
            return entries[:count]
    return entries
