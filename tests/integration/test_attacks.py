"""Attackers among real peers: what comes of each kind."""

from __future__ import annotations

from pathlib import Path

import pytest

from peer.trials import Outcome, Trial, run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

PEERS = 4
LAST_ROUNDS_SHARE = 0.05  # of all credit; a fair share is 0.25


async def outcome_of(kind: str, folder: Path, rounds: int = 10) -> Outcome:
    """One attacker among four peers. Whatever it does, nobody honest is accused and all agree to the end."""
    outcome = await run(Trial(kind, 1, PEERS, rounds), folder)
    assert outcome.rounds == rounds
    assert outcome.roots_agree
    assert outcome.honest_accused == 0
    return outcome


@pytest.mark.parametrize("kind", ["skip", "label_flip", "copy"])
async def test_whose_work_isnt_what_it_sends_is_suspended(kind: str, tmp_path: Path) -> None:
    """It does half of the samples, trains on wrong labels, or copies: two auditors find it out, and it keeps nothing."""
    outcome = await outcome_of(kind, tmp_path)
    assert outcome.convicted == 1
    assert outcome.detected_after is not None
    assert outcome.detected_after <= 8
    assert outcome.credit_kept == 0


async def test_where_nobody_can_compute_again_the_loss_tells(tmp_path: Path) -> None:
    """The inner state is kept: noise in the place of work does nothing for its author's samples, and audits find that out.

    Not in the first rounds, in which work doesn't show in the loss yet: what became final of them is kept.
    """
    outcome = await run(Trial("plausible_noise", 1, PEERS, 30, inner_state="kept"), tmp_path)
    assert outcome.roots_agree
    assert (outcome.convicted, outcome.honest_accused) == (1, 0)
    assert outcome.credit_kept < 1 / PEERS / 2


async def test_a_new_key_is_found_out_like_the_old_one(tmp_path: Path) -> None:
    """It comes back with another key whenever one is suspended, and none of them keeps anything.

    But for one that came in just before the run's end: what it did last hasn't been audited yet, and isn't final.
    """
    outcome = await outcome_of("sybil", tmp_path, rounds=16)
    assert outcome.convicted >= 1
    assert outcome.credit_kept < LAST_ROUNDS_SHARE


async def test_a_leader_that_proposes_two_things_is_convicted(tmp_path: Path) -> None:
    """By its own signatures, whenever it leads."""
    outcome = await outcome_of("equivocate", tmp_path, rounds=16)
    assert outcome.convicted == 1
    assert outcome.credit_kept == 0


@pytest.mark.parametrize(("kind", "rounds"), [("lying_donor", 30), ("replay", 10)])
async def test_who_only_disturbs_changes_nothing(kind: str, rounds: int, tmp_path: Path) -> None:
    """Wrong chunks for a newcomer, old messages: refused, and the run goes on."""
    outcome = await outcome_of(kind, tmp_path, rounds)
    assert outcome.loss < 5.0
    assert outcome.credit_kept == 0
