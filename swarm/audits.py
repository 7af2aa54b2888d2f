"""Which contributions are audited, and by whom: drawn from the ledger, so that anyone can draw again.

What is drawn follows from the coordinator's signature of a round's confirmation. Ed25519 signatures are deterministic (RFC 8032),
so the coordinator can't choose; and nobody else knows it before the round's commits are in the ledger. Commits are drawn, whether
they are reported or not: not reporting those that are drawn is no way out.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from swarm.rpc.v1.signed_pb2 import Signed

PASSED, FAILED, WITHHELD, UNABLE = "passed", "failed", "withheld", "unable"
CONVICTED = "convicted"
FINDINGS = (PASSED, FAILED, WITHHELD, UNABLE, CONVICTED)
MOST_AUDITORS = 5
DECIDING = 2
TWICE_OF_256 = 32
MOST_WRONG = 3
PATIENCE_ROUNDS = 3


class Duty(NamedTuple):
    """An audit that somebody is asked for; what it looks at follows from `seed`, 32 bytes."""

    round: int
    peer_id: str
    commit_hash: bytes
    seed: bytes


@dataclass(slots=True)
class Case:
    """A contribution that is being audited, by these auditors one after the other, and what they have found."""

    duty: Duty
    auditors: tuple[str, ...]
    findings: dict[str, str] = field(default_factory=dict)

    def has_turn(self, peer_id: str, newest_round: int) -> bool:
        """Whether an auditor may speak: those before it have, or have been waited for."""
        if peer_id not in self.auditors or peer_id in self.findings:
            return False
        waited = max(0, newest_round - self.duty.round) // PATIENCE_ROUNDS
        return self.auditors.index(peer_id) <= len(self.findings) + waited

    def is_overdue(self, newest_round: int) -> bool:
        """Whether nobody has spoken, and the first auditor isn't waited for any more."""
        return not self.findings and newest_round - self.duty.round >= PATIENCE_ROUNDS

    @property
    def twice(self) -> bool:
        """Whether two have to find nothing wrong; nobody but the coordinator's signature decides which cases these are."""
        return len(self.auditors) >= DECIDING and self.duty.seed[-1:] < bytes([TWICE_OF_256])

    @property
    def wrong(self) -> list[str]:
        """The auditors that said the opposite of what the case came to."""
        opposite = {PASSED: FAILED, FAILED: PASSED}.get(self.outcome)
        return [auditor for auditor, finding in self.findings.items() if finding == opposite]

    @property
    def outcome(self) -> str:
        """`passed`, `failed`, `withheld`, `undecided` when nobody is left to ask, or empty while the case is open.

        A first bad finding is put to a second auditor; two of one kind decide. One that found nothing wrong decides alone, where
        nobody found anything and the case isn't one of those that are looked at twice, to see whether auditors look.
        """
        found = list(self.findings.values())
        failed, withheld, passed = found.count(FAILED), found.count(WITHHELD), found.count(PASSED)
        if failed >= DECIDING:
            return FAILED
        if failed + withheld >= DECIDING:
            return WITHHELD
        if passed >= (DECIDING if failed + withheld or self.twice else 1):
            return PASSED
        return "undecided" if len(found) == len(self.auditors) else ""


def beacon_of(confirmed: Signed) -> bytes:
    """32 bytes that the draw of a confirmed round follows from."""
    return hashlib.blake2b(confirmed.signature, digest_size=32, person=b"swarm.beacon").digest()


def draw_case(
    beacon: bytes, round_index: int, peer_id: str, commit_hash: bytes, rate: float, others: Iterable[str]
) -> Case | None:
    """The case of a contribution, if it is drawn at this rate and there is somebody of another account to look at it."""
    about = hashlib.blake2b(peer_id.encode() + b"/", digest_size=32, key=beacon)
    if int.from_bytes(_draw(about, "audit")[:8], "big") >= rate * 2**64:
        return None
    auditors = [other for _, other in sorted([(_draw(about, other), other) for other in others])[:MOST_AUDITORS]]
    return Case(Duty(round_index, peer_id, commit_hash, _draw(about, "what")), tuple(auditors)) if auditors else None


def _draw(about: hashlib.blake2b, name: str) -> bytes:
    drawn = about.copy()
    drawn.update(name.encode())
    return drawn.digest()


def escape_chance(rate: float, faked: float, rounds: int) -> float:
    """The chance that who fakes a share `faked` of each contribution isn't found out in so many rounds.

    For a key that isn't new, among honest auditors: an audit looks at one piece of the work that nobody chooses, so it meets what
    is faked with that share's chance, and the second auditor looks at the same piece. `bench.audit` measures it.
    """
    return float((1 - rate * faked) ** rounds)
