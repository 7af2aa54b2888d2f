"""Messages that an admitted but hostile peer signs, with whatever in their fields."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from peer.rounds.inbox import read_delivery
from peer.rounds.wire import Checker
from swarm.errors import Rejected
from swarm.identity import Identity
from swarm.merkle import HASH_BYTES
from swarm.messages import parse, seal
from swarm.rpc.v1.peer_pb2 import Delivery
from swarm.rpc.v1.signed_pb2 import (
    Adoption,
    AnnouncedCommit,
    Commit,
    Complaint,
    MergedSpan,
    Proposal,
    Ready,
    Result,
    Seal,
    SealReply,
    Signed,
)
from tests.peer.codec.codec_cases import allocating_at_most

HOSTILE = Identity.from_seed(b"h" * 32)
COORDINATOR = Identity.from_seed(b"c" * 32)
RUN = b"\x01" * 32
MIB = 1 << 20
BODIES: dict[str, type[Message]] = {
    "commit": Commit,
    "proposal": Proposal,
    "merged_span": MergedSpan,
    "result": Result,
    "seal": Seal,
    "seal_reply": SealReply,
    "complaint": Complaint,
    "ready": Ready,
    "adoption": Adoption,
}
NUMBERS = {
    FieldDescriptor.CPPTYPE_INT32: st.integers(-(1 << 31), (1 << 31) - 1),
    FieldDescriptor.CPPTYPE_INT64: st.integers(-(1 << 63), (1 << 63) - 1),
    FieldDescriptor.CPPTYPE_UINT32: st.one_of(st.integers(0, 8), st.integers(0, (1 << 32) - 1)),
    FieldDescriptor.CPPTYPE_UINT64: st.one_of(st.integers(0, 8), st.integers(0, (1 << 64) - 1)),
    FieldDescriptor.CPPTYPE_DOUBLE: st.floats(),
    FieldDescriptor.CPPTYPE_FLOAT: st.floats(width=32),
    FieldDescriptor.CPPTYPE_BOOL: st.booleans(),
}
TEXTS = st.one_of(st.just(HOSTILE.peer_id), st.text(max_size=80))
BYTES = st.one_of(st.binary(max_size=70), st.binary(min_size=HASH_BYTES, max_size=HASH_BYTES))


@st.composite
def filled(draw: st.DrawFn, kind: type[Message], depth: int = 0) -> Message:
    """A message with anything in its fields; signed ones inside are signed by the hostile peer, so that they are read."""
    message = kind()
    for field in kind.DESCRIPTOR.fields:
        if not draw(st.booleans()):
            continue
        many = field.is_repeated
        count = draw(st.integers(0, 4)) if many else 1
        values = [draw(_value(field, depth)) for _ in range(count)]
        if field.cpp_type == FieldDescriptor.CPPTYPE_MESSAGE:
            target = getattr(message, field.name)
            for value in values:
                (target.add() if many else target).CopyFrom(value)
        elif many:
            getattr(message, field.name).extend(values)
        else:
            setattr(message, field.name, values[0])
    if "run_id" in kind.DESCRIPTOR.fields_by_name and draw(st.integers(0, 9)):
        message.run_id = RUN  # type: ignore[attr-defined]
    return message


def _value(field: Any, depth: int) -> st.SearchStrategy[Any]:
    if field.cpp_type == FieldDescriptor.CPPTYPE_MESSAGE:
        kind = field.message_type._concrete_class
        if kind is Signed:
            return st.sampled_from([Commit, Proposal, MergedSpan]).flatmap(lambda inner: signed(inner, depth + 1))
        return filled(kind, depth + 1) if depth < 3 else st.just(kind())
    if field.cpp_type == FieldDescriptor.CPPTYPE_STRING:
        return BYTES if field.type == FieldDescriptor.TYPE_BYTES else TEXTS
    return NUMBERS[field.cpp_type]


def signed(kind: type[Message], depth: int = 0) -> st.SearchStrategy[Signed]:
    """Signed by the hostile peer, whose key is a good one."""
    if depth > 2:
        return st.just(seal(HOSTILE, kind()))
    return filled(kind, depth).map(lambda message: seal(HOSTILE, message))


@pytest.fixture(scope="module")
def checker(small_run: Callable[..., Any]) -> Checker:
    return Checker(small_run().manifest, RUN, COORDINATOR.peer_id, {HOSTILE.peer_id}.__contains__)


def read(checker: Checker, delivery: Delivery) -> None:
    """Read it as a peer does; nothing but `Rejected` may come out, and no memory to speak of is taken."""
    with allocating_at_most(4 * MIB), contextlib.suppress(Rejected):
        again = parse(Delivery, delivery.SerializeToString(), HOSTILE.peer_id)
        if again.WhichOneof("body") == "result":
            checker.result(again.result)
        elif again.WhichOneof("body") is not None:
            for arrival in read_delivery(checker, again):
                assert arrival.sender


@pytest.mark.parametrize("body", BODIES)
@given(data=st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
def test_signed_nonsense_is_read_or_rejected(checker: Checker, body: str, data: st.DataObject) -> None:
    """Well signed messages with numbers, hashes and peers out of any range."""
    inner = data.draw(signed(BODIES[body]))
    if body == "commit":
        hashes = data.draw(st.one_of(st.binary(max_size=200), st.integers(0, 5).map(lambda count: bytes(HASH_BYTES * count))))
        delivery = Delivery(commit=AnnouncedCommit(commit=inner, part_hashes=hashes))
    elif body == "proposal":
        delivery = Delivery()
        delivery.proposal.proposal.CopyFrom(inner)
        delivery.proposal.commits.extend(
            AnnouncedCommit(commit=data.draw(signed(Commit)), part_hashes=bytes(HASH_BYTES)) for _ in range(2)
        )
    else:
        delivery = Delivery(**{body: inner})
    read(checker, delivery)


@given(st.binary(max_size=400))
@settings(max_examples=100, deadline=None)
def test_any_bytes_are_read_or_rejected(content: bytes) -> None:
    """What isn't a message at all."""
    with contextlib.suppress(Rejected):
        parse(Delivery, content, HOSTILE.peer_id)
