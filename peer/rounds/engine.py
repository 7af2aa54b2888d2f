"""Round after round: entering the run, training, taking part, repairing, leaving.

The engine owns the peer's state. It never blocks the loop: arithmetic happens in `pool`, training in its own thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import statistics
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, TypeVar

import structlog

from peer.buffers import buffers
from peer.codec import Codecs, Vector
from peer.evidence import Verdict
from peer.network.node import PeerFailure
from peer.outer import OuterState
from peer.rounds.applying import applied, loss_of, was_skipped
from peer.rounds.auditor import Auditor
from peer.rounds.audits import AuditDesk
from peer.rounds.disputes import Disputes
from peer.rounds.entering import Entered, Entry
from peer.rounds.gathering import Gatherer
from peer.rounds.inbox import Arrival, Inbox, read_delivery
from peer.rounds.keeping import Keeping
from peer.rounds.lapses import Lapses
from peer.rounds.pacing import Pacing, first_exchange_s
from peer.rounds.planning import sample_spans
from peer.rounds.planting import Planter
from peer.rounds.run import Contribution, RoundRun, Services
from peer.rounds.snapshots import Snapshots
from peer.rounds.state import RoundSetup
from peer.rounds.training import TrainingThread
from peer.rounds.values import CommitArrived, Event, JoinArrived, PeerLost, ProposalFacts, RosterMember
from peer.rounds.wire import ResultFacts, full_quota, quota_samples
from peer.sketch import Sketcher
from peer.state import Layout, Snapshot
from peer.tasks import cancel
from swarm import tracing
from swarm.errors import Rejected
from swarm.manifest import DiLoCo, Generate, Sync
from swarm.messages import open_signed, parse, seal
from swarm.rpc.v1.peer_pb2 import Ack, AddressList, Delivery, SyncReply, SyncRequest
from swarm.rpc.v1.signed_pb2 import Adoption, Evidence, JoinRequest, Member, Proposal, Result, SealReply, Signed, Tree

RESULT_WAIT_S = 20.0
RETRY_S, LONGEST_RETRY_S = 0.5, 8.0
DOWNLOAD_HEAD_START_S = 0.75
MAX_BACKLOG = 16
BEHIND_CHECK_S = 2.0
KEEP_BLOBS_ROUNDS = 3
LONGEST_STALL_S = 20.0
STUCK_S = 60.0
OVERLAP_FROM = 0.05

log = structlog.get_logger(__name__)
T = TypeVar("T")
Wish = Literal["train", "finish", "pause", "stop"]


@dataclass(frozen=True)
class Place:
    """Where the peer stands: the round to play, with whom, and from which state root."""

    round_index: int
    roster: tuple[RosterMember, ...]
    base_root: bytes


@dataclass(frozen=True)
class RoundReport:
    """A finished round, for the ledger, the metrics and the log; a `skipped` one was a spike, and changed no weights."""

    round_index: int
    proposal: ProposalFacts
    commit: Signed | None
    result: Signed | None
    root: bytes
    weight: int
    tokens: int
    tokens_total: int
    loss: float
    wall_s: float
    overhead_s: float
    roster_size: int
    skipped: bool = False


class Behind(Exception):
    """The others have gone on without us."""


class RepairNeeded(Exception):
    """The majority holds another root than we do."""


class Disagreement(Exception):
    """Computed again from verified parts, our root is still not the majority's: the others are wrong or forked."""


