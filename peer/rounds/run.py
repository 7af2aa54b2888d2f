"""One round, carried out: it feeds events to the state machine and performs the actions that follow.

Everything that can fail is a task whose outcome comes back as an event; nothing here decides.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import structlog
import torch

from peer.admissions import Admissions
from peer.codec import Codecs, Vector
from peer.faults import Faults
from peer.frauds import BAD_PART, EQUIVOCATION
from peer.generating import Sample
from peer.leaves import Leaf, pack
from peer.network.node import PeerFailure, Unreachable
from peer.network.transfer import Transfer
from peer.rounds import machine
from peer.rounds.exchange import Exchange
from peer.rounds.parts import Undecodable
from peer.rounds.planning import roster_hash
from peer.rounds.post import Post
from peer.rounds.residuals import Residuals
from peer.rounds.state import RoundSetup, RoundState
from peer.rounds.values import (
    Action,
    Adopt,
    BallotNumber,
    CommitFacts,
    Complain,
    Complete,
    Event,
    Expose,
    FetchFailed,
    FetchSpan,
    ForwardDecision,
    GrantArrived,
    PeerAlive,
    PeerLost,
    Probe,
    ProposalArrived,
    ProposalFacts,
    Propose,
    Reduce,
    Reduced,
    Refuse,
    RequestGrant,
    ResendProposal,
    SealReplyFacts,
    SendCommit,
    SendReady,
    SendSeal,
    SendSealReply,
    SpanFacts,
    SpanFetched,
    Tick,
    Trained,
)
from peer.rounds.wire import ATTEMPT_BYTES, Checker, build_proposal
from swarm.clock import Clock
from swarm.errors import Rejected
from swarm.identity import Identity
from swarm.manifest import Manifest
from swarm.merkle import root_of
from swarm.messages import parse, seal
from swarm.rpc.v1.peer_pb2 import AnnouncedProposal, Delivery
from swarm.rpc.v1.signed_pb2 import (
    Adoption,
    AnnouncedCommit,
    Ballot,
    Commit,
    Complaint,
    Evidence,
    Grant,
    MergedSpan,
    Proposal,
    Ready,
    Seal,
    SealReply,
    Signed,
)

TICK_S = 0.1
QUEUE_LIMIT = 8192

log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class Contribution:
    """What training gave: the update, [parameters], with its weight in samples; None for a zero update.

    `leaves` are what others can check, where the run is audited, or `piece`, where it generates; then the weight is in tokens.
    """

    update: Vector | None
    weight: int
    loss: float
    seconds: float
    leaves: tuple[Leaf, ...] = ()
    precision: str = "fp32"
    piece: bytes = b""


class Attack(Protocol):
    """What a hostile peer does otherwise; see `peer.attacks`."""

    def quota(self, quota: int) -> int:
        """How much of its work it does."""

    def contribution(self, honest: Contribution) -> Contribution:
        """What it commits."""

    async def copied(self, round_run: RoundRun) -> CommitFacts | None:
        """Another's commit that it passes off as its own."""

    def labels(self, labels: torch.Tensor, vocabulary: int) -> torch.Tensor:
        """What it trains on."""

    def samples(self, written: Sequence[Sample]) -> Sequence[Sample]:
        """What it gives out for samples that it should have written."""

    def proposals(self, message: Proposal) -> list[Proposal]:
        """What it proposes, each to a share of the roster."""

    def again(self, delivery: Delivery) -> list[Delivery]:
        """What it sends besides a message."""

    def served(self, chunk: memoryview | None) -> bytes | memoryview | None:
        """A chunk of the weights."""

    def parts(self, parts: list[bytes]) -> list[bytes]:
        """What it serves."""

    def merged(self, values: Vector) -> Vector:
        """What it merges a part to."""


class Observer(Protocol):
    """Who is told what happens: metrics and the status."""

    def refused(self, sender: str, reason: str) -> None:
        """A message was rejected."""

    def merged(self, weights: Sequence[int], scales: Sequence[float]) -> None:
        """A part of each contributor was merged by us, each scaled by a factor of at most 1."""

    def merge_checked(self, outcome: str) -> None:
        """Another's merged part was merged again, or couldn't be."""

    def proven(self, kind: str) -> None:
        """A proof of fraud holds."""

    def audited(self, finding: str) -> None:
        """We have audited a contribution."""

    def evaluated(self, outcome: str, loss: float | None = None) -> None:
        """We have measured a held-out loss, or couldn't."""

    def phase(self, name: str, seconds: float) -> None:
        """A part of the round took this long."""

    def state(self, reason: str) -> None:
        """What the peer is doing now, as a reason code."""


