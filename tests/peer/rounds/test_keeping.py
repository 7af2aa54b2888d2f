"""Rounds are kept in order beside those that go on; one that can't be is a gap, and nothing worse."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from types import SimpleNamespace
from typing import Any

import pytest

from peer.rounds.keeping import MOST_WAITING, Keeping
from peer.rounds.values import IncludedCommit
from swarm.errors import DiskFull
from swarm.rpc.v1.signed_pb2 import Signed

PEER, PART = "p00", b"h" * 32


class Writer:
    """A keeper whose disk is as slow as `gate` says."""

    def __init__(self, error: Exception | None = None) -> None:
        self.gate, self.error = threading.Event(), error
        self.kept: list[int] = []

    def keep(self, record: Any, base_root: bytes, before: Any, after: Any) -> None:
        self.gate.wait()
        if self.error is not None:
            raise self.error
        assert dict(record.parts) == {PART: b"part"}
        self.kept.append(record.round_index)


class World:
    """A peer that finishes rounds of one part, which its store may have lost."""

    def __init__(self, writer: Writer, content: bytes | None = b"part") -> None:
        self.gaps, self.tasks = 0, list[asyncio.Task[None]]()
        post = SimpleNamespace(spawn=self._spawn)
        services: Any = SimpleNamespace(post=post, transfer=SimpleNamespace(store=SimpleNamespace(get=lambda name: content)))
        self.keeping = Keeping(services, writer, self._gap)  # type: ignore[arg-type]

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        self.tasks.append(asyncio.create_task(work))

    def _gap(self) -> None:
        self.gaps += 1

    def finish(self, round_index: int) -> None:
        """A round is over."""
        needed = [(0, PART, PEER)]
        exchange = SimpleNamespace(parts=SimpleNamespace(needed=lambda proposal, commits, spans: needed))
        state = SimpleNamespace(commits={}, spans={PEER: SimpleNamespace(signed=Signed(kind="span"))})
        setup = SimpleNamespace(all_gather=False, base_root=b"b" * 32)
        run: Any = SimpleNamespace(round_index=round_index, state=state, setup=setup, exchange=exchange)
        item = IncludedCommit(PEER, b"c" * 32, 1, 0, 1)
        proposal: Any = SimpleNamespace(signed=Signed(kind="proposal"), contributors=(item,), reducers=(item,))
        after: Any = SimpleNamespace(root=b"r" * 32)
        self.keeping.keep(run, proposal, None, after)


async def test_rounds_are_kept_in_order_and_nobody_waits() -> None:
    """While one is written the next are finished; where the disk doesn't keep up with them there is a gap."""
    writer = Writer()
    world = World(writer)
    for round_index in range(MOST_WAITING + 1):
        world.finish(round_index)
    assert (writer.kept, world.gaps) == ([], 1)
    writer.gate.set()
    await asyncio.gather(*world.tasks)
    world.finish(7)
    await asyncio.gather(*world.tasks)
    assert (writer.kept, world.gaps) == ([*range(MOST_WAITING), 7], 1)


@pytest.mark.parametrize(
    ("error", "content"), [(DiskFull("no space left", ""), b"part"), (OSError(5, "input/output"), b"part"), (None, None)]
)
async def test_what_cannot_be_kept_is_a_gap(error: Exception | None, content: bytes | None) -> None:
    """A full disk, a broken one, a part that is gone already."""
    writer = Writer(error)
    writer.gate.set()
    world = World(writer, content)
    world.finish(3)
    await asyncio.gather(*world.tasks)
    assert (writer.kept, world.gaps) == ([], 1)