@dataclass
class Engine:
    """Plays rounds until it is told to leave. `on_round` hears of each finished round."""

    services: Services
    training: TrainingThread
    snapshots: Snapshots
    entry: Entry
    auditor: Auditor
    desk: AuditDesk
    on_round: Callable[[RoundReport], Awaitable[None]]
    on_entered: Callable[[], None] = lambda: None
    planter: Planter | None = None
    keeping: Keeping | None = None
    gatherer: Gatherer | None = None
    pacing: Pacing = field(init=False)
    disputes: Disputes = field(init=False)
    inbox: Inbox = field(default_factory=Inbox)
    wish: Wish = "train"
    place: Place | None = None
    state: OuterState | None = None
    current: RoundRun | None = None
    previous: RoundRun | None = None
    joiners: dict[str, Signed] = field(default_factory=dict)
    last_proposal: ProposalFacts | None = None
    repairs: int = 0
    _download: asyncio.Task[OuterState] | None = None
    _failed_downloads: int = 0
    _train_seconds: float = 0.0
    _backlog: list[tuple[ProposalFacts, Vector | None]] = field(default_factory=list)
    _wake: asyncio.Event = field(default_factory=asyncio.Event)
    _repair: asyncio.Event = field(default_factory=asyncio.Event)
    _results_changed: asyncio.Event = field(default_factory=asyncio.Event)
    _told_stale: bool = False
    _lapses: Lapses = field(default_factory=Lapses)

    def __post_init__(self) -> None:
        manifest = self.services.manifest
        first_s = first_exchange_s(manifest.model.parameters)
        self.pacing = Pacing(manifest.rounds.grace_floor_s, manifest.rounds.grace_mads, first_s)
        self.layout = Layout.of(self.services.manifest)
        self.disputes = Disputes(self.services, self.auditor, self.inbox)
        self.auditor.on_proven = self._on_proven
        self.entry.barred = lambda: self._barred

    # --- what others ask of us ------------------------------------------------------------------------------------------

    async def deliver(self, peer: str, raw: bytes) -> bytes:
        """Answer a delivery: verified and handed to its round, or rejected with the reason."""
        try:
            self._receive(parse(Delivery, raw, peer))
        except Rejected as error:
            self.services.observer.refused(error.sender or peer, error.reason)
            return Ack(rejected=error.reason, detail=error.detail[:200]).SerializeToString()
        return Ack().SerializeToString()

    async def answer_sync(self, peer: str, raw: bytes, file_hashes: Callable[[bytes], tuple[bytes, ...]]) -> bytes:
        """Tell an admitted peer where the run stands, and the chunk hashes of a state or file if it asks for one."""
        request = parse(SyncRequest, raw, peer)
        if request.run_id != self.services.checker.run_id:
            raise Rejected("not_admitted", "sync", peer)
        self.services.admissions.require(peer, request.admission, "sync")
        reply = SyncReply()
        place = self.place
        if place is not None:
            reply.round = place.round_index
            reply.roster.extend(Member(peer_id=member.peer, quota=member.quota) for member in place.roster)
            reply.results.extend(item.signed for item in self.inbox.results(place.round_index - 1).values())
            for member in place.roster:
                reply.addresses[member.peer].CopyFrom(AddressList(addresses=self.addresses_of(member.peer)))
                token = self.services.admissions.token(member.peer)
                if token is not None:
                    reply.admissions.append(token)
        if self.last_proposal is not None:
            reply.proposal.CopyFrom(self.last_proposal.signed)
        if request.proposal_hash and self.previous is not None and self._ended_by(request.proposal_hash):
            reply.spans.extend(span.signed for span in self.previous.state.spans.values() if span.signed is not None)
        if request.state_root:
            reply.chunk_hashes = b"".join(self._chunk_hashes(request.state_root) or file_hashes(request.state_root))
        return reply.SerializeToString()

    def _ended_by(self, proposal_hash: bytes) -> bool:
        return self.last_proposal is not None and self.last_proposal.proposal_hash == proposal_hash

    def _chunk_hashes(self, root: bytes) -> tuple[bytes, ...]:
        return self.snapshots.lease(root) or self.services.residuals.hashes(root)

    def addresses_of(self, peer: str) -> Sequence[str]:
        """Where a peer, or we, can be dialled."""
        node = self.services.post.node
        return node.addresses if peer == node.peer_id else node.known_addresses(peer)

    def _receive(self, delivery: Delivery) -> None:
        body = delivery.WhichOneof("body")
        if body == "result":
            self._on_result(self.services.checker.result(delivery.result))
        elif body == "join_request":
            self._on_join(delivery.join_request)
        elif body == "evidence":
            self._on_evidence(delivery.evidence)
        else:
            if body == "proposal":
                self._learn_admissions(delivery.proposal.proposal)
            elif body == "seal_reply":
                reply = open_signed(delivery.seal_reply, SealReply, run_id=self.services.checker.run_id)
                if reply.HasField("accepted"):
                    self._learn_admissions(reply.accepted)
            elif body == "adoption":
                adoption = open_signed(delivery.adoption, Adoption, run_id=self.services.checker.run_id)
                reply = open_signed(adoption.reply, SealReply, run_id=self.services.checker.run_id)
                self._learn_admissions(reply.accepted)
            for arrival in read_delivery(self.services.checker, delivery):
                if self.previous is not None and arrival.round_index == self.previous.round_index:
                    self.previous.answer(arrival.event)
                    continue
                self.inbox.add(arrival)
                self._pass_on(arrival)
        self._wake.set()

    def _pass_on(self, arrival: Arrival) -> None:
        run = self.current
        if run is None or run.round_index != arrival.round_index:
            return
        if _is_of_another_state(arrival.event, run.setup.base_root):
            raise Rejected("wrong_base", "", arrival.sender)
        run.put(arrival.event)

    def _learn_admissions(self, signed: Signed) -> None:
        for token in open_signed(signed, Proposal, run_id=self.services.checker.run_id).admissions[:64]:
            self.services.admissions.admit(token)

    def _on_result(self, result: ResultFacts) -> None:
        completed = self.inbox.add_result(result)
        if completed is not None and self.current is not None and self.current.round_index == result.round_index:
            self.current.put(completed)
        self._results_changed.set()
        self._count_again()

    def _on_join(self, signed: Signed) -> None:
        request = open_signed(signed, JoinRequest, run_id=self.services.checker.run_id)
        if self.services.admissions.admit(request.admission) != signed.signer:
            raise Rejected("wrong_signer", "admission", signed.signer)
        roster = {member.peer for member in self.place.roster} if self.place is not None else set()
        self.services.admissions.fit(signed.signer, (roster | self.joiners.keys()) - {signed.signer})
        if signed.signer in self._barred:
            raise Rejected("barred", "proven to have cheated", signed.signer)
        self.services.post.node.learn(signed.signer, request.addresses)
        member = self.place is not None and any(item.peer == signed.signer for item in self.place.roster)
        if member and (self.current is None or signed.signer not in self.current.state.lost):
            return
        if len(self.joiners) < 256:
            self.joiners[signed.signer] = request.admission
        if self.current is not None:
            self.current.put(self._join_of(signed.signer, request.admission))

    def _join_of(self, peer: str, admission: Signed) -> JoinArrived:
        return JoinArrived(peer, admission, self.services.admissions.is_newcomer(peer))

    def _on_evidence(self, signed: Signed) -> None:
        """Only members of the roster may take our time with it."""
        notice = self.auditor.check_notice(signed)
        if self.place is None or all(member.peer != signed.signer for member in self.place.roster):
            raise Rejected("not_in_roster", "evidence", signed.signer)
        self.services.post.spawn(self.auditor.hear(signed.signer, notice))

    # --- the loop -------------------------------------------------------------------------------------------------------

    async def play(self) -> str:
        """Take part until told to leave, or the run is over; the reason why it ended."""
        try:
            while True:
                if self.wish == "stop":
                    return self.wish
                if self.wish in ("pause", "finish") and self.place is None:
                    await self._see_others_through()
                    return self.wish
                total = self.services.manifest.rounds.total
                if total and self.place is not None and self.place.round_index > total:
                    await self._see_others_through()
                    return "run_complete"
                if self.place is None:
                    await self._enter()
                    continue
                try:
                    await self._play_round(self.place)
                except RepairNeeded:
                    await self._mend(self.place)
                except Behind:
                    log.warning("fell_behind", round=self.place.round_index)
                    self.place = None
        finally:
            await self.training.drop_early()
            await self._close_rounds()

    async def _see_others_through(self) -> None:
        """Go on serving our last round until everybody in it has said that they have it too, or has had time enough."""
        run, proposal = self.previous, self.last_proposal
        if run is None or proposal is None:
            return
        waited_for = {item.peer for item in proposal.commits}
        deadline = self.services.clock.monotonic_s() + min(LONGEST_STALL_S, self.pacing.exchange_s + self.pacing.patience_s)
        while self.services.clock.monotonic_s() < deadline and self.wish != "stop":
            if waited_for <= self.inbox.results(run.round_index).keys() | run.state.lost:
                return
            self._results_changed.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(0.25):
                    await self._results_changed.wait()

    def ask(self, wish: Wish) -> None:
        """Change what the peer wants: finish, pause or stop."""
        self.wish = wish
        self._wake.set()
        if wish in ("pause", "stop"):
            self.training.stop(wish)
        elif wish == "train":
            self.training.go_on()

    def lost(self, peer: str) -> None:
        """A peer can't be reached."""
        if self.current is not None:
            self.current.put(PeerLost(peer))

    def refused(self, reason: str) -> None:
        """A message of ours wasn't taken: who finds it stale may be past our round."""
        self._told_stale = self._told_stale or reason == "stale"

    def forget(self) -> None:
        """Free the memory that the state takes; it comes back from the checkpoint and from others."""
        self.place = self.state = None
        self.snapshots.clear()
        self.desk.forget()
        buffers.clear()

    async def _enter(self) -> None:
        await self.training.drop_early()
        self.services.observer.state("joining")
        self._forget_download()
        await self._wait_after_failures()
        entering = asyncio.create_task(self.entry.enter(self.inbox))
        try:
            while not entering.done():
                if self.wish != "train":
                    return
                self._wake.clear()
                wake = asyncio.create_task(self._wake.wait())
                await asyncio.wait({entering, wake}, timeout=0.5, return_when=asyncio.FIRST_COMPLETED)
                wake.cancel()
            self._start_at(await entering)
        finally:
            entering.cancel()
            await asyncio.gather(entering, return_exceptions=True)

    async def _wait_after_failures(self) -> None:
        """Where the state couldn't be had, it is asked for again after a while, longer each time."""
        if not self._failed_downloads:
            return
        clock = self.services.clock
        until_s = clock.monotonic_s() + min(LONGEST_RETRY_S, RETRY_S * 2 ** (self._failed_downloads - 1))
        while self.wish == "train" and (left_s := until_s - clock.monotonic_s()) > 0:
            self._wake.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(left_s):
                    await self._wake.wait()

    def _start_at(self, entered: Entered) -> None:
        self.place = Place(entered.round_index, entered.roster, entered.base_root)
        self.state = None
        if isinstance(entered.state, OuterState):
            self._adopt(Snapshot.from_state(entered.state))
        else:
            self._download = asyncio.create_task(entered.state)
        self.inbox.advance(entered.round_index)
        self.services.observer.state("following")
        self.on_entered()
        log.info("entered", round=entered.round_index, roster=len(entered.roster), downloading=self.state is None)

    async def _play_round(self, place: Place) -> None:
        with tracing.span("round", {"swarm.round": place.round_index, "swarm.roster": len(place.roster)}):
            await self._play_traced(place)

    async def _play_traced(self, place: Place) -> None:
        services = self.services
        started = services.clock.monotonic_s()
        self.inbox.advance(place.round_index)
        services.transfer.stall_s = min(LONGEST_STALL_S, self.pacing.exchange_s)
        run = RoundRun(services, self._setup(place), lambda: self.wish in ("finish", "pause"), self._on_proof)
        self.current = run
        self._replay(run, place)
        tasks = [asyncio.create_task(self._contribute(run)), asyncio.create_task(self._watch_behind(run))]
        playing = asyncio.create_task(run.run())
        try:
            proposal = await self._until_done(playing, tasks)
        except BaseException:
            await cancel([playing, *tasks])
            await run.close()
            self.current = None
            raise
        await cancel(tasks)
        await self._finish_round(run, place, proposal, started)

    async def _until_done(self, playing: asyncio.Task[ProposalFacts], tasks: list[asyncio.Task[None]]) -> ProposalFacts:
        """Wait for the round, while watching for a stop, a repair, and helpers that fail."""
        while True:
            if self._repair.is_set():
                raise RepairNeeded
            self._wake.clear()
            wake = asyncio.create_task(self._wake.wait())
            waiting = {playing, wake, *(task for task in tasks if not task.done())}
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            wake.cancel()
            for task in tasks:
                if task.done() and not task.cancelled():
                    task.result()
            if playing.done():
                return playing.result()
            if self.wish == "stop":
                raise Behind

    def _replay(self, run: RoundRun, place: Place) -> None:
        self._drop_misfits(place)
        for peer, admission in self.joiners.items():
            run.put(self._join_of(peer, admission))
        for arrival in self.inbox.events_of(place.round_index):
            if not _is_of_another_state(arrival.event, place.base_root):
                run.put(arrival.event)
        for result in self.inbox.results(place.round_index).values():
            self._on_result(result)

    def _drop_misfits(self, place: Place) -> None:
        """Another leader may have let somebody in with whom a peer that has asked us has no protocol in common."""
        company = {member.peer for member in place.roster}
        for peer in list(self.joiners):
            try:
                self.services.admissions.fit(peer, company - {peer})
            except Rejected as error:
                self.services.observer.refused(peer, error.reason)
                del self.joiners[peer]
            else:
                company.add(peer)

    def _setup(self, place: Place) -> RoundSetup:
        manifest = self.services.manifest
        codec = Codecs(manifest).at(place.round_index)
        return RoundSetup(
            me=self.services.identity.peer_id,
            run_id=self.services.checker.run_id,
            round_index=place.round_index,
            base_root=place.base_root,
            roster=place.roster,
            part_count=codec.part_count,
            all_gather=codec.topology == "all_gather",
            grace_s=self.pacing.grace_s,
            patience_s=self.pacing.patience_s,
            exchange_s=self.pacing.exchange_s,
            min_peers=manifest.rounds.min_peers if place.round_index == 0 else 1,
            max_peers=manifest.rounds.max_peers,
            full_quota=full_quota(manifest, place.round_index + 1),
            shared_quota=isinstance(manifest.strategy, Sync | Generate),
            scale_to_speed=manifest.rounds.scale_to_speed,
            barred=self._barred | self._lapses.barred(place.round_index),
            newcomers=frozenset(member.peer for member in place.roster if self.services.admissions.is_newcomer(member.peer)),
            new_weight=manifest.audit.new_weight,
            quota_samples=quota_samples(manifest),
            quotes_losses=manifest.skip_spikes is not None,
        )

    @property
    def _barred(self) -> frozenset[str]:
        """Who gets no place in a roster: those of whom we have proof, and those that the coordinator has suspended."""
        return self.auditor.docket.barred | self.desk.suspended

    async def _contribute(self, run: RoundRun) -> None:
        """Train, or make a zero update where there is nothing to train from or for."""
        if self._download is not None:
            await asyncio.wait({self._download}, timeout=DOWNLOAD_HEAD_START_S)
            self._take_download()
        quota = next((member.quota for member in run.setup.roster if member.peer == run.setup.me), 0)
        over = run.state.accepted is not None
        if self.state is None or run.round_index == 0 or self.wish != "train" or over or not quota:
            await self.training.drop_early()
            self._show("gathering" if run.round_index == 0 else "following")
            await run.contribute(Contribution(None, 0, 0.0, 0.0))
            return
        self._show("training")
        self.services.faults.reached("training", run.round_index)
        state, attack = self.state, self.services.attack
        quota = quota if attack is None else attack.quota(quota)
        with tracing.span("training", {"swarm.round": run.round_index}):
            if self.training.is_ahead(run.round_index):
                contribution = await self.training.join_early(state.theta, quota, state.tokens)
            elif self.services.manifest.generates:
                first, count = self._span(run)
                contribution = await self.training.write(first, min(count, quota))
            else:
                contribution = await self.training.train(
                    state.theta, run.round_index, run.setup.me, quota, state.tokens, self._sketcher(run)
                )
        self.services.observer.phase("train", contribution.seconds)
        self._show("exchanging")
        if self.planter is not None:
            contribution = self.planter.contribution(run, contribution)
        self._train_seconds = contribution.seconds
        if contribution.weight and self._overlaps(run):
            tokens = state.tokens + sum(member.quota for member in run.setup.roster) * self._tokens_per_step
            self.training.begin_early(run.round_index + 1, run.setup.me, quota, tokens)
        await run.contribute(contribution if attack is None else attack.contribution(contribution))

    def _show(self, reason: str) -> None:
        """Say what we are doing; once we are to pause or to leave, why we do so stays."""
        if self.wish == "train":
            self.services.observer.state(reason)

    def _span(self, run: RoundRun) -> tuple[int, int]:
        """The first sample that is ours to write, and how many are."""
        spans = sample_spans(run.round_index, run.setup.roster, self.services.manifest.strategy.batch_samples)
        return spans[run.setup.me]

    def _sketcher(self, run: RoundRun) -> Sketcher | None:
        """What shows others our work, where they compute it again."""
        setup, size = run.setup, self.services.manifest.model.parameters
        if not self.services.manifest.is_replayed:
            return None
        return Sketcher.of_round(setup.run_id, setup.round_index, setup.base_root, size)

    def _overlaps(self, run: RoundRun) -> bool:
        """Whether to go on training while this round is exchanged."""
        manifest = self.services.manifest
        strategy, total = manifest.strategy, manifest.rounds.total
        ends = self.wish != "train" or (total and run.round_index >= total)
        if not isinstance(strategy, DiLoCo) or strategy.overlap == "off" or ends:
            return False
        return strategy.overlap == "on" or self.pacing.typical_exchange_s > OVERLAP_FROM * self._train_seconds

    @property
    def _tokens_per_step(self) -> int:
        manifest = self.services.manifest
        return manifest.strategy.batch_samples * manifest.data.sequence_length

    async def _watch_behind(self, run: RoundRun) -> None:
        """Notice that the others have moved on: several speak of rounds after the next, or this one goes on without us."""
        stuck_s = 0.0
        while True:
            await asyncio.sleep(BEHIND_CHECK_S)
            stuck_s = stuck_s + BEHIND_CHECK_S if run.state.waiting_for == "no_quorum" else 0.0
            if stuck_s > STUCK_S:
                raise Behind
            ahead = self.inbox.ahead(run.round_index + 1) & set(run.setup.peers)
            if len(ahead) * 2 >= len(run.setup.others) and ahead:
                raise Behind
            if run.state.waiting_for == "no_quorum" and await self.entry.others_are_past(run.round_index):
                raise Behind
            told_stale, self._told_stale = self._told_stale, False
            if told_stale and await self.entry.others_are_past(run.round_index + 1):
                raise Behind

    async def _finish_round(self, run: RoundRun, place: Place, proposal: ProposalFacts, started: float) -> None:
        services = self.services
        completed_s = services.clock.monotonic_s()
        numbers = {"swarm.round": run.round_index, "swarm.commits": len(proposal.commits)}
        with tracing.span("exchange", numbers, started_s_ago=completed_s - (run.committed_s or completed_s)):
            pass
        merged = run.exchange.merged(proposal)
        services.faults.reached("merge", run.round_index)
        mine = proposal.included(run.setup.me)
        self.services.residuals.settle(mine is not None and bool(mine.weight), run.exchange.span_merge(proposal.proposal_hash))
        before = self.state
        if self.gatherer is not None:
            commits = [run.state.commits[item.peer] for item in proposal.contributors if item.peer in run.state.commits]
            await self.gatherer.gather(run.round_index, run.setup.roster, commits)
        with tracing.span("merge", {"swarm.round": run.round_index}):
            snapshot = await self._apply(run, proposal, merged)
        if self.keeping is not None and snapshot is not None:
            self.keeping.keep(run, proposal, self.snapshots.previous, snapshot)
        self.desk.keep(run, before, services.clock.monotonic_s() - started)
        run.exchange.forget_merged()
        del merged
        services.observer.phase("exchange", completed_s - (run.committed_s or completed_s))
        services.observer.phase("apply", services.clock.monotonic_s() - completed_s)
        self._retire(run, proposal)
        result = self._announce_result(run, proposal, snapshot) if snapshot is not None else None
        root = snapshot.root if snapshot is not None else await self._majority_root(place.round_index, proposal)
        members = proposal.next_roster
        here = any(member.peer == run.setup.me for member in members) and not run.leaving
        self.joiners = {peer: token for peer, token in self.joiners.items() if all(peer != member.peer for member in members)}
        self._observe_pace(run, completed_s)
        self._lapses.note(run.state.dropped - run.state.lost if run.state.leads else (), place.round_index)
        skipped = was_skipped(before, snapshot.state) if before is not None and snapshot is not None else None
        await self.on_round(replace(self._report(run, proposal, result, root, started), skipped=bool(skipped)))
        self.place = Place(place.round_index + 1, members, root) if here else None
        services.faults.reached("apply", run.round_index)
        self.inbox.advance(place.round_index + 1)
        if snapshot is not None:
            self._check_agreement(snapshot)
        services.post.spawn(self.auditor.after(run, proposal, skipped))

    async def _apply(self, run: RoundRun, proposal: ProposalFacts, merged: Vector | None) -> Snapshot | None:
        """The next state, or None while our own is still being downloaded."""
        self._take_download()
        if self.state is None:
            self._backlog.append((proposal, None if merged is None else merged.copy()))
            if len(self._backlog) > MAX_BACKLOG:
                raise Behind
            return None
        before = self.state
        state = await self._in_pool(self._next_state, before, proposal, merged)
        if was_skipped(before, state):
            await self._start_over(proposal, before, state)
        self._begin_next(run, proposal, state)
        snapshot = await self._in_pool(Snapshot.from_state, state)
        self._adopt(snapshot)
        return snapshot

    async def _start_over(self, proposal: ProposalFacts, before: OuterState, after: OuterState) -> None:
        """The round was a spike: let nothing of our work in it reach the next."""
        usual = round(statistics.median(before.recent.losses), 4) if before.recent.losses else None
        loss, skipped = round(loss_of(proposal), 4), after.recent.skipped
        log.warning("round_skipped", round=before.round, loss=loss, usual=usual, norm=after.recent.norms[-1:], skipped=skipped)
        self.services.residuals.disown()
        await self.training.start_over()

    def _begin_next(self, run: RoundRun, proposal: ProposalFacts, state: OuterState) -> None:
        """Train from the next state while it is hashed; not where what we show of our work depends on the hash."""
        manifest, following = self.services.manifest, run.round_index + 1
        quota = next((member.quota for member in proposal.next_roster if member.peer == run.setup.me), 0)
        ends = run.leaving or self.wish != "train" or 0 < manifest.rounds.total < following
        if ends or not quota or manifest.shows_work or self.services.attack is not None or self.training.is_ahead(following):
            return
        self.training.begin(state.theta, following, run.setup.me, quota, state.tokens)

    def _next_state(self, state: OuterState, proposal: ProposalFacts, merged: Vector | None) -> OuterState:
        return applied(self.services.manifest, state, proposal, merged)

    def _adopt(self, snapshot: Snapshot) -> None:
        self.state = snapshot.state
        self.snapshots.add(snapshot)

    def _take_download(self) -> None:
        """Bring a finished download up to date with the rounds that have passed meanwhile."""
        if self._download is None or not self._download.done():
            return
        download, backlog = self._download, self._backlog
        self._download, self._backlog = None, []
        try:
            state = download.result()
        except (PeerFailure, Rejected, OSError, RuntimeError) as error:
            log.warning("download_failed", error=str(error))
            self._failed_downloads += 1
            raise Behind from error
        self._failed_downloads = 0
        for proposal, merged in backlog:
            state = self._next_state(state, proposal, merged)
        snapshot = Snapshot.from_state(state)
        if self.place is not None and snapshot.root != self.place.base_root:
            raise Behind
        self._adopt(snapshot)

    def _forget_download(self) -> None:
        if self._download is not None:
            self._download.cancel()
        self._download, self._backlog = None, []

    def _announce_result(self, run: RoundRun, proposal: ProposalFacts, snapshot: Snapshot) -> Signed:
        tree = Tree(root=snapshot.root, size_bytes=snapshot.size_bytes, chunk_bytes=1 << 20)
        message = Result(
            run_id=run.setup.run_id,
            round=run.round_index,
            proposal_hash=proposal.proposal_hash,
            state=tree,
            tokens_total=snapshot.state.tokens,
        )
        signed = seal(self.services.identity, message)
        self.inbox.add_result(self.services.checker.result(signed))
        everybody = {*run.setup.others, *(member.peer for member in proposal.next_roster)}
        self.services.post.send(everybody, Delivery(result=signed))
        return signed

    def _retire(self, run: RoundRun, proposal: ProposalFacts) -> None:
        self.last_proposal = proposal
        self.current = None
        if self.previous is not None:
            self.services.post.spawn(self.previous.close())
        self.previous = run
        self.services.transfer.store.drop_before(run.round_index - KEEP_BLOBS_ROUNDS)

    def _observe_pace(self, run: RoundRun, completed_s: float) -> None:
        arrivals = list(run.state.arrived_s.values())
        if run.round_index and run.accepted_s:
            self.pacing.observe(arrivals, run.accepted_s, completed_s)

    def _report(self, run: RoundRun, proposal: ProposalFacts, result: Signed | None, root: bytes, started: float) -> RoundReport:
        mine = proposal.included(run.setup.me)
        commits = [run.state.commits[item.peer] for item in proposal.contributors if item.peer in run.state.commits]
        weight = sum(item.weight for item in proposal.contributors)
        wall_s = self.services.clock.monotonic_s() - started
        return RoundReport(
            round_index=run.round_index,
            proposal=proposal,
            commit=run.commit if mine is not None and mine.weight else None,
            result=result,
            root=root,
            weight=mine.weight if mine is not None else 0,
            tokens=weight * self.services.manifest.tokens_per_weight,
            tokens_total=self.state.tokens if self.state is not None else 0,
            loss=sum(item.loss * item.weight for item in commits) / max(1, sum(item.weight for item in commits)),
            wall_s=wall_s,
            overhead_s=max(0.0, wall_s - max((item.seconds for item in commits), default=0.0)),
            roster_size=len(run.setup.roster),
        )

    # --- agreement and repair -------------------------------------------------------------------------------------------

    def _check_agreement(self, snapshot: Snapshot) -> None:
        proposal = self.last_proposal
        if proposal is None or self.previous is None or self.previous.round_index != snapshot.round - 1:
            return
        found = self.disputes.agreement(self.previous, proposal, snapshot.root)
        if found.verdict == "differs":
            self._repair.set()
            self._wake.set()
        elif found.verdict != "agreed" and (others := self.disputes.to_compare(self.previous, proposal, snapshot.root)):
            self.services.post.spawn(self.disputes.is_contradicted(self.previous, proposal, others))

    def _count_again(self) -> None:
        snapshot = self.snapshots.newest
        if self.state is not None and snapshot is not None:
            self._check_agreement(snapshot)

    def _on_proven(self, verdict: Verdict) -> None:
        """Tell the coordinator; and count again what the others hold, now without the accused."""
        self.desk.convict(verdict)
        self._count_again()

    def _on_proof(self, run: RoundRun, evidence: Evidence) -> None:
        self.services.post.spawn(self.auditor.prove(run, evidence))

    async def _majority_root(self, round_index: int, proposal: ProposalFacts) -> bytes:
        """The root that most participants of a round hold. Raises `Behind` if they don't say so in time."""
        voters = [item.peer for item in proposal.commits if item.peer != self.services.identity.peer_id]
        deadline = self.services.clock.monotonic_s() + RESULT_WAIT_S
        while self.services.clock.monotonic_s() < deadline:
            found = self.inbox.agreement(round_index, voters, None)
            if found.root is not None:
                return found.root
            self._results_changed.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(0.5):
                    await self._results_changed.wait()
        raise Behind

    async def _mend(self, place: Place) -> None:
        """Repair our state, or enter anew where that can't be done."""
        try:
            await self._repair_state(place)
        except (Behind, PeerFailure, Rejected) as error:
            log.warning("not_repaired", round=place.round_index, error=str(error))
            self.place = None

    async def _repair_state(self, place: Place) -> None:
        """Our root isn't the majority's. Compute again: if that gives theirs, our memory was wrong; otherwise fetch what differs.

        Raises `Disagreement` when verified parts and an undamaged state give our own root again, and no reducer is proven to have
        sent us other parts than the others.
        """
        self._repair.clear()
        self.services.observer.state("repairing")
        self.repairs += 1
        proposal, run = self.last_proposal, self.previous
        if proposal is None or run is None or run.round_index != place.round_index - 1:
            raise Behind
        found = self.disputes.agreement(run, proposal, place.base_root)
        if found.verdict != "differs" or found.root is None:
            return
        snapshot = await self._in_pool(self._recomputed, run, proposal)
        log.warning("root_differs", round=run.round_index, recomputed=snapshot.root_hex[:12] if snapshot else None)
        honest = snapshot is not None and snapshot.root == place.base_root
        if honest and not await self.disputes.is_contradicted(run, proposal, found.holders):
            raise Disagreement(f"round {run.round_index}: {place.base_root.hex()[:12]} here, {found.root.hex()[:12]} elsewhere")
        found = self.disputes.agreement(run, proposal, place.base_root)  # who is proven guilty since has no vote any more
        if found.verdict != "differs" or found.root is None:
            return
        if snapshot is None or snapshot.root != found.root:
            state = await self.entry.fetch_state(found.root, found.holders, self.snapshots.newest)
            snapshot = await self._in_pool(Snapshot.from_state, state)
        self._adopt(snapshot)
        self.place = replace(place, base_root=found.root)
        self._check_agreement(snapshot)  # somebody may have been proven guilty while it was fetched

    def _recomputed(self, run: RoundRun, proposal: ProposalFacts) -> Snapshot | None:
        """The state after a round, from the state before it and the stored parts, every hash checked; None if damaged."""
        before = self.snapshots.previous
        if before is None or Snapshot.from_state(before.state).root != before.root:
            return None
        try:
            merged = run.exchange.collected_again(proposal, run.state.commits, tuple(run.state.spans.values()))
        except Rejected:
            return None
        return Snapshot.from_state(self._next_state(before.state, proposal, merged))

    async def _close_rounds(self) -> None:
        self._forget_download()
        for run in (self.current, self.previous):
            if run is not None:
                await run.close()
        self.current = self.previous = None

    async def _in_pool(self, function: Callable[..., T], *args: object) -> T:
        return await asyncio.get_running_loop().run_in_executor(self.services.pool, function, *args)


def _is_of_another_state(event: Event, base_root: bytes) -> bool:
    """Whether it is a commit of work that started from another state."""
    return isinstance(event, CommitArrived) and event.commit.base_root != base_root
