"""The exchange of one round: encoding our update, merging our span, and collecting what the others merged."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar

import structlog

from peer.buffers import buffers
from peer.codec import Codec, Vector
from peer.merge import Scaled, ignore
from peer.network.node import PeerFailure
from peer.network.transfer import Transfer
from peer.rounds.parts import Parts
from peer.rounds.residuals import Residuals, SpanMerge
from peer.rounds.sharing import relays_of
from peer.rounds.values import CommitFacts, IncludedCommit, ProposalFacts, SpanFacts
from peer.tasks import cancel
from swarm import manifest
from swarm.errors import Rejected
from swarm.merkle import blob_hash

log = structlog.get_logger(__name__)
T = TypeVar("T")


@dataclass
class Exchange:
    """Bulk work of one round. Merged values are collected per proposal; only the accepted one's are kept.

    `on_merged` hears of the weights that were merged and how far the rule scaled each down, in the pool's thread.
    `distort` is what a fault script or an attack makes a reducer do to what it has merged, `mangle` a sender to its parts.
    """

    round_index: int
    me: str
    codec: Codec
    transfer: Transfer
    pool: ThreadPoolExecutor
    rule: manifest.Mean | manifest.CenteredClip
    residuals: Residuals
    on_merged: Scaled = ignore
    _proposal_hash: bytes = b""
    _merged: Vector | None = None
    _filled: set[int] = field(default_factory=set)
    _merges: dict[bytes, SpanMerge] = field(default_factory=dict)
    _kept: asyncio.Event = field(default_factory=asyncio.Event)
    distort: Callable[[Vector], Vector] = lambda merged: merged
    mangle: Callable[[list[bytes]], list[bytes]] = lambda parts: parts
    parts: Parts = field(init=False)

    def __post_init__(self) -> None:
        self.parts = Parts(self.codec, self.rule, lambda name: self.transfer.store.get(name))

    async def publish(self, update: Vector) -> tuple[bytes, ...]:
        """Encode our update, [parameters], and keep the parts where others can fetch them; their hashes."""
        blobs = await self._in_pool(self._encode_all, update)
        for name, content in blobs:
            self.keep(name, content)
        return tuple(name for name, _ in blobs)

    def begin(self, proposal_hash: bytes) -> None:
        """Collect merged values for this proposal from now on, and forget those of any other."""
        if proposal_hash != self._proposal_hash:
            self._proposal_hash, self._filled, self._merged = proposal_hash, set(), None

    async def reduce(
        self,
        proposal: ProposalFacts,
        commits: Mapping[str, CommitFacts],
        parts: range,
        *,
        publish: bool,
        holders: Sequence[str] = (),
    ) -> tuple[bytes, ...]:
        """Pull the contributors' `parts`, merge them in the proposal's order; the hashes of the encoded merged parts.

        With `publish` the merged parts are encoded and kept for others (a reducer's span); without it they stay here.
        `holders` have the parts of contributors that can't be reached. Raises what fetching raises, with the peer's name.
        """
        contributors = proposal.contributors
        pulls = [asyncio.create_task(self._pull(item, proposal, commits, parts, holders)) for item in contributors]
        hashes = []
        merge = self.residuals.merging(self.codec, parts) if publish else None
        try:
            for part in parts:
                await self._arrival([commits[item.peer].part_hashes[part] for item in contributors], pulls)
                encoded = await self._in_pool(self._merge_part, proposal, commits, part, publish, merge)
                if encoded is not None:
                    hashes.append(self.transfer.store.put(encoded, self.round_index))
        finally:
            await cancel(pulls)
        if merge is not None:
            await self._in_pool(merge.close)
            self._merges[proposal.proposal_hash] = merge
        return tuple(hashes)

    async def _arrival(self, names: Sequence[bytes], pulls: Sequence[asyncio.Task[None]]) -> None:
        """Wait until these blobs are here, or can't come any more. Raises what fetching raises."""
        while any(name not in self.transfer.store for name in names):
            for pull in pulls:
                if pull.done():
                    pull.result()
            running = [pull for pull in pulls if not pull.done()]
            if not running:
                return
            self._kept.clear()
            kept = asyncio.create_task(self._kept.wait())
            await asyncio.wait({kept, *running}, return_when=asyncio.FIRST_COMPLETED)
            kept.cancel()

    def span_merge(self, proposal_hash: bytes) -> SpanMerge | None:
        """Our merge for a proposal, with its residuals; None if we merged nothing for it, or exactly."""
        return self._merges.get(proposal_hash)

    def residual_roots(self, proposal_hash: bytes) -> tuple[bytes, bytes]:
        """What our merged span names: the roots of the residual before and after, empty where there is none."""
        merge = self.span_merge(proposal_hash)
        return merge.roots if merge is not None else (b"", b"")

    async def fetch_span(self, span: SpanFacts, source: str) -> None:
        """Pull a reducer's merged parts from `source` and decode them. Raises what fetching raises, and `Rejected`."""
        wanted = {
            name: self.codec.part_size_limit(span.first_part + place)
            for place, name in enumerate(span.part_hashes)
            if name not in self.transfer.store
        }
        if wanted:
            await self.transfer.fetch(source, wanted, keep=self.keep)
        await self._in_pool(self._take_span, span)

    def merged(self, proposal: ProposalFacts) -> Vector | None:
        """The merged update, [parameters]; None when nobody contributed. Raises `ValueError` while parts are missing."""
        if not proposal.contributors:
            return None
        if proposal.proposal_hash != self._proposal_hash or len(self._filled) != self.codec.part_count or self._merged is None:
            raise ValueError(f"{len(self._filled)} of {self.codec.part_count} merged parts")
        return self._merged

    def forget_merged(self) -> None:
        """Free the merged update, once it is applied; `collected_again` makes it anew from the stored parts."""
        self._merged, self._filled = None, set()

    def collected_again(
        self, proposal: ProposalFacts, commits: Mapping[str, CommitFacts], spans: Sequence[SpanFacts]
    ) -> Vector | None:
        """The merged update once more, from stored parts whose hashes are checked again. Raises `Rejected`."""
        return self.parts.collected(proposal, commits, spans)

    def _encode_all(self, update: Vector) -> list[tuple[bytes, bytes]]:
        return [(blob_hash(part), part) for part in self.mangle(self.residuals.encode(self.codec, update))]

    async def _pull(
        self,
        item: IncludedCommit,
        proposal: ProposalFacts,
        commits: Mapping[str, CommitFacts],
        parts: range,
        holders: Sequence[str],
    ) -> None:
        """Pull a contributor's parts: through those who pass them on, from itself, or from others that may hold them."""
        if item.peer == self.me:
            return
        hashes = commits[item.peer].part_hashes
        if self.codec.topology == "all_gather":
            await self._pull_through_relays(item, hashes, self._relays(item, proposal, commits, parts))
        failure: PeerFailure | None = None
        for source in (item.peer, *holders):
            wanted = self._lacking(hashes, parts)
            if not wanted or source == self.me:
                return
            try:
                await self.transfer.obtain(source, wanted, self.keep)
            except PeerFailure as error:
                failure = failure or error
                continue
            return
        if failure is not None:
            raise failure

    def _relays(
        self, item: IncludedCommit, proposal: ProposalFacts, commits: Mapping[str, CommitFacts], parts: range
    ) -> dict[int, str]:
        """Part to the peer that passes it on to us."""
        uploads = {entry.peer: commits[entry.peer].upload_bytes_per_s for entry in proposal.commits if entry.peer in commits}
        authors = [entry.peer for entry in proposal.contributors]
        relays = relays_of(self.round_index, item.peer, parts, uploads, authors)
        return {part: relay for part, relay in relays.items() if relay != self.me}

    async def _pull_through_relays(self, item: IncludedCommit, hashes: Sequence[bytes], relays: Mapping[int, str]) -> None:
        """Take what others pass on, while the rest comes from the author. What a relay fails to give is asked for later."""
        given: dict[str, list[int]] = {}
        for part, relay in relays.items():
            given.setdefault(relay, []).append(part)
        direct = [part for part in range(len(hashes)) if part not in relays] if relays else []
        await asyncio.gather(
            *(self._try_pull(relay, self._lacking(hashes, parts), origin=item.peer) for relay, parts in given.items()),
            self._try_pull(item.peer, self._lacking(hashes, direct)),
        )

    async def _try_pull(self, source: str, wanted: Mapping[bytes, int], origin: str = "") -> None:
        if not wanted:
            return
        try:
            await self.transfer.obtain(source, wanted, self.keep, origin=origin)
        except PeerFailure as error:
            log.debug("pull_failed", round=self.round_index, source=source, origin=origin, reason=error.reason)
        except Rejected as error:
            self.transfer.node.on_rejected(source, error.reason)

    def _lacking(self, hashes: Sequence[bytes], parts: Iterable[int]) -> dict[bytes, int]:
        """Hash to size limit of those parts that aren't here."""
        return {hashes[part]: self.codec.part_size_limit(part) for part in parts if hashes[part] not in self.transfer.store}

    def keep(self, name: bytes, content: bytes) -> None:
        """Keep a verified blob of this round."""
        self.transfer.store.put_verified(name, content, self.round_index)
        self._kept.set()

    def _merge_part(
        self, proposal: ProposalFacts, commits: Mapping[str, CommitFacts], part: int, publish: bool, merge: SpanMerge | None
    ) -> bytes | None:
        merged = self.parts.merged(proposal.contributors, commits, part, self.on_merged)
        if not publish:
            self._place(proposal.proposal_hash, part, merged)
            return None
        merged = self.distort(merged)
        if merge is not None:
            fed = merge.encode_part(merged, part)
            self._place(proposal.proposal_hash, part, fed.decoded)
            return fed.part
        encoded = self.codec.encode_part(merged, part)
        self._place(proposal.proposal_hash, part, self.codec.decode_part(encoded, part))
        return encoded

    def _take_span(self, span: SpanFacts) -> None:
        for place, name in enumerate(span.part_hashes):
            part = span.first_part + place
            self._place(span.proposal_hash, part, self.parts.decoded(span.reducer, name, part, self.codec.decode_part))

    def _place(self, proposal_hash: bytes, part: int, values: Vector) -> None:
        if proposal_hash != self._proposal_hash:
            return
        if self._merged is None:
            self._merged = buffers.empty(self.codec.values)
        self._merged[slice(*self.codec.part_span(part))] = values
        self._filled.add(part)

    async def _in_pool(self, function: Callable[..., T], *args: object) -> T:
        return await asyncio.get_running_loop().run_in_executor(self.pool, function, *args)
