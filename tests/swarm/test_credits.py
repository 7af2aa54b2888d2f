"""The fold from ledger to balances: every rule, and that nothing is lost or doubled."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from swarm import credit_records
from swarm import credits as module
from swarm.credit_records import Standings, Tally, rank
from swarm.credits import Balance, CreditState, RoundSet, apply_entry, fold, verify_ledger
from swarm.entries import open_entry
from swarm.errors import LedgerInvalid
from swarm.identity import Identity
from swarm.messages import seal
from swarm.rpc.v1.ledger_pb2 import LedgerEntry, Report, RunOpened
from swarm.rpc.v1.signed_pb2 import Grant, Signed
from tests.world import (
    COORDINATOR,
    FLOPS_PER_TOKEN,
    OTHER_ROOT,
    ROOT,
    SEQUENCE_LENGTH,
    World,
    entry,
    identity,
    manifest,
)

WORLD = World()
PEERS = [identity(number) for number in range(3)]
ALICE, BOB, CAROL = PEERS
STRANGER = identity(99)
START = [WORLD.opened(), *(WORLD.admitted(peer) for peer in PEERS)]
FLOPS = 4 * SEQUENCE_LENGTH * FLOPS_PER_TOKEN  # one contribution of weight 4


def state_of(*entries: bytes) -> CreditState:
    """The state after the opening, three admissions and `entries`."""
    return fold([*START, *entries], COORDINATOR.peer_id)


def balance(state: CreditState, peer: Identity = ALICE) -> tuple[int, int, int]:
    """Pending, verified and final FLOPs."""
    value = state.balance(WORLD.run_id, peer.peer_id)
    return value.pending_flops, value.verified_flops, value.final_flops


def fault(*entries: bytes) -> str:
    """The reason for which the last entry is refused, after checking that it changed nothing."""
    state = state_of(*entries[:-1])
    before = [balance(state, peer) for peer in PEERS]
    index = len(START) + len(entries) - 1
    with pytest.raises(LedgerInvalid, match=f"^entry {index}: ") as caught:
        apply_entry(state, index, entries[-1])
    assert [balance(state, peer) for peer in PEERS] == before
    assert state.size == index
    return caught.value.message.split(": ")[1]


def whole_round(number: int, root: bytes = ROOT) -> list[bytes]:
    """A round with its proposal, all reports and the confirmation."""
    proposal, reports = WORLD.round(PEERS, number, root=root)
    return [entry(proposed=proposal), *(entry(reported=r) for r in reports), WORLD.confirmed(number, proposal, root)]


def test_pending_verified_final() -> None:
    """A contribution is pending when reported, verified when confirmed, final two rounds later (hold_rounds = 2)."""
    first = whole_round(0)
    assert balance(state_of(*first[:2])) == (FLOPS, 0, 0)
    assert balance(state_of(*first)) == (0, FLOPS, 0)
    later = [*first, *whole_round(1), *whole_round(2)]
    assert balance(state_of(*later)) == (0, 2 * FLOPS, FLOPS)


def test_progress_and_loss() -> None:
    """Progress is the newest confirmed round with the mean loss over its verified commits by weight."""
    commits = [WORLD.commit(ALICE, 0, 4, loss=2.0), WORLD.commit(BOB, 0, 12, loss=4.0)]
    proposal = WORLD.proposal(ALICE, 0, commits)
    reports = [entry(reported=WORLD.report(peer, c, proposal)) for peer, c in zip((ALICE, BOB), commits, strict=True)]
    state = state_of(entry(proposed=proposal), *reports, WORLD.confirmed(0, proposal))
    assert state.progress(WORLD.run_id) == (0, ROOT, 16 * SEQUENCE_LENGTH, 3.5)
    assert state_of().progress(WORLD.run_id).state_root == b""


def test_another_root_is_void() -> None:
    """A contribution to another state than the confirmed one earns nothing."""
    proposal, reports = WORLD.round(PEERS, 0)
    commit = WORLD.commit(CAROL, 0)
    odd = WORLD.report(CAROL, commit, proposal, OTHER_ROOT)
    state = state_of(
        entry(proposed=proposal), entry(reported=odd), *(entry(reported=r) for r in reports[:2]), WORLD.confirmed(0, proposal)
    )
    assert balance(state, CAROL) == (0, 0, 0)
    assert balance(state, BOB) == (0, FLOPS, 0)


def test_late_reports() -> None:
    """After the confirmation a matching report is verified at once, and one to another root is void."""
    proposal, reports = WORLD.round(PEERS, 0)
    before = [entry(proposed=proposal), *(entry(reported=r) for r in reports[:2]), WORLD.confirmed(0, proposal)]
    assert balance(state_of(*before, entry(reported=reports[2])), CAROL) == (0, FLOPS, 0)
    odd = WORLD.report(CAROL, WORLD.commit(CAROL, 0), proposal, OTHER_ROOT)
    assert balance(state_of(*before, entry(reported=odd)), CAROL) == (0, 0, 0)


def test_very_late_report_is_final_at_once() -> None:
    """A matching report for a round that is final already earns final credit, however late."""
    proposal, reports = WORLD.round(PEERS, 0)
    before = [entry(proposed=proposal), *(entry(reported=r) for r in reports[:2]), WORLD.confirmed(0, proposal)]
    later = [item for number in range(1, 6) for item in whole_round(number)]
    state = state_of(*before, *later, entry(reported=reports[2]))
    assert balance(state, CAROL) == balance(state, BOB)


def test_settled_rounds_are_forgotten_but_not_forgiven() -> None:
    """A round with nothing outstanding takes no memory, and replays of it are still recognised."""
    entries = [item for number in range(20) for item in whole_round(number)]
    state = state_of(*entries)
    assert len(state._runs[WORLD.run_id].rounds) <= 3
    assert fault(*entries, entries[1]) == "already_reported"
    assert fault(*entries, entries[0]) == "round_closed"


def test_reports_after_confirmation_on_an_amended_proposal() -> None:
    """A report that follows a proposal which was not the confirmed one earns nothing."""
    proposal, reports = WORLD.round(PEERS, 0)
    commit = WORLD.commit(CAROL, 0)
    amended = WORLD.proposal(ALICE, 0, [commit], roster=PEERS, ballot=(0, 1))
    state = state_of(
        entry(proposed=proposal),
        *(entry(reported=r) for r in reports[:2]),
        WORLD.confirmed(0, proposal),
        entry(proposed=amended),
        entry(reported=WORLD.report(CAROL, commit, amended)),
    )
    assert balance(state, CAROL) == (0, 0, 0)


def test_zero_weight_counts_for_the_majority_only() -> None:
    """A peer with nothing to contribute takes part in the vote and earns nothing."""
    commits = [WORLD.commit(ALICE, 0), WORLD.commit(BOB, 0, 0, loss=0.0), WORLD.commit(CAROL, 0, 0, loss=0.0)]
    proposal = WORLD.proposal(ALICE, 0, commits)
    reports = [entry(reported=WORLD.report(peer, c, proposal)) for peer, c in zip(PEERS, commits, strict=True)]
    assert fault(entry(proposed=proposal), reports[0], WORLD.confirmed(0, proposal)) == "no_majority"
    state = state_of(entry(proposed=proposal), *reports[:2], WORLD.confirmed(0, proposal))
    assert balance(state, BOB) == (0, 0, 0)
    assert state.balance(WORLD.run_id, BOB.peer_id).rounds == 0
    assert state.balance(WORLD.run_id, ALICE.peer_id).rounds == 1


def test_run_rules() -> None:
    """A run is opened once, by its owner, under its own hash."""
    assert fault(WORLD.opened()) == "already_open"
    other = World(manifest(name="other"))
    mixed = RunOpened(run_id=WORLD.run_id, manifest=other.signed_manifest)
    assert fault(entry(run_opened=mixed)) == "wrong_run"
    signed = other.signed_manifest
    forged = Signed(kind=signed.kind, payload=signed.payload, signer=ALICE.peer_id, signature=signed.signature)
    assert fault(entry(run_opened=RunOpened(run_id=other.run_id, manifest=forged))) == "bad_signature"
    assert fault(other.admitted(ALICE)) == "unknown_run"


def test_admission_rules() -> None:
    """Only the coordinator admits, and a key once."""
    assert fault(WORLD.admitted(ALICE)) == "already_admitted"
    assert fault(WORLD.admitted(STRANGER, signer=STRANGER)) == "wrong_signer"
    assert fault(WORLD.admitted(STRANGER, peer_id="nobody")) == "bad_peer_id"


def test_proposal_rules() -> None:
    """A proposal comes from an admitted peer, once per ballot, and lists admitted peers only."""
    commits = [WORLD.commit(peer, 0) for peer in PEERS]
    proposal = WORLD.proposal(ALICE, 0, commits)
    assert fault(entry(proposed=WORLD.proposal(STRANGER, 0, commits))) == "not_admitted"
    assert fault(entry(proposed=proposal), entry(proposed=proposal)) == "already_proposed"
    second = WORLD.proposal(ALICE, 0, commits[:2])
    assert fault(entry(proposed=proposal), entry(proposed=second)) == "two_proposals"
    assert fault(entry(proposed=WORLD.proposal(ALICE, 0, [*commits, WORLD.commit(STRANGER, 0)]))) == "not_admitted"
    assert fault(entry(proposed=WORLD.proposal(ALICE, 0, []))) == "malformed"
    assert fault(entry(proposed=WORLD.proposal(ALICE, 0, [commits[0], commits[0]]))) == "malformed"


def test_roster_rules() -> None:
    """After a confirmed round only its next roster proposes and commits."""
    commits = [WORLD.commit(peer, 0) for peer in PEERS]
    proposal = WORLD.proposal(ALICE, 0, commits, roster=[ALICE, BOB])
    reports = [entry(reported=WORLD.report(p, c, proposal)) for p, c in zip(PEERS, commits, strict=True)]
    done = [entry(proposed=proposal), *reports, WORLD.confirmed(0, proposal)]
    mine = [WORLD.commit(ALICE, 1)]
    assert fault(*done, entry(proposed=WORLD.proposal(CAROL, 1, mine))) == "not_in_roster"
    with_carol = [*mine, WORLD.commit(CAROL, 1)]
    assert fault(*done, entry(proposed=WORLD.proposal(ALICE, 1, with_carol))) == "not_in_roster"
    state_of(*done, entry(proposed=WORLD.proposal(BOB, 1, mine)))


def broken_reports() -> dict[str, Callable[[], list[bytes]]]:
    """Reports that break one rule each, by the reason of their rejection."""
    commits = [WORLD.commit(peer, 0) for peer in PEERS]
    proposal = WORLD.proposal(ALICE, 0, commits)
    proposed = entry(proposed=proposal)
    honest = WORLD.report(ALICE, commits[0], proposal)

    def case(commit: Signed, **changes: object) -> Callable[[], list[bytes]]:
        return lambda: [proposed, entry(reported=WORLD.report(ALICE, commit, proposal, **changes))]

    def listed(weight: int, **changes: object) -> Callable[[], list[bytes]]:
        commit = WORLD.commit(ALICE, 0, weight, **changes)
        own = WORLD.proposal(ALICE, 0, [commit])
        return lambda: [entry(proposed=own), entry(reported=WORLD.report(ALICE, commit, own))]

    stranger = WORLD.commit(STRANGER, 0)
    return {
        "already_reported": lambda: [proposed, entry(reported=honest), entry(reported=honest)],
        "unknown_proposal": lambda: [entry(reported=honest)],
        "not_in_proposal": case(WORLD.commit(ALICE, 0, 8)),
        "not_admitted": lambda: [proposed, entry(reported=WORLD.report(STRANGER, stranger, proposal))],
        "wrong_signer": case(commits[1]),
        "wrong_round": case(WORLD.commit(ALICE, 0), round=1),
        "wrong_run": case(commits[0], run_id=b"\0" * 32),
        "wrong_proposal": case(commits[0], proposal_hash=b"\0" * 32),
        "malformed": case(commits[0], result=WORLD.result(ALICE, 0, proposal, b"short")),
        "too_heavy": listed(33),
        "wrong_tokens": listed(4, tokens=5),
        "not_finite": listed(4, loss=float("nan")),
        "bad_signature": lambda: [
            proposed,
            entry(reported=Signed(kind=honest.kind, payload=honest.payload, signer=BOB.peer_id, signature=honest.signature)),
        ],
    }


@given(st.sets(st.integers(0, 60)), st.integers(1, 20), st.none() | st.integers(0, 70))
def test_the_newest_of_a_set_of_rounds(numbers: set[int], limit: int, before: int | None) -> None:
    """Page after page, the largest first, without looking at all of them."""
    rounds = RoundSet()
    for number in numbers:
        rounds.add(number)
    below = [number for number in sorted(numbers, reverse=True) if before is None or number < before]
    assert rounds.newest(limit, before) == below[:limit]


@pytest.mark.parametrize("reason", broken_reports())
def test_report_rules(reason: str) -> None:
    """Each broken rule is named, and the state stays as it was."""
    assert fault(*broken_reports()[reason]()) == reason


def test_weight_must_be_the_proposed_one() -> None:
    """A commit can't count for more than the proposal says."""
    proposal, _ = WORLD.round(PEERS, 0)
    message = open_entry(entry(proposed=proposal), COORDINATOR.peer_id)
    assert isinstance(message, module.Nomination)
    commits = {peer: item._replace(weight=item.weight + 1) for peer, item in message.commits.items()}
    state = state_of()
    state.apply(message._replace(commits=commits))
    with pytest.raises(LedgerInvalid, match="wrong_weight"):
        apply_entry(state, state.size, entry(reported=WORLD.round(PEERS, 0)[1][0]))


