"""What a GPU and the machine around it report: by NVML for the card, by psutil and the desktop's own tools for the rest."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import psutil

from peer.rules import Values

ASK_TIMEOUT_S = 2.0
SLOW_EVERY_S = 30.0
TERMINALS = Path("/dev")
POWER_SUPPLIES = Path("/sys/class/power_supply")
LOGINS = Path("/run/utmp")
AUTOGROUP = Path("/proc/self/autogroup")
METERED = {1: True, 2: False, 3: True, 4: False}


class Card(Protocol):
    """One GPU as NVML shows it; every method gives None where the driver doesn't tell."""

    def temperature_c(self) -> float | None:
        """Of the core."""

    def power_w(self) -> float | None:
        """What it draws now."""

    def fan_ratio(self) -> float | None:
        """Of the fastest speed."""

    def programs(self) -> tuple[int, ...] | None:
        """Processes that use it."""

    def is_present(self) -> bool:
        """Whether it answers."""


class NvmlCard:
    """A card by its UUID; asks anew each time, so that a driver that was updated or came back is noticed."""

    def __init__(self, nvml: Any, uuid: str) -> None:
        self._nvml, self._uuid = nvml, uuid

    def temperature_c(self) -> float | None:
        """Of the core."""
        return self._number(lambda card: float(self._nvml.nvmlDeviceGetTemperature(card, self._nvml.NVML_TEMPERATURE_GPU)))

    def power_w(self) -> float | None:
        """What it draws now."""
        return self._number(lambda card: self._nvml.nvmlDeviceGetPowerUsage(card) / 1000)

    def fan_ratio(self) -> float | None:
        """Of the fastest speed; None for cards without a fan."""
        return self._number(lambda card: self._nvml.nvmlDeviceGetFanSpeed(card) / 100)

    def programs(self) -> tuple[int, ...] | None:
        """Processes that compute or draw on it."""
        found: tuple[int, ...] | None = self._ask(self._list_programs)
        return found

    def is_present(self) -> bool:
        """Whether it answers."""
        return self._ask(lambda card: True) is True

    def _list_programs(self, card: Any) -> tuple[int, ...]:
        running = [
            *self._nvml.nvmlDeviceGetComputeRunningProcesses(card),
            *self._nvml.nvmlDeviceGetGraphicsRunningProcesses(card),
        ]
        return tuple(sorted({int(process.pid) for process in running}))

    def _number(self, question: Callable[[Any], float]) -> float | None:
        found: float | None = self._ask(question)
        return found

    def _ask(self, question: Callable[[Any], Any]) -> Any:
        try:
            return question(self._nvml.nvmlDeviceGetHandleByUUID(self._uuid))
        except self._nvml.NVMLError:
            return None


def open_card(uuid: str) -> Card | None:
    """The card with a UUID (`GPU-...`), or None where there is no NVML."""
    try:
        import pynvml  # noqa: PLC0415 - only where a GPU is used

        pynvml.nvmlInit()
    except ImportError:
        return None
    except pynvml.NVMLError:
        return None
    return NvmlCard(pynvml, uuid)


@dataclass
class Sensors:
    """Measures everything that the rules are about. What is slow to ask is asked every half minute."""

    card: Card | None
    mine: Callable[[], Iterable[int]] = lambda: own_processes()
    _asked_s: float = float("-inf")
    _metered: bool | None = None
    _idle_hint_s: float | None = field(default=None)

    def read(self) -> Values:
        """One measurement; takes up to a few seconds, never raises."""
        if time.monotonic() - self._asked_s >= SLOW_EVERY_S:
            self._asked_s, self._metered = time.monotonic(), is_metered()
        card = self.card
        return Values(
            temperature_c=card.temperature_c() if card else None,
            power_w=card.power_w() if card else None,
            fan_ratio=card.fan_ratio() if card else None,
            others=self._others(card),
            user_idle_s=user_idle_s(),
            on_battery=on_battery(),
            on_metered=self._metered,
            gpu_present=card.is_present() if card else True,
        )

    def _others(self, card: Card | None) -> tuple[str, ...] | None:
        programs = card.programs() if card else None
        if programs is None:
            return None
        mine = set(self.mine())
        return tuple(name for pid in programs if pid not in mine and (name := program_name(pid)))


