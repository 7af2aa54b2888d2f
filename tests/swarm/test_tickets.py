"""Invitations: tickets, what the ledger says about them, and words to pass on."""

from __future__ import annotations

from typing import Any

import pytest

from coordinator.server import Coordinator
from swarm.clock import ManualClock
from swarm.config import CoordinatorSettings
from swarm.credit_snapshot import dump, load
from swarm.credits import apply_entry, fold, verify_ledger
from swarm.errors import LedgerInvalid, NotAdmitted, Rejected, UsageError
from swarm.identity import Identity
from swarm.messages import seal
from swarm.rpc.client import CoordinatorClient
from swarm.rpc.v1.ledger_pb2 import LedgerEntry
from swarm.rpc.v1.signed_pb2 import Signed, Ticket
from swarm.tickets import from_text, issue, open_ticket, to_text
from tests.swarm.test_accounts import ACCOUNT, held
from tests.world import COORDINATOR, NOW_S, OWNER, World, identity, manifest

WORLD = World(manifest(admission={"kind": "invitation"}))
PEERS = [identity(number) for number in range(4)]
NOW, DAY = int(NOW_S), 86_400


def ticket(uses: int = 2, owner: Identity = OWNER, run_id: bytes = WORLD.run_id) -> Signed:
    return issue(owner, run_id, uses, NOW_S, DAY)


def admitted(peer: Identity, by: Signed | None, **changes: Any) -> bytes:
    return WORLD.admitted(peer, ticket=by, **({"issued_at": NOW} | changes))


def test_a_ticket_lets_so_many_keys_in() -> None:
    """The third key isn't admitted, also by a ledger that goes on from a snapshot; a certificate later needs none."""
    two = ticket()
    entries = [WORLD.opened(), admitted(PEERS[0], two), admitted(PEERS[1], two)]
    state = load(dump(fold(entries, COORDINATOR.peer_id)))
    with pytest.raises(LedgerInvalid, match="ticket_used_up"):
        apply_entry(state, 3, admitted(PEERS[2], two))
    apply_entry(state, 3, admitted(PEERS[2], ticket()))
    later = admitted(PEERS[0], None, account=ACCOUNT.peer_id, held=held(PEERS[0]))
    apply_entry(state, 4, later)
    assert state.account(WORLD.run_id, PEERS[0].peer_id)[0] == ACCOUNT.peer_id


@pytest.mark.parametrize(
    ("by", "changes", "fault"),
    [
        (None, {}, "not_invited"),
        (ticket(owner=PEERS[3]), {}, "bad_ticket"),
        (ticket(run_id=b"\1" * 32), {}, "wrong_run"),
        (ticket(), {"issued_at": NOW + 2 * DAY}, "ticket_expired"),
        (seal(OWNER, Ticket(run_id=WORLD.run_id, id=b"short", uses=1, expires_at=NOW + DAY)), {}, "bad_ticket"),
        (seal(OWNER, Ticket(run_id=WORLD.run_id, id=bytes(16), uses=0, expires_at=NOW + DAY)), {}, "bad_ticket"),
        (Signed(kind="x", payload=b"x", signer=OWNER.peer_id, signature=bytes(64)), {}, "wrong_kind"),
    ],
    ids=["none", "of a stranger", "of another run", "expired", "malformed", "for nobody", "another message"],
)
def test_nobody_is_let_in_without_one(by: Signed | None, changes: dict[str, Any], fault: str) -> None:
    """A coordinator that does so breaks the ledger's rules."""
    with pytest.raises(LedgerInvalid, match=fault):
        verify_ledger([WORLD.opened(), admitted(PEERS[0], by, **changes)], COORDINATOR.peer_id)


def test_an_open_run_asks_for_none() -> None:
    """And doesn't mind one."""
    world = World()
    given = issue(OWNER, world.run_id, 1, NOW_S, DAY)
    entries = [world.opened(), world.admitted(PEERS[0]), world.admitted(PEERS[1], ticket=given, issued_at=NOW)]
    assert fold(entries, COORDINATOR.peer_id).member_count(world.run_id) == 2


def test_words() -> None:
    """A ticket survives being passed on; half of it doesn't."""
    made = ticket(7)
    text = to_text(made)
    assert open_ticket(from_text(f" {text}\n"), WORLD.run_id).uses == 7
    for damaged in (text[:-5], text.replace("swarm-ticket-", ""), "swarm-ticket-", "swarm-ticket-!!", "swarm-ticket-ü"):
        with pytest.raises((UsageError, Rejected)):
            open_ticket(from_text(damaged), WORLD.run_id)


async def test_against_a_coordinator(tmp_path: Any) -> None:
    """Announced with the ticket once, and without it afterwards; the ledger that comes of it verifies."""
    settings = CoordinatorSettings(listen="127.0.0.1:0", state_dir=tmp_path, db="memory://")
    clock = ManualClock(NOW_S)
    one = ticket(1)
    async with (
        Coordinator.serve([WORLD.signed_manifest], settings, clock) as coordinator,
        await CoordinatorClient.connect(coordinator.link) as client,
    ):
        with pytest.raises(NotAdmitted, match="by invitation"):
            await client.announce(WORLD.announcement(PEERS[0]))
        with pytest.raises(NotAdmitted, match="owner"):
            await client.announce(WORLD.announcement(PEERS[0], ticket=ticket(owner=PEERS[3])))
        clock.advance(1)
        await client.announce(WORLD.announcement(PEERS[0], clock.wall_s(), ticket=one))
        clock.advance(1)
        answer = await client.announce(WORLD.announcement(PEERS[0], clock.wall_s()))
        assert answer.HasField("admission")
        with pytest.raises(NotAdmitted, match="as often as"):
            await client.announce(WORLD.announcement(PEERS[1], clock.wall_s(), ticket=one))
        late = ticket(1)
        clock.advance(2 * DAY)
        with pytest.raises(NotAdmitted, match="expired"):
            await client.announce(WORLD.announcement(PEERS[1], clock.wall_s(), ticket=late))
        entries = [raw async for raw in client.entries()]
        run = await client.get_run()
    assert [LedgerEntry.FromString(raw).WhichOneof("body") for raw in entries] == ["run_opened", "admitted"]
    assert verify_ledger(entries, run.coordinator).member_count(WORLD.run_id) == 1
