"""Who is audited by whom, and what their findings do to credit: from the ledger alone."""

from __future__ import annotations

import math
from itertools import combinations

import pytest

from swarm.audits import (
    FAILED,
    MOST_AUDITORS,
    MOST_WRONG,
    PASSED,
    UNABLE,
    WITHHELD,
    Case,
    Duty,
    beacon_of,
    draw_case,
    escape_chance,
)
from swarm.credit_snapshot import dump, load
from swarm.credits import CreditState, apply_entry, fold
from swarm.errors import LedgerInvalid
from swarm.explain import REASONS, explain
from swarm.identity import Identity
from swarm.messages import seal
from swarm.rpc.v1.ledger_pb2 import RoundConfirmed
from swarm.rpc.v1.signed_pb2 import Signed
from tests.world import COORDINATOR, FLOPS_PER_TOKEN, SEQUENCE_LENGTH, World, entry, identity, manifest

WORLD = World(manifest(audit={"rate": 0.0, "first": 2, "within_rounds": 4}))
PEERS = [identity(number) for number in range(6)]
CHEAT = PEERS[0]
START = [WORLD.opened(), *(WORLD.admitted(peer) for peer in PEERS)]
FLOPS = 4 * SEQUENCE_LENGTH * FLOPS_PER_TOKEN
BEACON, ONCE, TWICE = bytes(range(32)), b"\xff" * 32, bytes(32)


def commit(number: int, peer: Identity = CHEAT) -> Signed:
    return WORLD.commit(peer, number)


def a_round(number: int, reporting: list[Identity] = PEERS, audit_rate: float = 0.0) -> list[bytes]:
    """A confirmed round of all peers, of which some report."""
    commits = [WORLD.commit(peer, number) for peer in PEERS]
    proposal = WORLD.proposal(PEERS[0], number, commits)
    pairs = [(peer, its) for peer, its in zip(PEERS, commits, strict=True) if peer in reporting]
    reports = [entry(reported=WORLD.report(peer, its, proposal)) for peer, its in pairs]
    return [entry(proposed=proposal), *reports[:4], WORLD.confirmed(number, proposal, audit_rate=audit_rate), *reports[4:]]


def after(*entries: bytes) -> CreditState:
    return fold([*START, *entries], COORDINATOR.peer_id)


def auditors(state: CreditState, number: int = 0, about: Identity = CHEAT, world: World = WORLD) -> list[Identity]:
    """Who has a turn now."""
    asked = [(peer, state.duties(world.run_id, peer.peer_id)) for peer in PEERS]
    return [peer for peer, duties in asked if any((duty.round, duty.peer_id) == (number, about.peer_id) for duty in duties)]


def verdicts(entries: list[bytes], *findings: str, number: int = 0) -> list[bytes]:
    """The entries with these findings of the auditors whose turn it is, one after the other."""
    for finding in findings:
        (auditor,) = auditors(after(*entries), number)
        entries = [*entries, WORLD.audited(auditor, commit(number), finding, reason="leaf")]
    return entries


def earned(state: CreditState, peer: Identity = CHEAT) -> tuple[int, int, int]:
    balance = state.balance(WORLD.run_id, peer.peer_id)
    return balance.pending_flops // FLOPS, balance.verified_flops // FLOPS, balance.final_flops // FLOPS


def refused(*entries: bytes) -> str:
    """Why the last entry is refused."""
    state = after(*entries[:-1])
    with pytest.raises(LedgerInvalid) as caught:
        apply_entry(state, len(START) + len(entries) - 1, entries[-1])
    return caught.value.message.split(": ")[1]


def test_a_new_keys_first_contributions_are_all_audited() -> None:
    """By somebody else each, one auditor at a time; later ones at the manifest's rate, which is none here."""
    rounds = [*a_round(0), *a_round(1), *a_round(2)]
    for number, asked in ((0, 1), (1, 1), (2, 0)):
        for peer in PEERS:
            found = auditors(after(*rounds), number, peer)
            assert len(found) == asked
            assert peer not in found


