"""Saving the state as often as it costs next to nothing, and finding it again."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from pathlib import Path

import structlog

from peer.rounds.snapshots import Snapshots
from peer.state import Layout, Snapshot, load_newest, save_checkpoint
from swarm.errors import DiskFull

LARGEST_SHARE = 0.03
LONGEST_S = 60.0

log = structlog.get_logger(__name__)


@dataclass
class Checkpoints:
    """The newest states of a run on disk."""

    directory: Path
    run_id: str
    layout: Layout
    snapshots: Snapshots
    error: str = ""
    _saved_s: float = 0.0
    _took_s: float = 0.0
    _root: bytes = b""
    _known: tuple[int, bytes] | None = None
    _saving: asyncio.Lock = field(default_factory=asyncio.Lock)

    def standing(self) -> tuple[int, bytes]:
        """Rounds behind the newest state that we hold, and its root; (0, empty) without one. The disk is asked once."""
        newest = self.snapshots.newest
        if newest is not None:
            self._known = (newest.round, newest.root)
        elif self._known is None:
            stored = self.newest()
            self._known = (stored.round, stored.root) if stored is not None else (0, b"")
        return self._known

    def due(self) -> bool:
        """Whether it is time: saving takes at most 3 % of a disk writer's time, and a minute is never exceeded."""
        waited_s = time.monotonic() - self._saved_s
        return waited_s >= min(LONGEST_S, self._took_s / LARGEST_SHARE)

    async def save(self) -> None:
        """Write the newest state, unless it is there already. Raises `DiskFull`."""
        async with self._saving:
            snapshot = self.snapshots.newest
            if snapshot is None or snapshot.root == self._root:
                return
            started = self._saved_s = time.monotonic()
            await asyncio.to_thread(save_checkpoint, self.directory, snapshot, self.run_id)
            self._took_s, self._root, self.error = time.monotonic() - started, snapshot.root, ""

    async def save_quietly(self) -> None:
        """Write the newest state; a full disk is told and costs nothing else."""
        try:
            await self.save()
        except DiskFull as error:
            self.error = error.message
            log.warning("checkpoint_failed", error=error.message)

    def newest(self) -> Snapshot | None:
        """The state in memory, or the newest whole checkpoint."""
        if self.snapshots.newest is not None:
            return self.snapshots.newest
        loaded = load_newest(self.directory, self.layout, self.run_id)
        for skipped in loaded.skipped:
            log.warning("checkpoint_skipped", path=str(skipped.path), reason=skipped.reason)
        return loaded.snapshot
