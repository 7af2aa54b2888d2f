"""Proofs of misbehaviour: what holds, and everything that doesn't."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from peer.codec import Codec, Codecs
from peer.codec.feedback import ErrorFeedback
from peer.evidence import Verdict, merged_bytes, verify_evidence
from peer.leaves import Leaf, pack, unpack
from peer.planting import Place, planted
from peer.rounds.auditor import chance
from peer.rounds.docket import SUFFIX, Docket
from peer.sketch import BLOCKS, WIDTH
from swarm.cli.main import run as swarm
from swarm.errors import Rejected
from swarm.manifest import Manifest
from swarm.merkle import blob_hash, root_of
from swarm.messages import payload_hash, seal
from swarm.rpc.v1.signed_pb2 import AnnouncedCommit, AuditVerdict, Ballot, CommitReference, Evidence, MergedSpan, Proposal
from tests.peer.codec.codec_cases import normal
from tests.world import World, identity, manifest

PEERS = sorted((identity(number) for number in range(4)), key=lambda peer: peer.peer_id)
REDUCER = PEERS[2]
ROUND, PARTS, PART_VALUES = 7, 6, 4096
FIRST, SPAN, PART = 2, 3, 3  # the reducer's span, and the part that is looked at
KINDS = ("fp16", "int8", "int4", "int2")
FRESH = {"kind": "diloco", "inner_steps": 4, "batch_samples": 4, "inner_state": "fresh", "schedule": {"total_tokens": 100_000}}
Change = Callable[[Evidence], None]


def run_of(kind: str, merge: str = "mean") -> Manifest:
    """A run of six parts."""
    changed = {"model": {"config": {"model_type": "llama"}, "parameters": PARTS * PART_VALUES}}
    codec = {"codec": {"kind": kind, "part_values": PART_VALUES}, "merge": {"kind": merge}}
    return manifest(**changed, **codec)


def announced(world: World, author: int, codec: Codec, weight: int, part_of: Callable[[int], bytes]) -> AnnouncedCommit:
    """A commit to six parts."""
    hashes = [blob_hash(part_of(index)) for index in range(PARTS)]
    body = {"codec": codec.kind, "parts_root": root_of(hashes), "part_count": PARTS}
    signed = world.commit(PEERS[author], ROUND, weight, **body)
    return AnnouncedCommit(commit=signed, part_hashes=b"".join(hashes))


def evidence_of_merge(kind: str, merge: str = "mean", wrong: bool = True) -> Evidence:
    """A round of four, of whom one contributes nothing, and what the reducer signed for its span."""
    world = World(run_of(kind, merge))
    codec = Codecs(world.manifest).at(ROUND)
    weights = [4, 0, 2, 1]
    updates = [normal(PARTS * PART_VALUES, seed) for seed in range(4)]

    def part_of(author: int, index: int) -> bytes:
        return codec.encode_part(updates[author][slice(*codec.part_span(index))], index)

    empty = world.commit(PEERS[1], ROUND, 0)
    commits = [
        announced(world, author, codec, weight, partial(part_of, author)) if weight else AnnouncedCommit(commit=empty)
        for author, weight in enumerate(weights)
    ]
    named = [each.commit for each in commits]
    spans = {2: (FIRST, SPAN)}
    references = [
        CommitReference(
            peer_id=signed.signer,
            commit_hash=payload_hash(signed),
            weight=weight,
            first_part=spans.get(place, (0, 0))[0],
            part_span=spans.get(place, (0, 0))[1],
        )
        for place, (signed, weight) in enumerate(zip(named, weights, strict=True))
    ]
    proposal = seal(PEERS[0], Proposal(run_id=world.run_id, round=ROUND, ballot=Ballot(), commits=references))
    contributors = [place for place, weight in enumerate(weights) if weight]
    before = ErrorFeedback(codec, range(FIRST, FIRST + SPAN)) if kind != "fp16" else None
    if before is not None:
        for index in before.parts:
            before.encode_part(normal(PART_VALUES, 90 + index), index)
    hashes, residuals = list[bytes](), list[bytes]()
    for index in range(FIRST, FIRST + SPAN):
        residual = before.residual(index).copy() if before is not None else np.zeros(PART_VALUES, dtype=np.float32)
        contents = [part_of(author, index) for author in contributors]
        content = merged_bytes(codec, world.manifest, index, contents, [weights[author] for author in contributors], residual)
        hashes.append(blob_hash(b"mine" if wrong and index == PART else content))
        residuals.append(residual.tobytes())
    residual_hashes = [blob_hash(each) for each in residuals] if before is not None else []
    span = MergedSpan(
        run_id=world.run_id,
        round=ROUND,
        proposal_hash=payload_hash(proposal),
        first_part=FIRST,
        part_hashes=hashes,
        residual_before=root_of(residual_hashes) if residual_hashes else b"",
    )
    return Evidence(
        kind="wrong_merge",
        manifest=world.signed_manifest,
        commits=[commits[author] for author in contributors],
        part=PART,
        contents=[part_of(author, PART) for author in contributors],
        proposal=proposal,
        span=seal(REDUCER, span),
        residual_hashes=residual_hashes,
        residual=residuals[PART - FIRST] if residual_hashes else b"",
    )


def evidence_of_part(content: bytes = b"\xff" * 100) -> Evidence:
    """A commit of which one part is not what any encoder makes."""
    world = World(run_of("int4"))
    codec = Codecs(world.manifest).at(ROUND)
    good = codec.encode_part(normal(PART_VALUES), 0)
    commit = announced(world, 3, codec, 1, lambda index: content if index == PART else good)
    return Evidence(kind="bad_part", manifest=world.signed_manifest, commits=[commit], part=PART, contents=[content])


def evidence_of_pass(strategy: str = "diloco", leaf: int = 1, **said: object) -> Evidence:
    """What an auditor signed about a contribution whose leaves were made up from a secret."""
    world = World(manifest(**({} if strategy == "sync" else {"strategy": FRESH})))
    author, nonce = PEERS[3], bytes(range(32))
    random = np.random.default_rng(0)
    honest = tuple(Leaf(4, 2.0, random.standard_normal((BLOCKS, WIDTH)).astype(np.float32)) for _ in range(4))
    leaves = planted(honest, nonce, Place(world.run_id, ROUND, author.peer_id), by_samples=strategy == "sync")
    raw = pack(leaves, "fp32")
    commit = world.commit(author, ROUND, 16, evidence_root=blob_hash(raw))
    values = {"run_id": world.run_id, "round": ROUND, "peer_id": author.peer_id, "commit_hash": payload_hash(commit)}
    verdict = AuditVerdict(**(values | {"finding": "passed", "leaf": leaf} | said))
    return Evidence(
        kind="false_pass",
        manifest=world.signed_manifest,
        commits=[AnnouncedCommit(commit=commit)],
        contents=[raw],
        verdict=seal(REDUCER, verdict),
        nonce=nonce,
    )


def verified(evidence: Evidence) -> Verdict:
    return verify_evidence(evidence.SerializeToString())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("merge", ["mean", "centered_clip"])
def test_a_wrong_merge_is_proven(kind: str, merge: str) -> None:
    """By the reducer's signature over something else than the merge; an honest reducer's proves nothing."""
    verdict = verified(evidence_of_merge(kind, merge))
    assert (verdict.accused, verdict.kind, verdict.round_index, verdict.part) == (REDUCER.peer_id, "wrong_merge", ROUND, PART)
    with pytest.raises(Rejected, match="the merge is right"):
        verified(evidence_of_merge(kind, merge, wrong=False))


def test_a_part_that_nobody_can_decode_is_proven() -> None:
    """And a good one isn't."""
    verdict = verified(evidence_of_part())
    assert (verdict.accused, verdict.kind, verdict.part) == (PEERS[3].peer_id, "bad_part", PART)
    good = Codecs(run_of("int4")).at(ROUND).encode_part(normal(PART_VALUES), 0)
    with pytest.raises(Rejected, match="can be decoded"):
        verified(evidence_of_part(good))


