"""Invitations: a ticket signed by the run's owner lets so many keys in, until it expires. Whoever has it may use it.

The admission that stands in the ledger holds the ticket, so that anybody can see that nobody was let in without one, and that
none was used more often than its owner said.
"""

from __future__ import annotations

import base64
import binascii
import os
from typing import NamedTuple

from swarm.errors import Rejected, UsageError
from swarm.identity import Identity
from swarm.messages import open_signed, parse, seal
from swarm.rpc.v1.signed_pb2 import Signed, Ticket

PREFIX = "swarm-ticket-"
ID_BYTES = 16
MAX_USES = 100_000
HINT = "ask whoever runs the training for one"


class Invited(NamedTuple):
    """What a ticket says: whose it is, how often it may be used, and until when, in Unix seconds."""

    ticket: bytes
    owner: str
    uses: int
    expires_at: int


def issue(owner: Identity, run_id: bytes, uses: int, now_s: float, valid_s: int) -> Signed:
    """A new ticket of the run's owner."""
    issued_at = int(now_s)
    return seal(
        owner, Ticket(run_id=run_id, id=os.urandom(ID_BYTES), uses=uses, issued_at=issued_at, expires_at=issued_at + valid_s)
    )


def open_ticket(signed: Signed, run_id: bytes) -> Invited:
    """What a ticket of this run says, whoever signed it. Raises `Rejected`."""
    ticket = open_signed(signed, Ticket, run_id=run_id)
    if len(ticket.id) != ID_BYTES or not 0 < ticket.uses <= MAX_USES:
        raise Rejected("bad_ticket", "malformed", signed.signer)
    return Invited(ticket.id, signed.signer, ticket.uses, ticket.expires_at)


def to_text(signed: Signed) -> str:
    """A ticket as one word, to be passed on."""
    return PREFIX + base64.urlsafe_b64encode(signed.SerializeToString(deterministic=True)).decode().rstrip("=")


def from_text(text: str) -> Signed:
    """The ticket in a word. Raises `UsageError`."""
    word = text.strip()
    if not word.startswith(PREFIX):
        raise UsageError("that is no ticket", f"it begins with {PREFIX}; {HINT}")
    encoded = word.removeprefix(PREFIX)
    try:
        return parse(Signed, base64.b64decode(encoded + "=" * (-len(encoded) % 4), altchars=b"-_", validate=True))
    except (binascii.Error, ValueError, Rejected) as error:
        raise UsageError("the ticket is damaged", f"copy it once more, whole; {HINT}") from error
