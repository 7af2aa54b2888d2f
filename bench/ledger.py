"""What a stranger with a laptop can check: `swarm ledger verify` on a million entries, and on ledgers that were tampered with.

The ledger is made here with real keys and real signatures, rounds of 32 peers out of 256, and verified by the command as users
run it, on the exported file. Then an entry far into it is exchanged for one that its peer never signed, and bytes of a shorter
one are changed at random places, file header included.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import lru_cache
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from bench import report
from bench.big_ledger import APPENDED_AT_US
from bench.report import Report
from bench.signed_rounds import identity, round_of, sealer, sign_manifest, state_root, tiny_manifest
from swarm.identity import Identity
from swarm.ledger import Checkpoint, origin_of, sign_checkpoint
from swarm.ledger_copy import LedgerCopy
from swarm.local import swarm_command
from swarm.merkle import MerkleTree, leaf_hash
from swarm.messages import payload_hash, seal
from swarm.rpc.v1.ledger_pb2 import LedgerEntry, RoundConfirmed, RunOpened
from swarm.rpc.v1.signed_pb2 import AdmissionToken, Signed

ENTRIES, QUICK_ENTRIES = 1_000_000, 20_000
SHORT_ENTRIES = 3_000
FLIPS, QUICK_FLIPS = 200, 20
PEERS, ROSTER = 256, 32
ROUNDS_AT_ONCE = 64
TIMEOUT_S = 900.0
SEED = 5


async def measure(out: Report) -> None:
    """Make, verify, tamper, verify again."""
    count = out.choose(ENTRIES, QUICK_ENTRIES)
    with report.workspace() as folder:
        started = time.perf_counter()
        copy = make_copy(count)
        path = folder / "ledger"
        copy.write(path)
        out.say(f"  {count:,} entries, {path.stat().st_size / 1e6:,.0f} MB, made in {time.perf_counter() - started:.0f} s")
        fields, seconds = await _verify(path)
        if fields.get("entries") != count:
            raise RuntimeError(f"the ledger wasn't accepted: {fields}")
        how = f"`swarm ledger verify --file`, {count:,} entries, {path.stat().st_size:,} bytes, {os.cpu_count()} processors"
        out.figure("verify_1m_entries_s", seconds * ENTRIES / count, how, "<= 60")
        out.figure("verify_entries_per_s", count / seconds, how)
        await _far_fault(out, copy, path)
        await _flips(out, make_copy(SHORT_ENTRIES), path, out.choose(FLIPS, QUICK_FLIPS))


async def _far_fault(out: Report, copy: LedgerCopy, path: Path) -> None:
    """A coordinator that signs a tree over an entry with more weight than its peer signed."""
    index = next(index for index in range(len(copy.entries) * 7 // 10, len(copy.entries)) if _is_report(copy.entries[index]))
    entries = list(copy.entries)
    entry = LedgerEntry.FromString(entries[index])
    entry.reported.signature = bytes(64)
    entries[index] = entry.SerializeToString(deterministic=True)
    _signed_copy(copy.run_id, entries).write(path)
    fields, seconds = await _verify(path)
    named = f"entry {index}:" in str(fields.get("error"))
    out.figure(
        "first_fault_named", int(named), f"entry {index:,} has a signature that isn't its peer's: {fields.get('error')}", "== 1"
    )
    out.figure("first_fault_s", seconds, "until it was named")


async def _flips(out: Report, copy: LedgerCopy, path: Path, flips: int) -> None:
    """One byte of the file at a time, at random places."""
    copy.write(path)
    content, drawn, missed = await asyncio.to_thread(path.read_bytes), random.Random(SEED), list[int]()
    for _ in range(flips):
        end = drawn.choice((content.index(b"\n") + 1, len(content)))
        place, change = drawn.randrange(end), drawn.randrange(1, 256)
        changed = content[:place] + bytes([content[place] ^ change]) + content[place + 1 :]
        await asyncio.to_thread(path.write_bytes, changed)
        if "error" not in (await _verify(path))[0]:
            missed.append(place)
    how = f"of {flips} bytes changed in a file of {len(content):,} bytes, each alone, half of them in its header; places {missed}"
    out.figure("changed_bytes_missed", len(missed), how, "== 0")


async def _verify(path: Path) -> tuple[dict[str, Any], float]:
    """What the command says, as a dictionary, and how long it took."""
    started = time.perf_counter()
    process = await asyncio.create_subprocess_exec(
        *swarm_command(),
        "ledger",
        "verify",
        "--file",
        str(path),
        "--json",
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        said, complained = await asyncio.wait_for(process.communicate(), TIMEOUT_S)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    seconds = time.perf_counter() - started
    if process.returncode == 0:
        return json.loads(said), seconds
    return {"error": complained.decode().strip() or f"exit code {process.returncode}"}, seconds


def make_copy(count: int) -> LedgerCopy:
    """An exported ledger of so many entries; signing is shared between the processors."""
    run = sign_manifest(tiny_manifest(), identity(1))
    run_id = payload_hash(run)
    return _signed_copy(run_id, list(islice(_entries(run_id, run), count)))


def _signed_copy(run_id: bytes, entries: list[bytes]) -> LedgerCopy:
    tree = MerkleTree()
    tree.extend(leaf_hash(entry) for entry in entries)
    coordinator = identity(0)
    note = sign_checkpoint(coordinator, Checkpoint(origin_of(run_id), len(tree), tree.root()))
    return LedgerCopy(run_id, coordinator.peer_id, note, entries)


def _entries(run_id: bytes, run: Signed) -> Iterator[bytes]:
    coordinator, peers = identity(0), _peers()
    yield _raw(LedgerEntry(run_opened=RunOpened(run_id=run_id, manifest=run)))
    for peer in peers:
        token = AdmissionToken(run_id=run_id, peer_id=peer.peer_id, account=peer.peer_id)
        yield _raw(LedgerEntry(admitted=seal(coordinator, token)))
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
        first = 0
        while True:
            numbers = range(first, first + ROUNDS_AT_ONCE)
            for made in pool.map(_round, [run_id] * ROUNDS_AT_ONCE, numbers):
                yield from made
            first += ROUNDS_AT_ONCE


def _round(run_id: bytes, number: int) -> list[bytes]:
    """The proposal of a round, its reports, and the confirmation after the one that makes the majority."""
    peers = _peers()
    roster, following = (_group(peers, each) for each in (number, number + 1))
    proposal, reports = round_of(run_id, number, roster, following, sealer(peers))
    made = [_raw(LedgerEntry(proposed=proposal))]
    majority = len(reports) // 2 + 1
    for place, each in enumerate(reports):
        made.append(_raw(LedgerEntry(reported=each)))
        if place + 1 == majority:
            name, root = payload_hash(proposal), state_root(number)
            body = RoundConfirmed(run_id=run_id, round=number, proposal_hash=name, state_root=root)
            made.append(_raw(LedgerEntry(confirmed=seal(identity(0), body))))
    return made


def _group(peers: Sequence[Identity], number: int) -> list[str]:
    return sorted(peers[(number * ROSTER + place) % len(peers)].peer_id for place in range(ROSTER))


@lru_cache
def _peers() -> tuple[Identity, ...]:
    """The coordinator has 0, the run's owner 1."""
    return tuple(identity(number + 2) for number in range(PEERS))


def _raw(entry: LedgerEntry) -> bytes:
    entry.appended_at_us = APPENDED_AT_US
    return entry.SerializeToString(deterministic=True)


def _is_report(raw: bytes) -> bool:
    return LedgerEntry.FromString(raw).WhichOneof("body") == "reported"


def main(argv: Sequence[str] | None = None) -> int:
    """Measure."""
    return report.run("ledger", __doc__, {"verify": measure}, argv)


if __name__ == "__main__":
    sys.exit(main())
