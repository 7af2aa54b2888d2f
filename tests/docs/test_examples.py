"""What the pages show is true: messages in the protocol page parse, and the example manifest is valid."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest
from google.protobuf import text_format
from google.protobuf.message import Message

from swarm.manifest import Manifest
from swarm.rpc.v1 import coordinator_pb2, ledger_pb2, peer_pb2, signed_pb2

ROOT = Path(__file__).resolve().parents[2]
PROTOCOL = (ROOT / "docs" / "protocol.md").read_text()
EXAMPLES = re.findall(r"^```textproto\n# proto-message: (\w+)\n(.*?)^```$", PROTOCOL, re.MULTILINE | re.DOTALL)
TYPES: dict[str, type[Message]] = {
    name: getattr(module, name)
    for module in (signed_pb2, peer_pb2, coordinator_pb2, ledger_pb2)
    for name in module.DESCRIPTOR.message_types_by_name
}


def test_every_message_has_one_example() -> None:
    """The protocol page shows each message of the wire once, and none that doesn't exist."""
    assert Counter(name for name, _ in EXAMPLES) == Counter(list(TYPES))


@pytest.mark.parametrize(("name", "text"), EXAMPLES, ids=[name for name, _ in EXAMPLES])
def test_example_is_such_a_message(name: str, text: str) -> None:
    """Every field of an example exists and has the right type."""
    assert text_format.Parse(text, TYPES[name]()).ByteSize() or name in ("GetRunRequest", "SubmitAuditResponse")


def test_example_manifest_is_valid() -> None:
    """The commented manifest passes the check that `swarm run validate` makes."""
    assert Manifest.read(ROOT / "examples" / "run.yaml").strategy.kind == "diloco"
