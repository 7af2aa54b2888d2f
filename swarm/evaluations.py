"""Held-out loss on which a quorum of peers agrees: who measures it, and what their statements come to. Pure functions.

Evaluators are drawn from the coordinator's signature of a round's confirmation, as audits are (`swarm.audits`): nobody chooses
them, and anyone can draw again. They measure the state that the round came to. Who differs from the others is not convicted of
anything: a device may compute badly. Evaluations earn no credit.
"""

from __future__ import annotations

import hashlib
import math
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

LARGEST_LOSS = 1e6  # nats per token; nothing that is trained comes near
MOST_PROMPTS = 4
MOST_TEXT_BYTES = 1024
OPEN_PANELS = 4
MOST_AGREED = 512
LARGEST_EXPONENT = 700.0
HIDDEN = re.compile(
    "[\x00-\x09\x0b-\x1f\x7f-\x9f\u00ad\u061c\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    "\U000e0000-\U000e007f]"
)
"""Characters that are no text: controls, and those that hide or turn round what stands beside them. Named one by one, as what
Python takes for printable changes with its version, and a ledger's rules must not."""


class Said(NamedTuple):
    """What an evaluator has stated: the loss in nats per token, a text for each prompt, and which entry of the ledger it is."""

    loss: float
    texts: tuple[str, ...] = ()
    entry: int = 0


class Agreement(NamedTuple):
    """The median loss of those who agree, and who they are."""

    loss: float
    by: tuple[str, ...]


@dataclass(slots=True)
class Panel:
    """The peers that are drawn to measure the state after a round, and what they have stated, in the order of the ledger.

    `place` is the round's among the confirmed ones, `at_us` when it was confirmed.
    """

    round: int
    state_root: bytes
    evaluators: tuple[str, ...]
    place: int = 0
    at_us: int = 0
    statements: dict[str, Said] = field(default_factory=dict)

    @property
    def is_complete(self) -> bool:
        """Whether all have spoken."""
        return 0 < len(self.statements) == len(self.evaluators)

    def agreement(self, quorum: int, tolerance: float) -> Agreement | None:
        """What they agree on, if they do."""
        return agree_on({peer: said.loss for peer, said in self.statements.items()}, quorum, tolerance)


class Agreed(NamedTuple):
    """A panel that has agreed: on which loss, how many of those who have spoken."""

    round: int
    place: int
    at_us: int
    loss: float
    evaluators: int
    statements: int


def draw_evaluators(beacon: bytes, round_index: int, accounts: Mapping[str, str], count: int) -> tuple[str, ...]:
    """So many of the peers, given with the account of each; no account has a second one before every account has one."""
    about = hashlib.blake2b(f"evaluate/{round_index}/".encode(), digest_size=32, key=beacon)

    def drawn(peer: str) -> bytes:
        mine = about.copy()
        mine.update(peer.encode())
        return mine.digest()

    seen: dict[str, int] = {}
    order = sorted(accounts, key=drawn)
    turns = {}
    for peer in order:
        turns[peer] = seen[accounts[peer]] = seen.get(accounts[peer], 0) + 1
    return tuple(sorted(order, key=turns.__getitem__)[:count])


def agree_on(losses: Mapping[str, float], quorum: int, tolerance: float) -> Agreement | None:
    """The agreement of those within the relative tolerance of the median: at least a quorum, and more than half of all."""
    if not losses:
        return None
    middle = statistics.median(losses.values())
    near = {peer: loss for peer, loss in losses.items() if abs(loss - middle) <= tolerance * middle}
    if len(near) < quorum or 2 * len(near) <= len(losses):
        return None
    return Agreement(statistics.median(near.values()), tuple(near))


def perplexity(loss: float) -> float:
    """Of a loss in nats per token; bounded where no number is as large."""
    return math.exp(min(loss, LARGEST_EXPONENT))


def best_of(agreed: Sequence[Agreed]) -> Agreed | None:
    """The one with the lowest loss, the first of several."""
    return min(agreed, key=lambda each: (each.loss, each.round), default=None)


def thinned(agreed: Sequence[Agreed], most: int = MOST_AGREED) -> list[Agreed]:
    """Every other one where there are more than `most`; the newest and the best stay."""
    if len(agreed) <= most:
        return list(agreed)
    best = best_of(agreed)
    return [each for place, each in enumerate(agreed) if (len(agreed) - place) % 2 or each is best]


def spoken_texts(panel: Panel, by: Sequence[str]) -> tuple[tuple[str, ...], int]:
    """The texts that most of these evaluators have written alike, of several the first; and how many they are."""
    written = [panel.statements[peer].texts for peer in by if panel.statements[peer].texts]
    if not written:
        return (), 0
    most = max(written, key=written.count)
    return most, written.count(most)


def cleaned(text: str, most_bytes: int = MOST_TEXT_BYTES) -> str:
    """What may be shown of a text, blanks for `HIDDEN` ones: as many whole characters as fit into so many bytes."""
    return HIDDEN.sub(" ", text).encode(errors="replace")[:most_bytes].decode(errors="ignore")
