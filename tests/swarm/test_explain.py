"""Why a key earned what it did: one case for each answer."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from swarm.cli.main import run
from swarm.errors import LedgerInvalid
from swarm.explain import REASONS, explain
from swarm.identity import Identity
from swarm.ledger import Checkpoint, origin_of, sign_checkpoint
from swarm.ledger_copy import LedgerCopy
from swarm.merkle import root_of
from tests.swarm.test_accounts import admitted, revoked
from tests.world import COORDINATOR, FLOPS_PER_TOKEN, OTHER_ROOT, SEQUENCE_LENGTH, World, entry, identity

WORLD = World()
PEERS = sorted((identity(number) for number in range(3)), key=lambda peer: peer.peer_id)
ALICE, BOB, CAROL = PEERS
START = [WORLD.opened(), *(WORLD.admitted(peer) for peer in PEERS)]


def whole_round(number: int, peers: Sequence[Identity] = PEERS) -> list[bytes]:
    proposal, reports = WORLD.round(peers, number)
    return [entry(proposed=proposal), *(entry(reported=report) for report in reports), WORLD.confirmed(number, proposal)]


def reason(entries: list[bytes], number: int, peer_id: str = ALICE.peer_id) -> str:
    found = explain(entries, COORDINATOR.peer_id, WORLD.run_id, peer_id, number)
    assert found.why == REASONS[found.reason].format(hold=2)
    assert bool(found.tokens) == (found.reason in ("final", "verified", "pending"))
    return found.reason


def without(number: int, left_out: int, roster: Sequence[Identity] = ()) -> list[bytes]:
    """A round whose proposal leaves one peer out."""
    others = [peer for place, peer in enumerate(PEERS) if place != left_out]
    commits = [WORLD.commit(peer, number) for peer in others]
    proposal = WORLD.proposal(others[0], number, commits, roster or PEERS)
    reports = [WORLD.report(peer, commit, proposal) for peer, commit in zip(others, commits, strict=True)]
    return [entry(proposed=proposal), *(entry(reported=report) for report in reports), WORLD.confirmed(number, proposal)]


def test_what_earns() -> None:
    """Pending, verified, and final two rounds later; the amount is exact."""
    proposal, reports = WORLD.round(PEERS, 0)
    entries = [*START, entry(proposed=proposal), *(entry(reported=report) for report in reports)]
    assert reason(entries[:-1], 0) == "pending"
    entries.append(WORLD.confirmed(0, proposal))
    assert reason(entries, 0) == "verified"
    entries += [*whole_round(1), *whole_round(2)]
    assert reason(entries, 0) == "final"
    found = explain(entries, COORDINATOR.peer_id, WORLD.run_id, ALICE.peer_id, 0)
    assert (found.tokens, found.flops) == (4 * SEQUENCE_LENGTH, 4 * SEQUENCE_LENGTH * FLOPS_PER_TOKEN)


def test_what_does_not() -> None:
    """Strangers, rounds to come, places outside of the roster or the proposal, and reports that are missing."""
    entries = [*START, *whole_round(0)]
    assert reason(entries, 0, identity(99).peer_id) == "never_admitted"
    assert reason(entries, 1) == "not_yet"
    assert reason([*entries, *without(1, 0)], 1) == "not_included"
    smaller = [*START, *without(0, 0, [BOB, CAROL]), *without(1, 0, [BOB, CAROL])]
    assert reason(smaller, 1) == "not_in_roster"
    proposal, reports = WORLD.round(PEERS, 1)
    others = [entry(reported=report) for report in reports if report.signer != ALICE.peer_id]
    assert reason([*entries, entry(proposed=proposal), *others, WORLD.confirmed(1, proposal)], 1) == "not_reported"


def test_a_place_without_work() -> None:
    """Reported or not."""
    commits = [WORLD.commit(ALICE, 0, 0), WORLD.commit(BOB, 0), WORLD.commit(CAROL, 0)]
    proposal = WORLD.proposal(BOB, 0, commits)
    reports = [WORLD.report(peer, commit, proposal) for peer, commit in zip(PEERS, commits, strict=True)]
    entries = [
        *START,
        entry(proposed=proposal),
        *(entry(reported=report) for report in reports[1:]),
        WORLD.confirmed(0, proposal),
    ]
    assert reason(entries, 0) == "no_work"
    assert reason([*entries, entry(reported=reports[0])], 0) == "no_work"


def test_void_contributions() -> None:
    """Another state than the majority's, and a proposal that didn't make the round."""
    commits = [WORLD.commit(peer, 0) for peer in PEERS]
    proposal = WORLD.proposal(BOB, 0, commits)
    rest = [entry(reported=WORLD.report(peer, commit, proposal)) for peer, commit in zip(PEERS[1:], commits[1:], strict=True)]
    wrong = entry(reported=WORLD.report(ALICE, commits[0], proposal, OTHER_ROOT))
    made = [*START, entry(proposed=proposal), *rest, WORLD.confirmed(0, proposal)]
    assert reason([*made, wrong], 0) == "other_state"
    other = WORLD.proposal(CAROL, 0, commits, ballot=(1, 0))
    late = entry(reported=WORLD.report(ALICE, commits[0], other))
    start = [*START, entry(proposed=proposal), entry(proposed=other), *rest, WORLD.confirmed(0, proposal)]
    assert reason([*start, late], 0) == "other_proposal"


def test_a_revoked_key() -> None:
    """It can't report any more."""
    start = [WORLD.opened(), admitted(ALICE), WORLD.admitted(BOB), WORLD.admitted(CAROL), *whole_round(0), revoked(ALICE)]
    assert reason([*start, *without(1, 0)], 1) == "revoked"
    assert reason([*start, *without(1, 0)], 0) == "verified"


def test_a_ledger_that_breaks_its_rules() -> None:
    """It is said to be no ledger, instead of being explained."""
    with pytest.raises(LedgerInvalid, match="entry 4"):
        explain([*START, START[1]], COORDINATOR.peer_id, WORLD.run_id, ALICE.peer_id, 0)


def test_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From an exported file, offline."""
    entries = [*START, *whole_round(0)]
    note = sign_checkpoint(COORDINATOR, Checkpoint(origin_of(WORLD.run_id), len(entries), root_of(entries)))
    LedgerCopy(WORLD.run_id, COORDINATOR.peer_id, note, entries).write(tmp_path / "copy")
    arguments = ["explain", "--round", "0", "--peer", ALICE.peer_id, "--file", str(tmp_path / "copy")]
    assert run([*arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["reason"] == "verified"
    assert run(arguments) == 0
    assert "becomes final once 2 more rounds" in capsys.readouterr().out
