"""How evenly a mixture's tokens are spread over its experts, as a peer shows it. Needs neither torch nor numpy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class ExpertLoad:
    """A round's visits to the experts of all layers.

    `busiest` and `idlest` are the most and the fewest that one had, over an even share within its layer; `unused` of `experts`
    had none.
    """

    busiest: float
    idlest: float
    unused: int
    experts: int

    @classmethod
    def of(cls, visits: Sequence[Sequence[float]]) -> ExpertLoad:
        """From the visits, [layers, experts], of which each layer has some."""
        shares = [count * len(layer) / sum(layer) for layer in visits for count in layer]
        return cls(max(shares), min(shares), shares.count(0.0), len(shares))