@pytest.mark.parametrize(("strategy", "leaf"), [("diloco", 0), ("diloco", 3), ("sync", 0), ("sync", 2), ("sync", 3)])
def test_letting_a_planted_contribution_pass_is_proven(strategy: str, leaf: int) -> None:
    """By the auditor's own signature, as nobody who computed it again could have found it right."""
    verdict = verified(evidence_of_pass(strategy, leaf))
    assert (verdict.accused, verdict.kind, verdict.round_index) == (REDUCER.peer_id, "false_pass", ROUND)
    assert verdict.part == (leaf if strategy == "sync" else 0)


def _other_nonce(evidence: Evidence) -> None:
    evidence.nonce = bytes(32)


def _short_nonce(evidence: Evidence) -> None:
    evidence.nonce = evidence.nonce[:31]


def _honest_leaves(evidence: Evidence) -> None:
    evidence.contents[0] = pack(unpack(evidence.contents[0])[0][::-1], "fp32")


@pytest.mark.parametrize(
    ("evidence", "change"),
    [
        (evidence_of_pass(), _other_nonce),
        (evidence_of_pass(), _short_nonce),
        (evidence_of_pass(), _honest_leaves),
        (evidence_of_pass("sync", 1), None),  # the leaf that keeps the sum follows from nothing that is told
        (evidence_of_pass("sync", 4), None),
        (evidence_of_pass(finding="failed"), None),
        (evidence_of_pass(finding="unable"), None),
        (evidence_of_pass(round=ROUND + 1), None),
        (evidence_of_pass(peer_id=PEERS[0].peer_id), None),
        (evidence_of_pass(commit_hash=bytes(32)), None),
    ],
)
def test_an_honest_auditor_is_not_shown_to_have_passed_anything(evidence: Evidence, change: Change | None) -> None:
    """Another secret, other leaves, a leaf that follows from none, another finding, or one about something else."""
    changed = Evidence.FromString(evidence.SerializeToString())
    if change is not None:
        change(changed)
    with pytest.raises(Rejected, match="not_proven"):
        verified(changed)


