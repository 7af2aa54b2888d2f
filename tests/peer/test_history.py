"""Past rounds are kept within a limit, and any kept round's weights come out again with the root that they had."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from peer.codec import Codecs
from peer.history import (
    CHECKPOINT_SUFFIX,
    Keeper,
    Record,
    check_limit,
    checkpoint_path,
    kept_rounds,
    kept_states,
    load_record,
    numbers_of,
    record_path,
    save_record,
)
from peer.outer import initial_state
from peer.rebuilding import Rebuilder
from peer.rounds.applying import applied
from peer.rounds.parts import Parts
from peer.rounds.planning import spans_of
from peer.rounds.residuals import Residuals
from peer.rounds.values import BallotNumber, IncludedCommit
from peer.rounds.wire import Checker, build_proposal
from peer.state import Snapshot, save_checkpoint
from swarm.errors import CheckpointCorrupt, StateDisputed, UsageError
from swarm.manifest import Manifest
from swarm.merkle import blob_hash, root_of
from swarm.messages import payload_hash, seal
from swarm.rpc.v1.signed_pb2 import AnnouncedCommit, Commit, MergedSpan, SealReply
from tests.world import COORDINATOR, identity, manifest

PARAMETERS = 3 * 4096 + 50
SAMPLES = 4
PEERS = sorted((identity(number) for number in range(3)), key=lambda peer: peer.peer_id)
SCHEDULE = {"total_tokens": 10**6}
SKIPS = {"skip_spikes": {"window": 8}}
DILOCO = {"kind": "diloco", "inner_steps": 1, "batch_samples": 8, "outer": {"momentum": 0.9}, "schedule": SCHEDULE, **SKIPS}
SYNC = {"kind": "sync", "batch_samples": 32, "schedule": SCHEDULE, **SKIPS}
NO_LIMIT = 1 << 40


def run_of(codec: str, strategy: dict[str, Any] = DILOCO) -> Manifest:
    """A run of three parts and a bit."""
    model = {"config": {"model_type": "llama"}, "parameters": PARAMETERS}
    return manifest(model=model, codec={"kind": codec, "part_values": 4096}, strategy=strategy)


@dataclass
class Rounds:
    """Three peers in one process, with real updates, codecs, signatures and merges; a loss of 9 makes a spike."""

    run: Manifest
    folder: Path
    snapshot: Snapshot = field(init=False)
    roots: list[bytes] = field(default_factory=list)
    residuals: list[Residuals] = field(init=False)

    def __post_init__(self) -> None:
        theta = np.random.default_rng(0).standard_normal(PARAMETERS).astype(np.float32)
        self.snapshot = Snapshot.from_state(initial_state(self.run.strategy, theta))
        self.residuals = [Residuals(self.folder, self.run.run_id) for _ in PEERS]

    def play(self, losses: Sequence[float]) -> Iterator[tuple[Record, Snapshot, Snapshot]]:
        """A round for each loss: what it consisted of, and the states before and after it."""
        for loss in losses:
            before = self.snapshot
            record = self._round(before, loss)
            yield record, before, self.snapshot

    def keep(self, keeper: Keeper, losses: Sequence[float]) -> None:
        """Play rounds and keep each."""
        for record, before, after in self.play(losses):
            keeper.keep(record, before.root, before, after)

    def _round(self, before: Snapshot, loss: float) -> Record:
        run, index = self.run, before.round
        run_id, codec = bytes.fromhex(run.run_id), Codecs(run).at(index)
        checker = Checker(run, run_id, COORDINATOR.peer_id, lambda peer: True)
        blobs, announced = dict[bytes, bytes](), list[AnnouncedCommit]()
        for number, peer in enumerate(PEERS if index else ()):
            update = np.random.default_rng([index, number]).standard_normal(PARAMETERS).astype(np.float32)
            parts = self.residuals[number].encode(codec, update)
            hashes = [blob_hash(part) for part in parts]
            blobs |= dict(zip(hashes, parts, strict=True))
            announced.append(self._commit(peer, before, loss + number / 100, hashes))
        commits = {facts.peer: facts for _, facts in map(checker.commit, announced)}
        gathers = codec.topology == "all_gather"
        spans = {} if gathers or not commits else spans_of(codec.part_count, dict.fromkeys(commits, 0))
        included = [
            IncludedCommit(peer, facts.commit_hash, facts.weight, *spans.get(peer, (0, 0)), facts.loss)
            for peer, facts in sorted(commits.items())
        ] or [IncludedCommit(peer.peer_id, b"c" * 32, 0) for peer in PEERS]
        message = build_proposal(
            run_id=run_id,
            round_index=index,
            base_root=before.root,
            ballot=BallotNumber(),
            attempt=bytes(16),
            commits=included,
            next_roster=(),
            roster=b"",
            grant=None,
            admissions=(),
        )
        signed = seal(PEERS[0], message)
        _, proposal = checker.proposal(signed)
        parts_of = Parts(codec, run.merge, blobs.get)
        merged_spans = []
        for number, peer in enumerate(PEERS):
            if peer.peer_id in spans:
                first, count = spans[peer.peer_id]
                merge = self.residuals[number].merging(codec, range(first, first + count))
                names = []
                for part in range(first, first + count):
                    values = parts_of.merged(proposal.contributors, commits, part)
                    encoded = merge.encode_part(values, part).part if merge is not None else codec.encode_part(values, part)
                    names.append(blob_hash(encoded))
                    blobs[names[-1]] = encoded
                self.residuals[number].settle(True, merge)
                span = MergedSpan(
                    run_id=run_id,
                    round=index,
                    proposal_hash=payload_hash(signed),
                    first_part=first,
                    part_hashes=names,
                    attempt=bytes(16),
                )
                merged_spans.append(seal(peer, span))
        facts = [checker.span(span)[1] for span in merged_spans]
        merged = parts_of.collected(proposal, commits, facts)
        self.snapshot = Snapshot.from_state(applied(run, before.state, proposal, merged))
        self.roots.append(self.snapshot.root)
        made = SealReply(accepted=signed, commits=announced if gathers else [], spans=merged_spans)
        needed = {name: blobs[name] for _, name, _ in parts_of.needed(proposal, commits, facts)}
        return Record(index, self.snapshot.root, made, needed)

    def _commit(self, peer: Any, before: Snapshot, loss: float, hashes: list[bytes]) -> AnnouncedCommit:
        message = Commit(
            run_id=bytes.fromhex(self.run.run_id),
            round=before.round,
            base_root=before.root,
            weight=SAMPLES,
            tokens=SAMPLES * self.run.data.sequence_length,
            codec=self.run.codec.kind,
            parts_root=root_of(hashes),
            part_count=len(hashes),
            loss=loss,
        )
        return AnnouncedCommit(commit=seal(peer, message), part_hashes=b"".join(hashes))


def losses(count: int, spike: int | None = None) -> list[float]:
    """A slowly falling loss with at most one spike; the first round trains nothing."""
    return [9.0 if number == spike else 3 - number / 50 for number in range(count)]


def rebuilder(folder: Path, run: Manifest, confirmed: dict[int, bytes] | None = None) -> Rebuilder:
    return Rebuilder.of(folder, run, COORDINATOR.peer_id, confirmed)


@pytest.mark.parametrize(("codec", "strategy"), [("fp16", SYNC), ("int4", DILOCO), ("sparse", DILOCO), ("sparse", SYNC)])
def test_every_kept_round_comes_out_with_the_root_that_it_had(tmp_path: Path, codec: str, strategy: dict[str, Any]) -> None:
    """Twelve rounds, one of them skipped as a spike: each is rebuilt from the nearest checkpoint, to the bit."""
    run = run_of(codec, strategy)
    rounds, folder = Rounds(run, tmp_path), tmp_path / "history"
    rounds.keep(Keeper(folder, run.run_id, NO_LIMIT), losses(12, spike=8))
    assert kept_states(folder) == list(range(13))
    assert kept_rounds(folder) == "rounds 0-11"
    starts = set()
    for index, root in enumerate(rounds.roots):
        done: list[str] = []
        found = rebuilder(folder, run).after(index, lambda what, total, done=done: lambda: done.append(what))
        assert (found.snapshot.root, found.snapshot.round) == (root, index + 1)
        assert len(done) == found.snapshot.round - found.start
        assert found.skipped == ((8,) if found.start <= 8 <= index else ())
        assert found.confirmed_by == ("next proposal" if index < 11 else "")
        starts.add(found.start)
    assert starts == set(numbers_of(folder, CHECKPOINT_SUFFIX)) - {12}
    assert rounds.snapshot.state.recent.skipped == 1


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Rounds]:
    """Six rounds in one stretch, never changed."""
    folder = tmp_path_factory.mktemp("kept")
    rounds = Rounds(run_of("int4"), folder)
    steps = list(rounds.play(losses(6)))
    save_checkpoint(folder / "history", steps[0][1], rounds.run.run_id, keep=None)
    for record, _, _ in steps:
        save_record(folder / "history", record, rounds.run.run_id)
    return folder / "history", rounds


@pytest.fixture
def copied(kept: tuple[Path, Rounds], tmp_path: Path) -> tuple[Path, Rounds]:
    """A copy to damage."""
    folder = tmp_path / "history"
    folder.mkdir()
    for path in kept[0].iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder, kept[1]


def test_any_flipped_byte_is_noticed_and_the_file_named(copied: tuple[Path, Rounds]) -> None:
    """Wherever a record is damaged, the rebuild ends with its name, and names a damaged part."""
    folder, rounds = copied
    path = record_path(folder, 3)
    whole, told = path.read_bytes(), set()
    for place in [*range(0, len(whole), len(whole) // 61), len(whole) - 1]:
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x10]) + whole[place + 1 :])
        with pytest.raises((CheckpointCorrupt, StateDisputed)) as caught:
            rebuilder(folder, rounds.run).after(4)
        told.add("part" if "part " in caught.value.message else "file")
        assert path.name in caught.value.message or "round 3" in caught.value.message
    assert told == {"part", "file"}
    path.write_bytes(whole[:-1])
    with pytest.raises(CheckpointCorrupt, match="torn"):
        rebuilder(folder, rounds.run).after(4)
    assert rebuilder(folder, rounds.run).after(2).snapshot.root == rounds.roots[2]


def test_a_gap_is_named_with_what_there_is(copied: tuple[Path, Rounds]) -> None:
    """A missing round keeps the later ones from being rebuilt; so does a missing checkpoint all."""
    folder, rounds = copied
    record_path(folder, 2).unlink()
    with pytest.raises(CheckpointCorrupt, match=r"round 4 isn't kept .* rounds 0-1$"):
        rebuilder(folder, rounds.run).after(4)
    save_checkpoint(folder, rounds.snapshot, rounds.run.run_id, keep=None)
    with pytest.raises(CheckpointCorrupt, match=r"round 2 is missing .* round 4 can't be rebuilt; there are rounds 0-1, 5$"):
        rebuilder(folder, rounds.run).after(4)
    with pytest.raises(CheckpointCorrupt, match="round 77 isn't kept"):
        rebuilder(folder, rounds.run).after(77)
    with pytest.raises(CheckpointCorrupt, match="rounds none"):
        rebuilder(folder / "elsewhere", rounds.run).after(0)


def test_a_root_that_differs_is_told(copied: tuple[Path, Rounds]) -> None:
    """Rebuilt states are held against the ledger, the peer's own note, and the next round's signed proposal."""
    folder, rounds = copied
    right = dict(enumerate(rounds.roots))
    assert rebuilder(folder, rounds.run, right).after(4).confirmed_by == "ledger"
    with pytest.raises(StateDisputed, match="after round 2 the ledger confirms"):
        rebuilder(folder, rounds.run, {**right, 2: bytes(32)}).after(4)
    record = load_record(folder, 3, rounds.run.run_id)
    save_record(folder, Record(3, b"x" * 32, record.made, record.parts), rounds.run.run_id)
    with pytest.raises(StateDisputed, match="after round 3 the peer had"):
        rebuilder(folder, rounds.run).after(3)
    save_record(folder, record, rounds.run.run_id)
    other, _, _ = list(Rounds(rounds.run, folder.parent).play([2.0] * 5))[4]
    save_record(folder, other, rounds.run.run_id)
    with pytest.raises(StateDisputed, match="round 4's proposal begins with"):
        rebuilder(folder, rounds.run).after(3)


def test_what_another_has_signed_does_not_pass(copied: tuple[Path, Rounds]) -> None:
    """A span that its reducer hasn't signed, or that is missing, is no merge of the round."""
    folder, rounds = copied
    record = load_record(folder, 3, rounds.run.run_id)
    made = SealReply()
    made.CopyFrom(record.made)
    del made.spans[0]
    save_record(folder, Record(3, record.root, made, record.parts), rounds.run.run_id)
    with pytest.raises(CheckpointCorrupt, match=r"round-000000000003.record is damaged: wrong_parts"):
        rebuilder(folder, rounds.run).after(3)
    made.CopyFrom(record.made)
    made.spans[0].signer = made.spans[1].signer
    save_record(folder, Record(3, record.root, made, record.parts), rounds.run.run_id)
    with pytest.raises(CheckpointCorrupt, match=r"round-000000000003.record is damaged"):
        rebuilder(folder, rounds.run).after(3)


