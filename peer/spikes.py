"""Whether a round is a spike, which is to change nothing: a pure function of what all peers agree on.

After OLMo's skip-step (OLMo 2, 2501.00656; a step is left out where loss or gradient norm is more than 6 standard deviations
above those of the last 128 steps) and PaLM's skipped batches (2204.02311, section 5.1). Here strangers say what their loss was,
so a round's loss is the weighted median of the contributors': whoever has less than half of the weight can't move it past what
the others say. A merged update's norm alone is no reason, as the merge rule lets one contributor move it somewhat; it halves
what the loss must exceed. In the place of mean and standard deviation there are the median and the median absolute deviation,
which the spikes among the rounds before don't widen.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from swarm.manifest import SkipSpikes

MAD_TO_DEVIATION = 1.4826  # of a normal distribution
LEAST_DEVIATION = 0.02  # of the median: what is all but constant has no spikes of a few thousandths


@dataclass(frozen=True)
class Recent:
    """Part of the agreed state: of the last rounds, the oldest first, the loss in nats per token and the merged update's norm.

    Rounds that were skipped are among them, so that what lasts becomes usual. `skipped` counts those of the whole run.
    """

    losses: tuple[float, ...] = ()
    norms: tuple[float, ...] = ()
    skipped: int = 0

    def after(self, settings: SkipSpikes, loss: float, norm: float) -> Recent:
        """What is agreed after one more round; it counts as skipped if it is a spike. A norm that isn't finite is one."""
        skipped = self.skipped + int(is_spike(settings, self, loss, norm))
        if not math.isfinite(norm):
            return Recent(self.losses, self.norms, skipped)
        last = settings.window
        return Recent((*self.losses, loss)[-last:], (*self.norms, norm)[-last:], skipped)


def weighted_median(values: Iterable[tuple[float, int]]) -> float:
    """Of (value, weight) the smallest value that half of the weight doesn't exceed. Raises `ValueError` without any weight."""
    ordered = sorted(values)
    total, reached = sum(weight for _, weight in ordered), 0
    for value, weight in ordered:
        reached += weight
        if weight and 2 * reached >= total:
            return value
    raise ValueError("nothing has any weight")


def bound(values: Sequence[float], deviations: float) -> float:
    """The median plus so many deviations, each 1.4826 times the median absolute deviation, and at least 2 % of the median."""
    middle = statistics.median(values)
    spread = statistics.median(abs(value - middle) for value in values)
    return middle + deviations * max(MAD_TO_DEVIATION * spread, LEAST_DEVIATION * abs(middle))


def is_spike(settings: SkipSpikes, recent: Recent, loss: float, norm: float) -> bool:
    """Whether a round of this loss and this norm of the merged update is to change nothing.

    Never before half of the window is there. As skipped rounds enter the window, a level that stays is usual after half of it.
    """
    if not math.isfinite(norm):
        return True
    if len(recent.losses) < settings.window // 2:
        return False
    if loss > bound(recent.losses, settings.deviations):
        return True
    return norm > bound(recent.norms, settings.deviations) and loss > bound(recent.losses, settings.deviations / 2)