def test_the_operator_may_have_more_audited() -> None:
    """The confirmation names the rate for its round alone; one that is no share is no confirmation."""
    rounds = [*a_round(0), *a_round(1), *a_round(2, audit_rate=1.0), *a_round(3)]
    for number, asked in ((2, 1), (3, 0)):
        assert [len(auditors(after(*rounds), number, peer)) for peer in PEERS] == [asked] * len(PEERS)
    for rate in (-0.1, 1.5, math.nan):
        *before, confirmation, _, _ = a_round(0, audit_rate=rate)
        assert refused(*before, confirmation) == "malformed"


def test_a_newcomer_is_one_while_everything_is_audited() -> None:
    """Confirmed contributions count, not reports; a key that isn't admitted yet has none."""
    rounds = [a_round(0), a_round(1)]
    for count, newcomer in ((0, True), (1, True), (2, False)):
        state = after(*(each for entries in rounds[:count] for each in entries))
        assert {state.is_newcomer(WORLD.run_id, peer.peer_id) for peer in PEERS} == {newcomer}
        assert state.is_newcomer(WORLD.run_id, identity(9).peer_id)
    unaudited = World(manifest(audit={"rate": 0.0, "first": 0}))
    state = fold([unaudited.opened(), unaudited.admitted(CHEAT)], COORDINATOR.peer_id)
    assert not state.is_newcomer(unaudited.run_id, CHEAT.peer_id)


def test_what_is_drawn_keeps_its_rate_and_its_auditors_differ() -> None:
    """A twentieth of many contributions, and no auditor much more often than another."""
    names = [peer.peer_id for peer in PEERS]
    cases = [draw_case(number.to_bytes(32, "big"), number, "me", b"", 0.05, names) for number in range(4000)]
    drawn = [case for case in cases if case is not None]
    assert 140 <= len(drawn) <= 260
    firsts = [case.auditors[0] for case in drawn]
    assert min(map(firsts.count, names)) > len(drawn) / 12
    assert all(len(case.auditors) == min(len(names), MOST_AUDITORS) for case in drawn)
    assert len({case.duty.seed for case in drawn}) == len(drawn)
    assert draw_case(BEACON, 1, "me", b"", 1.0, []) is None


def test_the_beacon_is_the_confirmations_signature() -> None:
    """The same confirmation gives the same draw, whoever asks; another round another one."""
    first, again, other = (
        seal(COORDINATOR, RoundConfirmed(run_id=WORLD.run_id, round=number, state_root=b"r" * 32)) for number in (1, 1, 2)
    )
    assert beacon_of(first) == beacon_of(again) != beacon_of(other)


def test_one_that_finds_nothing_wrong_decides() -> None:
    """The case is closed, and the credit becomes final in its time."""
    entries = verdicts(a_round(0), PASSED)
    assert auditors(after(*entries)) == []
    rounds = [each for number in range(1, 5) for each in a_round(number)]
    assert earned(after(*entries, *rounds)) == (0, 4, 1)


def test_two_that_find_it_wrong_take_all_that_isnt_final_and_suspend_the_key() -> None:
    """Also what is reported later; the others keep theirs, and the key gets no admission."""
    entries = verdicts([*a_round(0), *a_round(1)], FAILED)
    assert earned(after(*entries)) == (0, 2, 0)
    entries = verdicts(entries, FAILED)
    state = after(*entries)
    assert earned(state) == (0, 0, 0)
    assert earned(state, PEERS[1]) == (0, 2, 0)
    assert state.suspended(WORLD.run_id) == {CHEAT.peer_id: "leaf"}
    assert auditors(state, 1) == []
    assert [balance.peer_id for balance in state.leaderboard(WORLD.run_id, 3)] != []
    proposal, reports = WORLD.round(PEERS, 2)
    assert refused(*entries, entry(proposed=proposal), entry(reported=reports[0])) == "suspended"


def test_a_first_bad_finding_alone_does_nothing() -> None:
    """Two good ones outweigh it."""
    entries = verdicts(a_round(0), FAILED, PASSED)
    assert len(auditors(after(*entries))) == 1
    state = after(*verdicts(entries, PASSED))
    assert auditors(state) == []
    assert earned(state) == (0, 1, 0)
    assert state.suspended(WORLD.run_id) == {}


def test_what_isnt_shown_earns_nothing_and_suspends_nobody() -> None:
    """Not serving auditors is no way out, and no crime."""
    state = after(*verdicts([*a_round(0), *a_round(1)], WITHHELD, WITHHELD))
    assert earned(state) == (0, 1, 0)
    assert state.suspended(WORLD.run_id) == {}
    assert earned(after(*verdicts(a_round(0), FAILED, WITHHELD))) == (0, 0, 0)


