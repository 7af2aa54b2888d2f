"""The coordinator's TLS key: self-signed ECDSA P-256, made at the first start; join links pin it by its fingerprint."""

from __future__ import annotations

import datetime
import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from cryptography.x509.oid import NameOID

from swarm.errors import KeyFileError
from swarm.rpc.client import TLS_NAME

VALID_DAYS = 36_500  # the pin is what is trusted, not the date
CIPHER_SUITES_VARIABLE = "GRPC_SSL_CIPHER_SUITES"
RSA_ONLY_SUITES = "ECDHE-RSA-AES128-GCM-SHA256"
KEY_FILE = "tls.key"
CERTIFICATE_FILE = "tls.crt"


@dataclass(frozen=True)
class Certificate:
    """A private key and its self-signed certificate, both PEM."""

    key: bytes
    certificate: bytes

    def __repr__(self) -> str:
        return f"Certificate({self.fingerprint.hex()})"

    @property
    def fingerprint(self) -> bytes:
        """SHA-256 of the SubjectPublicKeyInfo."""
        public_key = x509.load_pem_x509_certificate(self.certificate).public_key()
        return hashlib.sha256(public_key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)).digest()

    @classmethod
    def load_or_create(cls, folder: Path, now: datetime.datetime) -> Certificate:
        """The pair in `folder`, made at the first call; the key file is readable by its owner only."""
        key_path, certificate_path = folder / KEY_FILE, folder / CERTIFICATE_FILE
        try:
            if not certificate_path.exists():
                made = create(now)
                _write(key_path, made.key)
                _write(certificate_path, made.certificate)
            return cls(key_path.read_bytes(), certificate_path.read_bytes())
        except OSError as error:
            raise KeyFileError(f"can't use the TLS key in {folder}: {error.strerror}", "check who owns the folder") from error


def require_tls_1_3() -> None:
    """Offer no older TLS; call before gRPC is used for the first time in this process.

    gRPC can't be told a version. These suites are of TLS 1.2 and need an RSA key, which the coordinator's isn't: no client of
    TLS 1.2 finds one that fits. TLS 1.3 has its own suites, on which this has no influence.
    """
    os.environ[CIPHER_SUITES_VARIABLE] = RSA_ONLY_SUITES


def create(now: datetime.datetime) -> Certificate:
    """A new key with its certificate."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, TLS_NAME)])
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=3650))
        .not_valid_after(now + datetime.timedelta(days=VALID_DAYS))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(TLS_NAME)]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, SHA256())
    )
    private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    return Certificate(private, certificate.public_bytes(Encoding.PEM))


def _write(path: Path, content: bytes) -> None:
    """Replace `path` in one step, mode 0600: a start that was cut short leaves no half of a pair in use."""
    part = path.with_suffix(path.suffix + ".part")
    part.unlink(missing_ok=True)
    descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)
