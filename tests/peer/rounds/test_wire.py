"""What a stranger's message must look like before anything believes it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.message import Message

from peer.rounds.inbox import read_delivery
from peer.rounds.planning import roster_hash
from peer.rounds.values import (
    BallotNumber,
    CommitArrived,
    ComplaintArrived,
    IncludedCommit,
    ProposalArrived,
    RosterMember,
    SealArrived,
    SealReplyArrived,
    SpanArrived,
)
from peer.rounds.wire import MAX_TERM, Checker, build_proposal, full_quota, quota_samples, weight_limit
from swarm.errors import Rejected
from swarm.identity import Identity
from swarm.merkle import blob_hash, root_of
from swarm.messages import payload_hash, seal
from swarm.rpc.v1.peer_pb2 import AnnouncedProposal, Delivery
from swarm.rpc.v1.signed_pb2 import (
    AnnouncedCommit,
    Ballot,
    Commit,
    Complaint,
    Grant,
    MergedSpan,
    Result,
    Seal,
    SealReply,
    Signed,
    Tree,
)
from tests.writing import writing_run

ALICE, BOB, STRANGER, COORDINATOR = (Identity.from_seed(letter * 32) for letter in (b"a", b"b", b"s", b"c"))
RUN, OTHER_RUN, BASE = b"\x01" * 32, b"\x02" * 32, b"\x03" * 32
HASHES = tuple(blob_hash(bytes([part])) for part in range(3))
ADMITTED = {ALICE.peer_id, BOB.peer_id}


@pytest.fixture(scope="module")
def checker(small_run: Callable[..., Any]) -> Checker:
    """Checks messages of a small `sync` run (batch of 8, sequences of 32 tokens) with three parts."""
    manifest = small_run().manifest
    codec = manifest.codec.model_copy(update={"part_values": -(-manifest.model.parameters // (3 * 4096)) * 4096})
    return Checker(manifest.model_copy(update={"codec": codec}), RUN, COORDINATOR.peer_id, ADMITTED.__contains__)


def announced(signer: Identity = ALICE, hashes: tuple[bytes, ...] = HASHES, **changes: Any) -> AnnouncedCommit:
    """A good commit, except for `changes`."""
    fields: dict[str, Any] = {
        "run_id": RUN,
        "round": 4,
        "base_root": BASE,
        "weight": 5,
        "tokens": 5 * 32,
        "codec": "fp16",
        "parts_root": root_of(HASHES),
        "part_count": 3,
        "evidence_root": b"e" * 32,
        "loss": 2.5,
        "train_seconds": 9.0,
        "upload_bytes_per_s": 1000,
    }
    return AnnouncedCommit(commit=seal(signer, Commit(**{**fields, **changes})), part_hashes=b"".join(hashes))


@pytest.fixture(scope="module")
def codec(checker: Checker) -> str:
    """The run's codec."""
    return checker.manifest.codec.kind


def proposed(signer: Identity = ALICE, grant: Signed | None = None, **changes: Any) -> Signed:
    """A good proposal of two, except for `changes`."""
    peers = sorted([ALICE.peer_id, BOB.peer_id])
    fields: dict[str, Any] = {
        "run_id": RUN,
        "round_index": 4,
        "base_root": BASE,
        "ballot": BallotNumber(1, 2),
        "attempt": bytes(16),
        "commits": [IncludedCommit(peers[0], b"x" * 32, 5, 0, 2), IncludedCommit(peers[1], b"y" * 32, 3, 2, 1, 2.5)],
        "next_roster": [RosterMember(peer, 4) for peer in peers],
        "roster": roster_hash([]),
        "grant": grant,
        "admissions": [],
    }
    return seal(signer, build_proposal(**{**fields, **changes}))


def permission(signer: Identity = COORDINATOR, **changes: Any) -> Signed:
    """A good grant for the two, except for `changes`."""
    fields: dict[str, Any] = {"run_id": RUN, "round": 4, "base_root": BASE, "present": sorted(ADMITTED)}
    return seal(signer, Grant(**{**fields, **changes}))


def reason_of(check: Callable[[Any], object], message: Any) -> str:
    """Why a message is rejected."""
    with pytest.raises(Rejected) as caught:
        check(message)
    return caught.value.reason


