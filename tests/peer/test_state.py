"""States as hashed chunks and as checkpoints."""

from __future__ import annotations

import errno
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from peer.outer import OuterState
from peer.spikes import Recent
from peer.state import (
    CHUNK_BYTES,
    CHUNK_VALUES,
    MAX_HEADER_BYTES,
    Layout,
    Snapshot,
    check_chunk_hashes,
    differing_chunks,
    load_newest,
    save_checkpoint,
    to_state,
)
from swarm.errors import DiskFull, Rejected
from swarm.merkle import blob_hash, root_of

SIZE = 300_000
RUN = "ab" * 32
LAYOUT = Layout(("theta", "first_moment", "second_moment"), SIZE)


def state(round_number: int = 3, seed: int = 0) -> OuterState:
    random = np.random.default_rng(seed)
    theta, first, second = (random.standard_normal(SIZE).astype(np.float32) for _ in range(3))
    return OuterState(theta, {"first_moment": first, "second_moment": np.abs(second)}, round_number, 4096, 3, 0.9**3, 0.95**3)


def chunks_of(snapshot: Snapshot) -> list[Any]:
    return [snapshot.chunk(index) for index in range(snapshot.chunk_count)]


@pytest.fixture(scope="module")
def snapshot() -> Snapshot:
    return Snapshot.from_state(state())


def test_a_state_root_is_golden() -> None:
    """Peers of different versions must agree on the root of the same state."""
    theta = (np.arange(SIZE, dtype=np.float32) - np.float32(1000)) / np.float32(7)
    root = Snapshot.from_state(OuterState(theta, {"momentum": -theta}, 5, 123, 5)).root_hex
    assert root == "cdce9dff8f9a10ec49ed12c6188b0c4fd38f709bd41bd424b4ffaed4e44ed430"


def test_the_header_is_golden(snapshot: Snapshot) -> None:
    """Chunk 0 is canonical JSON: sorted keys, no spaces."""
    assert bytes(snapshot.chunk(0)) == (
        b'{"arrays":[["theta",300000],["first_moment",300000],["second_moment",300000]],"beta1_power":0.7290000000000001,'
        b'"beta2_power":0.8573749999999999,"chunk_bytes":1048576,"format":"swarm-state-1","round":3,"step":3,"tokens":4096}'
    )


def with_figures(count: int, skipped: int = 2) -> OuterState:
    """A state with figures of so many rounds, written as long as floats can be."""
    losses = tuple(1.2345678901234567e-300 for _ in range(count))
    return replace(state(), recent=Recent(losses, losses, skipped))


def test_what_spikes_are_told_by_is_part_of_the_state() -> None:
    """A joiner gets it under the root with everything else, and the largest header has room for it."""
    layout = Layout(LAYOUT.names, SIZE, window=64)
    told = Snapshot.from_state(with_figures(64))
    assert to_state(chunks_of(told), layout).recent == with_figures(64).recent
    assert len(told.header) <= MAX_HEADER_BYTES
    assert told.root != Snapshot.from_state(with_figures(63)).root
    plain = Snapshot.from_state(state())
    assert to_state(chunks_of(plain), layout).recent == Recent()


@pytest.mark.parametrize(
    "recent",
    [Recent((1.0,) * 9, (1.0,) * 9), Recent((1.0, 2.0), (1.0,)), Recent((1.0,), (-1.0,)), Recent((), (), -1)],
)
def test_figures_that_the_manifest_does_not_allow_are_rejected(recent: Recent) -> None:
    """More rounds than the window has, half figures, negative norms."""
    made = Snapshot.from_state(state())
    values = {**json.loads(made.header), "recent": {"losses": recent.losses, "norms": recent.norms, "skipped": recent.skipped}}
    raw = json.dumps(values, sort_keys=True, separators=(",", ":")).encode()
    with pytest.raises(Rejected, match=r"figures|read"):
        to_state([raw, *chunks_of(made)[1:]], Layout(LAYOUT.names, SIZE, window=8))