def _swap_contents(evidence: Evidence) -> None:
    first, second = evidence.contents[0], evidence.contents[1]
    evidence.contents[0], evidence.contents[1] = second, first


def _swap_commits(evidence: Evidence) -> None:
    _swap_contents(evidence)
    first = AnnouncedCommit.FromString(evidence.commits[0].SerializeToString())
    evidence.commits[0].CopyFrom(evidence.commits[1])
    evidence.commits[1].CopyFrom(first)


def _other_residual(evidence: Evidence) -> None:
    evidence.residual = bytes(4 * PART_VALUES)


def _all_other_residuals(evidence: Evidence) -> None:
    evidence.residual = bytes(4 * PART_VALUES)
    del evidence.residual_hashes[:]
    evidence.residual_hashes.extend([blob_hash(evidence.residual)] * SPAN)


def _other_weight(evidence: Evidence) -> None:
    proposal = Proposal.FromString(evidence.proposal.payload)
    proposal.commits[0].weight = 1
    evidence.proposal.CopyFrom(seal(PEERS[0], proposal))


def _other_span(evidence: Evidence) -> None:
    span = MergedSpan.FromString(evidence.span.payload)
    span.part_hashes[PART - FIRST] = b"\0" * 32
    evidence.span.payload = span.SerializeToString()


def _left_out(evidence: Evidence) -> None:
    del evidence.commits[0]
    del evidence.contents[0]


def _other_run(evidence: Evidence) -> None:
    evidence.manifest.CopyFrom(World(run_of("int8")).signed_manifest)


def _outside(evidence: Evidence) -> None:
    evidence.part = PARTS - 1


@pytest.mark.parametrize(
    "change",
    [
        _swap_contents,
        _swap_commits,
        _other_residual,
        _all_other_residuals,
        _other_weight,
        _other_span,
        _left_out,
        _other_run,
        _outside,
    ],
)
def test_no_innocent_is_convicted_by_other_inputs(change: Change) -> None:
    """Whatever an accuser exchanges so that the merge comes out different, it isn't what the reducer has signed about."""
    evidence = evidence_of_merge("int4", wrong=False)
    change(evidence)
    with pytest.raises(Rejected):
        verified(evidence)