def forged(signed: Signed, **changes: Any) -> Signed:
    """The same message with something changed after signing."""
    copy = Signed()
    copy.CopyFrom(signed)
    for name, value in changes.items():
        setattr(copy, name, value)
    return copy


# --- commits --------------------------------------------------------------------------------------------------------------


def test_a_good_commit_becomes_facts(checker: Checker, codec: str) -> None:
    """Round, base and every field that decisions need come out; the facts carry the message itself."""
    message = announced(codec=codec, leaving=True)
    number, facts = checker.commit(message)
    assert (number, facts.base_root, facts.peer, facts.weight, facts.part_hashes) == (4, BASE, ALICE.peer_id, 5, HASHES)
    assert (facts.seconds, facts.upload_bytes_per_s, facts.leaving, facts.loss) == (9.0, 1000, True, 2.5)
    assert facts.commit_hash == payload_hash(message.commit)
    assert facts.signed is message


def test_a_zero_commit_has_no_parts(checker: Checker, codec: str) -> None:
    """Who contributes nothing announces no hashes; any that come along are ignored."""
    _, facts = checker.commit(announced(codec=codec, weight=0, tokens=0, part_count=0, parts_root=b"", evidence_root=b""))
    assert (facts.weight, facts.part_hashes) == (0, ())


def test_an_absurd_bandwidth_is_capped(checker: Checker, codec: str) -> None:
    """A claimed upload of exabytes counts as a terabyte per second."""
    assert checker.commit(announced(codec=codec, upload_bytes_per_s=(1 << 64) - 1))[1].upload_bytes_per_s == 1 << 40


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"run_id": OTHER_RUN}, "wrong_run"),
        ({"weight": 9, "tokens": 9 * 32}, "bad_weight"),
        ({"weight": 1 << 63, "tokens": 1 << 63}, "bad_weight"),
        ({"tokens": 5 * 32 + 1}, "bad_tokens"),
        ({"loss": float("nan")}, "bad_numbers"),
        ({"loss": float("inf")}, "bad_numbers"),
        ({"train_seconds": float("nan")}, "bad_numbers"),
        ({"train_seconds": -1.0}, "bad_numbers"),
        ({"codec": "abacus"}, "wrong_codec"),
        ({"part_count": 2}, "wrong_parts"),
        ({"part_count": 4}, "wrong_parts"),
        ({"hashes": HASHES[:2]}, "wrong_parts"),
        ({"hashes": HASHES[:2], "part_count": 2, "parts_root": root_of(HASHES[:2])}, "wrong_parts"),
        ({"hashes": HASHES[::-1]}, "wrong_parts"),
        ({"hashes": (b"short",)}, "malformed"),
        ({"parts_root": root_of(HASHES[:1])}, "wrong_parts"),
        ({"base_root": b"short"}, "wrong_base"),
        ({"evidence_root": b""}, "no_evidence"),
        ({"evidence_root": b"short"}, "no_evidence"),
        ({"signer": STRANGER}, "not_admitted"),
        ({"weight": 0, "tokens": 0}, "wrong_parts"),
        ({"codec": "x" * (1 << 16)}, "too_large"),
    ],
)
def test_bad_commits_are_rejected(checker: Checker, codec: str, changes: dict[str, Any], reason: str) -> None:
    """Each lie in a commit has its own reason."""
    assert reason_of(checker.commit, announced(**{"codec": codec, **changes})) == reason


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"signature": b"\x00" * 64}, "bad_signature"),
        ({"signature": b""}, "bad_signature"),
        ({"signer": BOB.peer_id}, "bad_signature"),
        ({"signer": "nobody"}, "bad_peer_id"),
        ({"payload": b"\xff\xff"}, "bad_signature"),
        ({"kind": "application/vnd.swarm.result.v1"}, "wrong_kind"),
    ],
)
def test_forgeries_are_rejected(checker: Checker, codec: str, changes: dict[str, Any], reason: str) -> None:
    """A commit that was changed after signing, or is said to be another's, doesn't open."""
    message = announced(codec=codec)
    message.commit.CopyFrom(forged(message.commit, **changes))
    assert reason_of(checker.commit, message) == reason