def test_a_run_that_skips_no_spikes_has_no_figures() -> None:
    """A donor can't add to a state what the manifest knows nothing of; nor write out figures of no rounds."""
    with pytest.raises(Rejected, match="figures"):
        to_state(chunks_of(Snapshot.from_state(with_figures(1))), LAYOUT)
    made = Snapshot.from_state(state())
    values = {**json.loads(made.header), "recent": {"losses": [], "norms": [], "skipped": 0}}
    raw = json.dumps(values, sort_keys=True, separators=(",", ":")).encode()
    with pytest.raises(Rejected, match="figures"):
        to_state([raw, *chunks_of(made)[1:]], Layout(LAYOUT.names, SIZE, window=8))


def test_the_root_covers_every_chunks_hash(snapshot: Snapshot) -> None:
    """Chunks are header, then each array in pieces of 1 MiB; their BLAKE2b hashes give the RFC 6962 root."""
    chunks = chunks_of(snapshot)
    assert [len(chunk) for chunk in chunks[1:]] == [CHUNK_BYTES, 4 * (SIZE - CHUNK_VALUES)] * 3
    assert list(snapshot.chunk_hashes) == [blob_hash(chunk) for chunk in chunks]
    assert snapshot.root == root_of([blob_hash(chunk) for chunk in chunks])
    assert snapshot.size_bytes == sum(len(chunk) for chunk in chunks)
    assert b"".join(chunks[3:5]) == snapshot.state.buffers["first_moment"].tobytes()


def test_threads_dont_change_the_root() -> None:
    """Hashing in parallel keeps the order."""
    large = OuterState(np.arange(20 * CHUNK_VALUES, dtype=np.float32))
    assert Snapshot.from_state(large, threads=1).root == Snapshot.from_state(large, threads=4).root


def test_chunks_are_views_that_nobody_can_write(snapshot: Snapshot) -> None:
    """Serving a state copies nothing and can't change it."""
    assert snapshot.chunk(1).readonly
    assert snapshot.chunk(1).obj is not None
    assert np.shares_memory(np.frombuffer(snapshot.chunk(1), np.float32), snapshot.state.theta)


def test_a_state_survives_being_cut_and_joined(snapshot: Snapshot) -> None:
    """A joiner with all chunks has the same state and root."""
    joined = to_state([bytes(chunk) for chunk in chunks_of(snapshot)], LAYOUT)
    assert Snapshot.from_state(joined).root == snapshot.root
    assert (joined.round, joined.tokens, joined.step) == (3, 4096, 3)