def test_diloco_limit() -> None:
    """In diloco a fast peer may do four times the manifest's inner steps and no more."""
    schedule = {"total_tokens": 10**6}
    value = manifest(strategy={"kind": "diloco", "inner_steps": 5, "batch_samples": 2, "schedule": schedule})
    assert module.Terms.of(value).max_weight == 40


def test_token_limit_of_a_key() -> None:
    """An admission may set a lower limit for its key."""
    entries = [WORLD.opened(), WORLD.admitted(ALICE, weight_limit=3)]
    proposal, reports = WORLD.round([ALICE], 0)
    with pytest.raises(LedgerInvalid, match="entry 3: too_heavy"):
        fold([*entries, entry(proposed=proposal), entry(reported=reports[0])], COORDINATOR.peer_id)


def test_confirmation_rules() -> None:
    """A round is confirmed once, by the coordinator, for what a strict majority reported."""
    proposal, reports = WORLD.round(PEERS, 0)
    reported = [entry(proposed=proposal), *(entry(reported=r) for r in reports)]
    confirmed = WORLD.confirmed(0, proposal)
    assert fault(*reported[:2], confirmed) == "no_majority"
    assert fault(*reported, WORLD.confirmed(0, proposal, OTHER_ROOT)) == "no_majority"
    assert fault(*reported, confirmed, confirmed) == "already_confirmed"
    assert fault(*reported, WORLD.confirmed(0, proposal, signer=ALICE)) == "wrong_signer"
    assert fault(*reported, WORLD.confirmed(0, WORLD.proposal(ALICE, 0, [WORLD.commit(ALICE, 0)]))) == "unknown_proposal"
    assert fault(*reported, WORLD.confirmed(5, proposal)) == "unknown_proposal"


