"""Account keys: certificates, what they are worth in the ledger, and revocation."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from swarm.accounts import CERTIFICATE_SUFFIX, DAY_S, certify, hold, open_certificate, open_held, revoke
from swarm.credit_snapshot import dump, load
from swarm.credits import CreditState, fold, verify_ledger
from swarm.errors import KeyFileError, LedgerInvalid, Rejected
from swarm.identity import Identity
from swarm.messages import seal
from swarm.rpc.v1.signed_pb2 import HeldCertificate, KeyCertificate, KeyRevocation, Signed
from tests.world import COORDINATOR, NOW_S, World, entry, identity

WORLD = World()
PEERS = [identity(number) for number in range(3)]
LAPTOP, DESKTOP, STRANGER = PEERS
ACCOUNT, OTHER = identity(70), identity(71)
NOW = int(NOW_S)


def held(machine: Identity, account: Identity = ACCOUNT, days: int = 30, issued_s: float = NOW_S) -> Signed:
    """A certificate that the machine has accepted."""
    return seal(machine, HeldCertificate(certificate=certify(account, machine.peer_id, issued_s, days)))


def admitted(machine: Identity, account: Identity = ACCOUNT, days: int = 30, **changes: Any) -> bytes:
    """The coordinator admits the machine for the account."""
    values = {"account": account.peer_id, "held": held(machine, account, days), "issued_at": NOW} | changes
    return WORLD.admitted(machine, **values)


def revoked(machine: Identity, account: Identity = ACCOUNT) -> bytes:
    return entry(revoked=revoke(account, machine.peer_id, WORLD.run_id, NOW_S))


def whole_round(number: int) -> list[bytes]:
    proposal, reports = WORLD.round(PEERS, number)
    return [entry(proposed=proposal), *(entry(reported=report) for report in reports), WORLD.confirmed(number, proposal)]


def state_of(*entries: bytes) -> CreditState:
    return fold([WORLD.opened(), *entries], COORDINATOR.peer_id)


def rounds(state: CreditState, key: Identity) -> int:
    return state.balance(WORLD.run_id, key.peer_id).rounds


def test_what_certified_machines_earn_adds_up() -> None:
    """Two machines of one account; asked for by the account or by either machine, it is the same balance."""
    state = state_of(admitted(LAPTOP), admitted(DESKTOP), WORLD.admitted(STRANGER), *whole_round(0), *whole_round(1))
    assert [rounds(state, key) for key in (ACCOUNT, LAPTOP, DESKTOP, STRANGER)] == [4, 4, 4, 2]
    assert state.leaderboard(WORLD.run_id, 1)[0].account == ACCOUNT.peer_id
    assert rounds(load(dump(state)), ACCOUNT) == 4
    for each in (state, load(dump(state))):
        assert each.keys(WORLD.run_id, ACCOUNT.peer_id) == [LAPTOP.peer_id, DESKTOP.peer_id]
        assert each.keys(WORLD.run_id, STRANGER.peer_id) == [STRANGER.peer_id]
        assert each.keys(WORLD.run_id, LAPTOP.peer_id) == []


def test_a_machine_is_certified_later() -> None:
    """What it earned before stays its own."""
    before = [WORLD.admitted(peer) for peer in PEERS]
    state = state_of(*before, *whole_round(0), admitted(LAPTOP), *whole_round(1))
    assert (rounds(state, ACCOUNT), state.balances(WORLD.run_id)[LAPTOP.peer_id].rounds) == (1, 1)
    assert state.keys(WORLD.run_id, ACCOUNT.peer_id) == [LAPTOP.peer_id]
    assert state.keys(WORLD.run_id, LAPTOP.peer_id) == []
    assert state.account(WORLD.run_id, LAPTOP.peer_id) == (ACCOUNT.peer_id, NOW + 30 * DAY_S)


def test_a_revoked_key_earns_nothing_any_more() -> None:
    """What it had earned stays with the account; it is admitted to nothing again."""
    start = [admitted(LAPTOP), WORLD.admitted(DESKTOP), WORLD.admitted(STRANGER), *whole_round(0), revoked(LAPTOP)]
    state = state_of(*start)
    assert rounds(state, ACCOUNT) == 1
    assert rounds(load(dump(state)), ACCOUNT) == 1
    for more, fault in (
        ([whole_round(1)[0], entry(reported=_report_of(LAPTOP, 1))], "revoked"),
        ([revoked(LAPTOP)], "revoked"),
        ([admitted(LAPTOP, days=90)], "revoked"),
    ):
        with pytest.raises(LedgerInvalid, match=fault):
            state_of(*start, *more)


def _report_of(peer: Identity, number: int) -> Signed:
    _, reports = WORLD.round(PEERS, number)
    return next(report for report in reports if report.signer == peer.peer_id)


def _unaccepted(machine: Identity) -> Signed:
    return seal(OTHER, HeldCertificate(certificate=certify(ACCOUNT, machine.peer_id, NOW_S, 30)))


def _self_made(machine: Identity) -> Signed:
    body = KeyCertificate(account=ACCOUNT.peer_id, peer_id=machine.peer_id, issued_at=NOW, expires_at=NOW + DAY_S)
    return seal(machine, HeldCertificate(certificate=seal(machine, body)))


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"held": None}, "uncertified"),
        ({"held": held(DESKTOP)}, "wrong_signer"),
        ({"held": _unaccepted(LAPTOP)}, "wrong_signer"),
        ({"held": _self_made(LAPTOP)}, "bad_certificate"),
        ({"held": held(LAPTOP, OTHER)}, "bad_certificate"),
        ({"held": held(LAPTOP, days=1), "issued_at": NOW + 2 * DAY_S}, "bad_certificate"),
        ({"issued_at": NOW - DAY_S}, "bad_certificate"),
    ],
    ids=["none", "of another machine", "not accepted", "self-made", "of another account", "expired", "not yet valid"],
)
def test_no_coordinator_moves_credit_without_both_signatures(changes: dict[str, Any], fault: str) -> None:
    """An admission for an account needs the account's word and the machine's, at that time; without checking entries' own too."""
    entries = [WORLD.opened(), admitted(LAPTOP, **changes)]
    with pytest.raises(LedgerInvalid, match=fault):
        fold(entries, COORDINATOR.peer_id)
    with pytest.raises(LedgerInvalid, match=fault):
        verify_ledger(entries, COORDINATOR.peer_id)


