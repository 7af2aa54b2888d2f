"""The TLS key."""

from __future__ import annotations

import datetime
import stat
from pathlib import Path

import pytest
from cryptography import x509

from coordinator.tls import Certificate, create
from swarm.errors import KeyFileError
from swarm.rpc.client import fingerprint_of

NOW = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)


def test_made_once_and_private(tmp_path: Path) -> None:
    """The key is made at the first start, readable by its owner only, and kept."""
    first = Certificate.load_or_create(tmp_path, NOW)
    assert stat.S_IMODE((tmp_path / "tls.key").stat().st_mode) == 0o600
    assert Certificate.load_or_create(tmp_path, NOW) == first
    assert not list(tmp_path.glob("*.part"))


def test_fingerprint_is_the_keys() -> None:
    """Server and client compute the same fingerprint, and another key has another."""
    made = create(NOW)
    assert fingerprint_of(x509.load_pem_x509_certificate(made.certificate)) == made.fingerprint
    assert create(NOW).fingerprint != made.fingerprint


def test_half_a_pair_is_replaced(tmp_path: Path) -> None:
    """A first start that was cut short between the two files leaves nothing unusable."""
    Certificate.load_or_create(tmp_path, NOW)
    (tmp_path / "tls.crt").unlink()
    again = Certificate.load_or_create(tmp_path, NOW)
    assert again.fingerprint == Certificate.load_or_create(tmp_path, NOW).fingerprint


def test_unusable_folder(tmp_path: Path) -> None:
    """A folder that is none is a key error with a hint."""
    with pytest.raises(KeyFileError):
        Certificate.load_or_create(tmp_path / "missing", NOW)


def test_key_is_not_printed() -> None:
    """Printing the pair shows the fingerprint only."""
    made = create(NOW)
    assert repr(made) == f"Certificate({made.fingerprint.hex()})"
