"""Tokens: who may take part, checked without asking anybody."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from peer import admissions as module
from peer.admissions import CLOCK_SLACK_S, Admissions
from swarm.errors import Rejected
from swarm.identity import Identity
from swarm.messages import seal
from swarm.protocol import OURS, SILENT, Range, Version
from swarm.rpc.v1.signed_pb2 import AdmissionToken, Signed
from tests.world import COORDINATOR, World, identity

RUN = World().run_id
ALICE, BOB = identity(1), identity(2)


@dataclass
class Time:
    """A clock that a test moves."""

    now_s: float = 1_000_000.0

    def wall_s(self) -> float:
        return self.now_s

    def monotonic_s(self) -> float:
        return self.now_s


def token(
    peer: Identity,
    lasts_s: float = 3600,
    signer: Identity = COORDINATOR,
    run_id: bytes = RUN,
    newcomer: bool = False,
    spoken: Range | None = None,
) -> Signed:
    message = AdmissionToken(
        run_id=run_id,
        peer_id=peer.peer_id,
        expires_at=int(Time().now_s + lasts_s),
        newcomer=newcomer,
        protocol=spoken.message if spoken is not None else None,
    )
    return seal(signer, message)


def admissions(time: Time | None = None, spoken: Range = OURS) -> Admissions:
    return Admissions(RUN, COORDINATOR.peer_id, time or Time(), spoken)


def test_a_token_admits_its_holder_until_it_expires() -> None:
    """A valid token counts for the key that it names, with a quarter of an hour's grace for wrong clocks."""
    time = Time()
    known = admissions(time)
    assert not known.is_admitted(ALICE.peer_id)
    assert known.admit(token(ALICE)) == ALICE.peer_id
    assert known.is_admitted(ALICE.peer_id)
    assert not known.is_admitted(BOB.peer_id)
    time.now_s += 3600 + CLOCK_SLACK_S - 1
    assert known.is_admitted(ALICE.peer_id)
    time.now_s += 2
    assert not known.is_admitted(ALICE.peer_id)


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        (token(ALICE, signer=ALICE), "wrong_signer"),
        (token(ALICE, run_id=b"\x01" * 32), "wrong_run"),
        (token(ALICE, lasts_s=-CLOCK_SLACK_S - 10), "admission_expired"),
        (Signed(), "wrong_kind"),
    ],
)
def test_other_tokens_admit_nobody(wrong: Signed, reason: str) -> None:
    """Tokens that the coordinator didn't sign, of another run, or expired, are rejected by their reason."""
    known = admissions()
    with pytest.raises(Rejected, match=reason):
        known.admit(wrong)
    assert not known.check(ALICE.peer_id, wrong)
    assert not known.is_admitted(ALICE.peer_id)


def test_a_newcomer_is_one_until_it_shows_a_newer_token() -> None:
    """The newest token counts, whatever comes in whichever order; a bad one takes nothing from who is admitted."""
    known = admissions()
    assert not known.is_newcomer(ALICE.peer_id)
    assert known.check(ALICE.peer_id, token(ALICE, 3600, newcomer=True))
    assert known.is_newcomer(ALICE.peer_id)
    assert known.check(ALICE.peer_id, token(ALICE, 3700))
    assert not known.is_newcomer(ALICE.peer_id)
    assert known.check(ALICE.peer_id, token(ALICE, 3600, newcomer=True))
    assert known.check(ALICE.peer_id, token(ALICE, 3800, signer=ALICE, newcomer=True))
    assert not known.is_newcomer(ALICE.peer_id)


def test_nobody_is_admitted_by_anothers_token() -> None:
    """Whoever shows a token must be the one whom it names."""
    known = admissions()
    assert not known.check(BOB.peer_id, token(ALICE))
    assert not known.check(BOB.peer_id, None)
    assert known.check(ALICE.peer_id, token(ALICE))
    assert known.check(ALICE.peer_id, None)


def test_the_longer_token_is_kept() -> None:
    """A replayed older token doesn't shorten an admission."""
    known = admissions()
    long, short = token(ALICE, 7200), token(ALICE, 60)
    known.admit(long)
    known.admit(short)
    assert known.token(ALICE.peer_id) == long
    assert known.token(BOB.peer_id) is None


def test_expired_tokens_make_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """The table is bounded: expired tokens go first, and without any the newcomer is told to come back."""
    monkeypatch.setattr(module, "MAX_TOKENS", 3)
    time = Time()
    known = admissions(time)
    for number in range(10, 13):
        known.admit(token(identity(number), 60))
    with pytest.raises(Rejected, match="busy"):
        known.admit(token(ALICE, 10**6))
    time.now_s += 60 + CLOCK_SLACK_S + 1
    known.admit(token(ALICE, 10**6))
    assert known.is_admitted(ALICE.peer_id)


def test_a_known_peer_renews_even_when_the_table_is_full(monkeypatch: pytest.MonkeyPatch) -> None:
    """A full table keeps newcomers out, not those who are in it."""
    monkeypatch.setattr(module, "MAX_TOKENS", 1)
    known = admissions()
    known.admit(token(ALICE, 60))
    known.admit(token(ALICE, 7200))
    with pytest.raises(Rejected, match="busy"):
        known.admit(token(BOB))


FIRST = Range(Version(1, 0), Version(1, 9))
SECOND = Range(Version(2, 0), Version(2, 1))
BOTH = Range(Version(1, 5), Version(2, 0))


def test_who_speaks_another_protocol_is_not_let_in() -> None:
    """By the range that the coordinator vouches for; a token of before that says nothing of it is of the first protocol."""
    with pytest.raises(Rejected, match="protocol_too_new") as caught:
        admissions(spoken=FIRST).require(ALICE.peer_id, token(ALICE, spoken=SECOND), "sync")
    assert caught.value.sender == ALICE.peer_id
    with pytest.raises(Rejected, match="protocol_too_old"):
        admissions(spoken=SECOND).require(ALICE.peer_id, token(ALICE), "sync")
    with pytest.raises(Rejected, match="not_admitted"):
        admissions(spoken=SECOND).require(BOB.peer_id, token(ALICE), "sync")
    admissions(spoken=FIRST).require(ALICE.peer_id, token(ALICE), "sync")
    admissions(spoken=SECOND).require(ALICE.peer_id, token(ALICE, spoken=BOTH), "sync")


def test_who_comes_back_with_another_protocol_is_out() -> None:
    """The newest token counts: the older one, of before the update, doesn't help."""
    known = admissions(spoken=FIRST)
    assert known.check(ALICE.peer_id, token(ALICE, 3600, spoken=SILENT))
    assert not known.check(ALICE.peer_id, token(ALICE, 3700, spoken=SECOND))
    assert not known.is_admitted(ALICE.peer_id)


def test_a_joiner_has_to_get_on_with_the_whole_roster() -> None:
    """A leader that speaks both doesn't bring together members who couldn't read each other's messages."""
    leader = admissions(spoken=Range(Version(1, 0), Version(2, 1)))
    carol, nobody = identity(3), identity(9)
    for peer, spoken in ((BOB, FIRST), (ALICE, SECOND), (carol, BOTH)):
        leader.admit(token(peer, spoken=spoken))
    with pytest.raises(Rejected, match="protocol_too_new"):
        leader.fit(ALICE.peer_id, (BOB.peer_id,))
    leader.fit(ALICE.peer_id, (carol.peer_id,))
    leader.fit(carol.peer_id, (BOB.peer_id, nobody.peer_id))
    with pytest.raises(Rejected, match="protocol_too_new"):
        leader.fit(ALICE.peer_id, (carol.peer_id, BOB.peer_id))
