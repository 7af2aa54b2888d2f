"""`swarm` with something wrong inside, for scenarios: `python tests/disturbed.py clock:600 join ...`.

What is wrong is put there from outside, so that the product has no code that lies.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

FRAME = bytes(1 << 16)
SLOW_CHUNK_S = 0.5
FIRST_LIE = 3
FP16_SCALE_BYTES = 4


def program(what: str) -> tuple[str, ...]:
    """What to run instead of `swarm`; without this folder on the path, which has a `swarm` of its own."""
    return (sys.executable, "-P", str(Path(__file__)), what)


def clock(offset_s: float) -> None:
    """This process's wall clock is wrong, for all Python in it: ours and hivemind's.

    gRPC adds a deadline up in Python and looks at it in C, where the machine's own clock is still right.
    """
    right, right_ns = time.time, time.time_ns
    time.time = lambda: right() + offset_s
    time.time_ns = lambda: right_ns() + int(offset_s * 1e9)
    import grpc.aio._utils

    grpc.aio._utils.time = SimpleNamespace(time=right)  # type: ignore[attr-defined]


def wrong_chunks() -> None:
    """A donor whose chunks of the state aren't what they are said to be; its rounds are honest."""
    from peer.rounds.snapshots import Snapshots

    honest = Snapshots.lookup
    Snapshots.lookup = lambda self, name: bytes(len(chunk)) if (chunk := honest(self, name)) is not None else None  # type: ignore


def slow_donor() -> None:
    """A donor that takes its time for each chunk of the state; what it sends is right."""
    import asyncio

    from peer.network.transfer import Transfer
    from peer.rounds.snapshots import Snapshots

    marker, lookup, send = set[bytes](), Snapshots.lookup, Transfer._send_blob

    def remember(self: Snapshots, name: bytes) -> Any:
        chunk = lookup(self, name)
        if chunk is not None:
            marker.add(name)
        return chunk

    async def send_late(self: Transfer, peer: str, writer: Any, name: bytes, offset: int) -> None:
        if self.store.get(name) is not None and name in marker:
            await asyncio.sleep(SLOW_CHUNK_S)
        await send(self, peer, writer, name, offset)

    Snapshots.lookup = remember  # type: ignore
    Transfer._send_blob = send_late  # type: ignore


def endless() -> None:
    """A donor that announces far more than a chunk and sends it for ever."""
    from peer.network.transfer import FOUND, Transfer
    from peer.rounds.snapshots import Snapshots

    marker, honest, send_honestly = bytes(FRAME), Snapshots.lookup, Transfer._send_blob

    async def send_for_ever(self: Transfer, peer: str, writer: Any, name: bytes, offset: int) -> None:
        if self.store.get(name) is not marker:
            await send_honestly(self, peer, writer, name, offset)
            return
        writer.write(bytes([FOUND]) + (1 << 62).to_bytes(8, "big"))
        while True:
            writer.write(FRAME)
            await writer.drain()

    Snapshots.lookup = lambda self, name: None if honest(self, name) is None else marker  # type: ignore
    Transfer._send_blob = send_for_ever  # type: ignore


def speaks(versions: str) -> None:
    """A peer of another release, whose protocol is `oldest-newest`, such as 2.0-2.1; to be called before all else is loaded."""
    from swarm import protocol

    oldest, newest = (protocol.Version(*map(int, version.split("."))) for version in versions.split("-"))
    protocol.OURS = protocol.Range(oldest, newest)


def wrong_root() -> None:
    """A peer that signs another state root than it has, and gives that root's name to chunks that it made up."""
    from peer.rounds import engine
    from peer.rounds.snapshots import Snapshots
    from swarm.rpc.v1.signed_pb2 import Result

    seal_honestly, lease = engine.seal, Snapshots.lease

    def seal(identity: Any, message: Any) -> Any:
        if isinstance(message, Result):
            message.state.root = bytes(reversed(message.state.root))
        return seal_honestly(identity, message)

    engine.seal = seal  # type: ignore
    Snapshots.lease = lambda self, root: tuple(bytes(reversed(name)) for name in lease(self, root))  # type: ignore


