"""What the pages show is true: messages in the protocol page parse, and the example manifest is valid."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from google.protobuf import text_format
from google.protobuf.message import Message

from peer.checking import problems_of
from swarm.manifest import Manifest
from swarm.rpc.v1 import coordinator_pb2, ledger_pb2, peer_pb2, signed_pb2
from tests.maker import MAKER

ROOT = Path(__file__).resolve().parents[2]
PROTOCOL = (ROOT / "docs" / "protocol.md").read_text()
EXAMPLES = re.findall(r"^```textproto\n# proto-message: (\w+)\n(.*?)^```$", PROTOCOL, re.MULTILINE | re.DOTALL)
MAY_BE_EMPTY = ("GetRunRequest", "SubmitAuditResponse", "SubmitEvaluationResponse")
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
    assert text_format.Parse(text, TYPES[name]()).ByteSize() or name in MAY_BE_EMPTY


@pytest.fixture
def one_thread() -> Iterator[None]:
    """These models are too small for more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", MAKER.RECIPES)
def test_a_recipes_example_is_what_its_commands_make(name: str, tmp_path: Path) -> None:
    """The manifest in examples/ is theirs, and has no problem with the files that they leave; a page links to it."""
    path = ROOT / "examples" / f"{name}.yaml"
    text = MAKER.make(name, tmp_path / name)
    assert MAKER.comparable(path.read_text()) == MAKER.comparable(text), "python examples/make.py"
    assert problems_of(Manifest.parse(text.encode()), tmp_path / name / "data") == []
    assert any(f"examples/{name}.yaml" in page.read_text() for page in (ROOT / "docs").rglob("*.md"))


def test_example_manifest_is_valid() -> None:
    """The commented manifest passes the check that `swarm run validate` makes."""
    assert Manifest.read(ROOT / "examples" / "run.yaml").strategy.kind == "diloco"