def test_a_damaged_checkpoint_is_passed_over_for_an_earlier_one(copied: tuple[Path, Rounds]) -> None:
    """The rounds between are applied instead; without another one the damaged file is named."""
    folder, rounds = copied
    middle = rebuilder(folder, rounds.run).after(2).snapshot
    save_checkpoint(folder, middle, rounds.run.run_id, keep=None)
    assert rebuilder(folder, rounds.run).after(4).start == 3
    data = checkpoint_path(folder, 3).with_suffix(".safetensors")
    data.write_bytes(data.read_bytes()[:-1] + b"\x55")
    found = rebuilder(folder, rounds.run).after(4)
    assert (found.start, found.snapshot.root) == (0, rounds.roots[4])
    first = checkpoint_path(folder, 0).with_suffix(".safetensors")
    first.write_bytes(first.read_bytes()[:-1] + b"\x55")
    with pytest.raises(CheckpointCorrupt, match=r"round-000000000003.json: the file is torn or damaged"):
        rebuilder(folder, rounds.run).after(4)


def test_a_history_stays_within_its_limit(tmp_path: Path) -> None:
    """The oldest stretches go, whole; what is left can be rebuilt."""
    run = run_of("int4")
    rounds, folder = Rounds(run, tmp_path), tmp_path / "history"
    state_bytes = rounds.snapshot.size_bytes
    keeper = Keeper(folder, run.run_id, 4 * state_bytes)
    for record, before, after in rounds.play(losses(60)):
        keeper.keep(record, before.root, before, after)
        told = keeper.describe()
        assert told["size_bytes"] <= told["limit_bytes"] == 4 * state_bytes
    states = kept_states(folder)
    assert states[-1] == 60
    assert len(states) > 5
    assert states == list(range(states[0], 61))
    for rounds_done in (states[0], states[0] + 1, 60):
        assert rebuilder(folder, run).after(rounds_done - 1).snapshot.root == rounds.roots[rounds_done - 1]