def other_signs(part: bytes) -> bytes:
    """A part of `fp16` with the signs of its values changed, behind its scale."""
    return part[:FP16_SCALE_BYTES] + bytes(
        byte ^ 0x80 if place % 2 else byte for place, byte in enumerate(part[FP16_SCALE_BYTES:])
    )


def two_merges(spoil: Callable[[bytes], bytes] = other_signs) -> None:
    """A reducer that signs one merge for half of the roster, and another for the rest."""
    from peer.rounds.run import RoundRun
    from swarm.messages import seal
    from swarm.rpc.v1.peer_pb2 import Delivery
    from swarm.rpc.v1.signed_pb2 import MergedSpan

    send_honestly = RoundRun._to_roster

    def send(self: RoundRun, delivery: Delivery) -> None:
        if delivery.WhichOneof("body") != "merged_span" or self.round_index < FIRST_LIE:
            send_honestly(self, delivery)
            return
        span, store = MergedSpan.FromString(delivery.merged_span.payload), self.services.transfer.store
        first = bytes(store.get(span.part_hashes[0]) or b"")
        changed = spoil(first)
        span.part_hashes[0] = store.put(changed, self.round_index)
        self.services.post.send(self.setup.others[::2], delivery)
        self.services.post.send(self.setup.others[1::2], Delivery(merged_span=seal(self.services.identity, span)))

    RoundRun._to_roster = send  # type: ignore


def rotten_merge() -> None:
    """A reducer whose merge half of the roster can't decode."""
    two_merges(lambda part: b"\xff" * len(part))


def far_ahead() -> None:
    """A peer that tells newcomers of a round that nobody has reached."""
    from peer.rounds.engine import Engine
    from swarm.rpc.v1.peer_pb2 import SyncReply

    answer_honestly = Engine.answer_sync

    async def answer(self: Engine, *given: Any) -> bytes:
        reply = SyncReply.FromString(await answer_honestly(self, *given))
        reply.round += 1_000_000
        return reply.SerializeToString()

    Engine.answer_sync = answer  # type: ignore


def rubber_stamp() -> None:
    """A peer that lets every contribution pass without looking at it."""
    from peer.judging import Judgement
    from peer.rounds.audits import AuditDesk

    async def passed(self: AuditDesk, duty: Any) -> Judgement:
        return Judgement("passed")

    AuditDesk._audited = passed  # type: ignore


def die_half_way() -> None:
    """A peer whose power fails when half of its first download of several chunks is there."""
    from peer.network.transfer import Transfer

    download_whole = Transfer.download_all

    async def download(self: Transfer, sources: Any, sizes: Any, keep: Any, *rest: Any) -> Any:
        kept: list[bytes] = []

        def keep_half(name: bytes, content: bytes) -> None:
            keep(name, content)
            kept.append(name)
            if len(sizes) > 1 and len(kept) * 2 >= len(sizes):
                os.kill(os.getpid(), signal.SIGKILL)

        return await download_whole(self, sources, sizes, keep_half, *rest)

    Transfer.download_all = download  # type: ignore


MISDEEDS = {
    "wrong_chunks": wrong_chunks,
    "endless": endless,
    "slow_donor": slow_donor,
    "wrong_root": wrong_root,
    "two_merges": two_merges,
    "rotten_merge": rotten_merge,
    "far_ahead": far_ahead,
    "rubber_stamp": rubber_stamp,
    "die_half_way": die_half_way,
}


def main() -> None:
    """Break what the first argument names, then be `swarm` with the others."""
    what, _, value = sys.argv.pop(1).partition(":")
    if what == "clock":
        clock(float(value))
    elif what == "speaks":
        speaks(value)
    else:
        MISDEEDS[what]()
    from swarm.cli.main import main as run

    run()


if __name__ == "__main__":
    main()
