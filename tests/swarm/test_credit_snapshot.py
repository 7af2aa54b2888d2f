"""A credit state written down and read back is the same state."""

from __future__ import annotations

import json

import pytest

from swarm.credit_snapshot import dump, load
from swarm.credits import CreditState, apply_entry, fold
from swarm.errors import LedgerInvalid
from swarm.messages import seal
from swarm.rpc.v1.signed_pb2 import Grant
from tests.world import COORDINATOR, OTHER_ROOT, World, entry, identity

WORLD = World()
PEERS = [identity(number) for number in range(3)]
ALICE, BOB, CAROL = PEERS


def eventful_ledger() -> list[bytes]:
    """Four rounds, with a grant, a second ballot, a dissenter, a late report and a round that stays open."""
    entries = WORLD.ledger(PEERS, 3)
    commits = [WORLD.commit(peer, 3) for peer in PEERS]
    proposal = WORLD.proposal(ALICE, 3, commits)
    other = WORLD.proposal(BOB, 3, commits[:2], ballot=(1, 0))
    grant = Grant(run_id=WORLD.run_id, round=3, base_root=OTHER_ROOT, peer_id=ALICE.peer_id, present=[ALICE.peer_id])
    return [
        *entries,
        entry(granted=seal(COORDINATOR, grant)),
        entry(proposed=other),
        entry(proposed=proposal),
        entry(reported=WORLD.report(CAROL, commits[2], proposal, OTHER_ROOT)),
        entry(reported=WORLD.report(ALICE, commits[0], proposal)),
        entry(reported=WORLD.report(BOB, commits[1], proposal)),
        WORLD.confirmed(3, proposal),
    ]


ENTRIES = eventful_ledger()


def told(state: CreditState) -> object:
    """What a state answers."""
    run_id = WORLD.run_id
    return (
        state.size,
        state.balances(run_id),
        state.progress(run_id),
        state.leaderboard(run_id, 10),
        state.manifest(run_id),
        (state.history(run_id).stride, state.history(run_id).points, state.audit_totals(run_id)),
        [(state.deeds(run_id, peer.peer_id), state.keys(run_id, peer.peer_id)) for peer in PEERS],
        [(state.rosters(run_id, number), state.grant(run_id, number), state.is_confirmed(run_id, number)) for number in range(6)],
    )


@pytest.mark.parametrize("cut", range(len(ENTRIES) + 1))
def test_a_restored_state_goes_on_alike(cut: int) -> None:
    """Cut anywhere, written down and read back: the rest of the ledger leads to the same."""
    restored = load(dump(fold(ENTRIES[:cut], COORDINATOR.peer_id)))
    for index, each in enumerate(ENTRIES[cut:], cut):
        apply_entry(restored, index, each)
    straight = fold(ENTRIES, COORDINATOR.peer_id)
    assert told(restored) == told(straight)
    assert dump(restored) == dump(straight)


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b"null", b'{"version": 9}'])
def test_damaged_snapshots_are_refused(damage: bytes) -> None:
    """What isn't a snapshot of this version is refused as a whole."""
    with pytest.raises(LedgerInvalid):
        load(damage)


def test_missing_parts_are_refused() -> None:
    """A snapshot without one of its parts is refused, not filled with defaults."""
    whole = json.loads(dump(fold(ENTRIES, COORDINATOR.peer_id)))
    for part in whole["runs"][0][1]:
        run = {name: value for name, value in whole["runs"][0][1].items() if name != part}
        with pytest.raises(LedgerInvalid):
            load(json.dumps({**whole, "runs": [[WORLD.run_id.hex(), run]]}).encode())
