"""Error feedback over the rounds: what is owed is carried on, dropped where it never counted, and open to whoever checks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from peer.codec import Codec, decode, make_codec
from peer.codec.feedback import feed
from peer.rounds.residuals import FILE_NAME, Residuals
from swarm import manifest
from swarm.merkle import blob_hash, root_of
from tests.peer.codec.codec_cases import normal

SIZE = 3 * 4096 + 100
RUN = "ab" * 32


def codec_of(kind: str) -> Codec:
    """A codec with four parts."""
    return make_codec(manifest.Codec.model_validate({"kind": kind, "part_values": 4096}), SIZE)


def test_what_a_round_owes_travels_in_the_next(tmp_path: Path) -> None:
    """Two equal updates come nearer to their sum than twice one of them, across a change of the codec."""
    residuals, update = Residuals(tmp_path, RUN), normal(SIZE, 1)
    first = decode(codec_of("int2"), residuals.encode(codec_of("int2"), update))
    residuals.settle(True, None)
    second = decode(codec_of("int4"), residuals.encode(codec_of("int4"), update))
    assert np.linalg.norm(first + second - 2 * update) < 0.2 * np.linalg.norm(2 * first - 2 * update)


def test_an_update_that_didnt_count_owes_nothing(tmp_path: Path) -> None:
    """After a round without us, or with a zero update, the next update travels alone."""
    residuals, codec, update = Residuals(tmp_path, RUN), codec_of("int4"), normal(SIZE, 1)
    alone = residuals.encode(codec, update)
    residuals.settle(False, None)
    assert residuals.encode(codec, update) == alone


def test_a_round_that_changed_nothing_owes_nothing(tmp_path: Path) -> None:
    """After a skipped round our update travels alone, and our span goes on from the residual before; both are still shown."""
    residuals, codec, update = Residuals(tmp_path, RUN), codec_of("int4"), normal(SIZE, 1)
    alone, parts = residuals.encode(codec, update), range(2)
    first = residuals.merging(codec, parts)
    assert first is not None
    owed = [first.encode_part(update[slice(*codec.part_span(part))], part).residual for part in parts]
    first.close()
    residuals.settle(True, first)
    second = residuals.merging(codec, parts)
    assert second is not None
    for part in parts:
        second.encode_part(3 * update[slice(*codec.part_span(part))], part)
    second.close()
    residuals.settle(True, second)
    residuals.disown()
    assert residuals.encode(codec, update) == alone
    third = residuals.merging(codec, parts)
    assert third is not None
    assert all(np.array_equal(third.before.residual(part), owed[part]) for part in parts)
    assert all(residuals.hashes(root) for root in second.roots)


def test_the_residual_survives_a_restart(tmp_path: Path) -> None:
    """A peer that starts again owes what it owed; one of another run, or with a damaged file, owes nothing."""
    residuals, codec, update = Residuals(tmp_path, RUN), codec_of("int4"), normal(SIZE, 1)
    alone = residuals.encode(codec, update)
    residuals.save(7)
    expected = residuals.encode(codec, update)
    assert expected != alone
    assert Residuals(tmp_path, RUN).encode(codec, update) == expected
    assert Residuals(tmp_path, "cd" * 32).encode(codec, update) == alone
    path = tmp_path / FILE_NAME
    path.write_bytes(path.read_bytes()[:-1] + b"\xff")
    assert Residuals(tmp_path, RUN).encode(codec, update) == alone


def test_exact_codecs_owe_nothing(tmp_path: Path) -> None:
    """With fp16 nothing is kept, nothing saved, and no residual stands in a merged span."""
    residuals, codec = Residuals(tmp_path, RUN), codec_of("fp16")
    assert residuals.encode(codec, normal(SIZE, 1)) == residuals.encode(codec, normal(SIZE, 1))
    residuals.save(1)
    assert list(tmp_path.iterdir()) == []
    assert residuals.merging(codec, range(2)) is None


def test_values_that_arent_finite_leave_nothing_behind(tmp_path: Path) -> None:
    """An update with an infinity is refused, and what it left in the residual is forgotten."""
    residuals, codec, update = Residuals(tmp_path, RUN), codec_of("int4"), normal(SIZE, 1)
    alone = Residuals(tmp_path, RUN).encode(codec, update)
    with pytest.raises(ValueError, match="finite"):
        residuals.encode(codec, np.where(np.arange(SIZE) == SIZE - 1, np.float32(np.inf), update).astype(np.float32))
    assert residuals.encode(codec, update) == alone


def test_a_merge_can_be_done_again_by_anybody(tmp_path: Path) -> None:
    """From the residual before, which is served by hash, follow the reducer's parts and the residual after, bit by bit."""
    residuals, codec, parts = Residuals(tmp_path, RUN), codec_of("int4"), range(1, 4)
    values = [normal(codec.part_span(index)[1] - codec.part_span(index)[0], index) for index in range(codec.part_count)]
    for _ in range(2):
        merge = residuals.merging(codec, parts)
        assert merge is not None
        encoded = [merge.encode_part(values[index], index).part for index in parts]
        merge.close()
        residuals.settle(True, merge)
    before, after = (residuals.hashes(root) for root in merge.roots)
    assert [root_of(before), root_of(after)] == list(merge.roots)
    for index, name, result, part in zip(parts, before, after, encoded, strict=True):
        content = residuals.lookup(name)
        assert content is not None
        assert blob_hash(content) == name
        fed = feed(codec, index, values[index], np.frombuffer(content, "<f4"), 1.0)
        assert fed.part == part
        assert blob_hash(fed.residual.tobytes()) == result
    assert residuals.hashes(b"x" * 32) == ()
    assert residuals.lookup(b"x" * 32) is None


def test_a_merge_that_didnt_count_is_forgotten(tmp_path: Path) -> None:
    """An amended proposal merges from the same residual as the first one did; a span that moves keeps what overlaps."""
    residuals, codec = Residuals(tmp_path, RUN), codec_of("int2")
    first = residuals.merging(codec, range(2))
    assert first is not None
    first.encode_part(normal(4096, 1), 0)
    first.encode_part(normal(4096, 2), 1)
    again = residuals.merging(codec, range(2))
    assert again is not None
    assert not again.before.residual(0).any()
    residuals.settle(True, first)
    moved = residuals.merging(codec, range(1, 3))
    assert moved is not None
    assert np.array_equal(moved.before.residual(1), first.after.residual(1))
    assert not moved.before.residual(2).any()


def test_worker_momentum_sends_a_running_average(tmp_path: Path) -> None:
    """m = 0.5 m + 0.5 update from the second round on; an update that isn't finite leaves no trace."""
    residuals, codec = Residuals(tmp_path, RUN, 0.5), codec_of("fp16")
    one, other = normal(SIZE, 1), normal(SIZE, 2)
    plain = Residuals(tmp_path, RUN)
    assert residuals.encode(codec, one) == plain.encode(codec, one)
    half = np.float32(0.5)
    assert residuals.encode(codec, other) == plain.encode(codec, one * half + other * half)
    with pytest.raises(ValueError, match="finite"):
        residuals.encode(codec, np.full(SIZE, np.nan, dtype=np.float32))
    assert residuals.encode(codec, other) == plain.encode(codec, other)
