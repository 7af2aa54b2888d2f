"""A ledger entry in lines that people can read.

The bytes are strangers': every length, depth and number of lines is bounded here, and nothing is checked. Templates escape.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any, NamedTuple

from google.protobuf.message import DecodeError, Message

from coordinator.web.words import utc
from swarm.errors import Rejected
from swarm.identity import public_key_of
from swarm.ledger import parse_entry
from swarm.messages import KINDS, MANIFEST_KIND
from swarm.rpc.v1.ledger_pb2 import LedgerEntry
from swarm.rpc.v1.signed_pb2 import Signed

MOST_LINES, MOST_DEPTH, MOST_REPEATED = 400, 8, 64
MOST_BYTES, MOST_CHARACTERS, MOST_MANIFEST_CHARACTERS = 32, 200, 20_000
MICROSECONDS = 1_000_000
TYPES = {kind: message for message, kind in KINDS.items()}
MEANINGS = {
    "run_opened": "The run is opened under its owner's manifest.",
    "admitted": "The coordinator lets a key take part.",
    "proposed": "A leader lists the contributions that make up a round, and the next roster.",
    "reported": "A peer reports its contribution to a round, and the state that it came to.",
    "confirmed": "Most of a round's peers came to one state: contributions to it are verified.",
    "granted": "A minority may go on with a round, as the others are gone.",
    "revoked": "An account takes back its word for a key.",
    "audited": "An auditor says what it found about a contribution.",
    "evaluated": "An evaluator says what held-out loss it measured of the state after a round.",
}
UNREADABLE = "unreadable"


class Summary(NamedTuple):
    """An entry in one line of a list."""

    position: int
    kind: str
    at_us: int
    who: str
    round: int | None
    size_bytes: int


class Line(NamedTuple):
    """One field: how deep it stands, its name, its value, and whether that is a peer id or a long text."""

    depth: int
    name: str
    value: str
    form: str = ""


def summary(index: int, raw: bytes) -> Summary:
    """What a list says about an entry: whom it is about, or else who signed it."""
    try:
        entry = parse_entry(raw)
        kind = entry.WhichOneof("body") or UNREADABLE
        signed = _signed(entry, kind)
        body = _payload(signed) if signed is not None else None
    except (Rejected, DecodeError):
        return Summary(index, UNREADABLE, 0, "", None, len(raw))
    about = str(getattr(body, "peer_id", "")) if kind in ("admitted", "granted") else ""
    signer = "" if signed is None else signed.signer
    return Summary(index, kind, entry.appended_at_us, about or signer, getattr(body, "round", None), len(raw))


def lines(raw: bytes) -> list[Line]:
    """An entry, field by field."""
    try:
        entry = parse_entry(raw)
        return list(islice(_fields(entry, 0), MOST_LINES))
    except (Rejected, DecodeError):
        return [Line(0, "bytes", _hex(raw))]


def _signed(entry: LedgerEntry, kind: str) -> Signed | None:
    if kind == UNREADABLE:
        return None
    body = getattr(entry, kind)
    return body if isinstance(body, Signed) else body.manifest


def _payload(signed: Signed) -> Message | None:
    expected = TYPES.get(signed.kind)
    return None if expected is None else expected.FromString(signed.payload)


def _fields(message: Message, depth: int) -> Iterator[Line]:
    if depth > MOST_DEPTH:
        yield Line(depth, "…", "and what is inside")
        return
    if isinstance(message, Signed):
        yield from _of_signed(message, depth)
        return
    for field, value in message.ListFields():
        repeated = not isinstance(value, Message | str | bytes | int | float)
        values = list(islice(value, MOST_REPEATED)) if repeated else [value]
        for place, each in enumerate(values):
            yield from _field(f"{field.name} {place + 1}" if repeated else field.name, each, depth)
        if repeated and len(value) > MOST_REPEATED:
            yield Line(depth, "…", f"and {len(value) - MOST_REPEATED:,} more of {field.name}")


def _field(name: str, value: Any, depth: int) -> Iterator[Line]:
    if isinstance(value, Message):
        yield Line(depth, name, "")
        yield from _fields(value, depth + 1)
    elif isinstance(value, bytes):
        yield Line(depth, name, _hex(value), "hash")
    elif isinstance(value, str):
        yield Line(depth, name, _cut(value, MOST_CHARACTERS), "key" if _is_key(value) else "")
    elif name.endswith("_at_us"):
        yield Line(depth, name.removesuffix("_us"), utc(value))
    elif name.endswith("_at"):
        yield Line(depth, name, utc(value * MICROSECONDS))
    else:
        yield Line(depth, name, repr(value) if isinstance(value, float) else f"{value:,}")


def _of_signed(signed: Signed, depth: int) -> Iterator[Line]:
    yield Line(depth, "kind", _cut(signed.kind, MOST_CHARACTERS))
    yield Line(depth, "signer", _cut(signed.signer, MOST_CHARACTERS), "key" if _is_key(signed.signer) else "")
    yield Line(depth, "signature", _hex(signed.signature), "hash")
    if signed.kind == MANIFEST_KIND:
        yield Line(depth, "manifest", _cut(signed.payload.decode(errors="replace"), MOST_MANIFEST_CHARACTERS), "text")
        return
    yield Line(depth, f"payload, {len(signed.payload):,} bytes", "")
    try:
        body = _payload(signed)
    except DecodeError:
        body = None
    if body is None:
        yield Line(depth + 1, "bytes", _hex(signed.payload), "hash")
    else:
        yield from _fields(body, depth + 1)


def _hex(value: bytes) -> str:
    shown = value[: 2 * MOST_BYTES].hex() if len(value) <= 2 * MOST_BYTES else f"{value[:MOST_BYTES].hex()}…"
    return f"{shown} ({len(value):,} bytes)" if len(value) > 2 * MOST_BYTES else shown


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[:most]}… ({len(text):,} characters)"


def _is_key(text: str) -> bool:
    try:
        public_key_of(text)
    except Rejected:
        return False
    return True
