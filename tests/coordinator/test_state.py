"""Decisions: pure functions of state, event and time."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from coordinator.orders import Orders
from coordinator.presence import Presence, Sighting
from coordinator.state import Admit, Announced, Decision, GrantAsked, Now, Reported, State, decide, parse_version
from swarm.credits import CreditState, fold
from swarm.entries import Claim, Confirmation, Nomination, Permission, open_proposal, open_report
from swarm.identity import Identity
from swarm.messages import payload_hash, seal
from swarm.protocol import Range, Version
from swarm.rpc.v1.coordinator_pb2 import Announcement, GrantRequest
from swarm.rpc.v1.signed_pb2 import Grant, Signed
from tests.world import COORDINATOR, NOW_S, OTHER_ROOT, ROOT, World, entry, identity, manifest

PEERS = [identity(number) for number in range(3)]
ALICE, BOB, CAROL = PEERS
WORLD = World()
NOW = Now(NOW_S, 100.0)


def make_state(*entries: bytes, world: World = WORLD) -> State:
    """A state in which three peers are admitted and nobody was heard since second 0."""
    ledger = [world.opened(), *(world.admitted(peer) for peer in PEERS), *entries]
    return State(world.run_id, world.manifest, fold(ledger, COORDINATOR.peer_id), Presence(45.0, 0.0))


def announced(peer: Identity, world: World = WORLD, now_s: float = NOW_S, **changes: object) -> Announced:
    """An announcement as an event."""
    signed = world.announcement(peer, now_s, **changes)
    return Announced(peer.peer_id, Announcement.FromString(signed.payload), payload_hash(signed))


def reported(report: Signed, proposal: Signed | None = None) -> Reported:
    """A report as an event."""
    nomination = None if proposal is None else open_proposal(proposal)
    return Reported(open_report(report), report, nomination, proposal)


def asked(peer: Identity, number: int = 1, **changes: Any) -> GrantAsked:
    """A request for a grant as an event."""
    roster = changes.pop("members", PEERS)
    signed = WORLD.grant_request(peer, number, roster, **changes)
    return GrantAsked(peer.peer_id, GrantRequest.FromString(signed.payload))


def kinds(decision: Decision) -> list[type]:
    """The types of what is to be appended."""
    return [type(item) for item in decision.append]


def test_open_run_admits_a_key_once() -> None:
    """A new key is admitted with a ledger entry, a known one without."""
    new = identity(9).peer_id
    assert decide(make_state(), announced(identity(9)), NOW) == Decision(True, "admitted", append=(Admit(new, new),))
    assert decide(make_state(), announced(ALICE), NOW) == Decision(True, "renewed")


def test_allow_list() -> None:
    """A run with an allow list admits nobody else."""
    world = World(manifest(admission={"kind": "allow_list", "allow": [identity(9).peer_id]}))
    state = State(world.run_id, world.manifest, fold([world.opened()], COORDINATOR.peer_id), Presence(45.0, 0.0))
    assert decide(state, announced(identity(9), world), NOW).reason == "admitted"
    assert decide(state, announced(ALICE, world), NOW).reason == "not_on_allow_list"


def test_announcements_are_fresh() -> None:
    """A wrong clock is told by how much."""
    decision = decide(make_state(), announced(ALICE, now_s=NOW_S - 901), NOW)
    assert (decision.accepted, decision.reason, decision.detail) == (False, "stale", "901 s behind the coordinator")


def test_old_clients_are_sent_away() -> None:
    """A client older than the manifest asks for is refused, and one that says nothing, too."""
    world = World(manifest(min_client_version="1.2.3"))
    state = make_state(world=world)
    for version, reason in (
        ("1.2.2", "version_too_old"),
        ("", "version_too_old"),
        ("1.2.3", "renewed"),
        ("1.10.0rc1", "renewed"),
    ):
        assert decide(state, announced(ALICE, world, client_version=version), NOW).reason == reason
    assert parse_version("nonsense") == (0, 0, 0)


def test_addresses_are_bounded() -> None:
    """Nobody can fill the coordinator's memory with addresses."""
    assert decide(make_state(), announced(ALICE, addresses=["x"] * 17), NOW).reason == "too_large"
    assert decide(make_state(), announced(ALICE, addresses=["x" * 513]), NOW).reason == "too_large"


def test_first_report_brings_the_proposal() -> None:
    """The first report appends proposal and report, the next one the report, and the majority's the confirmation."""
    proposal, reports = WORLD.round(PEERS, 0)
    first = decide(make_state(), reported(reports[0], proposal), NOW)
    assert (first.reason, kinds(first)) == ("accepted", [Nomination, Claim])
    state = make_state(entry(proposed=proposal), entry(reported=reports[0]))
    second = decide(state, reported(reports[1], proposal), NOW)
    assert (second.reason, kinds(second)) == ("confirmed", [Claim, Confirmation])
    confirmed = make_state(
        *(entry(reported=r) if r else entry(proposed=proposal) for r in (None, *reports[:2])), WORLD.confirmed(0, proposal)
    )
    late = decide(confirmed, reported(reports[2]), NOW)
    assert (late.reason, kinds(late)) == ("accepted", [Claim])


def test_a_confirmation_names_the_operators_audit_rate() -> None:
    """So that everybody draws the same audits from the ledger alone."""
    proposal, reports = WORLD.round([ALICE], 0)
    for orders, rate in ((Orders(), 0.0), (Orders(audit_rate=0.2), 0.2)):
        decision = decide(replace(make_state(), orders=orders), reported(reports[0], proposal), NOW)
        assert cast("Confirmation", decision.append[-1]).audit_rate == rate


