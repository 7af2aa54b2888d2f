"""Power cuts, as far as a process can have them: a coordinator's writer is killed at random moments, again and again.

A forked child decides, commits and signs as the coordinator does, and writes every receipt into a pipe; the parent kills it with
SIGKILL after a random time and then holds every receipt that came out against what the database has. One JSON line says how it
went.
"""

from __future__ import annotations

import asyncio
import os
import random
import select
import signal
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from prometheus_client import CollectorRegistry

from bench.children import arguments, say
from bench.load_generator import LENGTH
from bench.signed_rounds import announcement, identity, round_of, sealer, sign_manifest, tiny_manifest
from coordinator.journal import Journal
from coordinator.metrics import Metrics
from coordinator.snapshot import restore
from coordinator.state import Announced, Reported
from coordinator.store.interface import Row
from coordinator.store.sql import SqlStore
from swarm.clock import SystemClock
from swarm.entries import open_proposal, open_report
from swarm.errors import DatabaseCorrupt, LedgerInvalid
from swarm.ledger import verify_receipt
from swarm.merkle import leaf_hash
from swarm.messages import payload_hash
from swarm.rpc.v1.coordinator_pb2 import Announcement
from swarm.rpc.v1.signed_pb2 import Signed

PEERS = [identity(number) for number in range(6)]
COORDINATOR = identity(77)
MANIFEST = sign_manifest(tiny_manifest(), identity(78))
RUN_ID = payload_hash(MANIFEST)
LONGEST_S = 0.05
START_S = 60.0
CUTS_PER_DATABASE = 40
LATE_S = 0.02


class CarelessStore(SqlStore):
    """Says that rows are durable before they are: what the check has to find."""

    later = ThreadPoolExecutor(1)

    def append(self, rows: Sequence[Row]) -> None:
        """Write a little later."""
        self.later.submit(self._append_late, rows)

    def _append_late(self, rows: Sequence[Row]) -> None:
        time.sleep(LATE_S)
        super().append(rows)


@dataclass
class Tally:
    """What was found so far."""

    cuts: int = 0
    receipts: int = 0
    lost: int = 0
    broken: int = 0


async def _work(store: SqlStore, out: int) -> None:
    """Admit the peers, then report round after round, all at once, until killed."""
    clock = SystemClock()
    journal = Journal(store, COORDINATOR, MANIFEST, clock, Metrics(CollectorRegistry()), 45.0)
    journal.load()
    writer = asyncio.create_task(journal.run())
    for peer in PEERS:
        signed = announcement(RUN_ID, peer, clock.wall_s())
        await journal.submit(Announced(peer.peer_id, Announcement.FromString(signed.payload), payload_hash(signed)))
    names, number = sorted(peer.peer_id for peer in PEERS), journal.credits.progress(RUN_ID).confirmed_round + 1
    while not writer.done():
        proposal, reports = round_of(RUN_ID, number, names, names, sealer(PEERS))
        nomination = open_proposal(proposal)
        await asyncio.gather(
            *(_report(journal, Reported(open_report(report), report, nomination, proposal), out) for report in reports)
        )
        number += 1


async def _report(journal: Journal, event: Reported, out: int) -> None:
    answer = (await journal.submit(event)).answer
    if answer is not None:
        raw = answer.SerializeToString()
        os.write(out, LENGTH.pack(len(raw)) + raw)


def _be_the_victim(url: str, out: int, careless: bool) -> NoReturn:
    try:
        asyncio.run(_work((CarelessStore if careless else SqlStore).open(url), out))
    finally:
        os._exit(1)


def _killed(url: str, after_s: float, careless: bool) -> bytes:
    """Fork the victim, kill it, and give what it has said."""
    ours, theirs = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(ours)
        _be_the_victim(url, theirs, careless)
    os.close(theirs)
    try:
        return _heard(ours, child, after_s)
    finally:
        os.close(ours)
        os.waitpid(child, 0)


def _heard(stream: int, child: int, after_s: float) -> bytes:
    """Kill the child `after_s` after it began to say something, and give all that it said."""
    said, kill_at = b"", float("inf")
    while True:
        ready, _, _ = select.select([stream], [], [], min(max(0.0, kill_at - time.monotonic()), START_S))
        if not ready:
            os.kill(child, signal.SIGKILL)
            kill_at = float("inf")
            continue
        chunk = os.read(stream, 1 << 16)
        if not chunk:
            return said
        kill_at = min(kill_at, time.monotonic() + after_s)
        said += chunk


def _receipts(said: bytes) -> list[Signed]:
    """The whole receipts in what came out of the pipe."""
    receipts, position = [], 0
    while position + LENGTH.size <= len(said):
        size = LENGTH.unpack_from(said, position)[0]
        raw = said[position + LENGTH.size : position + LENGTH.size + size]
        position += LENGTH.size + size
        if len(raw) == size:
            receipts.append(Signed.FromString(raw))
    return receipts


def _check(url: str, receipts: Sequence[Signed], tally: Tally) -> None:
    store = SqlStore.open(url)
    try:
        tree, _ = restore(store, COORDINATOR.peer_id)
    except DatabaseCorrupt:
        tally.broken += 1
        return
    finally:
        store.close()
    for signed in receipts:
        tally.receipts += 1
        try:
            receipt = verify_receipt(signed, COORDINATOR.peer_id)
        except LedgerInvalid:
            tally.lost += 1
            continue
        there = receipt.ledger_size <= len(tree) and tree.leaf(receipt.ledger_index) == leaf_hash(receipt.entry)
        tally.lost += not (there and tree.root(receipt.ledger_size) == receipt.ledger_root)


def cut_again_and_again(folder: Path, cuts: int, seed: int, careless: bool = False) -> Tally:
    """Kill the writer `cuts` times; its ledger goes on from one time to the next."""
    draw, tally = random.Random(seed), Tally()
    while tally.cuts < cuts:
        url = f"sqlite:///{folder / f'{tally.cuts // CUTS_PER_DATABASE}.db'}"
        _check(url, _receipts(_killed(url, draw.random() * LONGEST_S, careless)), tally)
        tally.cuts += 1
    return tally


def main() -> None:
    """Do as many cuts as the argument says."""
    given = arguments()
    with tempfile.TemporaryDirectory(prefix="swarm-cuts-") as folder:
        say(**vars(cut_again_and_again(Path(folder), given["cuts"], given["seed"], given.get("careless", False))))


if __name__ == "__main__":
    main()