def test_a_history_goes_on_after_a_restart_and_after_a_gap(tmp_path: Path) -> None:
    """A new keeper goes on where the last ended; after rounds that nobody kept a new stretch begins."""
    run = run_of("sparse")
    rounds, folder = Rounds(run, tmp_path), tmp_path / "history"
    rounds.keep(Keeper(folder, run.run_id, NO_LIMIT), losses(3))
    starts = numbers_of(folder, CHECKPOINT_SUFFIX)
    rounds.keep(Keeper(folder, run.run_id, NO_LIMIT), losses(2))
    assert numbers_of(folder, CHECKPOINT_SUFFIX) == starts == [0]
    list(rounds.play(losses(2)))
    rounds.keep(Keeper(folder, run.run_id, NO_LIMIT), losses(2))
    assert numbers_of(folder, CHECKPOINT_SUFFIX) == [0, 7]
    assert kept_rounds(folder) == "rounds 0-4, 6-8"
    for record, before, after in rounds.play(losses(1)):
        Keeper(folder, run.run_id, NO_LIMIT).keep(record, before.root, before, after)
    list(rounds.play(losses(1)))
    for record, before, after in rounds.play(losses(1)):
        Keeper(folder, run.run_id, NO_LIMIT).keep(record, before.root, None, after)
    assert kept_rounds(folder) == "rounds 0-4, 6-9, 11"


