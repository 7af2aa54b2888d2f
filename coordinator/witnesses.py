"""The checkpoint that witnesses are asked to cosign: the same one for a while, so that their signatures come together on it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from swarm.errors import LedgerInvalid, Rejected
from swarm.witness import cosigners, witness_of

PINNED_S = 60.0


@dataclass
class _Note:
    """A signed note and the witnesses' lines that have come for it, by peer id."""

    text: str
    size: int
    since_s: float
    lines: dict[str, str] = field(default_factory=dict)

    @property
    def whole(self) -> str:
        return self.text + "".join(self.lines[peer] for peer in sorted(self.lines))


@dataclass
class Witnessed:
    """Cosignatures by those who are `allowed`; kept in memory, since witnesses come again within minutes."""

    allowed: frozenset[str]
    _open: _Note | None = None
    _best: _Note | None = None

    def to_cosign(self, sign: Callable[[], tuple[str, int]], least_size: int, now_s: float) -> tuple[str, int]:
        """The note that is to be cosigned, and its size; a new one by `sign` once it is old or smaller than asked for."""
        now = self._open
        if now is None or now_s - now.since_s > PINNED_S or now.size < least_size:
            if now is not None and (self._best is None or len(now.lines) >= len(self._best.lines)):
                self._best = now
            now = self._open = _Note(*sign(), now_s)
        return now.whole, now.size

    def cosigned(self) -> tuple[str, int] | None:
        """The note with the most cosignatures, the newest of these; None before the first."""
        known = [note for note in (self._best, self._open) if note is not None and note.lines]
        best = max(known, key=lambda note: (len(note.lines), note.size), default=None)
        return None if best is None else (best.whole, best.size)

    def add(self, line: str) -> int:
        """Take a witness's line for the note that is to be cosigned; how many it has now. Raises `Rejected`."""
        note = self._open
        if note is None:
            raise Rejected("stale", "ask for the checkpoint first")
        peer = witness_of(line)
        if peer not in self.allowed:
            raise Rejected("not_a_witness", "the operator hasn't named this key as a witness", peer)
        try:
            cosigners(note.text + line)
        except LedgerInvalid as error:
            raise Rejected("bad_signature", f"{error.message}, or it is of an older checkpoint", peer) from error
        note.lines[peer] = line
        return len(note.lines)
