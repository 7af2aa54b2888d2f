"""The governor's shell: measures, asks the rules, and carries out what they say. Also the brake on the training thread."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Any

import structlog

from peer.gpu import Sensors
from peer.rules import Decision, GovernorState, Values, parse_hours, step, unenforceable
from swarm.config import GovernorSettings

if TYPE_CHECKING:
    from peer.trainer import Progress

EVERY_S = 2.0
HELD_EVERY_S = 5.0
ASLEEP_S = 30.0
BRAKE_STEP_S = 0.1
LONGEST_BRAKE_S = 30.0

log = structlog.get_logger(__name__)


@dataclass
class Brake:
    """Gives the device a rest after each micro-batch, so that training takes `share` of the time; runs in the training thread."""

    is_stopped: Callable[[], bool] = lambda: False
    share: float = 1.0
    _last_s: float = 0.0

    def on_progress(self, progress: Progress) -> None:
        """Rest in proportion to the work since the last rest; a stop ends it."""
        now_s = time.monotonic()
        worked_s, share = now_s - self._last_s, self.share
        if share < 1 and 0 < worked_s < LONGEST_BRAKE_S:
            until_s = now_s + min(LONGEST_BRAKE_S, worked_s * (1 / share - 1))
            while (left_s := until_s - time.monotonic()) > 0 and not self.is_stopped():
                time.sleep(min(BRAKE_STEP_S, left_s))
        self._last_s = time.monotonic()


@dataclass
class Governor:
    """Watches the machine. `hold(reason, detail)` is called while training isn't allowed, with an empty reason when it is."""

    rules: GovernorSettings
    sensors: Sensors
    on_gpu: bool
    hold: Callable[[str, str], None]
    on_wake: Callable[[float], None] = lambda slept_s: None
    brake: Brake = field(default_factory=Brake)
    values: Values = field(default_factory=Values)
    decision: Decision = field(default_factory=Decision)
    blind: tuple[str, ...] = ()
    state: GovernorState = field(default_factory=GovernorState)
    _seen: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        for text in self.rules.hours:
            parse_hours(text)

    def describe(self) -> dict[str, Any]:
        """For `swarm status`."""
        idle_s = self.values.user_idle_s
        return {
            "in_use": self.decision.in_use,
            "time_share": self.decision.share,
            "not_enforced": list(self.blind),
            **asdict(self.values),
            "user_idle_s": idle_s if idle_s != float("inf") else None,
        }

    async def begin(self) -> None:
        """Measure once, and name the rules that can't be kept here."""
        self.values = await asyncio.to_thread(self.sensors.read)
        self.blind = tuple(unenforceable(self.values, self.rules, on_gpu=self.on_gpu))
        for rule in self.blind:
            log.warning("rule_not_enforced", rule=rule)
        self._decide()

    async def watch(self) -> None:
        """Measure and decide for ever."""
        while True:
            await asyncio.sleep(HELD_EVERY_S if self.decision.reason else EVERY_S)
            self._look_at_clocks()
            self.values = await asyncio.to_thread(self.sensors.read)
            self._decide()

    def _decide(self) -> None:
        before = self.decision
        local = datetime.now().astimezone()
        self.state, self.decision = step(self.state, self.values, self.rules, time.monotonic(), local)
        self.brake.share = self.decision.share or 1.0
        if self.decision.share != before.share and not self.decision.reason:
            log.info("time_share", share=round(self.decision.share, 2))
        self.hold(self.decision.reason, self.decision.detail)

    def _look_at_clocks(self) -> None:
        """Notice that the machine or this process has slept, or that the clock was set."""
        now = (time.monotonic(), time.time())
        if self._seen is not None:
            slept_s = slept_for(self._seen, now, EVERY_S)
            if slept_s > ASLEEP_S:
                log.info("woke_up", slept_s=round(slept_s))
                self.on_wake(slept_s)
        self._seen = now


def slept_for(before: tuple[float, float], now: tuple[float, float], every_s: float) -> float:
    """How much longer than `every_s` lies between two readings of (monotonic, wall) clocks.

    A frozen process finds that both have gone on; a suspended machine that only the wall clock has; a clock that was set by hand
    that they differ. Steps back count as none.
    """
    return max(now[0] - before[0], now[1] - before[1]) - every_s


def device_uuid(device_type: str, index: int | None) -> str | None:
    """The NVML name of a CUDA device."""
    if device_type != "cuda":
        return None
    import torch  # noqa: PLC0415 - asked only where a GPU is used

    return f"GPU-{torch.cuda.get_device_properties(index or 0).uuid}"
