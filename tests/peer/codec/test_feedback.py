"""Error feedback: nothing is lost for good, and residuals are exact, verifiable and safe on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peer.codec import decode, encode, make_codec
from peer.codec.feedback import ErrorFeedback, default_decay, feed
from peer.codec.fp16 import Fp16
from peer.codec.int2 import Int2
from peer.codec.int4 import Int4
from peer.codec.sparse import Sparse
from swarm import manifest
from swarm.errors import CheckpointCorrupt, DiskFull
from swarm.merkle import blob_hash
from tests.peer.codec.codec_cases import normal

SIZE = 3 * 4096 + 100
RUN = "ab" * 32


@pytest.mark.parametrize("kind", ["fp16", "int8", "int4", "int2", "sparse"])
def test_decay_is_the_codecs(kind: str) -> None:
    """SparseLoCo forgets a twentieth each round, dense codecs nothing."""
    codec = make_codec(manifest.Codec.model_validate({"kind": kind}), SIZE)
    assert ErrorFeedback(codec).decay == default_decay(codec) == (0.95 if kind == "sparse" else 1.0)


def test_two_rounds_by_hand() -> None:
    """Steps of 1: 0.4 isn't sent in the first round; with the next 0.4 it makes 0.8, which is sent as 1."""
    feedback = ErrorFeedback(Int4(2, 4096))
    first = feedback.encode_part(np.array([7, 0.4], np.float32), 0)
    second = feedback.encode_part(np.array([7, 0.4], np.float32), 0)
    assert (first.decoded.tolist(), second.decoded.tolist()) == ([7, 0], [7, 1])
    assert feedback.residual(0).tolist() == [0, np.float32(0.4) + np.float32(0.4) - np.float32(1)]


