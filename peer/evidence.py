"""Proofs of misbehaviour that anybody can check from signed bytes alone: offline, without tolerance, whoever shows them.

    bad_part     a peer committed to a part, or signed a merged one, that its run's codec refuses to decode
    wrong_merge  a reducer signed a merged part that isn't the merge of the parts that its proposal names
    equivocation a leader signed two proposals for a ballot, or a reducer two merges of a proposal, in one attempt at a round
    false_pass   an auditor let a contribution pass whose leaves its author had made up from a secret that it tells now

All follow from what the accused has signed. A peer that computes as it should can't have; one whose memory is faulty can, as
evidence shows what was signed and not why.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from peer.codec import Codec, Codecs, Vector
from peer.codec.feedback import EXACT, default_decay, feed
from peer.frauds import BAD_PART, EQUIVOCATION, FALSE_PASS, WRONG_MERGE
from peer.leaves import unpack
from peer.merge import merge_part
from peer.planting import Place, is_planted
from swarm.audits import PASSED
from swarm.errors import ManifestInvalid, Rejected
from swarm.ledger import open_manifest
from swarm.manifest import DiLoCo, Manifest
from swarm.merkle import blob_hash, root_of
from swarm.messages import KINDS, open_signed, parse, payload_hash, split_hashes
from swarm.rpc.v1.signed_pb2 import AnnouncedCommit, AuditVerdict, Commit, Evidence, MergedSpan, Proposal

MAX_EVIDENCE_BYTES = 64 << 20


@dataclass(frozen=True)
class Verdict:
    """Who did what, where, and what shows it; `hash` names the evidence."""

    accused: str
    kind: str
    run_id: bytes
    round_index: int
    part: int
    why: str
    hash: bytes = b""


def merged_bytes(
    codec: Codec, manifest: Manifest, part: int, contents: Sequence[bytes], weights: Sequence[int], residual: Vector
) -> bytes:
    """The one encoding of a merged part: the contributors' encoded `contents` in the proposal's order, by their weights.

    `residual`, [values of the part], is the reducer's from before; it isn't used for fp16. Raises `Rejected` where a part can't
    be decoded, and `ValueError` where values aren't finite.
    """
    merged = merge_part([codec.decode_part(content, part) for content in contents], weights, manifest.merge)
    if codec.kind == EXACT:
        return codec.encode_part(merged, part)
    return feed(codec, part, merged, residual, default_decay(codec)).part


def verify_evidence(raw: bytes) -> Verdict:
    """What the bytes prove. Raises `Rejected` where they prove nothing: `not_proven`, or what is wrong with them."""
    if len(raw) > MAX_EVIDENCE_BYTES:
        raise Rejected("too_large", f"{len(raw)} bytes of evidence")
    evidence = parse(Evidence, raw)
    try:
        manifest = open_manifest(evidence.manifest)
    except ManifestInvalid as error:
        raise Rejected("malformed", f"the manifest: {error.message}") from error
    run_id = payload_hash(evidence.manifest)
    kinds = {BAD_PART: _bad_part, WRONG_MERGE: _wrong_merge, EQUIVOCATION: _equivocation, FALSE_PASS: _false_pass}
    proving = kinds.get(evidence.kind)
    if proving is None:
        raise Rejected("malformed", f"evidence of the kind {evidence.kind[:32]!r}")
    return replace(proving(evidence, manifest, run_id), hash=blob_hash(raw))


def _bad_part(evidence: Evidence, manifest: Manifest, run_id: bytes) -> Verdict:
    """A part of a contribution, or of a merge."""
    if len(evidence.contents) != 1:
        raise Rejected("malformed", "a bad part has one content")
    content, part = evidence.contents[0], evidence.part
    if evidence.HasField("span"):
        what, accused, span = "merge", evidence.span.signer, open_signed(evidence.span, MergedSpan, run_id=run_id)
        round_index, place = span.round, part - span.first_part
        if not 0 <= place < len(span.part_hashes) or blob_hash(content) != span.part_hashes[place]:
            raise Rejected("not_proven", "the merge is something else", accused)
    elif len(evidence.commits) == 1:
        what, accused = "commit", evidence.commits[0].commit.signer
        round_index = _committed(evidence.commits[0], content, part, run_id).round
    else:
        raise Rejected("malformed", "a bad part has one commit, or a span")
    codec = Codecs(manifest).at(round_index)
    if part >= codec.part_count:
        raise Rejected("not_proven", "no part of the run's")
    try:
        codec.decode_part(content, part)
    except Rejected as error:
        return Verdict(accused, BAD_PART, run_id, round_index, part, f"part {part} of the {what} can't be decoded: {error}")
    raise Rejected("not_proven", "the part can be decoded", accused)


def _false_pass(evidence: Evidence, manifest: Manifest, run_id: bytes) -> Verdict:
    """In `diloco` all leaves up to the one that the verdict names were looked at, in `sync` that one alone."""
    verdict = open_signed(evidence.verdict, AuditVerdict, run_id=run_id)
    accused = evidence.verdict.signer
    if len(evidence.commits) != 1 or len(evidence.contents) != 1:
        raise Rejected("malformed", "a false pass has one commit and one list of leaves")
    signed, raw = evidence.commits[0].commit, evidence.contents[0]
    commit = open_signed(signed, Commit, run_id=run_id)
    said = (verdict.finding, verdict.round, verdict.peer_id, verdict.commit_hash)
    if said != (PASSED, commit.round, signed.signer, payload_hash(signed)) or blob_hash(raw) != commit.evidence_root:
        raise Rejected("not_proven", "not about this commit and its leaves", accused)
    leaves, _ = unpack(raw, signed.signer)
    index = 0 if isinstance(manifest.strategy, DiLoCo) else verdict.leaf
    place = Place(run_id, commit.round, signed.signer)
    if index >= len(leaves) or not is_planted(leaves[index], evidence.nonce, place, index):
        raise Rejected("not_proven", "the leaf isn't made up from these bytes", accused)
    why = f"leaf {index} of {signed.signer} was made up, and passed as if it had been computed again"
    return Verdict(accused, FALSE_PASS, run_id, commit.round, index, why)


def _wrong_merge(evidence: Evidence, manifest: Manifest, run_id: bytes) -> Verdict:
    span = open_signed(evidence.span, MergedSpan, run_id=run_id)
    accused, part = evidence.span.signer, evidence.part
    codec = Codecs(manifest).at(span.round)
    place = part - span.first_part
    if not 0 <= place < len(span.part_hashes) or part >= codec.part_count:
        raise Rejected("not_proven", "the span doesn't hold the part", accused)
    weights = _weights(evidence, span, accused, run_id)
    residual = _residual(evidence, span, codec, place, accused)
    try:
        expected = merged_bytes(codec, manifest, part, list(evidence.contents), weights, residual)
    except ValueError as error:
        why = f"part {part} of the span: its residual or its merge has values that aren't finite ({error})"
        return Verdict(accused, WRONG_MERGE, run_id, span.round, part, why)
    if blob_hash(expected) == span.part_hashes[place]:
        raise Rejected("not_proven", "the merge is right", accused)
    signed, right = span.part_hashes[place].hex()[:12], blob_hash(expected).hex()[:12]
    why = f"part {part} of the span is signed as {signed}, the merge of what the proposal names is {right}"
    return Verdict(accused, WRONG_MERGE, run_id, span.round, part, why)


def _equivocation(evidence: Evidence, _manifest: Manifest, run_id: bytes) -> Verdict:
    """Whoever begins a round anew takes another attempt, so that only one process, at one time, can have signed both."""
    if len(evidence.statements) != 2:
        raise Rejected("malformed", "an equivocation has two statements")
    first, second = evidence.statements
    accused = first.signer
    if (first.signer, first.kind) != (second.signer, second.kind):
        raise Rejected("not_proven", "not two statements of one peer about one thing")
    if first.kind == KINDS[Proposal]:
        one, other = (open_signed(each, Proposal, run_id=run_id) for each in (first, second))
        about = one.round, one.ballot.term, one.ballot.amendment, one.attempt
        same = about == (other.round, other.ballot.term, other.ballot.amendment, other.attempt)
        differ, what = first.payload != second.payload, f"two proposals for ballot {about[1]}.{about[2]}"
        return _two_faced(accused, run_id, one.round, what, proven=same and differ)
    merge, another = (open_signed(each, MergedSpan, run_id=run_id) for each in (first, second))
    same = (merge.round, merge.proposal_hash, merge.attempt) == (another.round, another.proposal_hash, another.attempt)
    differ = (merge.first_part, list(merge.part_hashes)) != (another.first_part, list(another.part_hashes))
    what = f"two merges of proposal {merge.proposal_hash.hex()[:12]}"
    return _two_faced(accused, run_id, merge.round, what, proven=same and differ)


def _two_faced(accused: str, run_id: bytes, round_index: int, what: str, *, proven: bool) -> Verdict:
    if not proven:
        raise Rejected("not_proven", "the two statements don't contradict each other", accused)
    return Verdict(accused, EQUIVOCATION, run_id, round_index, 0, f"signed {what} in one attempt at the round")


def _weights(evidence: Evidence, span: MergedSpan, accused: str, run_id: bytes) -> list[int]:
    """The weights of the proposal's contributors, once it is clear that the evidence is about just their parts."""
    proposal = open_signed(evidence.proposal, Proposal, run_id=run_id)
    if payload_hash(evidence.proposal) != span.proposal_hash or proposal.round != span.round:
        raise Rejected("not_proven", "the span follows another proposal", accused)
    assigned = next((item for item in proposal.commits if item.peer_id == accused), None)
    if assigned is None or (assigned.first_part, assigned.part_span) != (span.first_part, len(span.part_hashes)):
        raise Rejected("not_proven", "the proposal gave the accused another span", accused)
    contributors = [item for item in proposal.commits if item.weight]
    if not len(contributors) == len(evidence.commits) == len(evidence.contents):
        raise Rejected("not_proven", "not the commits that the proposal names", accused)
    for item, announced, content in zip(contributors, evidence.commits, evidence.contents, strict=True):
        if announced.commit.signer != item.peer_id or payload_hash(announced.commit) != item.commit_hash:
            raise Rejected("not_proven", "not the commits that the proposal names", accused)
        _committed(announced, content, evidence.part, run_id)
    return [item.weight for item in contributors]


def _committed(announced: AnnouncedCommit, content: bytes, part: int, run_id: bytes) -> Commit:
    """The commit, if its author committed to just this content."""
    commit = open_signed(announced.commit, Commit, run_id=run_id)
    hashes = split_hashes(announced.part_hashes)
    fits = part < len(hashes) == commit.part_count and root_of(hashes) == commit.parts_root
    if not fits or blob_hash(content) != hashes[part]:
        raise Rejected("not_proven", "the commit is to something else", announced.commit.signer)
    return commit


def _residual(evidence: Evidence, span: MergedSpan, codec: Codec, place: int, accused: str) -> Vector:
    start, end = codec.part_span(evidence.part)
    if codec.kind == EXACT:
        return np.zeros(end - start, dtype=np.float32)
    hashes, content = list(evidence.residual_hashes), evidence.residual
    if len(hashes) != len(span.part_hashes) or root_of(hashes) != span.residual_before or blob_hash(content) != hashes[place]:
        raise Rejected("not_proven", "not the residual that the span names", accused)
    if len(content) != 4 * (end - start):
        raise Rejected("not_proven", "the residual has another size", accused)
    return np.frombuffer(content, dtype="<f4").astype(np.float32)
