"""The blob store: bounded in memory and on disk, by round, and never wrong."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peer.network.blobs import BlobStore
from swarm.merkle import blob_hash


def test_blobs_go_with_their_round() -> None:
    """A blob lives as long as the latest round that it was stored for."""
    store = BlobStore(1000)
    old, shared = store.put(b"old", 1), store.put(b"shared", 1)
    store.put(b"shared", 3)
    store.drop_before(3)
    assert old not in store
    assert store.get(old) is None
    assert store.get(shared) == b"shared"
    assert store.newest_round == 3
    assert store.missing([old, shared]) == [old]
    store.drop_before(4)
    assert store.size_bytes == (0, 0)


def test_what_does_not_fit_in_memory_goes_to_disk(tmp_path: Path) -> None:
    """The oldest blobs are spilled, read back whole, and their files go with the round."""
    store = BlobStore(100, 1000, tmp_path / "blobs")
    names = [store.put(bytes([index]) * 60, 1) for index in range(4)]
    assert store.size_bytes == (60, 180)
    assert [store.get(name) for name in names] == [bytes([index]) * 60 for index in range(4)]
    store.drop_before(2)
    assert store.size_bytes == (0, 0)
    assert list((tmp_path / "blobs").iterdir()) == []


def test_without_a_disk_the_oldest_are_dropped() -> None:
    """A store without a folder forgets what doesn't fit and says so."""
    store = BlobStore(100)
    names = [store.put(bytes([index]) * 60, 1) for index in range(3)]
    assert store.missing(names) == names[:2]


def test_leftovers_of_an_earlier_process_are_removed(tmp_path: Path) -> None:
    """Spilled blobs of a process that was killed don't fill the disk for ever."""
    (tmp_path / f"{blob_hash(b'x').hex()}.blob").write_bytes(b"x")
    BlobStore(1, 1000, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_costs_sharing_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A blob that can't be spilled is dropped without a torn file, the store says that the disk is full, and recovers."""

    def full(path: Path, content: bytes) -> int:
        path.touch()
        raise OSError(errno.ENOSPC, "No space left on device")

    store = BlobStore(100, 1000, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        names = [store.put(bytes([index]) * 60, 1) for index in range(3)]
        assert store.disk_full
    assert list(tmp_path.iterdir()) == []
    assert store.missing(names) == names[:2]
    store.put(b"z" * 60, 1)
    assert not store.disk_full
    assert store.get(names[2]) == bytes([2]) * 60


def test_a_spilled_blob_that_vanished_is_missing(tmp_path: Path) -> None:
    """A file that somebody removed is no error, only a missing blob."""
    store = BlobStore(10, 1000, tmp_path)
    name = store.put(b"a" * 8, 1)
    store.put(b"b" * 8, 1)
    (tmp_path / f"{name.hex()}.blob").unlink()
    assert store.get(name) is None
    assert name not in store


def test_a_damaged_spilled_blob_is_not_served(tmp_path: Path) -> None:
    """A file that changed on disk counts as missing: nobody is sent bytes that aren't theirs."""
    store = BlobStore(10, 1000, tmp_path)
    name = store.put(b"a" * 8, 1)
    store.put(b"b" * 8, 1)
    (tmp_path / f"{name.hex()}.blob").write_bytes(b"a" * 7 + b"!")
    assert store.get(name) is None


def test_providers_serve_what_the_store_does_not_hold() -> None:
    """Snapshots and data files are served by hash, too, without counting as the store's own."""
    store = BlobStore(100)
    store.provide(lambda name: None)
    store.provide(lambda name: b"chunk" if name == blob_hash(b"chunk") else None)
    assert store.get(blob_hash(b"chunk")) == b"chunk"
    assert blob_hash(b"chunk") not in store
    assert store.get(blob_hash(b"else")) is None


@given(st.lists(st.tuples(st.binary(max_size=50), st.integers(0, 5)), max_size=40), st.integers(0, 200))
def test_limits_hold_whatever_comes(contents: list[tuple[bytes, int]], limit: int) -> None:
    """Memory never holds more than the limit, beyond a single blob, and what is there is what was put."""
    store = BlobStore(limit)
    for content, round_index in contents:
        name = store.put(content, round_index)
        assert store.get(name) == content
        assert store.size_bytes[0] <= max(limit, len(content))
    store.drop_before(6)
    assert store.size_bytes == (0, 0)