@pytest.mark.parametrize("decay", [1.0, 0.95])
@given(st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_what_isnt_sent_is_the_residual(decay: float, seed: int) -> None:
    """residual = decay x residual + update - decoded, in float32, bit by bit."""
    codec = Int4(500, 4096)
    residual, update = normal(500, seed), normal(500, seed + 1000)
    fed = feed(codec, 0, update, residual, decay)
    values = np.float32(decay) * residual + update
    assert fed.part == codec.encode_part(values, 0)
    assert np.array_equal(fed.decoded, codec.decode_part(fed.part, 0))
    assert fed.residual.tobytes() == (values - fed.decoded).tobytes()


@pytest.mark.parametrize("codec", [Int4(SIZE, 4096), Int2(SIZE, 4096), Sparse(SIZE, 4096, 64)], ids=lambda codec: codec.kind)
def test_the_sum_of_what_was_sent_follows_the_sum_of_updates(codec: Int4 | Int2 | Sparse) -> None:
    """Without decay all that is missing after any number of rounds is one residual, which stops growing."""
    feedback = ErrorFeedback(codec, decay=1.0)
    drift = normal(SIZE, 7)
    sent, updates = np.zeros(SIZE), np.zeros(SIZE)
    distances = []
    for round_index in range(80):
        update = drift + normal(SIZE, round_index)
        sent += decode(codec, feedback.encode(update))
        updates += update
        distances.append(np.sqrt(np.sum((sent - updates) ** 2) / np.sum(updates**2)))
    assert distances[-1] < (0.35 if codec.kind == "sparse" else 0.03)
    assert distances[-1] < distances[len(distances) // 4]
    residual = np.concatenate([feedback.residual(index) for index in range(codec.part_count)])
    assert np.allclose(updates - sent, residual, atol=1e-6)


def test_feedback_beats_sending_without() -> None:
    """A value far below the step never travels by itself."""
    codec = Int2(64, 4096)
    update = np.concatenate([np.ones(32), np.full(16, 1.0), np.full(16, 0.1)]).astype(np.float32)
    feedback, sent = ErrorFeedback(codec), np.zeros(64)
    for _ in range(50):
        sent += decode(codec, feedback.encode(update))
    assert np.allclose(sent / 50, update, atol=0.05)
    assert not decode(codec, encode(codec, update))[48:].any()


def test_threads_change_nothing() -> None:
    """Parts are independent."""
    codec, one, four = Sparse(SIZE, 4096), ErrorFeedback(Sparse(SIZE, 4096)), ErrorFeedback(Sparse(SIZE, 4096))
    for seed in range(3):
        assert one.encode(normal(SIZE, seed)) == four.encode(normal(SIZE, seed), threads=4)
    assert one.hash() == four.hash()
    assert codec.part_count == 4


@pytest.mark.parametrize("make", [Int4, Sparse])
def test_encoding_all_is_feeding_each(make: Any) -> None:
    """What is done in place has the bits of the pure step that others can check."""
    all_at_once, one_by_one = (ErrorFeedback(make(SIZE, 4096)) for _ in range(2))
    for seed in range(3):
        update = normal(SIZE, seed)
        fed = [one_by_one.encode_part(update[4096 * part : 4096 * (part + 1)], part).part for part in range(4)]
        assert all_at_once.encode(update) == fed
        assert all_at_once.hash() == one_by_one.hash()


def test_a_reducer_keeps_the_residual_of_its_span() -> None:
    """Parts 1 and 2 alone give what they give among all."""
    codec, update = Int4(SIZE, 4096), normal(SIZE)
    whole, span = ErrorFeedback(codec), ErrorFeedback(codec, range(1, 3))
    parts = whole.encode(update)
    assert span.encode(update[4096 : 3 * 4096]) == parts[1:3]
    assert np.array_equal(span.residual(2), whole.residual(2))
    for index in (0, 3):
        with pytest.raises(IndexError):
            span.encode_part(update[:4096], index)


def test_a_span_that_moves_keeps_what_it_still_covers() -> None:
    """Part 2 stays with its residual, part 3 starts from zero, part 1 is gone."""
    codec, update = Int4(SIZE, 4096), normal(SIZE)
    span = ErrorFeedback(codec, range(1, 3))
    span.encode(update[4096 : 3 * 4096])
    moved = span.moved(range(2, 4))
    assert np.array_equal(moved.residual(2), span.residual(2))
    assert not moved.residual(3).any()
    assert span.moved(range(0)).hash() == blob_hash(b"")
    with pytest.raises(IndexError):
        moved.residual(1)


def test_whoever_has_the_residual_from_before_can_check_a_part() -> None:
    """The hashes are those of blobs: little-endian float32."""
    codec, feedback = Int4(SIZE, 4096), ErrorFeedback(Int4(SIZE, 4096))
    feedback.encode(normal(SIZE))
    before = feedback.residual(3).tobytes()
    assert feedback.part_hash(3) == blob_hash(before)
    update = normal(100, 5)
    part = feedback.encode_part(update, 3).part
    checked = feed(codec, 3, update, np.frombuffer(before, "<f4"), 1.0)
    assert checked.part == part
    assert blob_hash(checked.residual.tobytes()) == feedback.part_hash(3) != blob_hash(before)


def test_the_residual_is_golden() -> None:
    """Zeros, then 0.5 where the step is 1 (to even: 0)."""
    feedback = ErrorFeedback(Int4(2, 4096))
    assert feedback.hash() == feedback.part_hash(0) == blob_hash(bytes(8))
    feedback.encode(np.array([7, 0.5], np.float32))
    assert feedback.hash() == blob_hash(bytes.fromhex("000000000000003f"))


def test_a_null_round_resets() -> None:
    """What was left belonged to a round that never was."""
    feedback = ErrorFeedback(Int4(SIZE, 4096))
    feedback.encode(normal(SIZE))
    feedback.reset()
    assert feedback.hash() == blob_hash(bytes(4 * SIZE))


@pytest.mark.parametrize("value", [np.nan, np.inf, 3.4e38])
def test_an_update_that_isnt_finite_leaves_the_residual_alone(value: float) -> None:
    """Also one that only overflows together with the residual."""
    feedback = ErrorFeedback(Fp16(2, 4096))
    feedback._residual[:] = [1, 3.4e38]
    with pytest.raises(ValueError, match="not finite"):
        feedback.encode_part(np.array([1, value], np.float32), 0)
    assert feedback.residual(0).tolist() == [1, np.float32(3.4e38)]


def test_an_update_of_another_length_isnt_encoded() -> None:
    """An update of another model or span."""
    with pytest.raises(ValueError, match="an update of"):
        ErrorFeedback(Int4(SIZE, 4096), range(1)).encode(normal(SIZE))
    with pytest.raises(ValueError, match="not consecutive"):
        ErrorFeedback(Int4(SIZE, 4096), range(0, 4, 2))


def test_a_residual_is_only_for_reading() -> None:
    """Whoever hashes or serves it doesn't change it by accident."""
    with pytest.raises(ValueError, match="read-only"):
        ErrorFeedback(Int4(8, 4096)).residual(0)[0] = 1


# --- on disk ---------------------------------------------------------------------------------------------------------------


def test_a_restart_goes_on_with_the_same_bits(tmp_path: Path) -> None:
    """Saved after round 41, restored, and the next parts are those of a peer that never stopped."""
    codec, path = Sparse(SIZE, 4096), tmp_path / "residual.safetensors"
    running, restarted = ErrorFeedback(codec), ErrorFeedback(codec)
    running.encode(normal(SIZE))
    running.save(path, RUN, 41)
    assert restarted.restore(path, RUN) == 41
    assert restarted.encode(normal(SIZE, 1)) == running.encode(normal(SIZE, 1))
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_a_later_save_replaces_the_earlier(tmp_path: Path) -> None:
    """There is one file, and it is whole."""
    feedback, path = ErrorFeedback(Int4(SIZE, 4096)), tmp_path / "residual.safetensors"
    for round_index in (1, 2):
        feedback.encode(normal(SIZE, round_index))
        feedback.save(path, RUN, round_index)
    other = ErrorFeedback(Int4(SIZE, 4096))
    assert (other.restore(path, RUN), other.hash()) == (2, feedback.hash())


def saved(path: Path) -> Path:
    feedback = ErrorFeedback(Int4(SIZE, 4096))
    feedback.encode(normal(SIZE))
    feedback.save(path / "residual.safetensors", RUN, 3)
    return path / "residual.safetensors"


@pytest.mark.parametrize("damage", ["missing", "empty", "garbage", "cut", "flipped", "other_run", "other_span"])
def test_a_residual_that_isnt_ours_or_whole_is_refused(tmp_path: Path, damage: str) -> None:
    """The caller starts from zero then; nothing has changed here."""
    path = saved(tmp_path)
    content = path.read_bytes()
    wrong = {"empty": b"", "garbage": b"x" * 100, "cut": content[:-1], "flipped": content[:-1] + bytes([content[-1] ^ 1])}
    if damage == "missing":
        path.unlink()
    path.write_bytes(wrong[damage]) if damage in wrong else None
    feedback = ErrorFeedback(Int4(SIZE, 4096), range(1, 3) if damage == "other_span" else None)
    before = feedback.hash()
    with pytest.raises(CheckpointCorrupt):
        feedback.restore(path, "cd" * 32 if damage == "other_run" else RUN)
    assert feedback.hash() == before


def test_a_full_disk_leaves_the_earlier_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The residual of the round before is still there, and nothing half-written."""
    path = saved(tmp_path)
    content = path.read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("peer.codec.feedback._sync", full)
    with pytest.raises(DiskFull):
        ErrorFeedback(Int4(SIZE, 4096)).save(path, RUN, 4)
    assert path.read_bytes() == content
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_a_folder_that_isnt_there_is_an_error(tmp_path: Path) -> None:
    """Not a full disk: the caller's mistake."""
    with pytest.raises(Exception, match="No such file"):
        ErrorFeedback(Int4(8, 4096)).save(tmp_path / "missing" / "residual.safetensors", RUN, 0)
