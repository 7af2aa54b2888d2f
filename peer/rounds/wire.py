"""Between the wire and the decisions: signed messages become verified facts, and facts become messages to sign.

Everything that a stranger sends passes here once: size, signature, run, author's admission, ranges, and hashes that must fit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from peer.codec import Codec, Codecs
from peer.rounds.values import (
    AdoptionArrived,
    BallotNumber,
    CommitFacts,
    IncludedCommit,
    ProposalFacts,
    ReadyArrived,
    RosterMember,
    SealReplyFacts,
    SpanFacts,
)
from swarm.errors import Rejected
from swarm.identity import public_key_of
from swarm.manifest import DiLoCo, Generate, Manifest, Sync
from swarm.merkle import HASH_BYTES, root_of
from swarm.messages import open_signed, payload_hash, split_hashes
from swarm.rpc.v1.signed_pb2 import (
    Adoption,
    AnnouncedCommit,
    Ballot,
    Commit,
    CommitReference,
    Complaint,
    Grant,
    Member,
    MergedSpan,
    Proposal,
    Ready,
    Result,
    Seal,
    SealReply,
    Signed,
)

MAX_TERM = 1 << 31
ATTEMPT_BYTES = 16


@dataclass(frozen=True)
class ResultFacts:
    """A peer's signed statement of the state that it holds after a round."""

    peer: str
    round_index: int
    proposal_hash: bytes
    root: bytes
    size_bytes: int
    tokens_total: int
    signed: Signed