def test_signed_rubbish_is_malformed(checker: Checker) -> None:
    """Bytes that don't parse are rejected even with a good signature."""
    kind = "application/vnd.swarm.commit.v1"
    signed = Signed(kind=kind, payload=b"\xff\xff", signer=ALICE.peer_id, signature=ALICE.sign(kind, b"\xff\xff"))
    assert reason_of(checker.commit, AnnouncedCommit(commit=signed)) == "malformed"


# --- proposals ------------------------------------------------------------------------------------------------------------


def test_a_good_proposal_survives_the_wire(checker: Checker) -> None:
    """What a leader builds is what the others read."""
    signed = proposed()
    number, facts = checker.proposal(signed)
    assert (number, facts.ballot, facts.leader, facts.base_root) == (4, BallotNumber(1, 2), ALICE.peer_id, BASE)
    assert [(item.weight, item.first_part, item.part_span, item.loss) for item in facts.commits] == [(5, 0, 2, 0), (3, 2, 1, 2.5)]
    assert [member.peer for member in facts.next_roster] == sorted(ADMITTED)
    assert facts.proposal_hash == payload_hash(signed)
    assert not facts.grant


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"run_id": OTHER_RUN}, "wrong_run"),
        ({"signer": STRANGER}, "not_admitted"),
        ({"next_roster": [RosterMember(ALICE.peer_id, 0)]}, "bad_quota"),
        ({"next_roster": [RosterMember(ALICE.peer_id, 1 << 20)]}, "bad_quota"),
        ({"next_roster": [RosterMember("../../etc/passwd", 1)]}, "bad_member"),
        ({"next_roster": [RosterMember(ALICE.peer_id, 1)] * 65}, "roster_too_large"),
        ({"commits": [IncludedCommit(ALICE.peer_id, b"", 1)] * 65}, "roster_too_large"),
        ({"commits": [IncludedCommit(ALICE.peer_id, b"", 9)]}, "bad_weight"),
        ({"commits": [IncludedCommit(ALICE.peer_id, b"", 1, 2, 2)]}, "wrong_spans"),
        ({"commits": [IncludedCommit(ALICE.peer_id, b"", 1, loss=float("nan"))]}, "bad_numbers"),
        ({"commits": [IncludedCommit(ALICE.peer_id, b"", 1, loss=float("inf"))]}, "bad_numbers"),
        ({"attempt": b"short"}, "malformed"),
        ({"ballot": BallotNumber(MAX_TERM, 0)}, "bad_ballot"),
        ({"ballot": BallotNumber(0, MAX_TERM)}, "bad_ballot"),
    ],
)
def test_bad_proposals_are_rejected(checker: Checker, changes: dict[str, Any], reason: str) -> None:
    """Sizes, ranges and names of a proposal are checked before the machine sees it."""
    assert reason_of(checker.proposal, proposed(**changes)) == reason


def test_a_grant_counts_if_it_fits(checker: Checker) -> None:
    """The coordinator's permission for this round, state and these peers makes a proposal of a minority valid."""
    assert checker.proposal(proposed(grant=permission()))[1].grant


@pytest.mark.parametrize(
    "changes",
    [{"round": 5}, {"base_root": OTHER_RUN}, {"present": [ALICE.peer_id]}, {"present": []}],
)
def test_a_grant_for_something_else_is_none(checker: Checker, changes: dict[str, Any]) -> None:
    """A grant of another round, state or group permits nothing."""
    assert not checker.proposal(proposed(grant=permission(**changes)))[1].grant


@pytest.mark.parametrize(
    ("grant", "reason"),
    [
        (permission(ALICE), "wrong_signer"),
        (permission(run_id=OTHER_RUN), "wrong_run"),
        (forged(permission(), signature=b"\x00" * 64), "bad_signature"),
        (forged(permission(ALICE), signer=COORDINATOR.peer_id), "bad_signature"),
    ],
)
def test_a_false_grant_is_rejected(checker: Checker, grant: Signed, reason: str) -> None:
    """Only the coordinator's key grants."""
    assert reason_of(checker.proposal, proposed(grant=grant)) == reason


# --- spans, results, seals, complaints ------------------------------------------------------------------------------------


