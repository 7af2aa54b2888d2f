"""Auditing others' contributions: this peer was drawn, computes a piece of another's round again, and says what it found.

It happens in the training thread between rounds, from the state that both started from, and is told to the coordinator, signed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import numpy as np
import structlog

from peer.codec import Codec, Codecs, Vector, decode
from peer.evidence import Verdict
from peer.judging import (
    NOT_SHOWN,
    UNABLE_TO_LOOK,
    Judgement,
    adds_up,
    judge_gain,
    judge_leaves,
    judge_update,
    promised,
    tolerance,
    what_to_look_at,
)
from peer.leaves import MAX_LEAVES_BYTES, Leaf, unpack
from peer.network.node import PeerFailure
from peer.outer import OuterState
from peer.rounds.proofreading import Proofreader
from peer.rounds.run import RoundRun, Services
from peer.rounds.training import TrainingThread
from peer.rounds.values import CommitFacts, RosterMember
from peer.rounds.weighing import Scales
from peer.sketch import Sketcher
from swarm.audits import CONVICTED, FAILED, PASSED
from swarm.errors import NotAdmitted, OutOfMemory, Rejected, SwarmError
from swarm.manifest import CenteredClip, DiLoCo, Sync
from swarm.messages import seal
from swarm.rpc.client import CoordinatorClient
from swarm.rpc.v1.coordinator_pb2 import AuditDuty
from swarm.rpc.v1.signed_pb2 import AuditVerdict

KEPT_ROUNDS, KEPT_BYTES = 4, 1 << 30
SHORTEST_POLL_S, SHORTEST_IDLE_POLL_S, LONGEST_POLL_S = 0.5, 3.0, 30.0
POLLS_A_ROUND = 4
SHORTEST_WAIT_S, WAIT_ROUNDS = 3.0, 2
PATIENCE_S, AWAY_S = 10.0, 5.0
SHOWN_WRONG = ("bad_leaves", "bad_part", "bad_piece")
FLOAT_BYTES = 4

log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class Kept:
    """What an audit of a round starts from."""

    round_index: int
    base_root: bytes
    state: OuterState
    commits: dict[str, CommitFacts]
    roster: tuple[RosterMember, ...] = ()


@dataclass
class AuditDesk:
    """Asks which audits are due, and does them.

    `suspended` are the keys that the coordinator has suspended. In rounds that are `unplain` our own work shows too little.
    """

    services: Services
    training: TrainingThread
    client: Callable[[], Awaitable[CoordinatorClient]]
    on_suspended: Callable[[], None] = lambda: None
    suspended: frozenset[str] = frozenset()
    _kept: list[Kept] = field(default_factory=list)
    _round_s: float = 2.0
    _asked_s: dict[tuple[int, str], float] = field(default_factory=dict)
    _convictions: dict[str, Verdict] = field(default_factory=dict)
    _settled: dict[tuple[int, str], Judgement | None] = field(default_factory=dict)
    _unplain: set[int] = field(default_factory=set)

    def keep(self, run: RoundRun, state: OuterState | None, wall_s: float) -> None:
        """Remember what a finished round started from, for as long as there is room."""
        self._round_s = wall_s
        if state is None or not self.services.manifest.is_audited:
            return
        most = max(1, min(KEPT_ROUNDS, KEPT_BYTES // (FLOAT_BYTES * state.theta.size)))
        kept = Kept(run.round_index, run.setup.base_root, state, dict(run.state.commits), run.setup.roster)
        self._kept = [*self._kept, kept][-most:]

    def forget(self) -> None:
        """Free the memory that past states take."""
        self._kept = []

    def convict(self, verdict: Verdict) -> None:
        """Tell the coordinator that we hold proof against a peer; so does everybody who has checked it."""
        self._convictions[verdict.accused] = verdict

    async def work(self) -> None:
        """Look for audits, and for who is suspended, for ever."""
        shortest_s = SHORTEST_POLL_S if self.services.manifest.is_audited else SHORTEST_IDLE_POLL_S
        while True:
            await asyncio.sleep(min(LONGEST_POLL_S, max(shortest_s, self._round_s / POLLS_A_ROUND)))
            try:
                await self._look()
                await self._tell_convictions()
            except (SwarmError, Rejected) as error:
                log.info("audits_not_asked_for", error=str(error))
                await asyncio.sleep(AWAY_S)

    async def _look(self) -> None:
        answer = await (await self.client()).list_audits(self.services.identity.peer_id)
        self.suspended = frozenset(answer.suspended)
        due = {(int(duty.round), duty.peer_id): duty for duty in answer.duties}
        self._asked_s = {place: first_s for place, first_s in self._asked_s.items() if place in due}
        self._settled = {place: found for place, found in self._settled.items() if place in due}
        if self.services.identity.peer_id in self.suspended:
            self.on_suspended()
            return
        for place, duty in due.items():
            if place not in self._settled:
                judgement = await self._audited(duty)
                if judgement is None:
                    continue
                self._settled[place] = judgement
                _note(duty, judgement)
                self.services.observer.audited(judgement.finding)
            judgement = self._settled[place]
            if judgement is not None:
                await self._tell(duty, judgement)
                self._settled[place] = None

    async def _tell(self, duty: AuditDuty, judgement: Judgement) -> None:
        """Sign it and hand it in. Raises `SwarmError` where the coordinator can't be reached."""
        verdict = AuditVerdict(
            round=duty.round,
            peer_id=duty.peer_id,
            commit_hash=duty.commit_hash,
            finding=judgement.finding,
            reason=judgement.reason,
            leaf=judgement.leaf,
            distance=judgement.distance,
            tolerance=judgement.tolerance,
            claimed=judgement.claimed,
            found=judgement.found,
        )
        await self._refused(verdict)

    async def _tell_convictions(self) -> None:
        """Hand in what we hold proof of, once; who isn't in the roster yet tries again."""
        for accused, proof in list(self._convictions.items()):
            verdict = AuditVerdict(
                round=proof.round_index, peer_id=accused, commit_hash=proof.hash, finding=CONVICTED, reason=proof.kind
            )
            if await self._refused(verdict) != "not_in_roster":
                del self._convictions[accused]

    async def _refused(self, verdict: AuditVerdict) -> str:
        """Sign a verdict and hand it in; why it wasn't taken. Raises `SwarmError` where the coordinator can't be reached."""
        verdict.run_id, verdict.issued_at = self.services.checker.run_id, int(self.services.clock.wall_s())
        try:
            await (await self.client()).submit_audit(seal(self.services.identity, verdict))
        except NotAdmitted as error:
            return error.message
        except Rejected as error:
            log.info("finding_not_taken", round=verdict.round, peer=verdict.peer_id, reason=error.reason)
            return error.reason
        return ""

    async def _audited(self, duty: AuditDuty) -> Judgement | None:
        """What we find; None to try again later."""
        kept = next((item for item in self._kept if item.round_index == duty.round), None)
        commit = kept.commits.get(duty.peer_id) if kept is not None else None
        if kept is None or commit is None or commit.commit_hash != duty.commit_hash:
            newest = self._kept[-1].round_index if self._kept else -1
            return UNABLE_TO_LOOK if duty.round <= newest else None
        try:
            if self.services.manifest.generates:
                return await self._proofread(kept, commit, duty.seed)
            if self.services.manifest.is_replayed:
                return await self._looked_at(kept, commit, duty.seed)
            return await self._weighed(kept, commit, duty.seed)
        except (OutOfMemory, RuntimeError) as error:  # a device that fails is the trainer's to report
            log.warning("not_audited", round=duty.round, peer=duty.peer_id, error=str(error))
            return UNABLE_TO_LOOK
        except PeerFailure as error:
            log.info("not_shown", round=duty.round, peer=duty.peer_id, reason=error.reason)
            return self._not_shown((int(duty.round), duty.peer_id))
        except Rejected as error:
            return Judgement(FAILED, error.reason) if error.reason in SHOWN_WRONG else NOT_SHOWN

    def _not_shown(self, place: tuple[int, str]) -> Judgement | None:
        """Ask again for some rounds: its author may only be away for a moment."""
        now_s = self.services.clock.monotonic_s()
        first_s = self._asked_s.setdefault(place, now_s)
        return NOT_SHOWN if now_s - first_s >= max(SHORTEST_WAIT_S, WAIT_ROUNDS * self._round_s) else None

    async def _looked_at(self, kept: Kept, commit: CommitFacts, seed: bytes) -> Judgement | None:
        manifest = self.services.manifest
        found = await self._contents(commit, {commit.evidence_root: MAX_LEAVES_BYTES})
        leaves, precision = unpack(found[commit.evidence_root], commit.peer)
        unit = 1 if isinstance(manifest.strategy, Sync) else manifest.strategy.batch_samples
        if not adds_up(leaves, commit.weight, unit):
            return Judgement(FAILED, "leaves")
        run_id, size = self.services.checker.run_id, kept.state.theta.size
        sketcher = Sketcher.of_round(run_id, kept.round_index, kept.base_root, size)
        leaf, block = what_to_look_at(seed, len(leaves))
        sent = await self._check_update(kept, commit, leaves, sketcher, block)
        if sent.finding == FAILED:
            return sent
        return await self._check_work(kept, commit, leaves, sketcher, leaf, precision)

    async def _check_update(
        self, kept: Kept, commit: CommitFacts, leaves: tuple[Leaf, ...], sketcher: Sketcher, block: int
    ) -> Judgement:
        """Whether a block of what was sent is what the leaves amount to; all of it where that is little."""
        manifest, codec = self.services.manifest, Codecs(self.services.manifest).at(kept.round_index)
        whole, rule = codec.topology == "all_gather", manifest.merge
        span = (0, codec.values) if whole else sketcher.span(block)
        rows = slice(None) if whole else slice(block, block + 1)
        parts = [part for part in range(codec.part_count) if _overlap(codec, part, *span)]
        if not parts or (isinstance(rule, CenteredClip) and rule.worker_momentum):
            return Judgement(PASSED)
        contents = await self._contents(commit, {commit.part_hashes[part]: codec.part_size_limit(part) for part in parts})
        expected = promised(manifest, leaves)

        def judged() -> Judgement:
            values = np.concatenate([codec.decode_part(contents[commit.part_hashes[part]], part) for part in parts])
            first = codec.part_span(parts[0])[0]
            sketch = sketcher.of_vector(values[span[0] - first : span[1] - first], span[0])
            return judge_update(codec.kind, expected[rows], sketch[rows])

        return await asyncio.get_running_loop().run_in_executor(self.services.pool, judged)

    async def _proofread(self, kept: Kept, commit: CommitFacts, seed: bytes) -> Judgement | None:
        """Compute some of its samples again: whether the model wrote them, and whether they are those that it had to write."""
        batch = self.services.manifest.strategy.batch_samples
        reader = Proofreader(self.training, kept.round_index, kept.roster, batch)
        found = await self._contents(commit, {commit.evidence_root: reader.most_bytes(commit)})
        return await reader.judged(commit, found[commit.evidence_root], seed)

    async def _weighed(self, kept: Kept, commit: CommitFacts, seed: bytes) -> Judgement | None:
        """Hold what its update does to the loss on its samples and on others against what ours does."""
        mine = kept.commits.get(self.services.identity.peer_id)
        if mine is None or not mine.weight or kept.round_index in self._unplain:
            return UNABLE_TO_LOOK
        scales = Scales(self.training, kept.round_index, kept.state.theta, seed)
        try:
            own_update = await self._update(kept, mine)
        except (PeerFailure, Rejected) as error:  # not the author's fault
            log.info("own_update_gone", round=kept.round_index, error=str(error))
            return UNABLE_TO_LOOK
        ours = await scales.gain(mine, own_update)
        if ours is None:
            return None
        if not ours.is_plain:
            self._unplain = {*self._unplain, kept.round_index} & {item.round_index for item in self._kept}
            return UNABLE_TO_LOOK
        its = await scales.gain(commit, await self._update(kept, commit))
        return None if its is None else judge_gain(ours, its)

    async def _update(self, kept: Kept, commit: CommitFacts) -> Vector:
        """What a peer has sent in a round, as all decode it, [parameters]. Raises what fetching raises."""
        codec = Codecs(self.services.manifest).at(kept.round_index)
        sizes = {name: codec.part_size_limit(part) for part, name in enumerate(commit.part_hashes)}
        contents = await self._contents(commit, sizes)
        parts = [contents[name] for name in commit.part_hashes]
        return await asyncio.get_running_loop().run_in_executor(self.services.pool, decode, codec, parts)

    async def _contents(self, commit: CommitFacts, sizes: dict[bytes, int]) -> dict[bytes, bytes]:
        """Blobs of a commit, from our own store or from its author. Raises what fetching raises."""
        store = self.services.transfer.store
        held = {name: content for name in sizes if name in store and (content := store.get(name)) is not None}
        lacking = {name: size for name, size in sizes.items() if name not in held}
        fetched = await self.services.transfer.fetch(commit.peer, lacking, patience_s=PATIENCE_S) if lacking else {}
        return {name: bytes(content) for name, content in held.items()} | fetched

    async def _check_work(
        self, kept: Kept, commit: CommitFacts, leaves: tuple[Leaf, ...], sketcher: Sketcher, leaf: int, precision: str
    ) -> Judgement | None:
        """Compute a leaf again, or all up to it, as precisely as its author."""
        manifest, state = self.services.manifest, kept.state
        lengths = [item.samples for item in leaves]
        training = self.training
        again = await training.in_thread(
            lambda: training.trainer.replay(
                state.theta, kept.round_index, commit.peer, state.tokens, lengths, leaf, sketcher, training.why_stopped, precision
            )
        )
        if again is None:
            return None
        first = 0 if isinstance(manifest.strategy, DiLoCo) else leaf
        return judge_leaves(leaves, again, first, tolerance(manifest, precision))


def _note(duty: AuditDuty, judgement: Judgement) -> None:
    level = log.warning if judgement.finding == FAILED else log.info
    fields = {"finding": judgement.finding, "reason": judgement.reason, "distance": judgement.distance}
    level("audited", round=duty.round, peer=duty.peer_id, **fields)


def _overlap(codec: Codec, part: int, start: int, end: int) -> bool:
    first, last = codec.part_span(part)
    return first < end and start < last
