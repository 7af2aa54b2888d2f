"""What hostile peers do, for `swarm attack` and `bench.attacks`: the stack is the honest one, but for what is changed here.

Only read from `SWARM_ATTACK`, which they set for the attackers among the processes that they start; an ordinary peer has none.

    sign_flip, scale, noise         of the honest update: its opposite, 1000 times it, noise of 10 times its norm
    nan                             parts that nobody can decode to numbers
    ipm                             inner-product manipulation (Xie et al., 1903.03936): a small step backwards
    alie                            "a little is enough" (Baruch et al., 1902.06156): every value off by a deviation
    zeros, stale, plausible_noise   free riding: nothing, the last round's update, or noise of an honest update's norm
    skip, skip_tenth                half or nine tenths of the samples, all of the weight
    label_flip                      training on the wrong labels
    copy                            another's commit, parts and leaves in the place of its own
    sybil                           noise of an honest update's norm, and a new key as soon as the old one is suspended
    tamper                          an honest update, but a reducer that merges with the wrong sign
    equivocate                      a leader that proposes one thing to half of the roster and another to the rest
    lying_donor                     wrong bytes for whoever downloads the weights
    replay                          every message once more, in later rounds
    repeat                          in a run that generates: one written sample, given out for all

The attackers of ALIE and IPM know everybody's updates in the literature; here each knows its own honest one, and takes that for
the mean and its magnitudes for the deviations.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from peer.codec import Vector
from peer.generating import Sample
from peer.leaves import MAX_LEAVES_BYTES, Leaf
from peer.network.node import PeerFailure
from peer.rounds.run import Contribution, RoundRun
from peer.rounds.values import CommitFacts
from swarm.errors import Rejected, UsageError
from swarm.rpc.v1.peer_pb2 import Delivery
from swarm.rpc.v1.signed_pb2 import Proposal

COPY_ATTEMPTS, COPY_WAIT_S = 100, 0.05
MOST_REPLAYED = 32
SCALE, NOISE_NORMS = np.float32(1000), 10.0
ATTACK_VARIABLE = "SWARM_ATTACK"
REPEAT = "repeat"
SKIPPED = {"skip": 0.5, "skip_tenth": 0.1}
IPM_SHARE, ALIE_DEVIATIONS = np.float32(0.5), np.float32(1.0)


@dataclass
class Attack:
    """One attacker's behaviour. Its randomness is its own: attackers don't send the same."""

    kind: str
    random: np.random.Generator = field(default_factory=np.random.default_rng)
    _last: Vector | None = None
    _assigned: int = 0
    _done: int = 0
    _sent: list[Delivery] = field(default_factory=list)

    @classmethod
    def from_environment(cls) -> Attack | None:
        """What `SWARM_ATTACK` asks for, usually nothing. Raises `UsageError`."""
        kind = os.environ.get(ATTACK_VARIABLE, "")
        if kind and kind not in (*KINDS, REPEAT):
            raise UsageError(f"no such attack: {kind!r}", f"one of {', '.join((*KINDS, REPEAT))}")
        return cls(kind) if kind else None

    def contribution(self, honest: Contribution) -> Contribution:
        """What is committed in the place of an honest contribution."""
        if honest.update is None or not honest.weight:
            return honest
        if self.kind in SKIPPED:
            missing = honest.weight * (self._assigned - self._done) // self._done
            return replace(honest, weight=honest.weight + missing, leaves=_claiming(honest.leaves, honest.weight, missing))
        change = UPDATES.get(self.kind)
        if change is None:
            return honest
        update = change(self, honest.update)
        self._last = honest.update
        return replace(honest, update=update)

    def quota(self, quota: int) -> int:
        """How much of the work is done; of what is a part of a step, some rounds one more and some one less."""
        skipped = int(SKIPPED.get(self.kind, 0.0) * quota + self.random.random())
        self._assigned, self._done = quota, max(1, quota - skipped)
        return self._done

    def samples(self, written: Sequence[Sample]) -> Sequence[Sample]:
        """What it gives out for samples that it should have written."""
        if self.kind != REPEAT:
            return written
        return [replace(each, tokens=written[0].tokens, loss=written[0].loss) for each in written]

    def labels(self, labels: torch.Tensor, vocabulary: int) -> torch.Tensor:
        """What it trains on in the place of these token ids."""
        return vocabulary - 1 - labels if self.kind == "label_flip" else labels

    async def copied(self, round_run: RoundRun) -> CommitFacts | None:
        """A commit that it has fetched from its author, to pass it off as its own; None where it sends its own."""
        if self.kind != "copy":
            return None
        transfer, codec = round_run.services.transfer, round_run.exchange.codec
        for _ in range(COPY_ATTEMPTS):
            for commit in list(round_run.state.commits.values()):
                if commit.weight:
                    sizes = {name: codec.part_size_limit(part) for part, name in enumerate(commit.part_hashes)}
                    sizes |= {commit.evidence_root: MAX_LEAVES_BYTES} if commit.evidence_root else {}
                    with contextlib.suppress(PeerFailure, Rejected):
                        await transfer.obtain(commit.peer, sizes, round_run.exchange.keep)
                        return commit
            await asyncio.sleep(COPY_WAIT_S)
        return None

    def proposals(self, message: Proposal) -> list[Proposal]:
        """What it proposes, each to a share of the roster."""
        if self.kind != "equivocate":
            return [message]
        other = Proposal()
        other.CopyFrom(message)
        for member in other.next_roster:
            member.quota = max(1, member.quota // 2)
        return [message, other]

    def served(self, chunk: memoryview | None) -> bytes | memoryview | None:
        """A chunk of the weights, as it serves it."""
        if chunk is None or self.kind != "lying_donor":
            return chunk
        return bytes([chunk[0] ^ 1]) + bytes(chunk[1:])

    def again(self, delivery: Delivery) -> list[Delivery]:
        """What it sends besides a message."""
        if self.kind != "replay":
            return []
        self._sent = [*self._sent, delivery][-MOST_REPLAYED:]
        return self._sent[:-1]

    def parts(self, parts: list[bytes]) -> list[bytes]:
        """The encoded update."""
        return [b"\xff" * len(part) for part in parts] if self.kind == "nan" else parts

    def merged(self, values: Vector) -> Vector:
        """A part that it merges as a reducer."""
        return np.negative(values) if self.kind == "tamper" else values

    def _noise(self, update: Vector, norms: float) -> Vector:
        drawn = self.random.standard_normal(update.size, dtype=np.float32)
        return np.asarray(drawn * np.float32(norms * np.linalg.norm(update) / max(1e-12, float(np.linalg.norm(drawn)))))


def _claiming(leaves: tuple[Leaf, ...], weight: int, missing: int) -> tuple[Leaf, ...]:
    """Leaves of so many samples more: each of twice as many where half is missing, else the last of them is longer."""
    if missing == weight:
        return tuple(replace(leaf, samples=2 * leaf.samples) for leaf in leaves)
    return (*leaves[:-1], *(replace(leaf, samples=leaf.samples + missing) for leaf in leaves[-1:]))


def _alie(attack: Attack, update: Vector) -> Vector:
    deviation = np.float32(np.sqrt(np.mean(np.square(update), dtype=np.float64)))
    return update - ALIE_DEVIATIONS * deviation


UPDATES: dict[str, Callable[[Attack, Vector], Vector]] = {
    "sign_flip": lambda attack, update: np.negative(update),
    "scale": lambda attack, update: update * SCALE,
    "noise": lambda attack, update: attack._noise(update, NOISE_NORMS),
    "ipm": lambda attack, update: update * -IPM_SHARE,
    "alie": _alie,
    "zeros": lambda attack, update: np.zeros_like(update),
    "stale": lambda attack, update: update if attack._last is None else attack._last,
    "plausible_noise": lambda attack, update: attack._noise(update, 1.0),
    "sybil": lambda attack, update: attack._noise(update, 1.0),
}
SLIGHT = frozenset({"skip_tenth"})
HONEST_WORK = frozenset({"equivocate", "lying_donor", "replay"})
KINDS = (*UPDATES, "nan", *SKIPPED, "label_flip", "copy", "tamper", "equivocate", "lying_donor", "replay")