@given(st.sets(st.integers(0, SIZE - 1), max_size=3), st.booleans())
@settings(max_examples=10, deadline=None)
def test_repair_needs_only_the_chunks_that_differ(positions: set[int], other_round: bool) -> None:
    """A peer with a few wrong values fetches only those chunks and ends with the majority's root."""
    theirs = Snapshot.from_state(state())
    theta = theirs.state.theta.copy()
    theta[list(positions)] += 1
    wrong = OuterState(theta, theirs.state.buffers, 3 + other_round, 4096, 3, 0.9**3, 0.95**3)
    mine = Snapshot.from_state(wrong)
    missing = differing_chunks(mine.chunk_hashes, theirs.chunk_hashes)
    assert set(missing) == {1 + position // CHUNK_VALUES for position in positions} | ({0} if other_round else set())
    repaired = [theirs.chunk(index) if index in missing else mine.chunk(index) for index in range(theirs.chunk_count)]
    assert Snapshot.from_state(to_state(repaired, LAYOUT)).root == theirs.root


def test_a_peer_without_a_state_needs_every_chunk(snapshot: Snapshot) -> None:
    """Nothing of one's own means everything differs."""
    assert differing_chunks([], snapshot.chunk_hashes) == list(range(snapshot.chunk_count))


def test_sizes_are_known_before_a_byte_is_fetched(snapshot: Snapshot) -> None:
    """The manifest alone bounds every chunk."""
    assert LAYOUT.chunk_count == snapshot.chunk_count == 7
    assert all(len(snapshot.chunk(index)) <= LAYOUT.chunk_size_limit(index) for index in range(7))
    assert snapshot.size_bytes <= LAYOUT.size_limit_bytes
    for index in (-1, 7):
        with pytest.raises(IndexError):
            LAYOUT.chunk_size_limit(index)


def test_chunk_hashes_must_belong_to_the_root(snapshot: Snapshot) -> None:
    """A stranger's list is believed only under a root that somebody signed."""
    check_chunk_hashes(snapshot.chunk_hashes, snapshot.root, LAYOUT)
    for hashes in (snapshot.chunk_hashes[::-1], snapshot.chunk_hashes[:-1], (b"x", *snapshot.chunk_hashes[1:])):
        with pytest.raises(Rejected) as raised:
            check_chunk_hashes(hashes, snapshot.root, LAYOUT)
        assert raised.value.reason == "bad_state"


def header(**changes: Any) -> bytes:
    values = json.loads(bytes(Snapshot.from_state(state()).chunk(0))) | changes
    return json.dumps(values, sort_keys=True, separators=(",", ":")).encode()


BAD_HEADERS = {
    "empty": b"",
    "no_json": b"\xff",
    "not_canonical": header().replace(b":", b": ", 1),
    "too_long": header() + b" " * 5000,
    "deep": b"[" * 4000,
    "another_format": header(format="swarm-state-2"),
    "unknown_field": header(extra=1),
    "negative_round": header(round=-1),
    "huge_tokens": header(tokens=1 << 70),
    "float_round": header(round=3.0),
    "text_round": header(round="3"),
    "power_above_one": header(beta1_power=1.5),
    "infinite_power": header(beta1_power=float("inf")),
    "other_chunk_size": header(chunk_bytes=1),
    "fewer_arrays": header(arrays=[["theta", SIZE]]),
    "larger_array": header(arrays=[["theta", SIZE + 1], ["first_moment", SIZE], ["second_moment", SIZE]]),
    "other_order": header(arrays=[["first_moment", SIZE], ["theta", SIZE], ["second_moment", SIZE]]),
}


@pytest.mark.parametrize("name", BAD_HEADERS)
def test_a_strangers_header_is_checked(snapshot: Snapshot, name: str) -> None:
    """Only the canonical header of a state that fits the manifest is believed."""
    with pytest.raises(Rejected) as raised:
        to_state([BAD_HEADERS[name], *chunks_of(snapshot)[1:]], LAYOUT)
    assert raised.value.reason == "bad_state"


@pytest.mark.parametrize(
    ("index", "content"),
    [
        (1, b"\0" * (CHUNK_BYTES - 4)),
        (2, b"\0" * (CHUNK_BYTES)),
        (1, np.full(CHUNK_VALUES, np.nan, np.float32).tobytes()),
        (3, np.full(CHUNK_VALUES, np.inf, np.float32).tobytes()),
        (5, np.full(CHUNK_VALUES, -1, np.float32).tobytes()),
    ],
    ids=["short", "long", "nan", "infinite", "negative_second_moment"],
)
def test_a_strangers_values_are_checked(snapshot: Snapshot, index: int, content: bytes) -> None:
    """Chunks of the wrong size or with impossible values are rejected."""
    chunks = chunks_of(snapshot)
    chunks[index] = content
    with pytest.raises(Rejected) as raised:
        to_state(chunks, LAYOUT)
    assert raised.value.reason == "bad_state"


def test_a_missing_chunk_is_rejected(snapshot: Snapshot) -> None:
    """A state needs all its chunks."""
    with pytest.raises(Rejected, match="6 chunks instead of 7"):
        to_state(chunks_of(snapshot)[:-1], LAYOUT)


def test_a_checkpoint_comes_back_whole(tmp_path: Path, snapshot: Snapshot) -> None:
    """The newest checkpoint has the same root, and its file is plain safetensors."""
    path = save_checkpoint(tmp_path, snapshot, RUN)
    loaded = load_newest(tmp_path, LAYOUT, RUN)
    assert loaded.snapshot is not None
    assert loaded.snapshot.root == snapshot.root
    assert loaded.skipped == ()
    tensors = load_file(path.with_suffix(".safetensors"))
    assert np.array_equal(tensors["theta"], snapshot.state.theta)
    assert sorted(tensors) == ["first_moment", "second_moment", "theta"]


def test_only_the_newest_checkpoints_are_kept(tmp_path: Path) -> None:
    """Two stay, with their files and nothing else."""
    for number in (9, 10, 11):
        save_checkpoint(tmp_path, Snapshot.from_state(state(number)), RUN, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        f"round-{number:012d}.{kind}" for number in (10, 11) for kind in ("json", "safetensors")
    ]


def damage(path: Path, kind: str) -> None:
    data = path.with_suffix(".safetensors")
    match kind:
        case "torn":
            os.truncate(data, data.stat().st_size // 2)
        case "flipped":
            content = bytearray(data.read_bytes())
            content[-5] ^= 1
            data.write_bytes(content)
        case "no_file":
            data.unlink()
        case "torn_header":
            os.truncate(path, 40)
        case "other_root":
            path.write_text(path.read_text().replace('"root": "', '"root": "00'))
        case "other_counters":
            path.write_text(path.read_text().replace('"tokens": 4096', '"tokens": 4097'))
        case "path_outside":
            path.write_text(path.read_text().replace('"file": "', '"file": "../../'))


@pytest.mark.parametrize("kind", ["torn", "flipped", "no_file", "torn_header", "other_root", "other_counters"])
def test_a_damaged_checkpoint_is_skipped_with_a_reason(tmp_path: Path, kind: str) -> None:
    """After a power cut the newest whole checkpoint is used."""
    older = Snapshot.from_state(state(1))
    save_checkpoint(tmp_path, older, RUN)
    damage(newest := save_checkpoint(tmp_path, Snapshot.from_state(state(2)), RUN), kind)
    loaded = load_newest(tmp_path, LAYOUT, RUN)
    assert loaded.snapshot is not None
    assert loaded.snapshot.root == older.root
    assert [item.path for item in loaded.skipped] == [newest]
    assert loaded.skipped[0].reason


def test_a_header_cant_point_outside_its_folder(tmp_path: Path, snapshot: Snapshot) -> None:
    """The file named in a header is looked for beside it."""
    damage(save_checkpoint(tmp_path, snapshot, RUN), "path_outside")
    assert load_newest(tmp_path, LAYOUT, RUN).snapshot is not None


def test_another_runs_checkpoint_is_skipped(tmp_path: Path, snapshot: Snapshot) -> None:
    """A folder used for two runs mixes nothing up."""
    save_checkpoint(tmp_path, snapshot, "cd" * 32)
    loaded = load_newest(tmp_path, LAYOUT, RUN)
    assert loaded.snapshot is None
    assert "another run" in loaded.skipped[0].reason


def test_an_empty_or_missing_folder_has_no_checkpoint(tmp_path: Path) -> None:
    """A first start is no error."""
    assert load_newest(tmp_path, LAYOUT, RUN).snapshot is None
    assert load_newest(tmp_path / "none", LAYOUT, RUN).snapshot is None


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_leaves_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    """Running out of space is told apart, leaves no half file, and the last checkpoint stays usable."""
    save_checkpoint(tmp_path, Snapshot.from_state(state(1)), RUN)
    before = sorted(tmp_path.iterdir())

    def full(descriptor: int) -> None:
        raise OSError(code, "no space")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DiskFull):
        save_checkpoint(tmp_path, Snapshot.from_state(state(2)), RUN)
    assert sorted(tmp_path.iterdir()) == before
    assert load_newest(tmp_path, LAYOUT, RUN).snapshot is not None


def test_other_disk_errors_are_not_disguised(tmp_path: Path, snapshot: Snapshot) -> None:
    """A folder that is a file is not a full disk."""
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        save_checkpoint(tmp_path / "file", snapshot, RUN)