def test_a_report_that_comes_after_its_contribution_was_voided_earns_nothing() -> None:
    """Commits are audited whether they are reported or not."""
    entries = verdicts(a_round(0, PEERS[1:]), WITHHELD, WITHHELD)
    commits = [WORLD.commit(peer, 0) for peer in PEERS]
    late = entry(reported=WORLD.report(CHEAT, commits[0], WORLD.proposal(PEERS[0], 0, commits)))
    assert earned(after(*entries, late)) == (0, 0, 0)


def test_auditors_that_cant_look_pass_it_on() -> None:
    """Until nobody is left, and then the contribution stands."""
    entries = verdicts(a_round(0), *[UNABLE] * 5)
    assert auditors(after(*entries)) == []
    assert earned(after(*entries)) == (0, 1, 0)


def test_an_auditor_that_says_nothing_is_waited_for_three_rounds() -> None:
    """Then the next has its turn, too."""
    rounds = [each for number in range(4) for each in a_round(number)]
    assert len(auditors(after(*rounds[:-7]))) == 1
    assert len(auditors(after(*rounds))) == 2


def test_open_and_overdue_audits_are_counted() -> None:
    """Six a round of new keys; those that nobody has spoken about in three rounds are overdue, decided ones are neither."""
    assert after(*a_round(0)).open_audits(WORLD.run_id) == (6, 0)
    assert after(*a_round(0)).drawn_audits(WORLD.run_id, 0) == 6
    assert after(*verdicts(a_round(0), PASSED)).open_audits(WORLD.run_id) == (5, 0)
    waited = [each for number in range(1, 4) for each in a_round(number)]
    assert after(*a_round(0), *waited).open_audits(WORLD.run_id) == (12, 6)
    assert after(*verdicts(a_round(0), FAILED), *waited).open_audits(WORLD.run_id) == (12, 5)


def test_an_audit_ends_when_the_credit_becomes_final() -> None:
    """What wasn't found wrong in time stands."""
    rounds = [each for number in range(5) for each in a_round(number)]
    (auditor, *_) = auditors(after(*a_round(0)))
    assert refused(*rounds, WORLD.audited(auditor, commit(0), FAILED)) == "no_audit"


def test_who_wasnt_drawn_has_no_say() -> None:
    """Nor has anybody twice, nor about another commit, nor with an unknown word."""
    entries = a_round(0)
    (auditor,) = auditors(after(*entries))
    stranger = next(peer for peer in PEERS[1:] if peer is not auditor)
    assert refused(*entries, WORLD.audited(stranger, commit(0), FAILED)) == "not_an_auditor"
    assert refused(*entries, WORLD.audited(CHEAT, commit(0))) == "not_an_auditor"
    assert refused(*entries, WORLD.audited(auditor, WORLD.commit(CHEAT, 0, 5))) == "no_audit"
    assert refused(*entries, WORLD.audited(auditor, commit(0), "fine")) == "malformed"
    once = WORLD.audited(auditor, commit(0), UNABLE)
    assert refused(*entries, once, once) == "not_an_auditor"


def test_keys_of_one_account_dont_audit_each_other() -> None:
    """Whoever holds one of them holds them all."""
    alone = World(manifest(audit={"rate": 1.0, "first": 0}))
    peers = PEERS[:1]
    proposal, (report,) = alone.round(peers, 0)
    entries = [alone.opened(), alone.admitted(peers[0]), entry(proposed=proposal), entry(reported=report)]
    state = fold([*entries, alone.confirmed(0, proposal)], COORDINATOR.peer_id)
    assert state.duties(alone.run_id, peers[0].peer_id) == []


def convicted(*accusers: Identity, about: Identity = CHEAT) -> list[bytes]:
    """What holders of a proof tell the ledger."""
    return [WORLD.audited(peer, commit(0, about), "convicted", reason="wrong_merge") for peer in accusers]


def test_a_majority_that_holds_proof_of_a_fraud_suspends() -> None:
    """Four of six; three are too few, and the accused's own rosters don't matter."""
    entries = a_round(0)
    assert earned(after(*entries, *convicted(*PEERS[1:4]))) == (0, 1, 0)
    state = after(*entries, *convicted(*PEERS[1:5]))
    assert earned(state) == (0, 0, 0)
    assert earned(state, PEERS[1]) == (0, 1, 0)
    assert state.suspended(WORLD.run_id) == {CHEAT.peer_id: "wrong_merge"}
    assert refused(*entries, *convicted(*PEERS[1:6])) == "no_audit"