@dataclass(frozen=True)
class Checker:
    """Opens messages of one run. `is_admitted(peer, token)` decides who may speak; `coordinator` signs grants."""

    manifest: Manifest
    run_id: bytes
    coordinator: str
    is_admitted: Callable[[str], bool]

    def commit(self, announced: AnnouncedCommit) -> tuple[int, CommitFacts]:
        """Round and facts of a commit. Raises `Rejected`."""
        signed = announced.commit
        commit = open_signed(signed, Commit, run_id=self.run_id)
        self._admitted(signed.signer)
        hashes = tuple(split_hashes(announced.part_hashes)) if commit.weight else ()
        codec = self._codec(commit.round)
        problems = (
            ("bad_weight", commit.weight <= weight_limit(self.manifest, commit.round)),
            ("bad_tokens", commit.tokens == commit.weight * self.manifest.tokens_per_weight),
            ("bad_numbers", math.isfinite(commit.loss) and math.isfinite(commit.train_seconds) and commit.train_seconds >= 0),
            ("wrong_codec", commit.codec == codec.kind),
            ("wrong_parts", len(hashes) == commit.part_count == (codec.part_count if commit.weight else 0)),
            ("wrong_parts", not commit.weight or root_of(hashes) == commit.parts_root),
            ("wrong_base", len(commit.base_root) == HASH_BYTES),
            ("no_evidence", len(commit.evidence_root) == (HASH_BYTES if commit.weight and self.manifest.shows_work else 0)),
        )
        _require(problems, signed.signer)
        facts = CommitFacts(
            peer=signed.signer,
            commit_hash=payload_hash(signed),
            weight=commit.weight,
            part_hashes=hashes,
            seconds=commit.train_seconds,
            upload_bytes_per_s=min(commit.upload_bytes_per_s, 1 << 40),
            leaving=commit.leaving,
            loss=commit.loss,
            evidence_root=commit.evidence_root,
            base_root=commit.base_root,
            signed=announced,
        )
        return commit.round, facts

    def proposal(self, signed: Signed) -> tuple[int, ProposalFacts]:
        """Round and facts of a proposal. Raises `Rejected`."""
        proposal = open_signed(signed, Proposal, run_id=self.run_id)
        self._admitted(signed.signer)
        grant = proposal.HasField("grant") and self._grant_fits(proposal)
        members = tuple(RosterMember(member.peer_id, member.quota) for member in proposal.next_roster)
        limit, part_count = weight_limit(self.manifest, proposal.round), self._codec(proposal.round).part_count
        most = full_quota(self.manifest, proposal.round + 1)  # more would be work that nobody's commit may claim
        _require(
            (
                ("roster_too_large", len(members) <= self.manifest.rounds.max_peers and len(proposal.commits) <= 64),
                ("bad_ballot", proposal.ballot.term < MAX_TERM and proposal.ballot.amendment < MAX_TERM),
                ("malformed", len(proposal.attempt) == ATTEMPT_BYTES),
                ("bad_member", all(_is_peer_id(member.peer) for member in members)),
                ("bad_quota", all(0 < member.quota <= most for member in members)),
                ("bad_weight", all(item.weight <= limit for item in proposal.commits)),
                ("bad_numbers", all(math.isfinite(item.loss) for item in proposal.commits)),
                ("wrong_spans", all(item.first_part + item.part_span <= part_count for item in proposal.commits)),
            ),
            signed.signer,
        )
        commits = tuple(
            IncludedCommit(item.peer_id, item.commit_hash, item.weight, item.first_part, item.part_span, item.loss)
            for item in proposal.commits
        )
        facts = ProposalFacts(
            proposal_hash=payload_hash(signed),
            ballot=BallotNumber(proposal.ballot.term, proposal.ballot.amendment),
            leader=signed.signer,
            base_root=proposal.base_root,
            commits=commits,
            next_roster=members,
            grant=grant,
            signed=signed,
        )
        return proposal.round, facts

    def span(self, signed: Signed) -> tuple[int, SpanFacts]:
        """Round and facts of a reducer's merged span. Raises `Rejected`."""
        span = open_signed(signed, MergedSpan, run_id=self.run_id)
        self._admitted(signed.signer)
        hashes = tuple(span.part_hashes)
        sizes = all(len(name) == HASH_BYTES for name in hashes)
        fits = sizes and span.first_part + len(hashes) <= self._codec(span.round).part_count
        _require((("wrong_spans", fits), ("malformed", len(span.attempt) == ATTEMPT_BYTES)), signed.signer)
        return span.round, SpanFacts(signed.signer, span.proposal_hash, span.first_part, hashes, signed)

    def result(self, signed: Signed) -> ResultFacts:
        """Facts of a result. Raises `Rejected`."""
        result = open_signed(signed, Result, run_id=self.run_id)
        self._admitted(signed.signer)
        _require((("bad_root", len(result.state.root) == HASH_BYTES),), signed.signer)
        return ResultFacts(
            signed.signer,
            result.round,
            result.proposal_hash,
            result.state.root,
            result.state.size_bytes,
            result.tokens_total,
            signed,
        )

    def seal_reply(self, signed: Signed) -> tuple[int, SealReplyFacts]:
        """Round and facts of a seal reply, everything inside it checked too. Raises `Rejected`."""
        reply = open_signed(signed, SealReply, run_id=self.run_id)
        self._admitted(signed.signer)
        _require((("too_many", len(reply.commits) <= 64 and len(reply.spans) <= 64),), signed.signer)
        accepted = None
        if reply.HasField("accepted"):
            round_index, accepted = self.proposal(reply.accepted)
            _require((("wrong_round", round_index == reply.round),), signed.signer)
        commits = [self.commit(item) for item in reply.commits]
        spans = [self.span(item) for item in reply.spans]
        _require((("wrong_round", all(item[0] == reply.round for item in [*commits, *spans])),), signed.signer)
        facts = SealReplyFacts(
            peer=signed.signer,
            ballot=_ballot(reply.ballot, signed.signer),
            accepted=accepted,
            complete=reply.complete,
            ready=reply.ready,
            standing=_ballot(reply.standing, signed.signer),
            commits=tuple(item[1] for item in commits),
            spans=tuple(item[1] for item in spans),
            holds=frozenset(reply.holds),
            signed=signed,
        )
        return reply.round, facts

    def seal(self, signed: Signed) -> tuple[int, BallotNumber]:
        """Round and ballot of a seal. Raises `Rejected`."""
        seal = open_signed(signed, Seal, run_id=self.run_id)
        self._admitted(signed.signer)
        return seal.round, _ballot(seal.ballot, signed.signer)

    def ready(self, signed: Signed) -> tuple[int, ReadyArrived]:
        """Round and event of a peer that holds everything. Raises `Rejected`."""
        ready = open_signed(signed, Ready, run_id=self.run_id)
        self._admitted(signed.signer)
        ballot = _ballot(ready.ballot, signed.signer)
        return ready.round, ReadyArrived(signed.signer, ballot, ready.proposal_hash, ready.again)

    def adoption(self, signed: Signed) -> tuple[int, AdoptionArrived]:
        """Round and event of a proposal that is made again, everything inside it checked too. Raises `Rejected`."""
        adoption = open_signed(signed, Adoption, run_id=self.run_id)
        self._admitted(signed.signer)
        round_index, reply = self.seal_reply(adoption.reply)
        _require((("wrong_round", round_index == adoption.round),), signed.signer)
        return round_index, AdoptionArrived(signed.signer, _ballot(adoption.ballot, signed.signer), reply)

    def complaint(self, signed: Signed) -> tuple[int, str, str]:
        """Round, subject and reason of a complaint, cut to length. Raises `Rejected`."""
        complaint = open_signed(signed, Complaint, run_id=self.run_id)
        self._admitted(signed.signer)
        return complaint.round, complaint.about[:64], complaint.reason[:32]

    def _codec(self, round_index: int) -> Codec:
        return Codecs(self.manifest).at(round_index)

    def _grant_fits(self, proposal: Proposal) -> bool:
        grant = open_signed(proposal.grant, Grant, signer=self.coordinator, run_id=self.run_id)
        present = {item.peer_id for item in proposal.commits}
        return grant.round == proposal.round and grant.base_root == proposal.base_root and present <= set(grant.present)

    def _admitted(self, peer: str) -> None:
        if not self.is_admitted(peer):
            raise Rejected("not_admitted", "", peer)


