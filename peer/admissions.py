"""Who may take part, and in which protocol: the coordinator's signed tokens, checked by every peer for itself."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from swarm.clock import Clock, SystemClock
from swarm.errors import Rejected
from swarm.messages import open_signed
from swarm.protocol import DISAGREEMENTS, OURS, Range, agree, spoken_by
from swarm.rpc.v1.signed_pb2 import AdmissionToken, Signed

CLOCK_SLACK_S = 900.0
MAX_TOKENS = 100_000


class Known(NamedTuple):
    """A valid token, and what it says."""

    token: Signed
    expires_at: int
    newcomer: bool
    spoken: Range


@dataclass
class Admissions:
    """The valid tokens that this peer has seen, of those who speak a protocol that it does, too.

    Expiry allows for clocks that are a quarter of an hour off.
    """

    run_id: bytes
    coordinator: str
    clock: Clock = SystemClock()
    spoken: Range = OURS
    _tokens: dict[str, Known] = field(default_factory=dict)

    def admit(self, token: Signed) -> str:
        """Check a token and remember its holder; the holder's peer id. Raises `Rejected`."""
        admission = open_signed(token, AdmissionToken, signer=self.coordinator, run_id=self.run_id)
        if admission.expires_at + CLOCK_SLACK_S < self.clock.wall_s():
            raise Rejected("admission_expired", "", admission.peer_id)
        if admission.peer_id not in self._tokens and len(self._tokens) >= MAX_TOKENS:
            self._forget_expired()
        known = self._tokens.get(admission.peer_id)
        if known is None or known.expires_at < admission.expires_at:
            self._tokens.pop(admission.peer_id, None)  # also where it speaks another protocol by now
            spoken = spoken_by(admission, admission.peer_id)
            agree(spoken, self.spoken, admission.peer_id)
            self._tokens[admission.peer_id] = Known(token, admission.expires_at, admission.newcomer, spoken)
        return admission.peer_id

    def fit(self, peer: str, others: Iterable[str]) -> None:
        """Let pass an admitted peer that speaks a protocol which the others and we have in common. Raises `Rejected`."""
        common = self.spoken
        for known in filter(None, map(self._tokens.get, others)):
            with contextlib.suppress(Rejected):
                common = common.narrowed(known.spoken)
        mine = self._tokens.get(peer)
        if mine is not None:
            agree(mine.spoken, common, peer)

    def is_admitted(self, peer: str) -> bool:
        """Whether a valid token of the peer is known."""
        known = self._tokens.get(peer)
        return known is not None and known.expires_at + CLOCK_SLACK_S >= self.clock.wall_s()

    def is_newcomer(self, peer: str) -> bool:
        """Whether the newest token of the peer that we have seen says that all of its contributions are still audited."""
        known = self._tokens.get(peer)
        return known is not None and known.newcomer

    def check(self, peer: str, token: Signed | None) -> bool:
        """Whether the peer is known to be admitted, or shows a valid token of its own now. What it shows may be newer."""
        with contextlib.suppress(Rejected):
            self.require(peer, token, "")
        return self.is_admitted(peer)

    def require(self, peer: str, token: Signed | None, detail: str) -> None:
        """`check`, where a refusal tells which side speaks too old a protocol. Raises `Rejected`."""
        known = self._tokens.get(peer)
        refusal = Rejected("not_admitted", detail, peer)
        if token is not None and token.payload and (known is None or token.payload != known.token.payload):
            try:
                self.admit(token)
            except Rejected as error:
                refusal = error if error.reason in DISAGREEMENTS and error.sender == peer else refusal
        if not self.is_admitted(peer):
            raise refusal

    def token(self, peer: str) -> Signed | None:
        """The token of a peer, to show it to others."""
        known = self._tokens.get(peer)
        return known.token if known else None

    def _forget_expired(self) -> None:
        now = self.clock.wall_s()
        self._tokens = {peer: known for peer, known in self._tokens.items() if known.expires_at + CLOCK_SLACK_S >= now}
        if len(self._tokens) >= MAX_TOKENS:
            raise Rejected("busy", "too many admitted peers")