def proposals(**changes: Any) -> Evidence:
    """Two proposals of one leader for one ballot in one attempt at the round, the second with `changes`."""
    world = World(run_of("fp16"))
    values: dict[str, Any] = {"run_id": world.run_id, "round": ROUND, "ballot": Ballot(), "attempt": b"a" * 16}
    second = Proposal(**values | {"base_root": b"r" * 32} | changes)
    statements = [seal(PEERS[0], Proposal(**values)), seal(PEERS[0], second)]
    return Evidence(kind="equivocation", manifest=world.signed_manifest, statements=statements)


def merges(**changes: Any) -> Evidence:
    """Two merges that a reducer signed of one proposal in one attempt, the second with `changes`."""
    world = World(run_of("fp16"))
    values: dict[str, Any] = {"run_id": world.run_id, "round": ROUND, "proposal_hash": b"p" * 32, "attempt": b"a" * 16}
    first = MergedSpan(part_hashes=[b"1" * 32], **values)
    second = MergedSpan(**values | {"part_hashes": [b"2" * 32]} | changes)
    statements = [seal(REDUCER, first), seal(REDUCER, second)]
    return Evidence(kind="equivocation", manifest=world.signed_manifest, statements=statements)


def test_two_proposals_or_two_merges_are_proven() -> None:
    """Whatever they say: an honest peer signs one."""
    verdict = verified(proposals())
    assert (verdict.accused, verdict.kind, verdict.round_index) == (PEERS[0].peer_id, "equivocation", ROUND)
    assert "two proposals for ballot 0.0" in verdict.why
    verdict = verified(merges())
    assert (verdict.accused, verdict.kind) == (REDUCER.peer_id, "equivocation")
    assert "two merges of proposal" in verdict.why


@pytest.mark.parametrize(
    "evidence",
    [
        proposals(base_root=b""),
        proposals(ballot=Ballot(amendment=1)),
        proposals(round=ROUND + 1),
        proposals(attempt=b"b" * 16),
        merges(part_hashes=[b"1" * 32]),
        merges(part_hashes=[b"1" * 32], residual_after=b"x" * 32),
        merges(proposal_hash=b"q" * 32),
        merges(attempt=b"b" * 16),
        merges(round=ROUND + 1),
    ],
)
def test_what_honest_peers_sign_is_no_equivocation(evidence: Evidence) -> None:
    """The same again, another ballot, another round; and the same round begun again, after a restart or a repair."""
    with pytest.raises(Rejected, match="not_proven"):
        verified(evidence)


def test_statements_of_two_peers_or_kinds_prove_nothing() -> None:
    """Nor do one alone, three, or those of another run."""
    first, second = proposals().statements
    merge = merges().statements[0]
    other = seal(PEERS[1], Proposal.FromString(second.payload))
    foreign = Proposal.FromString(second.payload)
    foreign.run_id = b"x" * 32
    cases = [(first, other), (first, merge), (merge, first), (first,), (first, second, second), (first, seal(PEERS[0], foreign))]
    for statements in cases:
        evidence = proposals()
        del evidence.statements[:]
        evidence.statements.extend(statements)
        with pytest.raises(Rejected):
            verified(evidence)


