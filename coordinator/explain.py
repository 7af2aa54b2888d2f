"""Why an account earns, or doesn't: a pure function of what the coordinator knows about one key, in sentences for its owner."""

from __future__ import annotations

from typing import NamedTuple

from coordinator.orders import RUNNING
from coordinator.state import State
from swarm.credits import Balance

ROUNDS_SHOWN = 20


class RoundSeen(NamedTuple):
    """One round, as far as it is about this key."""

    number: int
    in_roster: bool | None
    """None where the ledger no longer tells."""
    reported: bool


class Account(NamedTuple):
    """What an account's page shows."""

    balance: Balance
    admitted: bool
    alive: bool
    rounds: list[RoundSeen]
    reasons: list[str]


def explain(state: State, peer_id: str) -> Account:
    """What is known of a key, and why it isn't earning; no reasons when nothing is in its way."""
    ledger, run_id = state.credits, state.run_id
    progress = ledger.progress(run_id)
    newest = progress.confirmed_round if progress.state_root else -1
    rounds = [_seen(state, number, peer_id) for number in range(newest, max(-1, newest - ROUNDS_SHOWN), -1)]
    sighting = state.presence.sighting(peer_id)
    admitted = ledger.is_admitted(run_id, peer_id)
    reasons = [] if admitted else ["This key was never admitted: has it joined this run, with this key?"]
    if peer_id in state.orders.suspended:
        reasons.append(f"The run's operator has suspended this key: {state.orders.suspended[peer_id]}.")
    found = ledger.suspended(run_id).get(peer_id)
    if found is not None:
        reasons.append(f"Its work was found wrong ({found}), and the key is suspended: `swarm explain --round N` shows by whom.")
    if state.orders.state != RUNNING:
        reasons.append(f"The run is {state.orders.state}.")
    if admitted and sighting is None:
        reasons.append(f"Nothing was heard from it for {state.presence.ttl_s:.0f} seconds: is it running? `swarm status` tells.")
    elif sighting is not None and not sighting.playing:
        reasons.append("It is there, but doesn't train yet: `swarm status` on that machine says what it waits for.")
    reasons += _from_rounds(rounds, sighting is not None and sighting.playing)
    return Account(ledger.balance(run_id, peer_id), admitted, sighting is not None, rounds, reasons)


def _seen(state: State, number: int, peer_id: str) -> RoundSeen:
    rosters = state.credits.rosters(state.run_id, number)
    in_roster = any(peer_id in roster for roster in rosters) if rosters else None
    return RoundSeen(number, in_roster, state.credits.has_reported(state.run_id, number, peer_id))


def _from_rounds(rounds: list[RoundSeen], playing: bool) -> list[str]:
    if not rounds or not playing:
        return []
    if rounds[0].in_roster is False:
        return [f"It isn't in the roster of round {rounds[0].number}: the next leader lets it in when it asks."]
    missing = [each.number for each in rounds[1:] if each.in_roster and not each.reported]
    if missing:
        return [f"No report of round {missing[0]} has come: a peer keeps its reports while it can't reach the coordinator."]
    return []