def test_half_is_no_majority() -> None:
    """Two of four peers don't confirm a round."""
    peers = [*PEERS, STRANGER]
    proposal, reports = WORLD.round(peers, 0)
    entries = [WORLD.admitted(STRANGER), entry(proposed=proposal), *(entry(reported=r) for r in reports[:2])]
    assert fault(*entries, WORLD.confirmed(0, proposal)) == "no_majority"


def test_grant_rules() -> None:
    """A round is granted once, by the coordinator."""
    grant = Grant(run_id=WORLD.run_id, round=4, peer_id=ALICE.peer_id, present=[ALICE.peer_id])
    granted = entry(granted=seal(COORDINATOR, grant))
    assert fault(granted, granted) == "already_granted"
    assert fault(entry(granted=seal(ALICE, grant))) == "wrong_signer"
    state = state_of(granted)
    assert state.grant(WORLD.run_id, 4) is not None
    assert state.grant(WORLD.run_id, 5) is None


def test_garbage_is_named() -> None:
    """Bytes that are no entry, an empty entry and an entry out of order are faults."""
    assert fault(b"\xff\xff") == "malformed"
    assert fault(LedgerEntry(appended_at_us=1).SerializeToString()) == "malformed"
    with pytest.raises(LedgerInvalid, match="out of order"):
        apply_entry(CreditState(COORDINATOR.peer_id), 3, WORLD.opened())


