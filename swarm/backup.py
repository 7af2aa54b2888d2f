"""Encrypted copies of a key: scrypt (RFC 7914) over a passphrase, then ChaCha20-Poly1305 (RFC 8439).

The file is JSON, so that it can be printed, and names the peer id, so that one knows whose it is.
"""

from __future__ import annotations

import base64
import binascii
import json
import os
from typing import Any

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.kdf.scrypt import Scrypt

from swarm.errors import KeyFileError
from swarm.identity import Identity

FORMAT = "swarm-identity-backup-1"
SCRYPT_N = 1 << 16  # 64 MiB
SCRYPT_R = 8
SALT_BYTES = 16
NONCE_BYTES = 12
MIN_PASSPHRASE = 8
HINT = "use the file that `swarm identity backup` wrote, and the passphrase that was given then"


def encrypt(identity: Identity, passphrase: str) -> bytes:
    """The backup file's content. Raises `KeyFileError` for a passphrase that is too short."""
    if len(passphrase) < MIN_PASSPHRASE:
        raise KeyFileError("the passphrase is too short", f"take at least {MIN_PASSPHRASE} characters, better a sentence")
    salt, nonce = os.urandom(SALT_BYTES), os.urandom(NONCE_BYTES)
    sealed = ChaCha20Poly1305(_key(passphrase, salt)).encrypt(nonce, identity.seed, _bound(identity.peer_id))
    fields = {"salt": salt, "nonce": nonce, "sealed": sealed}
    encoded = {name: base64.b64encode(value).decode() for name, value in fields.items()}
    return (json.dumps({"format": FORMAT, "peer_id": identity.peer_id, **encoded}, indent=1) + "\n").encode()


def decrypt(content: bytes, passphrase: str) -> Identity:
    """The key in a backup file. Raises `KeyFileError` for a wrong passphrase or a broken file."""
    try:
        fields = json.loads(content)
        peer_id = _field(fields, "peer_id")
        salt, nonce, sealed = (base64.b64decode(_field(fields, name)) for name in ("salt", "nonce", "sealed"))
    except (ValueError, KeyError, TypeError, binascii.Error) as error:
        raise KeyFileError("not a backup of a key", HINT) from error
    if fields.get("format") != FORMAT or len(nonce) != NONCE_BYTES:
        raise KeyFileError("not a backup of a key", HINT)
    try:
        seed = ChaCha20Poly1305(_key(passphrase, salt)).decrypt(nonce, sealed, _bound(peer_id))
        identity = Identity.from_seed(seed)
    except (InvalidTag, ValueError) as error:
        raise KeyFileError("the passphrase is wrong or the backup is damaged", HINT) from error
    if identity.peer_id != peer_id:
        raise KeyFileError("the backup holds another key than it says", HINT)
    return identity


def _key(passphrase: str, salt: bytes) -> bytes:
    return Scrypt(salt=salt, length=32, n=SCRYPT_N, r=SCRYPT_R, p=1).derive(passphrase.encode())


def _bound(peer_id: str) -> bytes:
    return f"{FORMAT}\n{peer_id}".encode()


def _field(fields: Any, name: str) -> str:
    value = fields[name]
    if not isinstance(value, str):
        raise TypeError(name)
    return value