def test_who_may_convict() -> None:
    """Each of the roster once, nobody else, and only whom the run knows."""
    assert refused(*convicted(PEERS[1])) == "not_in_roster"
    assert refused(*a_round(0), *convicted(identity(77))) == "not_in_roster"
    assert refused(*a_round(0), *convicted(PEERS[1], PEERS[1])) == "no_audit"
    assert refused(*a_round(0), *convicted(PEERS[1], about=identity(77))) == "no_audit"


@pytest.mark.parametrize("cut", range(0, 20, 3))
def test_open_cases_survive_a_snapshot(cut: int) -> None:
    """Written down and read back anywhere, the rest of the ledger leads to the same."""
    accused = convicted(*PEERS[2:4], about=PEERS[1])
    entries = [*START, *verdicts([*a_round(0), *accused, *a_round(1)], FAILED, FAILED), *convicted(*PEERS[4:], about=PEERS[1])]
    whole, restored = fold(entries, COORDINATOR.peer_id), load(dump(fold(entries[:cut], COORDINATOR.peer_id)))
    for index, each in enumerate(entries[cut:], cut):
        apply_entry(restored, index, each)
    assert set(whole.suspended(WORLD.run_id)) == {CHEAT.peer_id, PEERS[1].peer_id}
    assert restored.balances(WORLD.run_id) == whole.balances(WORLD.run_id)
    assert restored.suspended(WORLD.run_id) == whole.suspended(WORLD.run_id)
    assert [auditors(restored, number, peer) for number in (0, 1) for peer in PEERS] == [
        auditors(whole, number, peer) for number in (0, 1) for peer in PEERS
    ]


def test_no_two_findings_of_different_kinds_convict() -> None:
    """Only two failures suspend; every other pair of bad findings voids one contribution at most."""
    for pair in combinations((FAILED, WITHHELD, UNABLE, PASSED), 2):
        case = Case(Duty(0, "x", b"", ONCE), ("a", "b", "c"), dict(zip("ab", pair, strict=True)))
        assert case.outcome != FAILED


def test_one_case_in_eight_is_looked_at_twice() -> None:
    """There it takes two that find nothing wrong; a blind auditor is contradicted by those that look."""
    drawn = [draw_case(number.to_bytes(32, "big"), number, "me", b"", 1.0, "abc") for number in range(4000)]
    assert 400 <= sum(case is not None and case.twice for case in drawn) <= 600
    twice = Case(Duty(0, "x", b"", TWICE), ("a", "b", "c"), {"a": PASSED})
    assert twice.outcome == ""
    twice.findings["b"] = FAILED
    assert twice.outcome == ""
    twice.findings["c"] = FAILED
    assert (twice.outcome, twice.wrong) == (FAILED, ["a"])
    accuser = Case(Duty(0, "x", b"", ONCE), ("a", "b", "c"), {"a": FAILED, "b": PASSED, "c": PASSED})
    assert (accuser.outcome, accuser.wrong) == (PASSED, ["a"])
    assert Case(Duty(0, "x", b"", TWICE), ("a",), {"a": PASSED}).outcome == PASSED


def test_an_auditor_that_is_wrong_three_times_is_suspended() -> None:
    """It accuses whoever it is asked about; two others contradict it each time."""
    world = World(manifest(audit={"rate": 1.0, "first": 0, "within_rounds": 40}))
    state = fold([world.opened(), *(world.admitted(peer) for peer in PEERS)], COORDINATOR.peer_id)
    liar, wrong = PEERS[3], 0
    for number in range(20):
        if wrong == MOST_WRONG:
            break
        proposal, reports = world.round(PEERS, number)
        for each in (
            entry(proposed=proposal),
            *(entry(reported=report) for report in reports[:4]),
            world.confirmed(number, proposal),
        ):
            apply_entry(state, state.size, each)
        for about in PEERS:
            if wrong == MOST_WRONG or auditors(state, number, about, world) != [liar]:
                continue
            its = world.commit(about, number)
            apply_entry(state, state.size, world.audited(liar, its, FAILED))
            for _ in range(2):
                (other,) = auditors(state, number, about, world)
                assert liar.peer_id not in state.suspended(world.run_id)
                apply_entry(state, state.size, world.audited(other, its, PASSED))
            wrong += 1
    assert wrong == MOST_WRONG
    assert state.suspended(world.run_id) == {liar.peer_id: "wrong_audits"}
    assert load(dump(state)).suspended(world.run_id) == state.suspended(world.run_id)