def weight_limit(manifest: Manifest, round_index: int) -> int:
    """The most samples that the strategy gives one peer in a round; tokens where it generates."""
    return manifest.phase(round_index).inner_steps * manifest.most_round_weight


def full_quota(manifest: Manifest, round_index: int) -> int:
    """The work of a round: the samples of all (`sync`, `generate`) or the inner steps of the fastest peer (`diloco`)."""
    match manifest.strategy:
        case Sync(batch_samples=samples) | Generate(batch_samples=samples):
            return samples
        case DiLoCo():
            return manifest.phase(round_index).inner_steps


def quota_samples(manifest: Manifest) -> int:
    """The most weight of a unit of quota; 0 where work is begun before the quota is known, so that it binds nobody."""
    match manifest.strategy:
        case Sync():
            return 1
        case Generate(sampling=sampling):
            return sampling.max_tokens
        case DiLoCo(overlap="off", batch_samples=samples):
            return samples
        case DiLoCo():
            return 0


def build_proposal(
    *,
    run_id: bytes,
    round_index: int,
    base_root: bytes,
    ballot: BallotNumber,
    attempt: bytes,
    commits: Iterable[IncludedCommit],
    next_roster: Iterable[RosterMember],
    roster: bytes,
    grant: Signed | None,
    admissions: Iterable[Signed],
) -> Proposal:
    """The message behind a leader's decision."""
    return Proposal(
        run_id=run_id,
        round=round_index,
        ballot=Ballot(term=ballot.term, amendment=ballot.amendment),
        attempt=attempt,
        base_root=base_root,
        commits=[
            CommitReference(
                peer_id=item.peer,
                commit_hash=item.commit_hash,
                weight=item.weight,
                first_part=item.first_part,
                part_span=item.part_span,
                loss=item.loss,
            )
            for item in commits
        ],
        next_roster=[Member(peer_id=member.peer, quota=member.quota) for member in next_roster],
        grant=grant,
        roster_hash=roster,
        admissions=list(admissions),
    )


def _ballot(ballot: Ballot, sender: str) -> BallotNumber:
    _require((("bad_ballot", ballot.term < MAX_TERM and ballot.amendment < MAX_TERM),), sender)
    return BallotNumber(ballot.term, ballot.amendment)


def _is_peer_id(name: str) -> bool:
    try:
        public_key_of(name)
    except Rejected:
        return False
    return True


def _require(problems: Iterable[tuple[str, bool]], sender: str) -> None:
    for reason, fine in problems:
        if not fine:
            raise Rejected(reason, "", sender)