def own_processes() -> set[int]:
    """This process and its children."""
    me = psutil.Process()
    return {me.pid, *(child.pid for child in me.children(recursive=True))}


def program_name(pid: int) -> str:
    """What a process is called; its number where that can't be seen, empty when it has ended."""
    try:
        return psutil.Process(pid).name()
    except psutil.NoSuchProcess:
        return "" if pid not in psutil.pids() else str(pid)
    except psutil.Error:
        return str(pid)


def on_battery() -> bool | None:
    """Whether the machine draws from its battery; False for one without, None where that can't be read."""
    if not POWER_SUPPLIES.is_dir():
        return None
    battery = psutil.sensors_battery()
    return bool(battery is not None and battery.power_plugged is False)


def user_idle_s(now_s: Callable[[], float] = time.time) -> float | None:
    """Seconds since somebody last typed at a terminal or a desktop session; None where logins aren't recorded.

    Terminals tell by the time of their last input, as `w` shows it; desktops through logind.
    """
    if not LOGINS.exists():
        return None
    ages = [_terminal_age_s(user.terminal, now_s()) for user in psutil.users() if user.terminal]
    ages += _desktop_ages_s(now_s())
    return min((age for age in ages if age is not None), default=float("inf"))


def _terminal_age_s(terminal: str, now_s: float) -> float | None:
    try:
        return max(0.0, now_s - (TERMINALS / terminal).stat().st_atime)
    except OSError:
        return None


def _desktop_ages_s(now_s: float) -> list[float | None]:
    listed = _output("loginctl", "list-sessions", "--output=json", "--no-pager")
    try:
        names = [str(entry["session"]) for entry in json.loads(listed or "[]")]
    except (ValueError, KeyError, TypeError):
        return []
    return [_session_age_s(name, now_s) for name in names[:16]]


def _session_age_s(name: str, now_s: float) -> float | None:
    text = _output("loginctl", "show-session", name, "-p", "Type", "-p", "IdleHint", "-p", "IdleSinceHint") or ""
    shown = dict(line.split("=", 1) for line in text.splitlines() if "=" in line)
    if shown.get("Type") not in ("x11", "wayland", "mir"):
        return None
    if shown.get("IdleHint") != "yes":
        return 0.0
    return max(0.0, now_s - int(shown.get("IdleSinceHint") or 0) / 1e6)


def is_metered() -> bool | None:
    """Whether NetworkManager takes the link for a metered one; None without NetworkManager."""
    service, path = "org.freedesktop.NetworkManager", "/org/freedesktop/NetworkManager"
    text = _output("busctl", "get-property", service, path, service, "Metered")
    words = (text or "").split()
    return METERED.get(int(words[1])) if len(words) == 2 and words[1].isdigit() else None


def _output(*command: str) -> str | None:
    if shutil.which(command[0]) is None:
        return None
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=ASK_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def lower_disk_priority() -> None:
    """Use the disk only when nobody else does; where that isn't possible, nothing happens."""
    try:
        psutil.Process().ionice(psutil.IOPRIO_CLASS_IDLE)
    except (psutil.Error, OSError, AttributeError):
        return


def lower_thread_priority(nice: int) -> None:
    """Let everything else on the machine go before the calling thread, and those that it starts."""
    os.setpriority(os.PRIO_PROCESS, 0, max(nice, os.getpriority(os.PRIO_PROCESS, 0)))


def lower_session_priority(nice: int) -> None:
    """Let everything else on the machine go before a session that is ours alone; nothing happens in one that others share.

    Under Linux's autogroups (sched(7)) a process's nice value counts only within its session, and sessions are weighed against
    each other by this one. We have our own as a service, in a container and after `setsid`, not in a terminal.
    """
    if os.getsid(0) != os.getpid():
        return
    with contextlib.suppress(OSError, ValueError):
        AUTOGROUP.write_text(str(max(nice, int(AUTOGROUP.read_text().split()[-1]))))