def test_a_state_that_was_repaired_is_not_kept_as_the_agreed_one(tmp_path: Path) -> None:
    """The round after which we alone had another root is dropped, and a stretch begins with the repaired state."""
    run = run_of("fp16")
    rounds, folder = Rounds(run, tmp_path), tmp_path / "history"
    keeper = Keeper(folder, run.run_id, NO_LIMIT)
    *steps, (record, before, right), last = rounds.play(losses(5))
    for each, start, after in steps:
        keeper.keep(each, start.root, start, after)
    wrong = Snapshot.from_state(replace(right.state, tokens=right.state.tokens + 1))
    keeper.keep(Record(record.round_index, wrong.root, record.made, record.parts), before.root, before, wrong)
    keeper.keep(last[0], right.root, right, last[2])
    assert not record_path(folder, record.round_index).exists()
    assert rebuilder(folder, run).after(4).snapshot.root == rounds.roots[4]


def test_rounds_that_all_have_given_up_are_forgotten(tmp_path: Path) -> None:
    """A run that goes on from an earlier state, in another way, is kept in that way alone."""
    run = run_of("int4")
    rounds, folder = Rounds(run, tmp_path), tmp_path / "history"
    keeper = Keeper(folder, run.run_id, NO_LIMIT)
    steps = list(rounds.play(losses(14)))
    for record, before, after in steps:
        keeper.keep(record, before.root, before, after)
    assert max(numbers_of(folder, CHECKPOINT_SUFFIX)) > 6
    rounds.snapshot, other = steps[5][1], len(rounds.roots)
    rounds.keep(keeper, [2.0, 2.1])
    assert kept_rounds(folder) == "rounds 0-6"
    assert rebuilder(folder, run).after(6).snapshot.root == rounds.roots[other + 1] != rounds.roots[6]
    assert rebuilder(folder, run).after(3).snapshot.root == rounds.roots[3]


def test_too_small_a_limit_is_told_at_once() -> None:
    """A history that holds hardly more than one state is of no use."""
    with pytest.raises(UsageError, match="too few"):
        check_limit(299, 100)
    check_limit(300, 100)
