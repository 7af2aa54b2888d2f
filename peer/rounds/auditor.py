"""Merging again what others merged: a random part of a round, from parts that everybody committed to; and evidence.

It happens beside the next round and holds nobody up. How often follows from what it costs: at most a share of what a round's
exchange moves.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from random import SystemRandom
from typing import TypeVar

import numpy as np
import structlog

from peer.codec import Codec, Codecs
from peer.codec.feedback import EXACT
from peer.evidence import MAX_EVIDENCE_BYTES, Verdict, merged_bytes
from peer.frauds import WRONG_MERGE
from peer.network.node import PeerFailure
from peer.rounds.docket import Docket
from peer.rounds.run import RoundRun, Services
from peer.rounds.values import ProposalFacts, SpanFacts
from swarm.errors import Rejected
from swarm.merkle import HASH_BYTES, blob_hash, root_of
from swarm.messages import open_signed, parse, seal, split_hashes
from swarm.rpc.v1.peer_pb2 import Delivery, SyncRequest
from swarm.rpc.v1.signed_pb2 import Evidence, EvidenceNotice, MergedSpan, Signed

FLOAT_BYTES = 4
SMALL_CHECK_BYTES = 1 << 17
MOST_NOTICES = 64
MOST_CONTRIBUTORS = 64
MESSAGES_BYTES = 8 << 20  # the manifest, the commits with their hashes, the proposal and the span

log = structlog.get_logger(__name__)
T = TypeVar("T")


def chance(codec: Codec, contributors: int, share: float) -> float:
    """How likely one part is merged again, so that it costs on average `share` of what a peer moves in a round's exchange.

    A check takes the part from each contributor, and the reducer's residual where the codec has one. What takes next to nothing
    is done in every round; a share of 0 switches checking off.
    """
    if contributors < 2 or not share:
        return 0.0
    part = codec.part_size_limit(0)
    exchanged = 2 * codec.part_count * part * (contributors - 1) / contributors
    residual = 0 if codec.kind == EXACT else FLOAT_BYTES * codec.part_values
    check = (contributors - 1) * part + residual
    return 1.0 if check <= SMALL_CHECK_BYTES else min(1.0, share * exchanged / check)


@dataclass(frozen=True)
class Left:
    """What a reducer's merge of a span left for the next round: after one that was skipped that is what it began with."""

    span: SpanFacts
    skipped: bool

    @property
    def root(self) -> bytes:
        """The root of the residual."""
        signed = parse(MergedSpan, self.span.signed.payload)
        return signed.residual_before if self.skipped else signed.residual_after

    def is_of(self, span: SpanFacts) -> bool:
        """Whether it's about the same parts."""
        return (self.span.first_part, len(self.span.part_hashes)) == (span.first_part, len(span.part_hashes))


