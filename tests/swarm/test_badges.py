"""Badges follow from the ledger alone, and from nothing that somebody says about himself."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarm.badges import KINDS, Badge, Deeds, badges_of
from swarm.credit_records import FLOPS_PER_CREDIT
from swarm.credits import fold, verify_ledger
from tests.world import COORDINATOR, FLOPS_PER_TOKEN, SEQUENCE_LENGTH, World, identity

PEERS = [identity(number) for number in range(3)]
DEEDS = st.builds(
    Deeds, st.integers(0, 10**25), st.integers(0, 10**6), st.none() | st.integers(0, 50), *[st.integers(0, 5000)] * 3
)


def names(deeds: Deeds) -> dict[str, int]:
    return {badge.name: badge.level for badge in badges_of(deeds)}


@pytest.mark.parametrize(
    ("deeds", "expected"),
    [
        (Deeds(), {}),
        (Deeds(first=9), {"pioneer": 10}),
        (Deeds(first=10), {}),
        (Deeds(rounds=9), {}),
        (Deeds(rounds=10), {"regular": 10}),
        (Deeds(rounds=999), {"regular": 100}),
        (Deeds(earned_flops=FLOPS_PER_CREDIT - 1), {}),
        (Deeds(earned_flops=100 * FLOPS_PER_CREDIT), {"lifter": 100}),
        (Deeds(vouched=10), {"proven": 10}),
        (Deeds(audits=1), {"auditor": 1}),
        (Deeds(caught=1), {"watchdog": 1}),
    ],
)
def test_each_badge_has_its_level(deeds: Deeds, expected: dict[str, int]) -> None:
    """One less isn't enough."""
    assert names(deeds) == expected


@given(DEEDS)
def test_who_has_a_suspended_key_has_none(deeds: Deeds) -> None:
    """Whatever else the account has done."""
    assert badges_of(deeds._replace(is_suspended=True)) == []


@given(DEEDS, DEEDS)
def test_more_deeds_never_cost_a_badge(one: Deeds, other: Deeds) -> None:
    """Who has done at least as much of everything has at least the same badges, at least at the same levels."""
    firsts = [each.first for each in (one, other) if each.first is not None]
    most = Deeds(*[max(each or 0, its or 0) for each, its in zip(one, other, strict=True)])
    both = most._replace(first=min(firsts, default=None), is_suspended=False)
    assert names(one).keys() <= names(both).keys()
    assert all(names(both)[name] >= level for name, level in names(one).items())


def test_every_level_has_a_rule_in_words() -> None:
    """The rule names the level, levels rise, and no two kinds share a name."""
    for kind in KINDS:
        assert list(kind.levels) == sorted(set(kind.levels))
        for level in kind.levels:
            assert f"{level:,}" in kind.at(level).rule
    assert len({kind.name for kind in KINDS}) == len(KINDS)


def test_anyone_who_has_the_ledger_has_the_badges() -> None:
    """A stranger that checks every signature finds what the coordinator shows."""
    world = World()
    entries = world.ledger(PEERS, 12)
    mine, theirs = fold(entries, COORDINATOR.peer_id), verify_ledger(entries, COORDINATOR.peer_id)
    for peer in PEERS:
        deeds = mine.deeds(world.run_id, peer.peer_id)
        assert deeds == theirs.deeds(world.run_id, peer.peer_id)
        assert deeds == Deeds(12 * 4 * SEQUENCE_LENGTH * FLOPS_PER_TOKEN, rounds=12, first=0)
        assert badges_of(deeds) == [
            Badge("pioneer", "Pioneer", 10, "It earned in one of the first 10 rounds that were confirmed."),
            Badge("regular", "Regular", 10, "It earned for at least 10 contributions, each in one round."),
            Badge("lifter", "Lifter", 1, "Its verified and final credits come to at least 1."),
        ]
    assert mine.deeds(world.run_id, "nobody") == Deeds()


def test_the_rules_in_the_documents_are_those_of_the_code() -> None:
    """docs/protocol.md has a line for each kind, with its rule and its levels."""
    text = (Path(__file__).resolve().parents[2] / "docs" / "protocol.md").read_text()
    for kind in KINDS:
        levels = ", ".join(f"{level:,}" for level in kind.levels)
        assert f"| {kind.title} | {kind.rule.replace('{level:,}', 'N')} | {levels} |\n" in text