def span(signer: Identity = ALICE, **changes: Any) -> Signed:
    """A good merged span of two parts, except for `changes`."""
    fields: dict[str, Any] = {
        "run_id": RUN,
        "round": 4,
        "proposal_hash": b"p" * 32,
        "first_part": 1,
        "part_hashes": HASHES[:2],
        "attempt": bytes(16),
    }
    return seal(signer, MergedSpan(**{**fields, **changes}))


def test_a_good_span_becomes_facts(checker: Checker) -> None:
    """Reducer, proposal and hashes come out."""
    number, facts = checker.span(span())
    assert (number, facts.reducer, facts.proposal_hash, facts.first_part) == (4, ALICE.peer_id, b"p" * 32, 1)
    assert facts.part_hashes == HASHES[:2]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"first_part": 2}, "wrong_spans"),
        ({"part_hashes": [b"short"]}, "wrong_spans"),
        ({"attempt": b""}, "malformed"),
        ({"run_id": OTHER_RUN}, "wrong_run"),
        ({"signer": STRANGER}, "not_admitted"),
    ],
)
def test_bad_spans_are_rejected(checker: Checker, changes: dict[str, Any], reason: str) -> None:
    """A span ends within the model and names its parts by whole hashes."""
    assert reason_of(checker.span, span(**changes)) == reason


def result(signer: Identity = ALICE, root: bytes = BASE, **changes: Any) -> Signed:
    """A good result, except for `changes`."""
    tree = Tree(root=root, size_bytes=77, chunk_bytes=1 << 20)
    fields: dict[str, Any] = {"run_id": RUN, "round": 4, "proposal_hash": b"p" * 32, "state": tree, "tokens_total": 9}
    return seal(signer, Result(**{**fields, **changes}))


def test_a_good_result_becomes_facts(checker: Checker) -> None:
    """Root, size and tokens come out."""
    facts = checker.result(result())
    assert (facts.peer, facts.round_index, facts.root, facts.size_bytes, facts.tokens_total) == (ALICE.peer_id, 4, BASE, 77, 9)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [({"root": b""}, "bad_root"), ({"run_id": OTHER_RUN}, "wrong_run"), ({"signer": STRANGER}, "not_admitted")],
)
def test_bad_results_are_rejected(checker: Checker, changes: dict[str, Any], reason: str) -> None:
    """A result names a whole root, in this run, by an admitted peer."""
    assert reason_of(checker.result, result(**changes)) == reason


def reply(signer: Identity = BOB, **changes: Any) -> Signed:
    """A seal reply, empty except for `changes`."""
    fields: dict[str, Any] = {"run_id": RUN, "round": 4, "ballot": Ballot(term=1, amendment=2)}
    return seal(signer, SealReply(**{**fields, **changes}))


def test_a_full_seal_reply_becomes_facts(checker: Checker, codec: str) -> None:
    """Proposal, commits and spans inside a reply are opened and checked one by one."""
    signed = reply(accepted=proposed(), complete=True, commits=[announced(codec=codec)], spans=[span()], holds=[ALICE.peer_id])
    number, facts = checker.seal_reply(signed)
    assert (number, facts.peer, facts.ballot, facts.complete) == (4, BOB.peer_id, BallotNumber(1, 2), True)
    assert facts.accepted is not None
    assert facts.accepted.leader == ALICE.peer_id
    assert [item.peer for item in facts.commits] == [ALICE.peer_id]
    assert [item.reducer for item in facts.spans] == [ALICE.peer_id]
    assert facts.holds == {ALICE.peer_id}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"run_id": OTHER_RUN}, "wrong_run"),
        ({"signer": STRANGER}, "not_admitted"),
        ({"spans": [span()] * 65}, "too_many"),
        ({"accepted": proposed(round_index=5)}, "wrong_round"),
        ({"spans": [span(round=5)]}, "wrong_round"),
        ({"accepted": proposed(STRANGER)}, "not_admitted"),
        ({"accepted": forged(proposed(), signature=b"\x00" * 64)}, "bad_signature"),
        ({"spans": [forged(span(), signer=BOB.peer_id)]}, "bad_signature"),
    ],
)
def test_bad_seal_replies_are_rejected(checker: Checker, changes: dict[str, Any], reason: str) -> None:
    """A reply is worth no more than the worst message in it."""
    assert reason_of(checker.seal_reply, reply(**changes)) == reason


