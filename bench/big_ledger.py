"""A database with many accounts and entries, made in bulk: real keys, and signatures that nobody checks."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

from bench.signed_rounds import round_of, unsigned
from coordinator.journal import report_key
from coordinator.store.interface import Row
from coordinator.store.sql import SqlStore
from swarm.entries import open_report
from swarm.identity import Identity
from swarm.merkle import leaf_hash
from swarm.rpc.v1.ledger_pb2 import LedgerEntry, RoundConfirmed, RunOpened
from swarm.rpc.v1.signed_pb2 import AdmissionToken, Signed

PEERS_PER_ROUND = 32
GROUP = 2000
APPENDED_AT_US = 1_763_900_000_000_000

Keyed = tuple[LedgerEntry, bytes | None]


def entries(run_id: bytes, manifest: Signed, coordinator: Identity, peers: list[str]) -> Iterator[Keyed]:
    """The opening, everybody's admission, then rounds without end, in which group after group of peers reports."""
    yield LedgerEntry(run_opened=RunOpened(run_id=run_id, manifest=manifest)), None
    for peer in peers:
        yield LedgerEntry(admitted=unsigned(coordinator.peer_id, AdmissionToken(run_id=run_id, peer_id=peer, account=peer))), None
    number = 0
    while True:
        yield from _round(run_id, number, coordinator, _group(peers, number), _group(peers, number + 1))
        number += 1


def _group(peers: list[str], number: int) -> list[str]:
    return sorted(peers[(number * PEERS_PER_ROUND + place) % len(peers)] for place in range(PEERS_PER_ROUND))


def _round(run_id: bytes, number: int, coordinator: Identity, peers: list[str], following: list[str]) -> Iterator[Keyed]:
    proposal, reports = round_of(run_id, number, peers, following, unsigned)
    yield LedgerEntry(proposed=proposal), None
    majority = len(reports) // 2 + 1
    for place, report in enumerate(reports):
        claim = open_report(report, check_signatures=False)
        yield LedgerEntry(reported=report), report_key(run_id, number, claim.peer_id)
        if place + 1 == majority:
            body = RoundConfirmed(run_id=run_id, round=number, proposal_hash=claim.proposal_hash, state_root=claim.state_root)
            yield LedgerEntry(confirmed=unsigned(coordinator.peer_id, body)), None


def append(store: SqlStore, source: Iterator[Keyed], count: int) -> None:
    """Take the next `count` entries into the store."""
    position, end = store.size(), store.size() + count
    while position < end:
        rows = [_row(position + place, *each) for place, each in enumerate(islice(source, min(GROUP, end - position)))]
        store.append(rows)
        position += len(rows)


def _row(position: int, entry: LedgerEntry, key: bytes | None) -> Row:
    entry.appended_at_us = APPENDED_AT_US + position
    raw = entry.SerializeToString(deterministic=True)
    return Row(position, leaf_hash(raw), raw, key)
