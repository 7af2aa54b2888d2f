"""When the network falls into two halves, one history goes on and the other half comes back to it."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from bench import hosts
from bench.hosts import Link
from swarm.ledger_copy import LedgerCopy
from swarm.messages import parse
from swarm.rpc.v1.ledger_pb2 import LedgerEntry, RoundConfirmed
from swarm.scenario import last_contribution, last_round
from tests.runs import run_command

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(300),
    pytest.mark.skipif(bool(hosts.unavailable()), reason=hosts.unavailable()),
]


async def test_the_half_with_a_quorum_goes_on_and_the_other_comes_back(scenario: Any, tmp_path: Path) -> None:
    """Three peers on one host, two on another, and the cable between them is pulled for six rounds.

    The three go on, the two wait, catch up when the cable is back, and every round is confirmed with one root only.
    """
    with hosts.hosts([Link(), Link()]) as (here, there):
        async with scenario(5) as swarm:
            source = swarm.source
            await swarm.swarm.start_coordinator(
                source / "run.yaml", source / "owner.key", listen=f"{here.address}:0", prefix=here.prefix
            )
            for name, host in (("p0", here), ("p1", here), ("p2", here), ("p3", there), ("p4", there)):
                await swarm.join(name, prefix=host.prefix, address=host.address)
            majority = [swarm.peers[name] for name in ("p0", "p1", "p2")]
            minority = [swarm.peers[name] for name in ("p3", "p4")]
            await swarm.until_round(4)
            hosts.cut(there)
            cut_in = max(map(last_round, swarm.live()))
            await swarm.until_round(cut_in + 6, majority)
            assert max(map(last_round, minority)) <= cut_in + 1
            hosts.mend(there)
            healed_in = max(map(last_round, majority))
            await swarm.until(lambda: min(map(last_contribution, minority)) > healed_in, "the two contribute again", 90)
            await swarm.finish_all()
            assert swarm.missing_rounds() == []
            assert swarm.differing_roots() == []
            ledger = tmp_path / "ledger"
            done = await run_command("ledger", "export", "--to", str(ledger), swarm.swarm.link, prefix=here.prefix)
            assert done.code == 0, done.err
            confirmed = confirmed_roots(LedgerCopy.read(ledger))
            assert len(confirmed) > healed_in
            assert {number: roots for number, roots in confirmed.items() if len(roots) > 1} == {}


def confirmed_roots(ledger: LedgerCopy) -> dict[int, set[bytes]]:
    """State roots that the ledger confirms for each round."""
    found: dict[int, set[bytes]] = defaultdict(set)
    for raw in ledger.entries:
        entry = parse(LedgerEntry, raw)
        if entry.WhichOneof("body") == "confirmed":
            message = parse(RoundConfirmed, entry.confirmed.payload)
            found[message.round].add(message.state_root)
    return found