def test_signatures_can_be_left_to_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process pool finds the same first fault as a plain fold, and the same balances."""
    monkeypatch.setattr(module, "PARALLEL_FROM", 10)
    entries = WORLD.ledger(PEERS, 4)
    expected = fold(entries, COORDINATOR.peer_id).balances(WORLD.run_id)
    assert verify_ledger(entries, COORDINATOR.peer_id, workers=2).balances(WORLD.run_id) == expected
    damaged = LedgerEntry.FromString(entries[6])
    damaged.reported.signature = b"x" * 64
    entries[6] = damaged.SerializeToString()
    with pytest.raises(LedgerInvalid, match=r"^entry 6: bad_signature"):
        verify_ledger(entries, COORDINATOR.peer_id, workers=2)
    fold(entries, COORDINATOR.peer_id, check_signatures=False)


@pytest.mark.parametrize("body", ["reported", "proposed", "confirmed", "admitted"])
def test_every_entrys_own_signature_is_checked(body: str) -> None:
    """Also of the coordinator's own entries, which nobody else may sign."""
    entries = WORLD.ledger(PEERS, 2)
    index = next(index for index, raw in enumerate(entries) if LedgerEntry.FromString(raw).WhichOneof("body") == body)
    damaged = LedgerEntry.FromString(entries[index])
    getattr(damaged, body).signature = bytes(64)
    changed = [*entries[:index], damaged.SerializeToString(), *entries[index + 1 :]]
    with pytest.raises(LedgerInvalid, match=rf"^entry {index}: bad_signature"):
        verify_ledger(changed, COORDINATOR.peer_id)


