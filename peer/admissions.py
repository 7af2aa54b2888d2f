"""Who may take part: the coordinator's signed tokens, checked by every peer for itself."""

from __future__ import annotations

from dataclasses import dataclass, field

from swarm.clock import Clock, SystemClock
from swarm.errors import Rejected
from swarm.messages import open_signed
from swarm.rpc.v1.signed_pb2 import AdmissionToken, Signed

CLOCK_SLACK_S = 900.0
MAX_TOKENS = 100_000


@dataclass
class Admissions:
    """The valid tokens that this peer has seen. Expiry allows for clocks that are a quarter of an hour off."""

    run_id: bytes
    coordinator: str
    clock: Clock = SystemClock()
    _tokens: dict[str, tuple[Signed, float]] = field(default_factory=dict)

    def admit(self, token: Signed) -> str:
        """Check a token and remember its holder; the holder's peer id. Raises `Rejected`."""
        admission = open_signed(token, AdmissionToken, signer=self.coordinator, run_id=self.run_id)
        if admission.expires_at + CLOCK_SLACK_S < self.clock.wall_s():
            raise Rejected("admission_expired", "", admission.peer_id)
        if admission.peer_id not in self._tokens and len(self._tokens) >= MAX_TOKENS:
            self._forget_expired()
        known = self._tokens.get(admission.peer_id)
        if known is None or known[1] < admission.expires_at:
            self._tokens[admission.peer_id] = (token, float(admission.expires_at))
        return admission.peer_id

    def is_admitted(self, peer: str) -> bool:
        """Whether a valid token of the peer is known."""
        known = self._tokens.get(peer)
        return known is not None and known[1] + CLOCK_SLACK_S >= self.clock.wall_s()

    def check(self, peer: str, token: Signed | None) -> bool:
        """Whether the peer is known to be admitted, or shows a valid token of its own now."""
        if self.is_admitted(peer):
            return True
        if token is None or not token.payload:
            return False
        try:
            return self.admit(token) == peer
        except Rejected:
            return False

    def token(self, peer: str) -> Signed | None:
        """The token of a peer, to show it to others."""
        known = self._tokens.get(peer)
        return known[0] if known else None

    def _forget_expired(self) -> None:
        now = self.clock.wall_s()
        self._tokens = {peer: item for peer, item in self._tokens.items() if item[1] + CLOCK_SLACK_S >= now}
        if len(self._tokens) >= MAX_TOKENS:
            raise Rejected("busy", "too many admitted peers")
