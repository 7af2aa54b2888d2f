"""Encrypted copies of keys."""

from __future__ import annotations

import json

import pytest

from swarm.backup import decrypt, encrypt
from swarm.errors import KeyFileError
from swarm.identity import Identity

ALICE = Identity.from_seed(bytes(range(32)))
PHRASE = "a long enough sentence"


def test_round_trip() -> None:
    """The passphrase gives the key back, and the file shows whose it is but not the key."""
    content = encrypt(ALICE, PHRASE)
    assert decrypt(content, PHRASE).seed == ALICE.seed
    assert json.loads(content)["peer_id"] == ALICE.peer_id
    assert ALICE.seed not in content


def test_wrong_passphrase_and_damage() -> None:
    """A wrong passphrase, a changed name and a changed byte are all noticed."""
    content = encrypt(ALICE, PHRASE)
    with pytest.raises(KeyFileError, match="wrong or the backup is damaged"):
        decrypt(content, PHRASE + "!")
    fields = json.loads(content)
    for changed in ({"peer_id": "somebody"}, {"sealed": fields["sealed"][:-8] + "AAAAAAA="}):
        with pytest.raises(KeyFileError):
            decrypt(json.dumps(fields | changed).encode(), PHRASE)


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b"\xff", b'{"format": "x", "peer_id": 3}'])
def test_other_files(content: bytes) -> None:
    """What is no backup is said to be none."""
    with pytest.raises(KeyFileError, match="not a backup"):
        decrypt(content, PHRASE)


def test_short_passphrase() -> None:
    """A passphrase that can be guessed is refused."""
    with pytest.raises(KeyFileError, match="too short"):
        encrypt(ALICE, "short")