@pytest.mark.parametrize(
    ("later", "fault"),
    [
        (lambda: [admitted(LAPTOP)], "already_admitted"),
        (lambda: [WORLD.admitted(LAPTOP)], "other_account"),
        (lambda: [admitted(LAPTOP, OTHER, 90)], "other_account"),
        (lambda: [revoked(LAPTOP, OTHER)], "other_account"),
        (lambda: [revoked(DESKTOP)], "other_account"),
        (lambda: [revoked(STRANGER)], "not_admitted"),
        (lambda: [entry(revoked=seal(OTHER, _revocation_by(ACCOUNT)))], "wrong_signer"),
    ],
)
def test_what_changes_nothing(later: Callable[[], list[bytes]], fault: str) -> None:
    """The same certificate again, another account, and revocations by or of the wrong key."""
    start = [admitted(LAPTOP), WORLD.admitted(DESKTOP)]
    with pytest.raises(LedgerInvalid, match=fault):
        state_of(*start, *later())


def _revocation_by(account: Identity) -> KeyRevocation:
    return KeyRevocation(run_id=WORLD.run_id, account=account.peer_id, peer_id=LAPTOP.peer_id, issued_at=NOW)


def test_certificates_in_files(tmp_path: Path) -> None:
    """The file lies beside the key; another key's or a damaged one is refused."""
    path = tmp_path / f"identity{CERTIFICATE_SUFFIX}"
    assert hold(LAPTOP, path) is None
    path.write_bytes(certify(ACCOUNT, LAPTOP.peer_id, NOW_S, 30).SerializeToString())
    kept = hold(LAPTOP, path)
    assert kept is not None
    assert open_held(kept, LAPTOP.peer_id).account == ACCOUNT.peer_id
    with pytest.raises(KeyFileError, match="not for this key"):
        hold(DESKTOP, path)
    path.write_bytes(b"\xff")
    with pytest.raises(KeyFileError, match="no certificate"):
        hold(LAPTOP, path)
    with pytest.raises(Rejected, match="bad_certificate"):
        open_certificate(certify(ACCOUNT, ACCOUNT.peer_id, NOW_S, 30))
    with pytest.raises(Rejected, match="bad_peer_id"):
        certify(ACCOUNT, "laptop", NOW_S, 30)
