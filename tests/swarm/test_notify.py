"""What systemd hears from a service."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from swarm.notify import notify, watchdog_s


def test_systemd_hears_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A state arrives at the socket that systemd names."""
    path = tmp_path / "notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(str(path))
        monkeypatch.setenv("NOTIFY_SOCKET", str(path))
        assert notify("READY=1")
        assert systemd.recv(100) == b"READY=1"


def test_without_systemd_nothing_happens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No variable, or a socket that is gone, is no error."""
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    assert not notify("READY=1")
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "gone"))
    assert not notify("READY=1")


@pytest.mark.parametrize(("given", "expected"), [("", None), ("0", None), ("nonsense", None), ("30000000", 30.0)])
def test_watchdog(given: str, expected: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The time that systemd allows, in seconds."""
    monkeypatch.setenv("WATCHDOG_USEC", given)
    assert watchdog_s() == expected