def explained(entries: list[bytes], number: int = 0) -> tuple[str, str, tuple[str, ...]]:
    found = explain([*START, *entries], COORDINATOR.peer_id, WORLD.run_id, CHEAT.peer_id, number)
    return found.reason, found.why, tuple(line.partition(": ")[2] for line in found.audits)


def test_audits_are_explained() -> None:
    """What auditors found, and what came of it."""
    start = [*a_round(0), *a_round(1)]
    reason, _, audits = explained(verdicts(start, FAILED, PASSED))
    assert (reason, audits) == ("verified", ("failed (leaf)", "passed (leaf)"))
    reason, why, audits = explained(verdicts(start, WITHHELD, WITHHELD))
    assert (reason, len(audits)) == ("withheld", 2)
    assert "reachable" in why
    guilty = verdicts(start, FAILED, FAILED)
    assert explained(guilty)[:2] == ("failed_audit", REASONS["failed_audit"].format(audit="leaf"))
    assert explained(guilty, 1)[0] == "failed_audit"
    proposal, reports = WORLD.round(PEERS, 2)
    assert explained([*guilty, entry(proposed=proposal), *(entry(reported=each) for each in reports[1:])], 2)[0] == "suspended"


def test_what_becomes_of_audits_is_counted() -> None:
    """Every case is in one count; contributions are counted whether they are drawn or not."""
    rounds = [*a_round(0), *a_round(1), *a_round(2)]
    totals = after(*rounds).audit_totals(WORLD.run_id)
    assert (totals.contributions, totals.drawn, totals.open, totals.done) == (18, 12, 12, 0)
    state = after(*verdicts(rounds, FAILED, FAILED))
    totals = state.audit_totals(WORLD.run_id)
    assert (totals.failed, totals.moot, totals.open, totals.done) == (1, 1, 10, 1)
    later = [each for number in range(3, 7) for each in a_round(number, PEERS[1:])]
    totals = after(*verdicts(rounds, FAILED, FAILED), *later).audit_totals(WORLD.run_id)
    assert (totals.lapsed, totals.open) == (10, 0)
    assert load(dump(state)).audit_totals(WORLD.run_id) == state.audit_totals(WORLD.run_id)


def test_who_was_right_is_remembered() -> None:
    """Findings that were what the case came to count for their auditors; a passed case for its author."""
    rounds = a_round(0)
    state = after(*verdicts(rounds, FAILED, FAILED))
    caught = [state.deeds(WORLD.run_id, peer.peer_id).caught for peer in PEERS]
    assert sorted(caught) == [0, 0, 0, 0, 1, 1]
    assert [state.deeds(WORLD.run_id, peer.peer_id).audits for peer in PEERS] == caught
    assert state.deeds(WORLD.run_id, CHEAT.peer_id).is_suspended
    state = after(*verdicts(rounds, FAILED, PASSED, PASSED))
    assert state.deeds(WORLD.run_id, CHEAT.peer_id).vouched == 1
    assert sum(state.deeds(WORLD.run_id, peer.peer_id).audits for peer in PEERS) == 2


def test_the_chance_to_escape() -> None:
    """At five per cent half of those who fake everything are found within 14 rounds, of those who fake a tenth within 150."""
    assert escape_chance(0.05, 1.0, 13) > 0.5 > escape_chance(0.05, 1.0, 14)
    assert escape_chance(0.05, 0.1, 138) > 0.5 > escape_chance(0.05, 0.1, 139)
    assert (escape_chance(1.0, 1.0, 1), escape_chance(0.0, 1.0, 1000)) == (0.0, 1.0)
    drawn = sum(draw_case(bytes([number % 256, number >> 8]), 0, "me", b"", 0.05, ["you"]) is None for number in range(4000))
    assert abs(drawn / 4000 - escape_chance(0.05, 1.0, 1)) < 0.02
