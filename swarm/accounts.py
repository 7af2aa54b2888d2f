"""Account keys: one key of a volunteer certifies the keys of machines, and what these earn adds up under it.

A certificate is signed by the account key, and what the coordinator gets is signed around it by the machine's key: neither can
be put under the other without its own consent, and the ledger keeps both signatures. A machine key that is lost or stolen is
revoked by the account key; a lost machine costs nothing, since the account key needn't be on it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from swarm.errors import KeyFileError, Rejected
from swarm.identity import Identity, public_key_of
from swarm.messages import open_signed, parse, seal
from swarm.rpc.v1.signed_pb2 import HeldCertificate, KeyCertificate, KeyRevocation, Signed

CERTIFICATE_SUFFIX = ".certificate"
DAY_S = 86_400
LONGEST_DAYS = 3650
CLOCK_SLACK_S = 600


@dataclass(frozen=True)
class Certified:
    """An account's word for a machine's key, in Unix seconds."""

    account: str
    peer_id: str
    issued_at: int
    expires_at: int

    def holds_at(self, now_s: float) -> bool:
        """Whether it is valid at this time of the wall clock, give or take ten minutes."""
        return self.issued_at - CLOCK_SLACK_S <= now_s <= self.expires_at + CLOCK_SLACK_S


def certify(account: Identity, peer_id: str, now_s: float, days: int) -> Signed:
    """A certificate for a machine's key. Raises `Rejected` where `peer_id` is none."""
    public_key_of(peer_id)
    issued_at = int(now_s)
    body = KeyCertificate(account=account.peer_id, peer_id=peer_id, issued_at=issued_at, expires_at=issued_at + days * DAY_S)
    return seal(account, body)


def revoke(account: Identity, peer_id: str, run_id: bytes, now_s: float) -> Signed:
    """The account key's word that a machine's key earns nothing any more in a run. Raises `Rejected` where `peer_id` is none."""
    public_key_of(peer_id)
    return seal(account, KeyRevocation(run_id=run_id, account=account.peer_id, peer_id=peer_id, issued_at=int(now_s)))


def open_certificate(signed: Signed) -> Certified:
    """What a certificate says. Raises `Rejected`."""
    body = open_signed(signed, KeyCertificate)
    if body.account != signed.signer or body.account == body.peer_id:
        raise Rejected("bad_certificate", "not signed by the account that it names, or for itself", signed.signer)
    public_key_of(body.peer_id)
    return Certified(body.account, body.peer_id, body.issued_at, body.expires_at)


def open_held(held: Signed, peer_id: str) -> Certified:
    """The certificate that the machine's key `peer_id` has accepted. Raises `Rejected`."""
    certified = open_certificate(open_signed(held, HeldCertificate, signer=peer_id).certificate)
    if certified.peer_id != peer_id:
        raise Rejected("bad_certificate", "of another key", peer_id)
    return certified


def hold(identity: Identity, path: Path) -> Signed | None:
    """The certificate in a file, accepted by the machine's key; None where there is no such file. Raises `KeyFileError`."""
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise KeyFileError(f"can't read {path}: {error.strerror}", "check who owns the file") from error
    try:
        signed = parse(Signed, raw)
        certified = open_certificate(signed)
    except Rejected as error:
        raise KeyFileError(f"{path} is no certificate: {error}", "make one with: swarm identity certify") from error
    if certified.peer_id != identity.peer_id:
        raise KeyFileError(f"{path} is for {certified.peer_id}, not for this key", "make one with: swarm identity certify")
    return seal(identity, HeldCertificate(certificate=signed))
