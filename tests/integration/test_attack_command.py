"""`swarm attack` with real peers."""

from __future__ import annotations

import json

import pytest

from tests.runs import run_command

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]


async def test_an_attacker_that_nobody_can_decode_is_convicted() -> None:
    """One of three commits to rubbish: it is proven guilty in the first round, earns nothing, and the others agree."""
    arguments = ("--kind", "nan", "--attackers", "1", "--peers", "3", "--rounds", "6", "--json")
    outcome = await run_command("attack", *arguments, timeout_s=300)
    assert outcome.code == 0, outcome.err
    found = json.loads(outcome.out)
    assert (found["convicted"], found["detected_after_rounds"], found["honest_accused"]) == (1, 1, 0)
    assert found["credit_kept"] == 0
    assert found["roots_agree"]


async def test_an_attacker_whose_work_isnt_what_it_sends_is_suspended() -> None:
    """One of four sends the opposite of its update: two auditors find it, and it keeps nothing."""
    arguments = ("--kind", "sign_flip", "--attackers", "1", "--peers", "4", "--rounds", "10", "--json")
    outcome = await run_command("attack", *arguments, timeout_s=300)
    assert outcome.code == 0, outcome.err
    found = json.loads(outcome.out)
    assert (found["convicted"], found["honest_accused"]) == (1, 0)
    assert found["detected_after_rounds"] <= 8
    assert found["credit_kept"] == 0
    assert found["roots_agree"]


async def test_what_cant_be_attacked() -> None:
    """Unknown kinds, and swarms without anybody honest."""
    assert "sign_flip" in (await run_command("attack", "--kind", "list")).out
    for arguments in (
        ("--kind", "curse"),
        ("--kind", "nan", "--attackers", "3", "--peers", "3"),
        ("--kind", "nan", "--merge", "x"),
    ):
        assert (await run_command("attack", *arguments)).code == 2
