"""Why a key isn't earning, case by case."""

from __future__ import annotations

from dataclasses import replace

from coordinator.explain import explain
from coordinator.orders import Orders
from coordinator.presence import Presence, Sighting
from coordinator.state import State
from swarm.credits import fold
from tests.world import COORDINATOR, World, entry, identity, manifest

WORLD = World(manifest(credit={"flops_per_token": 10**12, "hold_rounds": 10}))  # so that the last rounds are not settled
ALICE, BOB, CAROL, STRANGER = (identity(number) for number in range(4))
TTL_S = 45.0


def made(playing: bool | None = True, rounds: int = 2, extra: tuple[bytes, ...] = ()) -> State:
    """A run of Alice and Bob; Alice plays, is there (False) or isn't (None)."""
    presence = Presence(TTL_S, 0.0)
    if playing is not None:
        presence.announced(Sighting(ALICE.peer_id, (), 2, 0.0, b"", playing), 1, b"")
    ledger = fold([*WORLD.ledger([ALICE, BOB], rounds), *extra], COORDINATOR.peer_id)
    return State(WORLD.run_id, manifest(), ledger, presence)


def reasons(state: State, peer_id: str = ALICE.peer_id) -> str:
    """All reasons in one text."""
    return " ".join(explain(state, peer_id).reasons)


def test_nothing_in_the_way() -> None:
    """Who trains and reports has no reasons, and sees its rounds, the newest first."""
    account = explain(made(), ALICE.peer_id)
    assert (account.reasons, account.admitted, account.alive, account.balance.rounds) == ([], True, True, 2)
    assert [(each.number, each.reported) for each in account.rounds] == [(1, True), (0, True)]


def test_who_isnt_there() -> None:
    """A stranger, a silent peer and one that waits each get their own reason."""
    assert "never admitted" in reasons(made(), STRANGER.peer_id)
    assert "Nothing was heard from it for 45 seconds" in reasons(made(None))
    assert "doesn't train yet" in reasons(made(False))


def test_what_the_operator_ordered() -> None:
    """A suspension is told with its reason, a pause by its name."""
    orders = Orders("paused", {ALICE.peer_id: "wrong results"})
    told = reasons(replace(made(), orders=orders))
    assert "suspended this key: wrong results" in told
    assert "The run is paused" in told


def test_whose_work_was_found_wrong() -> None:
    """A key that the others have convicted is told so."""
    convicted = [WORLD.audited(peer, WORLD.commit(CAROL, 1), "convicted", reason="wrong_merge") for peer in (ALICE, BOB)]
    state = made(extra=(WORLD.admitted(CAROL), *convicted))
    assert "found wrong (wrong_merge), and the key is suspended" in reasons(state, CAROL.peer_id)
    assert "found wrong" not in reasons(state)


def test_outside_the_roster() -> None:
    """Who trains but isn't in the newest roster is told so."""
    state = made(extra=(WORLD.admitted(CAROL),))
    state.presence.announced(Sighting(CAROL.peer_id, (), 2, 0.0, b"", True), 1, b"")
    assert "isn't in the roster of round 1" in reasons(state, CAROL.peer_id)


def test_reports_that_did_not_come() -> None:
    """Who was in the roster of an earlier round and didn't report is told which one."""
    entries: list[bytes] = []
    for number in (2, 3):
        commits = [WORLD.commit(peer, number) for peer in (ALICE, BOB)][1:]
        proposal = WORLD.proposal(BOB, number, commits, [ALICE, BOB])
        entries += [entry(proposed=proposal), entry(reported=WORLD.report(BOB, commits[0], proposal))]
        entries.append(WORLD.confirmed(number, proposal))
    assert "No report of round 2" in reasons(made(extra=tuple(entries)))


def test_before_the_first_round() -> None:
    """Without a confirmed round there is nothing to show, and no false reason."""
    account = explain(made(rounds=0), ALICE.peer_id)
    assert (account.rounds, account.reasons) == ([], [])
