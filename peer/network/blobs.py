"""Immutable bytes by hash: a bounded store that anybody in the run can be served from.

Memory first, then disk. Blobs belong to a round and go with it; the store never grows past its limits, whatever others send.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import structlog

from swarm.merkle import blob_hash

Provider = Callable[[bytes], "bytes | memoryview | None"]

log = structlog.get_logger(__name__)


@dataclass
class BlobStore:
    """Blobs of recent rounds, plus whatever the registered providers (state snapshots, data shards) can serve."""

    memory_limit_bytes: int
    disk_limit_bytes: int = 0
    directory: Path | None = None
    disk_full: bool = False
    _memory: dict[bytes, bytes] = field(default_factory=dict)
    _disk: dict[bytes, int] = field(default_factory=dict)
    _rounds: dict[bytes, int] = field(default_factory=dict)
    _until: dict[bytes, int] = field(default_factory=dict)
    _providers: list[Provider] = field(default_factory=list)
    _memory_bytes: int = 0
    _disk_bytes: int = 0

    def __post_init__(self) -> None:
        if self.directory is not None:
            self.directory.mkdir(parents=True, exist_ok=True, mode=0o700)
            for leftover in self.directory.glob("*.blob"):
                leftover.unlink()

    def provide(self, provider: Provider) -> None:
        """Also serve what `provider(hash)` returns."""
        self._providers.append(provider)

    def put(self, content: bytes, round_index: int) -> bytes:
        """Keep a blob until its round is dropped; its hash."""
        name = blob_hash(content)
        self.put_verified(name, content, round_index)
        return name

    def put_verified(self, name: bytes, content: bytes, round_index: int) -> None:
        """Keep a blob whose hash was checked already."""
        self._rounds[name] = max(round_index, self._rounds.get(name, 0))
        if name in self._memory or name in self._disk:
            return
        self._memory[name] = content
        self._memory_bytes += len(content)
        while self._memory_bytes > self.memory_limit_bytes and len(self._memory) > 1:
            self._spill()

    def keep_until(self, names: Iterable[bytes], round_index: int) -> None:
        """Keep blobs longer than others of their round: until `drop_before` is past this one."""
        self._until |= dict.fromkeys(names, round_index)

    def get(self, name: bytes) -> bytes | memoryview | None:
        """The blob, or None."""
        content: bytes | memoryview | None = self._memory.get(name)
        if content is not None:
            return content
        if name in self._disk and self.directory is not None:
            content = self._read(self.directory / f"{name.hex()}.blob", name)
            if content is not None:
                return content
            self._forget_disk(name)
        for provider in self._providers:
            content = provider(name)
            if content is not None:
                return content
        return None

    def __contains__(self, name: bytes) -> bool:
        return name in self._memory or name in self._disk

    def missing(self, names: Iterable[bytes]) -> list[bytes]:
        """Those of `names` that the store itself doesn't hold."""
        return [name for name in names if name not in self]

    def drop_before(self, round_index: int) -> None:
        """Forget the blobs of rounds before `round_index`."""
        for name in [name for name, kept in self._rounds.items() if max(kept, self._until.get(name, 0)) < round_index]:
            self._drop(name)

    @property
    def newest_round(self) -> int:
        """The latest round that a blob belongs to."""
        return max(self._rounds.values(), default=0)

    @property
    def size_bytes(self) -> tuple[int, int]:
        """Bytes in memory and on disk."""
        return self._memory_bytes, self._disk_bytes

    def _drop(self, name: bytes) -> None:
        self._rounds.pop(name, None)
        self._until.pop(name, None)
        content = self._memory.pop(name, None)
        if content is not None:
            self._memory_bytes -= len(content)
        if name in self._disk:
            self._forget_disk(name)

    @staticmethod
    def _read(path: Path, name: bytes) -> bytes | None:
        """A spilled blob, or None where the disk has lost or damaged it: others must not take us for a liar."""
        try:
            content = path.read_bytes()
        except OSError:
            return None
        if blob_hash(content) != name:
            log.warning("blob_damaged", path=str(path))
            return None
        return content

    def _forget_disk(self, name: bytes) -> None:
        self._disk_bytes -= self._disk.pop(name)
        if self.directory is not None:
            (self.directory / f"{name.hex()}.blob").unlink(missing_ok=True)

    def _spill(self) -> None:
        """Move the oldest blob to disk; drop it where there is no room."""
        name = next(iter(self._memory))
        content = self._memory.pop(name)
        self._memory_bytes -= len(content)
        while self._disk and self._disk_bytes + len(content) > self.disk_limit_bytes:
            self._drop(next(iter(self._disk)))
        if self.directory is None or len(content) > self.disk_limit_bytes:
            self._rounds.pop(name, None)
            return
        path = self.directory / f"{name.hex()}.blob"
        try:
            path.write_bytes(content)
        except OSError as error:
            path.unlink(missing_ok=True)
            self._rounds.pop(name, None)
            self.disk_full = error.errno == errno.ENOSPC
            log.warning("blob_not_kept", error=error.strerror)
            return
        self.disk_full = False
        self._disk[name] = len(content)
        self._disk_bytes += len(content)
