"""Entering a run: find the roster, ask to be admitted, learn the agreed state, fetch it by chunks from many peers."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import structlog

from peer.network.node import PeerFailure
from peer.network.transfer import MissingBlob
from peer.outer import OuterState
from peer.rounds import agreement
from peer.rounds.inbox import ROUNDS_AHEAD, Inbox
from peer.rounds.planning import quorum_of
from peer.rounds.run import Services
from peer.rounds.state import NEVER_S
from peer.rounds.values import ProposalFacts, RosterMember
from peer.rounds.wire import full_quota
from peer.state import Layout, Snapshot, check_chunk_hashes, differing_chunks, to_state
from peer.tasks import cancel
from swarm.errors import Rejected
from swarm.messages import seal, split_hashes
from swarm.protocol import DISAGREEMENTS
from swarm.rpc.v1.peer_pb2 import Delivery, SyncReply, SyncRequest
from swarm.rpc.v1.signed_pb2 import JoinRequest, Signed

RETRY_S = 1.0
INVITATION_WAIT_S = 10.0
LONGEST_WAIT_S = 900.0
REQUEST_EVERY_S = 1.0
POLL_S = 0.05
MAX_ASKED = 32
UNTRAINED_ROUNDS = 1  # nobody trains in round 0

log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class Whereabouts:
    """Whom discovery knows to be alive; `first` = the coordinator says that we begin the run."""

    peers: tuple[str, ...]
    first: bool = False


@dataclass(frozen=True)
class Entered:
    """Where we come in: the next round to play, and its state or the download of it."""

    round_index: int
    roster: tuple[RosterMember, ...]
    base_root: bytes
    state: OuterState | Coroutine[Any, Any, OuterState]


@dataclass
class Entry:
    """How a peer gets in. `find` asks the coordinator and the DHT; `begin` makes or restores the state of a first peer.

    `initial` makes the state that the manifest begins with. What the `barred` say of the state isn't believed.
    """

    services: Services
    layout: Layout
    find: Callable[[], Awaitable[Whereabouts]]
    begin: Callable[[], Awaitable[OuterState]]
    local: Callable[[], Snapshot | None]
    initial: Callable[[], Awaitable[OuterState]]
    barred: Callable[[], frozenset[str]] = frozenset
    _foreign: set[str] = field(default_factory=set)

    async def enter(self, inbox: Inbox) -> Entered:
        """Try until we are in. What doesn't work with what most peers say is tried with what others say."""
        attempt = 0
        while True:
            where = await self.find()
            if where.first:
                return await self._begin_alone()
            replies = await self._ask(where.peers)
            entered = await self._enter_with(inbox, replies, attempt) if replies else None
            if entered is not None:
                return entered
            self.services.observer.state("protocol_mismatch" if self._foreign and not replies else "waiting_for_peers")
            await asyncio.sleep(RETRY_S)
            attempt += bool(replies)

    async def others_are_past(self, round_index: int) -> bool:
        """Whether peers that discovery knows have finished this round without us."""
        try:
            replies = await self._ask((await self.find()).peers)
        except PeerFailure as error:
            log.info("nobody_to_ask", error=str(error))
            return False
        log.info("asked_others", round=round_index, theirs=sorted(reply.round for reply in replies.values()))
        return any(reply.round > round_index for reply in replies.values())

    async def state_after(self, rounds: int, root: bytes, holders: Sequence[str]) -> OuterState:
        """The state behind `root`, after so many rounds: what we have, what the manifest begins with, or what others have."""
        local = self.local()
        if local is not None and local.root == root:
            return local.state
        if rounds <= UNTRAINED_ROUNDS:
            state = replace(await self.initial(), round=rounds)
            made = await asyncio.get_running_loop().run_in_executor(self.services.pool, Snapshot.from_state, state)
            if made.root == root:
                log.info("state_made", round=rounds, root=root.hex()[:12])
                return state
        return await self.fetch_state(root, holders, local)

    async def fetch_state(self, root: bytes, holders: Sequence[str], local: Snapshot | None) -> OuterState:
        """The state behind `root`: only chunks that `local` doesn't have are fetched, from all holders at once.

        Every holder is asked for the list of chunks, so that each keeps them until they are fetched.
        """
        sources = [peer for peer in holders if peer != self.services.identity.peer_id]
        asked = [asyncio.create_task(self._chunk_hashes(root, peer), name=f"chunk-hashes-{peer}") for peer in sources]
        try:
            return await self._fetch_listed(root, sources, await _first_list(root, asked), local)
        finally:
            await cancel(asked)

    async def _fetch_listed(
        self, root: bytes, sources: Sequence[str], hashes: Sequence[bytes], local: Snapshot | None
    ) -> OuterState:
        mine = {name: index for index, name in enumerate(local.chunk_hashes)} if local is not None else {}
        chunks: dict[bytes, bytes | memoryview] = {}
        if local is not None:
            chunks = {name: local.chunk(mine[name]) for name in hashes if name in mine}
        sizes = {name: self.layout.chunk_size_limit(index) for index, name in enumerate(hashes) if name not in chunks}
        changed = len(differing_chunks(local.chunk_hashes, hashes)) if local is not None else len(hashes)
        log.info("state_fetch", root=root.hex()[:12], chunks=len(hashes), changed=changed, sources=len(sources))
        if sizes:
            failed = await self.services.transfer.download_all(sources, sizes, chunks.__setitem__)
            for peer, reason in failed.items():
                self.services.observer.refused(peer, reason)
        return await asyncio.get_running_loop().run_in_executor(
            self.services.pool, lambda: to_state([chunks[name] for name in hashes], self.layout)
        )

    async def _begin_alone(self) -> Entered:
        state = await self.begin()
        snapshot = Snapshot.from_state(state)
        quota = full_quota(self.services.manifest, state.round)
        return Entered(state.round, (RosterMember(self.services.identity.peer_id, quota),), snapshot.root, state)

    async def _ask(self, peers: Sequence[str]) -> dict[str, SyncReply]:
        """Sync replies of those who answer in a protocol of ours; what they tell of addresses and admissions is learnt."""
        self._foreign.clear()
        asked = [peer for peer in peers if peer != self.services.identity.peer_id][:MAX_ASKED]
        answers = await asyncio.gather(*(self._ask_one(peer) for peer in asked))
        replies = {peer: reply for peer, reply in zip(asked, answers, strict=True) if reply is not None and reply.roster}
        return {peer: reply for peer, reply in replies.items() if self._learn(peer, reply)}

    async def _ask_one(self, peer: str) -> SyncReply | None:
        request = SyncRequest(run_id=self.services.checker.run_id, admission=self._token())
        try:
            return await self.services.post.sync(peer, request, timeout_s=5.0)
        except Rejected as error:
            self._note_foreign(peer, error)
        except PeerFailure as error:
            log.debug("sync_failed", peer=peer, error=str(error))
        return None

    def _note_foreign(self, peer: str, error: Rejected) -> None:
        log.info("sync_refused", peer=peer, error=str(error))
        if DISAGREEMENTS & {error.reason, error.detail}:  # what a peer refuses with comes as the detail of a refusal
            self._foreign.add(peer)

    def _learn(self, asked: str, reply: SyncReply) -> bool:
        """Take in what a reply tells; whether its whole roster speaks a protocol of ours."""
        ours = True
        for peer, entry in list(reply.addresses.items())[:64]:
            self.services.post.node.learn(peer, entry.addresses)
        for token in reply.admissions[:64]:
            try:
                self.services.admissions.admit(token)
            except Rejected as error:
                self.services.observer.refused(error.sender, error.reason)
                if error.reason in DISAGREEMENTS:
                    self._note_foreign(asked, error)
                    ours = False
        return ours

    async def _enter_with(self, inbox: Inbox, replies: dict[str, SyncReply], attempt: int) -> Entered | None:
        me = self.services.identity.peer_id
        likely = agreement.present_rounds({peer: reply.round for peer, reply in replies.items()})
        newest = likely[attempt % len(likely)]
        replies = {peer: reply for peer, reply in replies.items() if abs(reply.round - newest) <= 1}
        inbox.advance(newest)
        for reply in replies.values():
            self._take_results(inbox, reply)
        members = _usual_roster([reply for reply in replies.values() if reply.round == newest])
        if newest > 0 and any(member.peer == me for member in members):
            return self._as_member(inbox, members, newest)
        return await self._as_joiner(inbox, members, newest, set(replies))

    def _as_member(self, inbox: Inbox, roster: tuple[RosterMember, ...], round_index: int) -> Entered | None:
        """We are in the roster already (restarted, or fallen behind): what most results name is the state."""
        results = inbox.results(round_index - 1)
        barred = self.barred()
        found = agreement.newest([(item.round_index, item.root, peer) for peer, item in results.items() if peer not in barred])
        if found is None:
            return None
        _, root, holders = found
        return Entered(round_index, roster, root, self.state_after(round_index, root, holders))

    def _take_results(self, inbox: Inbox, reply: SyncReply) -> None:
        for signed in reply.results[:64]:
            try:
                inbox.add_result(self.services.checker.result(signed))
            except Rejected as error:
                self.services.observer.refused(error.sender, error.reason)

    async def _as_joiner(self, inbox: Inbox, members: tuple[RosterMember, ...], newest: int, others: set[str]) -> Entered | None:
        """Ask for a place, and wait for a proposal that gives us one and that most participants have completed."""
        clock, asked_s = self.services.clock, NEVER_S
        asked = {member.peer for member in members} | others
        until_s = clock.monotonic_s() + INVITATION_WAIT_S
        last_s = clock.monotonic_s() + LONGEST_WAIT_S
        while (now_s := clock.monotonic_s()) < min(until_s, last_s):
            if now_s >= asked_s + REQUEST_EVERY_S:
                self.services.post.send(asked, Delivery(join_request=self._join_request(newest)))
                asked_s = now_s
            invitations = list(self._invitations(inbox, members, asked, newest))
            for round_index, proposal in invitations:
                found = inbox.agreement_on(round_index, proposal, self.services.identity.peer_id)
                if found.root is not None:
                    download = self.state_after(round_index + 1, found.root, found.holders)
                    return Entered(round_index + 1, proposal.next_roster, found.root, download)
            if invitations:
                until_s = now_s + INVITATION_WAIT_S
            elif 2 * len(inbox.ahead(newest + ROUNDS_AHEAD) & asked) > len(asked):
                return None  # the rounds for which we keep messages are over
            await asyncio.sleep(POLL_S)
        return None

    def _invitations(
        self, inbox: Inbox, members: tuple[RosterMember, ...], leaders: set[str], newest: int
    ) -> Iterator[tuple[int, ProposalFacts]]:
        """Proposals of this round and the next few that give us a place, with a quorum's commits, and may still be completed."""
        me, quorum = self.services.identity.peer_id, quorum_of(len(members))
        for round_index in range(newest, newest + ROUNDS_AHEAD + 1):
            for proposal in inbox.proposals(round_index):
                enough = proposal.grant or len(proposal.commits) >= quorum
                invited = any(member.peer == me for member in proposal.next_roster)
                open_still = inbox.agreement_on(round_index, proposal, me).verdict != "split"
                if proposal.leader in leaders and enough and invited and open_still:
                    yield round_index, proposal

    def _join_request(self, round_index: int) -> Signed:
        request = JoinRequest(
            run_id=self.services.checker.run_id,
            round=round_index,
            admission=self._token(),
            addresses=self.services.post.node.addresses,
            issued_at=int(self.services.clock.wall_s()),
        )
        return seal(self.services.identity, request)

    def _token(self) -> Signed | None:
        return self.services.admissions.token(self.services.identity.peer_id)

    async def _chunk_hashes(self, root: bytes, peer: str) -> list[bytes]:
        """The chunk hashes of a state, from one holder; none if it doesn't give those of the root."""
        request = SyncRequest(run_id=self.services.checker.run_id, admission=self._token(), state_root=root)
        try:
            reply = await self.services.post.sync(peer, request)
            hashes = split_hashes(reply.chunk_hashes)
            check_chunk_hashes(hashes, root, self.layout)
        except (PeerFailure, Rejected) as error:
            log.info("chunk_hashes_refused", peer=peer, error=str(error))
            if isinstance(error, Rejected):
                self.services.observer.refused(peer, error.reason)
            return []
        return hashes


async def _first_list(root: bytes, asked: Sequence[asyncio.Task[list[bytes]]]) -> list[bytes]:
    """The first list of chunk hashes that comes. Raises `MissingBlob`."""
    for answer in asyncio.as_completed(asked):
        hashes = await answer
        if hashes:
            return hashes
    raise MissingBlob("any source", f"no chunk hashes of {root.hex()[:12]}")


def _usual_roster(replies: Sequence[SyncReply]) -> tuple[RosterMember, ...]:
    """The roster that most of the replies name; of equally many, the one that was named first."""
    named = Counter(tuple(RosterMember(member.peer_id, member.quota) for member in reply.roster) for reply in replies)
    return max(named, key=named.__getitem__)