def test_signatures_within_reports_are_checked_when_asked() -> None:
    """A report that its peer signed over a commit whose own signature is wrong."""
    entries = WORLD.ledger(PEERS, 1)
    index = next(index for index, raw in enumerate(entries) if LedgerEntry.FromString(raw).WhichOneof("body") == "reported")
    reported = LedgerEntry.FromString(entries[index]).reported
    report = Report.FromString(reported.payload)
    report.commit.signature = bytes(64)
    author = next(peer for peer in PEERS if peer.peer_id == reported.signer)
    entries[index] = entry(reported=seal(author, report))
    assert verify_ledger(entries, COORDINATOR.peer_id).size == len(entries)
    with pytest.raises(LedgerInvalid, match=rf"^entry {index}: bad_signature"):
        verify_ledger(entries, COORDINATOR.peer_id, every_signature=True)


def test_leaderboard() -> None:
    """The leaderboard lists accounts by what they earned, and a stranger has nothing."""
    entries = [item for number in range(3) for item in whole_round(number)]
    commit = WORLD.commit(BOB, 3)
    proposal = WORLD.proposal(BOB, 3, [commit])
    more = [entry(proposed=proposal), entry(reported=WORLD.report(BOB, commit, proposal)), WORLD.confirmed(3, proposal)]
    state = state_of(*entries, *more)
    best = state.leaderboard(WORLD.run_id, 2)
    assert [item.account for item in best] == [BOB.peer_id, min(ALICE.peer_id, CAROL.peer_id)]
    assert best[0].earned_flops == 4 * FLOPS
    assert state.balance(WORLD.run_id, STRANGER.peer_id) == Balance(STRANGER.peer_id, STRANGER.peer_id)


@given(st.lists(st.integers(0, 40)))
def test_round_set_is_a_set(numbers: list[int]) -> None:
    """The interval set answers like a set, whatever the order."""
    found, expected = RoundSet(), set()
    for number in numbers:
        found.add(number)
        expected.add(number)
    assert {number for number in range(-1, 43) if number in found} == expected


@settings(max_examples=30, suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(st.data())
def test_nothing_is_lost_or_doubled(data: st.DataObject) -> None:
    """Over any mix of honest, deviating and missing reports every FLOP is pending, verified, final or void, exactly once."""
    state, index = state_of(), len(START)
    paid = dict.fromkeys(range(3), Fraction(0))
    for number in range(data.draw(st.integers(1, 5))):
        proposal, _ = WORLD.round(PEERS, number)
        roots = [data.draw(st.sampled_from([ROOT, OTHER_ROOT, None])) for _ in PEERS]
        order = data.draw(st.permutations(range(3)))
        apply_entry(state, index, entry(proposed=proposal), False)
        index += 1
        for place in order:
            if roots[place] is None:
                continue
            report = WORLD.report(PEERS[place], WORLD.commit(PEERS[place], number), proposal, roots[place])
            apply_entry(state, index, entry(reported=report), False)
            index += 1
            paid[place] += FLOPS
        for root in (ROOT, OTHER_ROOT):
            if roots.count(root) >= 2:
                apply_entry(state, index, WORLD.confirmed(number, proposal, root), False)
                index += 1
                for place in range(3):
                    paid[place] -= FLOPS if roots[place] not in (root, None) else 0
    for place, peer in enumerate(PEERS):
        assert sum(balance(state, peer)) == paid[place]


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 5)), max_size=200))
def test_standings_are_those_of_all_accounts(gains: list[tuple[int, int]]) -> None:
    """Kept up to date with every gain, the best accounts are those that sorting all of them gives, ties by name."""
    tallies = {number: Tally(f"{number:02}") for number in range(31)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(credit_records, "KEPT", 4)
        standings = Standings()
        for number in sorted(tallies):
            standings.offer(tallies[number])
        for number, tokens in gains:
            tallies[number].verified += tokens
            standings.offer(tallies[number])
            assert standings.first(4) == sorted(tallies.values(), key=rank)[:4]