@dataclass
class Auditor:
    """Checks merges, tells the others what it proves, and checks what they say they have proven."""

    services: Services
    docket: Docket
    share: float
    on_proven: Callable[[Verdict], None] = lambda verdict: None
    random: SystemRandom = field(default_factory=SystemRandom)
    _left: tuple[int, dict[str, Left]] = field(default_factory=lambda: (-1, {}))
    _heard: set[bytes] = field(default_factory=set)
    _unbelieved: set[str] = field(default_factory=set)
    _told: set[tuple[str, str]] = field(default_factory=set)
    _looking: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def after(self, run: RoundRun, proposal: ProposalFacts, skipped: bool | None = False) -> None:
        """Perhaps merge a part of a finished round again; and, as its leader, tell those who have come what is proven.

        Whether the round was `skipped` as a spike is None where we can't tell yet.
        """
        if proposal.leader == run.setup.me:
            self._tell(run)
        left = {} if skipped is None else {span.reducer: Left(span, skipped) for span in run.state.spans.values()}
        before, self._left = self._left, (run.round_index, left)
        contributors = len(proposal.contributors)
        if run.setup.all_gather or self.random.random() >= chance(run.exchange.codec, contributors, self.share):
            return
        foreign = [span for span in run.state.spans.values() if span.reducer != run.setup.me and span.part_hashes]
        parts = [(span, place) for span in foreign for place in range(len(span.part_hashes))]
        if parts:
            span, place = self.random.choice(parts)
            last = before[1].get(span.reducer) if before[0] == run.round_index - 1 else None
            await self._check(run, proposal, span, place, last)

    async def _check(self, run: RoundRun, proposal: ProposalFacts, span: SpanFacts, place: int, before: Left | None) -> None:
        """Merge one part again. What can't be had any more proves nothing."""
        part, codec = span.first_part + place, run.exchange.codec
        commits = [run.state.commits.get(item.peer) for item in proposal.contributors]
        known = [commit for commit in commits if commit is not None]
        if len(known) < len(commits):
            return
        try:
            contents = [await self._content(item.peer, item.part_hashes[part], codec.part_size_limit(part)) for item in known]
            hashes, residual = await self._residual(span, place, codec)
            self._note_chain(run, span, residual, before)
            weights = [item.weight for item in proposal.contributors]
            values = np.frombuffer(residual, dtype="<f4").astype(np.float32)
            manifest = self.services.manifest
            expected = await self._in_pool(merged_bytes, codec, manifest, part, contents, weights, values)
        except (PeerFailure, Rejected) as error:
            log.info("not_checked", round=run.round_index, reducer=span.reducer, reason=error.reason)
            self.services.observer.merge_checked("unable")
            return
        except ValueError:
            expected = b""
        if blob_hash(expected) == span.part_hashes[place]:
            log.info("merge_checked", round=run.round_index, reducer=span.reducer, part=part)
            self.services.observer.merge_checked("right")
            return
        self.services.observer.merge_checked("wrong")
        evidence = Evidence(
            kind=WRONG_MERGE,
            proposal=proposal.signed,
            span=span.signed,
            part=part,
            commits=[item.signed for item in known],
            contents=contents,
            residual_hashes=hashes,
            residual=residual,
        )
        await self.prove(run, evidence)

    async def _content(self, peer: str, name: bytes, limit: int) -> bytes:
        """A contributor's part: from the store, or from its author."""
        held = self.services.transfer.store.get(name)
        if held is not None:
            return bytes(held)
        return (await self.services.transfer.fetch(peer, {name: limit}))[name]

    async def _residual(self, span: SpanFacts, place: int, codec: Codec) -> tuple[list[bytes], bytes]:
        """The hashes of a reducer's residual before its merge, and one part of it; empty where the codec has none."""
        if codec.kind == EXACT:
            return [], b""
        root = parse(MergedSpan, span.signed.payload).residual_before
        hashes = await self._hashes(span.reducer, root, len(span.part_hashes))
        start, end = codec.part_span(span.first_part + place)
        content = await self._content(span.reducer, hashes[place], FLOAT_BYTES * (end - start))
        if len(content) != FLOAT_BYTES * (end - start):
            raise Rejected("wrong_residual", "of another size", span.reducer)
        return hashes, content

    async def _hashes(self, reducer: str, root: bytes, count: int) -> list[bytes]:
        token = self.services.admissions.token(self.services.identity.peer_id)
        request = SyncRequest(run_id=self.services.checker.run_id, admission=token, state_root=root)
        hashes = split_hashes((await self.services.post.sync(reducer, request)).chunk_hashes)
        if len(hashes) != count or root_of(hashes) != root:
            raise Rejected("wrong_residual", "not the hashes of the residual that it names", reducer)
        return hashes

    def _note_chain(self, run: RoundRun, span: SpanFacts, residual: bytes, before: Left | None) -> None:
        """Say so where a residual is neither what the round before left nor zero; it could bring in whatever its reducer likes.

        That is no proof: who falls behind at the wrong moment goes on from an older one.
        """
        if before is None or not any(residual):
            return
        named = parse(MergedSpan, span.signed.payload).residual_before
        if before.is_of(span) and before.root != named:
            log.warning("residual_from_elsewhere", round=run.round_index, reducer=span.reducer)
            self.services.observer.refused(span.reducer, "residual_from_elsewhere")

    async def prove(self, run: RoundRun, evidence: Evidence) -> bool:
        """Whether the evidence holds. If so it is kept, and offered to the roster."""
        evidence.manifest.CopyFrom(self.services.signed_manifest)
        raw = evidence.SerializeToString(deterministic=True)
        try:
            verdict = await self._taken(raw)
        except Rejected as error:
            log.info("not_proven", round=run.round_index, reason=error.reason, detail=error.detail)
            return False
        if verdict is not None:
            self._tell(run)
        return True

    def _tell(self, run: RoundRun) -> None:
        """Offer the roster what is proven, once to each: whoever has proven it does, and leaders tell those who came later."""
        for accused, notice in self.docket.notices.items():
            untold = [peer for peer in run.setup.others if peer != accused and (peer, accused) not in self._told]
            if untold:
                self._told.update((peer, accused) for peer in untold)
                self.services.post.send(untold, Delivery(evidence=seal(self.services.identity, notice)))

    async def hear(self, sender: str, notice: EvidenceNotice) -> None:
        """Somebody says that it has a proof: take it, if it is about somebody whom we don't know to be guilty yet.

        Who has once offered something that proves nothing isn't listened to again.
        """
        if notice.hash in self._heard or notice.accused in self.docket.proven or sender in self._unbelieved:
            return
        if len(self._heard) >= MOST_NOTICES:
            self._heard.clear()
        self._heard.add(notice.hash)
        async with self._looking:
            if sender in self._unbelieved:
                return
            try:
                found = await self.services.transfer.fetch(sender, {notice.hash: int(notice.size_bytes)})
                await self._taken(found[notice.hash])
            except PeerFailure as error:
                log.info("evidence_not_had", sender=sender, reason=error.reason)
                self._heard.discard(notice.hash)
            except Rejected as error:
                log.warning("evidence_refused", sender=sender, reason=error.reason, detail=error.detail)
                self._unbelieved.add(sender)
                self.services.observer.refused(sender, error.reason)

    def check_notice(self, signed: Signed) -> EvidenceNotice:
        """A notice of evidence of a size that evidence of this run can have. Raises `Rejected`."""
        notice = open_signed(signed, EvidenceNotice, run_id=self.services.checker.run_id)
        codec = Codecs(self.services.manifest).at(notice.round)
        most = MOST_CONTRIBUTORS * codec.part_size_limit(0) + FLOAT_BYTES * codec.part_values + MESSAGES_BYTES
        if len(notice.hash) != HASH_BYTES or not 0 < notice.size_bytes <= min(most, MAX_EVIDENCE_BYTES):
            raise Rejected("malformed", "a notice of evidence", signed.signer)
        return notice

    async def _taken(self, raw: bytes) -> Verdict | None:
        verdict = await self._in_pool(self.docket.add, raw)
        if verdict is not None:
            self.services.observer.refused(verdict.accused, verdict.kind)
            self.services.observer.proven(verdict.kind)
            self.on_proven(verdict)
        return verdict

    async def _in_pool(self, function: Callable[..., T], *args: object) -> T:
        return await asyncio.get_running_loop().run_in_executor(self.services.pool, function, *args)