def test_lone_peer_confirms_itself() -> None:
    """In a round of one peer its own report is the majority."""
    proposal, reports = WORLD.round([ALICE], 0)
    decision = decide(make_state(), reported(reports[0], proposal), NOW)
    assert kinds(decision) == [Nomination, Claim, Confirmation]


def test_report_without_proposal() -> None:
    """A report whose proposal nobody has sent, or that comes with another one, is refused."""
    proposal, reports = WORLD.round(PEERS, 0)
    other = WORLD.proposal(BOB, 0, [WORLD.commit(BOB, 0)])
    assert decide(make_state(), reported(reports[0]), NOW).reason == "unknown_proposal"
    assert decide(make_state(), reported(reports[0], other), NOW).reason == "unknown_proposal"
    assert proposal != other


def test_duplicates_append_nothing() -> None:
    """The same report again is accepted without an entry."""
    proposal, reports = WORLD.round(PEERS, 0)
    state = make_state(entry(proposed=proposal), entry(reported=reports[0]))
    assert decide(state, reported(reports[0], proposal), NOW) == Decision(True, "duplicate")


def after_round_zero(*more: bytes) -> State:
    """A state in which Alice has reported round 0 with a next roster of all three."""
    proposal, reports = WORLD.round(PEERS, 0)
    return make_state(entry(proposed=proposal), entry(reported=reports[0]), *more)


def test_grant_when_all_others_are_silent() -> None:
    """Whoever is left of the roster may go on once everyone else was silent long enough."""
    decision = decide(after_round_zero(), asked(ALICE), NOW)
    assert kinds(decision) == [Permission]
    assert decision.append[0].present == (ALICE.peer_id,)


def test_no_grant_while_others_live() -> None:
    """As long as anyone else of the roster may be alive there is no grant, and it says who and when to ask again."""
    state = after_round_zero()
    state.presence.announced(Sighting(BOB.peer_id, (), 0, 95.0), 1, b"")
    decision = decide(state, asked(ALICE), NOW)
    assert (decision.accepted, decision.reason, decision.detail) == (False, "others_alive", BOB.peer_id)
    assert decision.retry_after_s > 0
    both = asked(ALICE, present=[ALICE.peer_id, BOB.peer_id])
    assert decide(state, both, NOW).reason == "granted"
    assert decide(after_round_zero(), asked(ALICE), Now(NOW_S, 10.0)).reason == "others_alive"


def test_one_grant_per_round() -> None:
    """The same request gets the same grant; another part of the roster, or another state, gets none."""
    grant = Grant(run_id=WORLD.run_id, round=1, base_root=ROOT, peer_id=ALICE.peer_id, present=[ALICE.peer_id])
    state = after_round_zero(entry(granted=seal(COORDINATOR, grant)))
    assert decide(state, asked(ALICE), NOW) == Decision(True, "duplicate")
    assert decide(state, asked(BOB), NOW).reason == "already_granted"
    assert decide(state, asked(ALICE, base_root=OTHER_ROOT), NOW).reason == "already_granted"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"present": []}, "not_in_roster"),
        ({"present": [ALICE.peer_id, "stranger"]}, "not_in_roster"),
        ({"members": [ALICE]}, "wrong_roster"),
        ({"issued_at": 1}, "stale"),
        ({"number": 7}, "roster_unknown"),
    ],
)
def test_grant_requests_are_checked(changes: dict[str, object], reason: str) -> None:
    """A stale request, a made-up roster and an unknown one get no grant."""
    assert decide(after_round_zero(), asked(ALICE, **changes), NOW).reason == reason


def test_no_grant_for_a_confirmed_round() -> None:
    """A round that the majority completed needs no grant."""
    proposal, reports = WORLD.round(PEERS, 0)
    state = make_state(entry(proposed=proposal), *(entry(reported=r) for r in reports), WORLD.confirmed(0, proposal))
    assert decide(state, asked(ALICE, 0), NOW).reason == "round_closed"


@settings(max_examples=40, suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(st.data())
def test_decisions_always_fold(data: st.DataObject) -> None:
    """Whatever comes in which order, what is decided can be appended, and deciding changes nothing."""
    credits_state: CreditState = make_state().credits
    state = State(WORLD.run_id, WORLD.manifest, credits_state, Presence(45.0, 0.0))
    rounds = [WORLD.round(PEERS, number, root=root) for number in range(3) for root in (ROOT, OTHER_ROOT)]
    for _ in range(data.draw(st.integers(1, 12))):
        proposal, reports = data.draw(st.sampled_from(rounds))
        event = reported(data.draw(st.sampled_from(reports)), data.draw(st.sampled_from([proposal, None])))
        size = credits_state.size
        decision = decide(state, event, NOW)
        assert credits_state.size == size
        assert decision == decide(state, event, NOW)
        for opened in decision.append:
            credits_state.apply(opened)


def test_peers_of_other_protocols_are_sent_away() -> None:
    """Before anything is written, and told which side has to be updated; who says nothing speaks the first protocol."""
    served = Range(Version(1, 1), Version(2, 0))
    state = replace(make_state(), spoken=served)
    for spoken, reason in (
        (None, "protocol_too_old"),
        (Range(Version(1, 0), Version(1, 0)), "protocol_too_old"),
        (Range(Version(1, 0), Version(1, 1)), "renewed"),
        (Range(Version(2, 0), Version(9, 9)), "renewed"),
        (Range(Version(2, 1), Version(9, 9)), "protocol_too_new"),
        (Range(Version(3, 0), Version(2, 0)), "malformed"),
        (Range(Version(0, 0), Version(2, 0)), "malformed"),
    ):
        decision = decide(state, announced(ALICE, protocol=spoken.message if spoken else None), NOW)
        assert (decision.reason, decision.append) == (reason, ())
    assert decide(make_state(), announced(ALICE), NOW).reason == "renewed"
