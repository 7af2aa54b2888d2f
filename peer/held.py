"""A paused peer: a small program in the daemon's place, with the same process id and control socket, and nothing else of it.

The daemon gives way to it by `exec`, so that every byte of the device's and the host's memory is free, a CUDA context too; when
training may go on, the daemon takes its place again. It imports neither torch nor hivemind, and speaks to nobody but its user.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import structlog
from prometheus_client import CollectorRegistry, start_http_server

from peer.control import ControlServer
from peer.governor import Governor
from peer.gpu import Sensors, open_card
from peer.holds import Hold, Holds
from peer.lock import only_one
from peer.metrics import PeerMetrics
from peer.rules import GovernorState
from peer.status import Status
from swarm.config import GovernorSettings
from swarm.control import HISTORY_NAME, STATUS_NAME
from swarm.errors import PortBusy, UsageError
from swarm.notify import keep_watchdog, notify

HELD_VARIABLE = "SWARM_HELD"
FILE_NAME = "held.json"
LOOK_AT_HOLDS_S = 5.0
LONGEST_SNOOZE_S = 366 * 86400.0

log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class Held:
    """What goes from the daemon to the program that waits, and back: why, the last status, the card, and the control socket."""

    holds: Holds
    status: dict[str, Any]
    gpu_uuid: str | None
    control_socket: int

    def save(self, directory: Path) -> None:
        """Write it into the peer's folder, for its owner only."""
        path = directory / FILE_NAME
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
            json.dump(asdict(self), file)

    @classmethod
    def load(cls, directory: Path) -> Held | None:
        """What was handed over to this program; None at an ordinary start."""
        if os.environ.pop(HELD_VARIABLE, None) is None:
            return None
        path = directory / FILE_NAME
        fields = json.loads(path.read_text())
        path.unlink()
        holds = {who: Hold(**hold) if hold else None for who, hold in fields["holds"].items()}
        return cls(Holds(**holds), fields["status"], fields["gpu_uuid"], fields["control_socket"])


def check_snooze(seconds: float) -> Hold:
    """A pause that ends by itself. Raises `UsageError`."""
    if not 0 < seconds <= LONGEST_SNOOZE_S:
        raise UsageError("a snooze lasts up to a year", "for example: swarm snooze 2h")
    until_s = time.time() + seconds
    return Hold("snoozed", f"until {time.strftime('%a %H:%M', time.localtime(until_s))}", until_s)


@dataclass
class Waiting:
    """Waits until nothing holds the peer any more, or it is to end."""

    held: Held
    directory: Path
    metrics_address: str
    rules: GovernorSettings
    ending: bool = False
    holds: Holds = field(init=False)
    _changed: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self.holds = self.held.holds
        self.status = Status(PeerMetrics(CollectorRegistry()), history=self.directory / HISTORY_NAME)
        self.status.carry_on(self.held.status)
        self._show_first()
        card = open_card(self.held.gpu_uuid) if self.held.gpu_uuid else None
        before = self.holds.governor
        state = GovernorState(reason=before.reason if before else "")
        sensors = Sensors(card)
        self.governor = Governor(self.rules, sensors, self.held.gpu_uuid is not None, self._on_rules, state=state)

    async def wait(self) -> Held | None:
        """What the daemon goes on with; None to end."""
        async with contextlib.AsyncExitStack() as stack:
            stack.enter_context(only_one(self.directory))
            control = ControlServer(self.directory, self.control)
            await control.start(self.held.control_socket)
            stack.push_async_callback(control.close)
            self._serve_metrics(stack)
            loop = asyncio.get_running_loop()
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.add_signal_handler(number, self.end)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGINT, signal.SIGTERM))
            await self.governor.begin()
            notify("READY=1")
            tasks = [asyncio.create_task(work) for work in (self.governor.watch(), keep_watchdog(lambda: self.status.reason))]
            try:
                await self._until_free()
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
            if self.ending:
                with contextlib.suppress(OSError):
                    (self.directory / STATUS_NAME).write_text(json.dumps(self.describe()))
                return None
            log.info("going_on")
            return Held(self.holds, self.describe(), self.held.gpu_uuid, control.keep())

    async def control(self, verb: str, arguments: dict[str, Any]) -> dict[str, Any]:
        """Answer the control socket."""
        match verb:
            case "status":
                return self.describe()
            case "pause":
                self._put("user", Hold("paused"))
            case "snooze":
                self._put("user", check_snooze(float(arguments.get("seconds", 0))))
            case "resume":
                self.holds = self.holds.resumed()
                self._put("user", None)
            case "finish" | "stop":
                self.end()
            case _:
                return {"error": f"{verb[:32]!r} is not possible while paused"}
        log.info("asked", verb=verb)
        return {"accepted": verb, **self.describe()}

    def describe(self) -> dict[str, Any]:
        """Everything that `swarm status` shows."""
        governor = self.governor
        return {
            **self.held.status,
            **self.status.as_dict(),
            "pid": os.getpid(),
            "device_free": True,
            "waits_for": "" if self.ending or self.holds.first is not None else "libraries and the model to be loaded",
            "addresses": [],
            "coordinator_reachable": self.held.status.get("coordinator_reachable", False),
            "metrics": self.metrics_address,
            "governor": governor.describe(),
        }

    def end(self) -> None:
        """Finish or stop: there is no round to complete."""
        self.ending = True
        self._changed.set()

    async def _until_free(self) -> None:
        while not self.ending:
            self.holds = self.holds.at(time.time())
            if self.holds.first is None:
                self.status.state("starting")
                return
            self._show_first()
            self._changed.clear()
            end_s = self.holds.next_end_s
            patience_s = None if end_s is None else min(LOOK_AT_HOLDS_S, max(0.0, end_s - time.time()))
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), patience_s)

    def _put(self, who: str, hold: Hold | None) -> None:
        self.holds = self.holds.put(who, hold)
        self._show_first()
        self._changed.set()

    def _show_first(self) -> None:
        """Say what holds us: from the first moment, as the control socket answers before the rules are read."""
        first = self.holds.first
        if first is not None:
            self.status.state(first.reason, first.detail)

    def _on_rules(self, reason: str, detail: str) -> None:
        hold = Hold(reason, detail) if reason else None
        if hold != self.holds.governor:
            self._put("governor", hold)

    def _serve_metrics(self, stack: contextlib.AsyncExitStack) -> None:
        if not self.metrics_address:
            return
        host, _, port = self.metrics_address.rpartition(":")
        registry = self.status.metrics.registry
        try:
            server, thread = start_http_server(int(port), addr=host or "127.0.0.1", registry=registry)
        except OSError as error:
            raise PortBusy(
                f"can't listen on {self.metrics_address}: {error.strerror}", "choose another with --metrics"
            ) from error
        stack.callback(thread.join, 5.0)
        stack.callback(server.server_close)
        stack.callback(server.shutdown)
