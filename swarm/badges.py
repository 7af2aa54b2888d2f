"""Badges: what an account is honoured for, as a pure function of what the ledger says about it.

Whoever folds the ledger (`swarm.credits`) gets the same `Deeds`, and so the same badges: `swarm ledger verify` prints them.
An account of which a key was suspended by audits has none.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from swarm.credit_records import FLOPS_PER_CREDIT


class Deeds(NamedTuple):
    """What the ledger says of an account, as far as badges go by it."""

    earned_flops: int = 0
    rounds: int = 0
    first: int | None = None
    """The place, among all confirmed rounds, of the earliest that it has earned in, from 0 on."""
    audits: int = 0
    """Findings of its keys that were what the audit came to."""
    caught: int = 0
    """Those of them that got a key suspended."""
    vouched: int = 0
    """Contributions of its keys whose audit came to `passed`."""
    is_suspended: bool = False


class Badge(NamedTuple):
    """One badge at the highest level that was reached."""

    name: str
    title: str
    level: int
    rule: str


class Kind(NamedTuple):
    """A badge with its levels, which rise; `rule` says in words what `reaches` decides."""

    name: str
    title: str
    rule: str
    levels: tuple[int, ...]
    reaches: Callable[[Deeds, int], bool]

    def at(self, level: int) -> Badge:
        """The badge of one level."""
        return Badge(self.name, self.title, level, self.rule.format(level=level))


KINDS = (
    Kind(
        "pioneer",
        "Pioneer",
        "It earned in one of the first {level:,} rounds that were confirmed.",
        (10,),
        lambda deeds, level: deeds.first is not None and deeds.first < level,
    ),
    Kind(
        "regular",
        "Regular",
        "It earned for at least {level:,} contributions, each in one round.",
        (10, 100, 1000, 10_000),
        lambda deeds, level: deeds.rounds >= level,
    ),
    Kind(
        "lifter",
        "Lifter",
        "Its verified and final credits come to at least {level:,}.",
        (1, 100, 10_000, 1_000_000),
        lambda deeds, level: deeds.earned_flops >= level * FLOPS_PER_CREDIT,
    ),
    Kind(
        "proven",
        "Proven",
        "At least {level:,} of its contributions were audited, and the audits came to `passed`.",
        (1, 10, 100, 1000),
        lambda deeds, level: deeds.vouched >= level,
    ),
    Kind(
        "auditor",
        "Auditor",
        "At least {level:,} findings of its keys were what the audit came to, `passed` or `failed`.",
        (1, 10, 100, 1000),
        lambda deeds, level: deeds.audits >= level,
    ),
    Kind(
        "watchdog",
        "Watchdog",
        "At least {level:,} findings of its keys were among those by which an audit came to `failed`.",
        (1, 10),
        lambda deeds, level: deeds.caught >= level,
    ),
)


def badges_of(deeds: Deeds) -> list[Badge]:
    """The badges that an account has, each at its highest level."""
    if deeds.is_suspended:
        return []
    found = []
    for kind in KINDS:
        reached = [level for level in kind.levels if kind.reaches(deeds, level)]
        if reached:
            found.append(kind.at(reached[-1]))
    return found