def test_a_merge_that_nobody_can_decode_is_proven() -> None:
    """From the signed span and the part that it names."""
    world, rubbish = World(run_of("fp16")), b"\xff" * 8
    values: dict[str, Any] = {"run_id": world.run_id, "round": ROUND, "first_part": FIRST}
    span = seal(REDUCER, MergedSpan(part_hashes=[b"1" * 32, blob_hash(rubbish)], **values))
    evidence = Evidence(kind="bad_part", manifest=world.signed_manifest, span=span, part=FIRST + 1, contents=[rubbish])
    verdict = verified(evidence)
    assert (verdict.accused, verdict.kind, verdict.part) == (REDUCER.peer_id, "bad_part", FIRST + 1)
    for part in (FIRST, FIRST + 2, 0):
        evidence.part = part
        with pytest.raises(Rejected, match="the merge is something else"):
            verified(evidence)
    codec = Codecs(world.manifest).at(ROUND)
    content = codec.encode_part(normal(PART_VALUES, 1), FIRST)
    evidence.part, evidence.contents[0] = FIRST, content
    evidence.span.CopyFrom(seal(REDUCER, MergedSpan(part_hashes=[blob_hash(content)], **values)))
    with pytest.raises(Rejected, match="can be decoded"):
        verified(evidence)


def test_evidence_of_nothing() -> None:
    """Bytes, empty messages, other kinds, and far too much."""
    for raw in (b"", b"\xff\xff", Evidence(kind="grudge").SerializeToString(), bytes((64 << 20) + 1)):
        with pytest.raises(Rejected):
            verify_evidence(raw)
    evidence = evidence_of_part()
    evidence.kind = "grudge"
    with pytest.raises(Rejected, match="malformed"):
        verified(evidence)


def test_a_docket_keeps_one_proof_for_each(tmp_path: Path) -> None:
    """Across restarts, checked again; damaged files and other runs' evidence prove nothing."""
    evidence = evidence_of_merge("int4")
    run_id, raw = payload_hash(evidence.manifest), evidence.SerializeToString()
    docket = Docket(tmp_path / "evidence", run_id)
    assert docket.add(raw) is not None
    assert docket.add(raw) is None
    assert REDUCER.peer_id in docket.barred
    assert PEERS[0].peer_id not in docket.barred
    (tmp_path / "evidence" / f"other{SUFFIX}").write_bytes(raw[:-1])
    (tmp_path / "evidence" / f"part{SUFFIX}").write_bytes(evidence_of_part().SerializeToString())
    again = Docket(tmp_path / "evidence", run_id)
    again.load()
    assert [again.lookup(notice.hash) for notice in again.notices.values()] == [docket.lookup(blob_hash(raw))] == [raw]
    assert docket.lookup(blob_hash(b"other")) is None
    assert again.barred == {REDUCER.peer_id, PEERS[3].peer_id}
    elsewhere = Docket(tmp_path / "evidence", b"\1" * 32)
    elsewhere.load()
    assert not elsewhere.barred


def test_the_command_says_by_whom_and_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From the file alone."""
    path = tmp_path / f"someone{SUFFIX}"
    path.write_bytes(evidence_of_merge("int2").SerializeToString())
    assert swarm(["evidence", "verify", str(path)]) == 0
    said = capsys.readouterr().out
    assert REDUCER.peer_id in said
    assert "the merge of what the proposal names is" in said
    assert swarm(["evidence", "list", "--dir", str(tmp_path), "--json"]) == 0
    assert '"kind": "wrong_merge"' in capsys.readouterr().out
    path.write_bytes(evidence_of_merge("int2", wrong=False).SerializeToString())
    assert swarm(["evidence", "verify", str(path)]) == 44
    assert "proves nothing" in capsys.readouterr().err
    assert swarm(["evidence", "verify", str(tmp_path / "missing")]) == 2


def test_checks_cost_a_share_of_the_traffic() -> None:
    """With 124 M parameters every round brings one, with a million few do; a tiny check costs nothing; alone there is none."""
    large, small = (
        Codecs(manifest(model={"config": {"model_type": "llama"}, "parameters": parameters}, codec={"kind": "int4"})).at(1)
        for parameters in (124_000_000, 1_000_000)
    )
    assert chance(large, 8, 0.02) == 1
    assert 0 < chance(small, 8, 0.02) < 0.1
    assert chance(small, 8, 100) == 1
    tiny = Codecs(run_of("int4")).at(ROUND)
    assert chance(tiny, 3, 0.02) == 1
    assert chance(tiny, 3, 0) == 0
    assert chance(tiny, 1, 0.02) == 0
