"""One Ed25519 key per peer: the libp2p identity, the signer of every message and the name in the ledger.

Keys are stored in libp2p's own format (`PrivateKey{type: Ed25519, data: private || public}`), so that the same file is the
network identity. The peer id of an Ed25519 key *contains* the public key (libp2p peer-ids specification, identity multihash):
any signature can be checked from the peer id alone. Signatures are over DSSE's pre-authentication encoding
(https://github.com/secure-systems-lab/dsse/blob/master/protocol.md), which separates every kind of message from every other.

Libsodium signs and checks: it refuses keys and signatures with points of small order, which other libraries let pass, so that
anybody could sign anything with such a key. It is also the quicker one.
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import base58
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from nacl.bindings import crypto_sign, crypto_sign_open
from nacl.exceptions import BadSignatureError

from swarm.errors import KeyFileError, Rejected

PEER_ID_PREFIX = bytes.fromhex("002408011220")  # identity multihash, 36 bytes; protobuf {type: Ed25519, data: 32 bytes}
PEER_ID_BYTES = len(PEER_ID_PREFIX) + 32
KEY_FILE_PREFIX = bytes.fromhex("08011240")  # protobuf {type: Ed25519, data: 64 bytes}
KEY_FILE_BYTES = len(KEY_FILE_PREFIX) + 64
SIGNATURE_BYTES = 64


def pre_authentication_encoding(payload_type: str, payload: bytes) -> bytes:
    """The exact bytes that are signed: DSSE's `PAE(type, payload)`."""
    kind = payload_type.encode()
    return b"DSSEv1 %d %b %d %b" % (len(kind), kind, len(payload), payload)


def peer_id_of(public_key: bytes) -> str:
    """The base58 libp2p peer id of a raw 32-byte Ed25519 public key."""
    return str(base58.b58encode(PEER_ID_PREFIX + public_key).decode())


@lru_cache(maxsize=65536)
def public_key_of(peer_id: str) -> bytes:
    """The raw 32-byte public key inside a peer id. Raises `Rejected` for anything but an Ed25519 peer id."""
    if len(peer_id) > 64:
        raise Rejected("bad_peer_id", "too long")
    try:
        decoded: bytes = base58.b58decode(peer_id)
    except ValueError as error:
        raise Rejected("bad_peer_id", "not base58") from error
    if len(decoded) != PEER_ID_BYTES or not decoded.startswith(PEER_ID_PREFIX):
        raise Rejected("bad_peer_id", "not an Ed25519 peer id")
    return decoded[len(PEER_ID_PREFIX) :]


def is_valid(public_key: bytes, signature: bytes, message: bytes) -> bool:
    """Whether the 64-byte signature is the 32-byte key's, over the message."""
    try:
        crypto_sign_open(signature + message, public_key)
    except BadSignatureError:
        return False
    return True


def verify(peer_id: str, payload_type: str, payload: bytes, signature: bytes) -> None:
    """Check a signature by the key inside `peer_id`. Raises `Rejected` when it is not valid."""
    if len(signature) != SIGNATURE_BYTES:
        raise Rejected("bad_signature", "wrong length", peer_id)
    if not is_valid(public_key_of(peer_id), signature, pre_authentication_encoding(payload_type, payload)):
        raise Rejected("bad_signature", payload_type, peer_id)


@dataclass(frozen=True)
class Identity:
    """A private key and the peer id that follows from it."""

    private_key: Ed25519PrivateKey
    peer_id: str

    def __repr__(self) -> str:
        return f"Identity({self.peer_id})"

    @classmethod
    def from_seed(cls, seed: bytes) -> Identity:
        """The identity of a 32-byte Ed25519 seed."""
        key = Ed25519PrivateKey.from_private_bytes(seed)
        return cls(key, peer_id_of(key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)))

    @classmethod
    def generate(cls) -> Identity:
        """A new random identity."""
        return cls.from_seed(os.urandom(32))

    @property
    def seed(self) -> bytes:
        """The 32 secret bytes."""
        return self.private_key.private_bytes(Encoding.Raw, PrivateFormat.Raw, NoEncryption())

    def sign(self, payload_type: str, payload: bytes) -> bytes:
        """Sign `PAE(payload_type, payload)`; 64 bytes."""
        return crypto_sign(pre_authentication_encoding(payload_type, payload), self._secret)[:SIGNATURE_BYTES]

    @cached_property
    def _secret(self) -> bytes:
        """Seed and public key, 64 bytes: as libsodium and libp2p have it."""
        return self.seed + public_key_of(self.peer_id)

    def save(self, path: Path) -> None:
        """Write a new key file, mode 0600. Raises `KeyFileError` if the path exists."""
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        content = KEY_FILE_PREFIX + self._secret
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        except FileExistsError as error:
            raise KeyFileError(f"{path} exists already", "a key is never overwritten; choose another path") from error
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())

    @classmethod
    def load(cls, path: Path) -> Identity:
        """Read a key file. Raises `KeyFileError` if it is missing, readable by others, or broken."""
        try:
            mode = path.stat().st_mode
            content = path.read_bytes()
        except FileNotFoundError as error:
            raise KeyFileError(f"no key at {path}", "make one with: swarm identity new") from error
        except OSError as error:
            raise KeyFileError(f"can't read the key {path}: {error.strerror}", "check who owns the file") from error
        if stat.S_IMODE(mode) & 0o077:
            raise KeyFileError(f"the key {path} is readable by others", f"run: chmod 600 {path}")
        if len(content) != KEY_FILE_BYTES or not content.startswith(KEY_FILE_PREFIX):
            raise KeyFileError(f"{path} is not an Ed25519 key file", "restore it with: swarm identity restore")
        identity = cls.from_seed(content[len(KEY_FILE_PREFIX) :][:32])
        if content[-32:] != public_key_of(identity.peer_id):
            raise KeyFileError(f"{path} is damaged: its two halves differ", "restore it with: swarm identity restore")
        return identity

    @classmethod
    def load_or_create(cls, path: Path) -> Identity:
        """The key at `path`, made at the first call."""
        if not path.exists():
            cls.generate().save(path)
        return cls.load(path)
