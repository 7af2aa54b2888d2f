"""`AdminService` over gRPC: checks and keeps the operator's signed commands, carries them out, and answers what is asked.

Every command that an admin's key signed is noted with its signature and its outcome before anything follows from it; a command
that was noted before isn't carried out again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import structlog

from coordinator.errors import StoreFailed
from coordinator.guard import Guard
from coordinator.journal import Journal
from coordinator.limits import check_fresh
from coordinator.orders import READS, carry_out
from coordinator.store.interface import Note, Store
from swarm.clock import Clock
from swarm.errors import Rejected
from swarm.messages import open_signed, parse, payload_hash
from swarm.rpc.v1 import coordinator_pb2 as pb
from swarm.rpc.v1.coordinator_pb2_grpc import AdminServiceServicer
from swarm.rpc.v1.signed_pb2 import Signed

DEFAULT_LIMIT, MAX_LIMIT = 100, 10_000
DONE = "done"

log = structlog.get_logger(__name__)


class AdminService(AdminServiceServicer):
    """The operator's one call; who may make it is the guard's matter."""

    def __init__(self, journal: Journal, store: Store, clock: Clock, guard: Guard, others: Sequence[Journal] = ()) -> None:
        self._journal = journal
        self._store = store
        self._clock = clock
        self._guard = guard
        self._others = others
        self._one_at_a_time = asyncio.Lock()

    async def Execute(self, request: pb.ExecuteRequest, context: Any) -> pb.ExecuteResponse:  # noqa: N802
        """Carry out a command."""
        signed = request.command
        command = open_signed(signed, pb.AdminCommand, run_id=self._journal.run_id)
        self._guard.take(signed.signer)
        check_fresh(command.issued_at, self._clock.wall_s(), signed.signer)
        if not self._journal.is_writer:
            raise Rejected("overloaded", "another replica writes; ask that one")
        async with self._one_at_a_time:
            await self._carry_out(signed, command)
        return await self._answer(command)

    async def _carry_out(self, signed: Signed, command: pb.AdminCommand) -> None:
        try:
            changed, outcome = carry_out(self._journal.orders, command), DONE
        except Rejected as error:
            changed, outcome = self._journal.orders, error.reason
            refusal: Rejected | None = error
        else:
            refusal = None
        if command.action not in READS:
            note = Note(payload_hash(signed), int(self._clock.wall_s() * 1e6), signed.SerializeToString(), outcome)
            await self._check_new(note)
            await self._journal.order(changed, note)
            log.info("admin_command", admin=signed.signer, action=command.action, about=command.peer_id, outcome=outcome)
        if refusal is not None:
            raise refusal
        if command.action == "suspend":
            self._journal.presence.forget(command.peer_id)

    async def _check_new(self, note: Note) -> None:
        """A fresh command is among the newest notes if it was noted before."""
        known = await asyncio.to_thread(self._store.notes, MAX_LIMIT)
        if any(each.command_hash == note.command_hash for each in known):
            raise Rejected("already_done", "sign it again to repeat it")

    async def _answer(self, command: pb.AdminCommand) -> pb.ExecuteResponse:
        limit = min(command.limit or DEFAULT_LIMIT, MAX_LIMIT)
        match command.action:
            case "peers":
                return pb.ExecuteResponse(peers=islice(self._peers(), limit))
            case "log":
                notes = await asyncio.to_thread(self._store.notes, limit)
                return pb.ExecuteResponse(log=map(_line, notes))
            case "suspend" | "reinstate" | "invite":
                return pb.ExecuteResponse(peers=[self._peer(command.peer_id)])
            case "runs":
                return pb.ExecuteResponse(runs=map(_run, (self._journal, *self._others)))
        return pb.ExecuteResponse(runs=[_run(self._journal)])

    def _peers(self) -> Iterator[pb.AdminPeer]:
        """Who is suspended, then who is alive, the most recently heard first."""
        suspended = self._journal.orders.suspended
        yield from (self._peer(peer_id) for peer_id in sorted(suspended))
        alive = self._journal.presence.others("", len(self._journal.presence))
        yield from (self._peer(sighting.peer_id) for sighting in alive if sighting.peer_id not in suspended)

    def _peer(self, peer_id: str) -> pb.AdminPeer:
        journal = self._journal
        sighting = journal.presence.sighting(peer_id)
        return pb.AdminPeer(
            peer_id=peer_id,
            admitted=journal.credits.is_admitted(journal.run_id, peer_id),
            alive=sighting is not None,
            age_s=0.0 if sighting is None else max(0.0, self._clock.monotonic_s() - sighting.heard_s),
            round=0 if sighting is None else sighting.round,
            suspended=journal.orders.suspended.get(peer_id, ""),
        )


def _run(journal: Journal) -> pb.AdminRun:
    return pb.AdminRun(
        run_id=journal.run_id,
        name=journal.manifest.name,
        state=journal.orders.state,
        confirmed_round=journal.credits.progress(journal.run_id).confirmed_round,
        peers_alive=len(journal.presence),
        peers_admitted=journal.credits.member_count(journal.run_id),
        ledger_size=len(journal.tree),
        audit_rate=journal.orders.audit_rate,
    )


def _line(note: Note) -> pb.AdminLogLine:
    try:
        signed = parse(Signed, note.command)
        command = parse(pb.AdminCommand, signed.payload)
    except Rejected as error:
        raise StoreFailed("a note in the database can't be read") from error
    return pb.AdminLogLine(
        at_us=note.at_us,
        admin=signed.signer,
        action=command.action,
        about=command.peer_id,
        reason=command.reason,
        outcome=note.outcome,
    )
