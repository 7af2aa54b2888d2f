"""Keys, peer ids and signatures."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarm.errors import KeyFileError, Rejected
from swarm.identity import Identity, peer_id_of, pre_authentication_encoding, public_key_of, verify

KIND = "application/vnd.swarm.commit.v1"
ALICE = Identity.from_seed(bytes(range(32)))


def test_golden_peer_id() -> None:
    """A seed gives the peer id that libp2p derives from the same key."""
    assert ALICE.peer_id == "12D3KooWA4Xop1JaT3MHxwYMkCepYsv4iPVopMXwCz5iHYdBfeSB"


def test_golden_signature() -> None:
    """What is signed is DSSE's pre-authentication encoding, byte for byte."""
    encoded = pre_authentication_encoding(KIND, b"hi")
    assert encoded == b"DSSEv1 31 application/vnd.swarm.commit.v1 2 hi"
    assert ALICE.sign(KIND, b"hi").hex() == (
        "771393faacdddf633e8361b228a09fe70f7cc7c1495f21c10814d3fcef70d4fa"
        "3e916eb128154c96d1094f4193ca16cf199789c783687d852eafe5e1d6a7d50a"
    )


@given(st.binary(min_size=32, max_size=32), st.text(max_size=20), st.binary(max_size=100))
def test_sign_and_verify(seed: bytes, kind: str, payload: bytes) -> None:
    """A signature holds for its own kind and payload, and the peer id gives the public key back."""
    identity = Identity.from_seed(seed)
    verify(identity.peer_id, kind, payload, identity.sign(kind, payload))
    assert peer_id_of(public_key_of(identity.peer_id)) == identity.peer_id
    with pytest.raises(Rejected, match="bad_signature"):
        verify(identity.peer_id, kind + "x", payload, identity.sign(kind, payload))


@pytest.mark.parametrize("peer_id", ["", "0", "Qm" + "a" * 44, "1" * 500, ALICE.peer_id[:-1]])
def test_foreign_peer_ids_are_refused(peer_id: str) -> None:
    """Only an Ed25519 peer id is taken for one."""
    with pytest.raises(Rejected, match="bad_peer_id"):
        public_key_of(peer_id)


def test_key_file_round_trip(tmp_path: Path) -> None:
    """A key file is private and gives the same identity back."""
    path = tmp_path / "folder" / "key"
    ALICE.save(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert Identity.load(path).seed == Identity.load_or_create(path).seed == ALICE.seed


def test_key_is_never_overwritten(tmp_path: Path) -> None:
    """Saving to an existing path fails."""
    ALICE.save(tmp_path / "key")
    with pytest.raises(KeyFileError, match="exists"):
        Identity.generate().save(tmp_path / "key")


def test_key_readable_by_others_is_refused(tmp_path: Path) -> None:
    """A key that others can read isn't used."""
    ALICE.save(tmp_path / "key")
    (tmp_path / "key").chmod(0o644)
    with pytest.raises(KeyFileError, match="readable by others"):
        Identity.load(tmp_path / "key")


def test_damaged_key_is_named(tmp_path: Path) -> None:
    """A key file whose halves differ is not used."""
    path = tmp_path / "key"
    ALICE.save(path)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(KeyFileError, match="damaged"):
        Identity.load(path)
    path.write_bytes(b"short")
    with pytest.raises(KeyFileError, match="not an Ed25519 key file"):
        Identity.load(path)


def test_secret_is_not_shown() -> None:
    """Printing an identity shows the peer id only."""
    assert repr(ALICE) == f"Identity({ALICE.peer_id})"