def test_seals_and_complaints_come_from_admitted_peers(checker: Checker) -> None:
    """Strangers can neither seal nor complain, and ballots have an end."""
    seal_message = Seal(run_id=RUN, round=4, ballot=Ballot(term=3, amendment=1))
    complaint = Complaint(run_id=RUN, round=4, about="x" * 1000, reason="y" * 1000)
    assert checker.seal(seal(ALICE, seal_message)) == (4, BallotNumber(3, 1))
    assert checker.complaint(seal(ALICE, complaint)) == (4, "x" * 64, "y" * 32)
    assert reason_of(checker.seal, seal(STRANGER, seal_message)) == "not_admitted"
    assert reason_of(checker.complaint, seal(STRANGER, complaint)) == "not_admitted"
    assert reason_of(checker.seal, seal(ALICE, Seal(run_id=OTHER_RUN))) == "wrong_run"
    assert reason_of(checker.seal, seal(ALICE, Seal(run_id=RUN, ballot=Ballot(term=(1 << 32) - 1)))) == "bad_ballot"


# --- deliveries -----------------------------------------------------------------------------------------------------------


def test_each_kind_of_delivery_becomes_its_event(checker: Checker, codec: str) -> None:
    """The arrival names sender, round and event; commits that travel with a proposal come first, marked as forwarded."""
    commit, complaint = announced(codec=codec), seal(ALICE, Complaint(run_id=RUN, round=4, about="b", reason="r"))
    sealed = seal(ALICE, Seal(run_id=RUN, round=4, ballot=Ballot(term=1)))
    cases: list[tuple[dict[str, Message], type, str]] = [
        ({"commit": commit}, CommitArrived, ALICE.peer_id),
        ({"merged_span": span()}, SpanArrived, ALICE.peer_id),
        ({"seal": sealed}, SealArrived, ALICE.peer_id),
        ({"seal_reply": reply()}, SealReplyArrived, BOB.peer_id),
        ({"complaint": complaint}, ComplaintArrived, ALICE.peer_id),
    ]
    for body, kind, sender in cases:
        (arrival,) = read_delivery(checker, Delivery(**body))
        assert isinstance(arrival.event, kind)
        assert (arrival.round_index, arrival.sender) == (4, sender)
    both = read_delivery(checker, Delivery(proposal=AnnouncedProposal(proposal=proposed(BOB), commits=[commit])))
    assert [type(arrival.event) for arrival in both] == [CommitArrived, ProposalArrived]
    assert [arrival.sender for arrival in both] == [ALICE.peer_id, BOB.peer_id]
    assert both[0].event == CommitArrived(replace(checker.commit(commit)[1]), forwarded=True)
    assert reason_of(lambda item: read_delivery(checker, item), Delivery()) == "malformed"


# --- limits ---------------------------------------------------------------------------------------------------------------


def test_weight_limits_follow_the_strategy(small_run: Callable[..., Any]) -> None:
    """`sync`: the target batch; `diloco`: inner steps times batch. The full quota is in samples or in steps."""
    sync, diloco = small_run("sync").manifest, small_run("diloco").manifest
    assert (weight_limit(sync, 4), full_quota(sync, 4)) == (8, 8)
    assert (weight_limit(diloco, 4), full_quota(diloco, 4)) == (12, 3)


def test_a_commit_to_samples_is_in_tokens_and_names_its_piece(checker: Checker, tmp_path: Path) -> None:
    """As many as a round's samples can have; the state that it carries is one value."""
    manifest = writing_run(tmp_path)[0]
    writing = replace(checker, manifest=manifest)
    good = {"weight": 160, "tokens": 160, "parts_root": root_of(HASHES[:1]), "part_count": 1}
    assert writing.commit(announced(hashes=HASHES[:1], **good))[1].weight == 160
    assert (weight_limit(manifest, 4), full_quota(manifest, 4), quota_samples(manifest)) == (160, 10, 16)
    for changes, reason in (
        ({"weight": 161, "tokens": 161}, "bad_weight"),
        ({"tokens": 159}, "bad_tokens"),
        ({"evidence_root": b""}, "no_evidence"),
    ):
        bad = announced(hashes=HASHES[:1], **(good | changes))
        assert reason_of(writing.commit, bad) == reason
