"""Opens what peers report: reads it, checks its signatures, and those of a round's proposal once for all who bring it."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

from coordinator.guard import Guard
from coordinator.journal import Journal
from coordinator.limits import MAX_REPORT_BYTES
from coordinator.signatures import SignatureChecker
from coordinator.state import Reported
from swarm.entries import Claim, Nomination, open_proposal, take_report_apart
from swarm.errors import Rejected
from swarm.rpc.v1.coordinator_pb2 import SubmitReportRequest
from swarm.rpc.v1.signed_pb2 import Signed

RECENT_PROPOSALS = 256  # more than there are rounds under way, also while peers hand in what has waited


class _Read(NamedTuple):
    """A report of which no signature was checked, what has to be signed, and the proposal that came with it."""

    claim: Claim
    report: Signed
    signed: Sequence[Signed]
    proposal: Signed | None


class _Nominated(NamedTuple):
    """A proposal whose signature is valid."""

    nomination: Nomination
    signed: Signed


class Opener:
    """Turns requests into events for the journal."""

    def __init__(self, journal: Journal, checker: SignatureChecker, guard: Guard) -> None:
        self._journal = journal
        self._checker = checker
        self._guard = guard
        self._proposals: OrderedDict[bytes, asyncio.Future[_Nominated | None]] = OrderedDict()

    async def open(self, requests: Sequence[SubmitReportRequest]) -> list[Reported | Rejected]:
        """What each report says, or why it is refused."""
        read = [self._read(request) for request in requests]
        refusals = iter(await self._checker.refusals([each.signed for each in read if isinstance(each, _Read)]))
        sound = [each if isinstance(each, Rejected) else next(refusals) or self._counted(each) for each in read]
        new = {each.claim.proposal_hash: each for each in sound if isinstance(each, _Read) and self._is_news(each)}
        nominated = dict(zip(new, await asyncio.gather(*map(self._nominated, new.values())), strict=True))
        return [each if isinstance(each, Rejected) else _event(each, nominated) for each in sound]

    def _read(self, request: SubmitReportRequest) -> _Read | Rejected:
        report = request.report
        try:
            if len(report.payload) > MAX_REPORT_BYTES:
                raise Rejected("too_large", "report", report.signer)
            claim, signed = take_report_apart(report)
            if claim.run_id != self._journal.run_id:
                raise Rejected("wrong_run", "report", claim.peer_id)
        except Rejected as error:
            return error
        return _Read(claim, report, signed, request.proposal if request.HasField("proposal") else None)

    def _counted(self, read: _Read) -> _Read | Rejected:
        try:
            self._guard.take(read.claim.peer_id)
        except Rejected as error:
            return error
        return read

    def _is_news(self, read: _Read) -> bool:
        claim = read.claim
        return read.proposal is not None and not self._journal.credits.knows_proposal(
            claim.run_id, claim.round, claim.proposal_hash
        )

    async def _nominated(self, read: _Read) -> _Nominated | Rejected | None:
        """A round's reports bring the same proposal at the same time: it is opened once, by the first of them."""
        shared = self._proposals.get(read.claim.proposal_hash)
        nominated = await shared if shared is not None else None
        if nominated is not None or read.proposal is None:
            return nominated
        try:
            nomination = open_proposal(read.proposal, check_signatures=False)
            if nomination.proposal_hash != read.claim.proposal_hash:
                return None
            return await self._share(_Nominated(nomination, read.proposal))
        except Rejected as error:
            return error

    async def _share(self, nominated: _Nominated) -> _Nominated:
        """Let others wait while the signature is checked; if it isn't valid, they look at what they have themselves."""
        opening: asyncio.Future[_Nominated | None] = asyncio.get_running_loop().create_future()
        proposal_hash = nominated.nomination.proposal_hash
        self._proposals[proposal_hash] = opening
        if len(self._proposals) > RECENT_PROPOSALS:
            self._proposals.popitem(last=False)
        try:
            await self._checker.check((nominated.signed,))
            opening.set_result(nominated)
        finally:
            if not opening.done():
                opening.set_result(None)
                self._proposals.pop(proposal_hash, None)
        return nominated


def _event(read: _Read, nominated: dict[bytes, _Nominated | Rejected | None]) -> Reported | Rejected:
    found = nominated.get(read.claim.proposal_hash)
    if isinstance(found, Rejected):
        return found
    return Reported(read.claim, read.report, *(found or (None, None)))
