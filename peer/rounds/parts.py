"""A round's encoded parts, wherever they lie by their hashes, as the merged update that they amount to."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from peer.buffers import buffers
from peer.codec import Codec, Vector
from peer.codec.sparse import Sparse
from peer.merge import Scaled, ignore, merge_pairs, merge_part
from peer.rounds.values import CommitFacts, IncludedCommit, ProposalFacts, SpanFacts
from swarm import manifest
from swarm.errors import Rejected
from swarm.merkle import blob_hash

T = TypeVar("T")


class Undecodable(Rejected):
    """A part that its author committed to, and that the codec refuses."""

    def __init__(self, peer: str, part: int, content: bytes, error: Rejected) -> None:
        super().__init__(error.reason, error.detail, peer)
        self.part, self.content = part, content


@dataclass(frozen=True)
class Parts:
    """Decodes and merges parts by the run's rule. `content` gives a part by its hash, or None."""

    codec: Codec
    rule: manifest.Mean | manifest.CenteredClip
    content: Callable[[bytes], bytes | memoryview | None]

    def decoded(self, peer: str, name: bytes, part: int, decode: Callable[[bytes | memoryview, int], T]) -> T:
        """A part of a peer's. Raises `Rejected("lost_blob")` and `Undecodable`."""
        content = self.content(name)
        if content is None:
            raise Rejected("lost_blob", name.hex()[:12], peer)
        try:
            return decode(content, part)
        except Rejected as error:
            raise Undecodable(peer, part, bytes(content), error) from error

    def merged(
        self, contributors: Sequence[IncludedCommit], commits: Mapping[str, CommitFacts], part: int, told: Scaled = ignore
    ) -> Vector:
        """One part of each contributor, merged in their order, [values of the part]. Raises what `decoded` raises."""
        named = [(item.peer, commits[item.peer].part_hashes[part]) for item in contributors]
        weights = [item.weight for item in contributors]
        if isinstance(self.codec, Sparse) and isinstance(self.rule, manifest.Mean):
            pairs = [self.decoded(peer, name, part, self.codec.decode_pairs) for peer, name in named]
            return merge_pairs(pairs, weights, self.rule, self.codec.part_length(part), told)
        decoded = [self.decoded(peer, name, part, self.codec.decode_part) for peer, name in named]
        return merge_part(decoded, weights, self.rule, told)

    def collected(self, proposal: ProposalFacts, commits: Mapping[str, CommitFacts], spans: Sequence[SpanFacts]) -> Vector | None:
        """The whole merged update, [parameters], every part checked against its hash; None where nobody contributed.

        Raises `Rejected`.
        """
        if not proposal.contributors:
            return None
        merged = buffers.empty(self.codec.values)
        for part, name, author in self.needed(proposal, commits, spans):
            self._check(author, name, part)
        if self.codec.topology == "all_gather":
            for part in range(self.codec.part_count):
                merged[slice(*self.codec.part_span(part))] = self.merged(proposal.contributors, commits, part)
            return merged
        for part, name, author in self.needed(proposal, commits, spans):
            merged[slice(*self.codec.part_span(part))] = self.decoded(author, name, part, self.codec.decode_part)
        return merged

    def needed(
        self, proposal: ProposalFacts, commits: Mapping[str, CommitFacts], spans: Sequence[SpanFacts]
    ) -> list[tuple[int, bytes, str]]:
        """Number, hash and author of every part that the update is collected from: the reducers', or everybody's."""
        if self.codec.topology == "all_gather":
            named = [(item.peer, commits[item.peer].part_hashes) for item in proposal.contributors]
            return [(part, name, peer) for peer, names in named for part, name in enumerate(names)]
        return [(part, name, span.reducer) for span in spans for part, name in enumerate(span.part_hashes, span.first_part)]

    def _check(self, peer: str, name: bytes, part: int) -> None:
        content = self.content(name)
        if content is None or blob_hash(content) != name:
            raise Rejected("lost_blob", f"part {part}, {name.hex()[:12]}", peer)