@dataclass(frozen=True)
class Services:
    """What a round works with."""

    manifest: Manifest
    signed_manifest: Signed
    identity: Identity
    checker: Checker
    admissions: Admissions
    post: Post
    transfer: Transfer
    residuals: Residuals
    pool: ThreadPoolExecutor
    observer: Observer
    clock: Clock
    ask_grant: Callable[[RoundSetup, tuple[str, ...]], Awaitable[Signed | None]]
    faults: Faults
    attack: Attack | None = None


@dataclass
class RoundRun:
    """A round in progress, and afterwards its record: it goes on answering for the round until the next one is done."""

    services: Services
    setup: RoundSetup
    is_leaving: Callable[[], bool]
    on_proof: Callable[[RoundRun, Evidence], None]
    attempt: bytes = field(default_factory=lambda: secrets.token_bytes(ATTEMPT_BYTES))
    state: RoundState = field(init=False)
    exchange: Exchange = field(init=False)
    commit: Signed | None = None
    leaving: bool = False
    train_started_s: float = 0.0
    committed_s: float = 0.0
    accepted_s: float = 0.0
    _events: asyncio.Queue[Event] = field(init=False)
    _tasks: set[asyncio.Task[Any]] = field(default_factory=set)
    _bulk: set[asyncio.Task[Any]] = field(default_factory=set)
    _fetching: dict[tuple[bytes, str], frozenset[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        services = self.services
        self._events = asyncio.Queue(QUEUE_LIMIT)
        self.state = machine.begin(self.setup, services.clock.monotonic_s())
        self.exchange = Exchange(
            self.setup.round_index,
            self.setup.me,
            Codecs(services.manifest).at(self.setup.round_index),
            services.transfer,
            services.pool,
            services.manifest.merge,
            services.residuals,
            services.observer.merged,
        )
        if services.attack is not None:
            self.exchange.distort, self.exchange.mangle = services.attack.merged, services.attack.parts

    @property
    def round_index(self) -> int:
        """The round's number."""
        return self.setup.round_index

    def put(self, event: Event) -> None:
        """Hand over an event; a full queue drops it, since every message that matters is repeated or asked for."""
        with contextlib.suppress(asyncio.QueueFull):
            self._events.put_nowait(event)

    async def contribute(self, contribution: Contribution) -> None:
        """Encode what training gave, sign the commit and hand it to the machine."""
        started = self.services.clock.monotonic_s()
        hashes: tuple[bytes, ...] = ()
        evidence = b""
        if contribution.update is not None and contribution.weight:
            hashes = await self.exchange.publish(contribution.update)
            evidence = self._keep_evidence(contribution, hashes)
        copied = await self.services.attack.copied(self) if self.services.attack is not None else None
        if copied is not None:
            hashes, evidence = copied.part_hashes, copied.evidence_root
            contribution = replace(contribution, weight=copied.weight)
        self.services.observer.phase("encode", self.services.clock.monotonic_s() - started)
        self.leaving = self.is_leaving()
        announced = self._sign_commit(contribution, hashes, evidence)
        self.commit = announced.commit
        self.committed_s = self.services.clock.monotonic_s()
        _, facts = self.services.checker.commit(announced)
        self.put(Trained(facts))

    async def run(self) -> ProposalFacts:
        """Take part until every merged part is here; the proposal that made the round."""
        while True:
            event: Event
            try:
                async with asyncio.timeout(TICK_S):
                    event = await self._events.get()
            except TimeoutError:
                event = Tick()
            done = self._step(event)
            if done is not None:
                return done

    def answer(self, event: Event) -> None:
        """Take an event after the round is over: late seals and complaints still get their answer."""
        self._step(event)

    async def close(self) -> None:
        """Cancel everything that is still under way."""
        for task in [*self._tasks, *self._bulk]:
            task.cancel()
        await asyncio.gather(*self._tasks, *self._bulk, return_exceptions=True)

    def _step(self, event: Event) -> ProposalFacts | None:
        before = self.state.accepted
        self.state, actions = machine.step(self.state, event, self.services.clock.monotonic_s())
        accepted = self.state.accepted
        if accepted is not None and accepted is not before:
            self.accepted_s = self.services.clock.monotonic_s()
            self.exchange.begin(accepted.proposal_hash)
            self._abandon_bulk()
            self.services.faults.reached("proposal", self.round_index)
        done = None
        for action in actions:
            if isinstance(action, Complete):
                done = action.proposal
            else:
                self._perform(action)
        return done

    def _abandon_bulk(self) -> None:
        for task in self._bulk:
            task.cancel()
        self._fetching.clear()

    def _perform(self, action: Action) -> None:
        match action:
            case SendCommit(commit):
                self._to_roster(Delivery(commit=commit.signed))
                self.services.faults.reached("commit", self.round_index)
            case Propose():
                self._propose(action)
            case ResendProposal(to):
                self._resend(to)
            case SendSeal(ballot, reason):
                log.info("round_sealed", round=self.round_index, term=ballot.term, amendment=ballot.amendment, reason=reason)
                message = Seal(run_id=self.setup.run_id, round=self.round_index, ballot=_ballot(ballot), reason=reason)
                self._to_roster(Delivery(seal=seal(self.services.identity, message)))
            case SendSealReply(to, ballot):
                self.services.post.send([to], Delivery(seal_reply=seal(self.services.identity, self._seal_reply(ballot))))
            case SendReady(ballot, proposal_hash, again):
                ready = Ready(
                    run_id=self.setup.run_id,
                    round=self.round_index,
                    ballot=_ballot(ballot),
                    proposal_hash=proposal_hash,
                    again=again,
                )
                self._to_roster(Delivery(ready=seal(self.services.identity, ready)))
            case Adopt(ballot, reply, to):
                self._adopt(ballot, reply, to)
            case ForwardDecision(reply):
                self._to_roster(Delivery(seal_reply=reply.signed))
            case Reduce(proposal):
                self._run_bulk(self._reduce(proposal, action.holders))
            case FetchSpan(span, sources):
                self._fetch_span(span, sources)
            case Complain(leader, about, reason):
                self._complain(leader, about, reason)
            case Probe(peer):
                self._run(self._probe(peer))
            case RequestGrant(present):
                self._run(self._request_grant(present))
            case Refuse(sender, reason):
                self.services.observer.refused(sender, reason)
            case Expose(first, second):
                self.on_proof(self, Evidence(kind=EQUIVOCATION, statements=[first, second]))
            case Complete():
                pass

    # --- messages -------------------------------------------------------------------------------------------------------

    def _keep_evidence(self, contribution: Contribution, hashes: tuple[bytes, ...]) -> bytes:
        """Keep what auditors will ask for, for as long as they may; the hash of the leaves, empty where nobody computes again.

        Of a piece it is the hash of the piece itself.
        """
        manifest, store = self.services.manifest, self.services.transfer.store
        if not (manifest.is_audited or manifest.generates):
            return b""
        until = self.round_index + manifest.audit.within_rounds
        store.keep_until(hashes, until)
        if not manifest.shows_work:
            return b""
        shown = contribution.piece if manifest.generates else pack(contribution.leaves, contribution.precision)
        name = store.put(shown, self.round_index)
        store.keep_until((name,), until)
        return name

    def _sign_commit(self, contribution: Contribution, hashes: tuple[bytes, ...], evidence: bytes) -> AnnouncedCommit:
        manifest = self.services.manifest
        message = Commit(
            run_id=self.setup.run_id,
            round=self.round_index,
            base_root=self.setup.base_root,
            weight=contribution.weight if hashes else 0,
            tokens=(contribution.weight if hashes else 0) * manifest.tokens_per_weight,
            codec=self.exchange.codec.kind,
            parts_root=root_of(hashes) if hashes else b"",
            part_count=len(hashes),
            payload_bytes=0,
            evidence_root=evidence,
            loss=contribution.loss,
            train_seconds=contribution.seconds,
            upload_bytes_per_s=int(self.services.transfer.upload_meter.bytes_per_s),
            leaving=self.leaving,
        )
        return AnnouncedCommit(commit=seal(self.services.identity, message), part_hashes=b"".join(hashes))

    def _propose(self, action: Propose) -> None:
        services = self.services
        joiners = [services.admissions.token(peer) for peer in action.joiners]
        message = build_proposal(
            run_id=self.setup.run_id,
            round_index=self.round_index,
            base_root=self.setup.base_root,
            ballot=action.ballot,
            attempt=self.attempt,
            commits=action.commits,
            next_roster=action.next_roster,
            roster=roster_hash(self.setup.roster),
            grant=self.state.grant,
            admissions=[token for token in joiners if token is not None],
        )
        messages = [message] if services.attack is None else services.attack.proposals(message)
        signed, *_ = proposals = [seal(services.identity, each) for each in messages]
        told = sorted({*self.setup.others, *action.joiners})
        for place, proposal in enumerate(proposals):
            announced = AnnouncedProposal(proposal=proposal, commits=[item.signed for item in action.forward])
            services.post.send(told[place :: len(proposals)], Delivery(proposal=announced))
        _, facts = services.checker.proposal(signed)
        self.put(ProposalArrived(facts))

    def _resend(self, to: str) -> None:
        proposal = self.state.accepted
        if proposal is None:
            return
        commits = [self.state.commits[item.peer].signed for item in proposal.commits if item.peer in self.state.commits]
        announced = AnnouncedProposal(proposal=proposal.signed, commits=commits)
        self.services.post.send([to], Delivery(proposal=announced))

    def _adopt(self, ballot: BallotNumber, reply: SealReplyFacts | None, to: str) -> None:
        log.info("proposal_adopted", round=self.round_index, term=ballot.term, amendment=ballot.amendment)
        ours = seal(self.services.identity, self._seal_reply(ballot)) if reply is None else reply.signed
        message = Adoption(run_id=self.setup.run_id, round=self.round_index, ballot=_ballot(ballot), reply=ours)
        delivery = Delivery(adoption=seal(self.services.identity, message))
        if to:
            self.services.post.send([to], delivery)
        else:
            self._to_roster(delivery)

    def _seal_reply(self, ballot: BallotNumber) -> SealReply:
        state = self.state
        holds = [peer for peer, commit in state.commits.items() if self._holds(commit)] if self.setup.all_gather else []
        ready = state.complete or state.gathered
        return SealReply(
            run_id=self.setup.run_id,
            round=self.round_index,
            ballot=_ballot(ballot),
            accepted=state.accepted.signed if state.accepted is not None else None,
            complete=state.complete,
            ready=ready,
            standing=_ballot(state.standing),
            commits=[commit.signed for commit in state.commits.values()],
            spans=[span.signed for span in state.spans.values() if span.signed is not None] if ready else [],
            holds=holds,
        )

    def _holds(self, commit: CommitFacts) -> bool:
        return bool(commit.weight) and not self.services.transfer.store.missing(commit.part_hashes)

    def _complain(self, leader: str, about: str, reason: str) -> None:
        proposal = self.state.accepted
        log.info("complaint", round=self.round_index, about=about, reason=reason)
        message = Complaint(
            run_id=self.setup.run_id,
            round=self.round_index,
            proposal_hash=proposal.proposal_hash if proposal is not None else b"",
            about=about,
            reason=reason,
        )
        self.services.post.send([leader], Delivery(complaint=seal(self.services.identity, message)))

    def _to_roster(self, delivery: Delivery) -> None:
        self.services.post.send(self.setup.others, delivery)
        for old in self.services.attack.again(delivery) if self.services.attack is not None else ():
            self.services.post.send(self.setup.others, old)

    # --- bulk work ------------------------------------------------------------------------------------------------------

    async def _reduce(self, proposal: ProposalFacts, holders: tuple[str, ...]) -> None:
        mine = proposal.included(self.setup.me)
        everything = self.setup.all_gather
        first, count = (0, self.setup.part_count) if everything or mine is None else (mine.first_part, mine.part_span)
        started = self.services.clock.monotonic_s()
        commits = dict(self.state.commits)
        try:
            parts = range(first, first + count)
            hashes = await self.exchange.reduce(proposal, commits, parts, publish=not everything, holders=holders)
            before, after = self.exchange.residual_roots(proposal.proposal_hash)
        except (PeerFailure, Rejected) as error:
            if isinstance(error, Undecodable):
                announced = commits[error.sender].signed
                self.on_proof(self, Evidence(kind=BAD_PART, commits=[announced], part=error.part, contents=[error.content]))
            self._fetch_failed(proposal.proposal_hash, error, merged=False)
            return
        self.services.observer.phase("merge", self.services.clock.monotonic_s() - started)
        span = SpanFacts(self.setup.me, proposal.proposal_hash, first, hashes)
        if not everything:
            message = MergedSpan(
                run_id=self.setup.run_id,
                round=self.round_index,
                proposal_hash=proposal.proposal_hash,
                first_part=first,
                part_hashes=list(hashes),
                residual_before=before,
                residual_after=after,
                attempt=self.attempt,
            )
            signed = seal(self.services.identity, message)
            span = SpanFacts(self.setup.me, proposal.proposal_hash, first, hashes, signed)
            self._to_roster(Delivery(merged_span=signed))
        self.put(Reduced(span))
        self.services.faults.reached("reduce", self.round_index)

    def _fetch_span(self, span: SpanFacts, sources: tuple[str, ...]) -> None:
        """Fetch, unless a fetch from all these sources is under way; a stalled one doesn't keep a helper from being asked."""
        if span.reducer in self.state.fetched:
            return
        key = (span.proposal_hash, span.reducer)
        new = tuple(source for source in sources if source not in self._fetching.get(key, frozenset()))
        if new:
            self._fetching[key] = self._fetching.get(key, frozenset()) | set(new)
            self._run_bulk(self._fetch_span_from(span, new, key))

    async def _fetch_span_from(self, span: SpanFacts, sources: tuple[str, ...], key: tuple[bytes, str]) -> None:
        failure: PeerFailure | Rejected | None = None
        for source in sources:
            try:
                await self.exchange.fetch_span(span, source)
            except (PeerFailure, Rejected) as error:
                failure = error
                if isinstance(error, Undecodable):
                    self.on_proof(self, Evidence(kind=BAD_PART, span=span.signed, part=error.part, contents=[error.content]))
                    break
                continue
            self.put(SpanFetched(span.proposal_hash, span.reducer))
            return
        self._fetching[key] = self._fetching.get(key, frozenset()) - set(sources)
        if failure is not None:
            self._fetch_failed(span.proposal_hash, failure, merged=True, peer=span.reducer)

    def _fetch_failed(self, proposal_hash: bytes, error: PeerFailure | Rejected, *, merged: bool, peer: str = "") -> None:
        reason = error.reason
        about = peer or (error.sender if isinstance(error, Rejected) else error.peer)
        log.info("fetch_failed", round=self.round_index, peer=about, reason=reason, merged=merged)
        if isinstance(error, Rejected):
            self.services.observer.refused(about, reason)
        self.put(FetchFailed(proposal_hash, about, merged, reason))

    # --- probes and grants ----------------------------------------------------------------------------------------------

    async def _probe(self, peer: str) -> None:
        try:
            if await self.services.post.ping(peer):
                self.put(PeerAlive(peer))
        except Unreachable:
            self.put(PeerLost(peer))

    async def _request_grant(self, present: tuple[str, ...]) -> None:
        self.services.observer.state("no_quorum")
        grant = await self.services.ask_grant(self.setup, present)
        if grant is not None:
            self.put(GrantArrived(grant, tuple(parse(Grant, grant.payload).present)))

    def _run(self, work: Coroutine[Any, Any, None]) -> None:
        self._track(self._tasks, work)

    def _run_bulk(self, work: Coroutine[Any, Any, None]) -> None:
        self._track(self._bulk, work)

    @staticmethod
    def _track(group: set[asyncio.Task[Any]], work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        group.add(task)
        task.add_done_callback(lambda done: _finish(group, done))


def _finish(group: set[asyncio.Task[Any]], task: asyncio.Task[Any]) -> None:
    group.discard(task)
    if not task.cancelled() and task.exception() is not None:
        log.error("round_task_failed", exc_info=task.exception())


def _ballot(ballot: BallotNumber) -> Ballot:
    return Ballot(term=ballot.term, amendment=ballot.amendment)
