"""Five refused contributions in a row pause the peer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from peer.daemon import REFUSALS_IN_A_ROW, Daemon, DaemonOptions
from peer.network.dialback import host_of, port_of
from peer.reports import Outbox
from swarm.messages import JoinLink

LINK = JoinLink("127.0.0.1", 1, bytes(32), bytes(32))


@pytest.fixture
def daemon(tmp_path: Path) -> Daemon:
    """A daemon that hasn't been started."""
    return Daemon.create(DaemonOptions(LINK, tmp_path, tmp_path / "identity.key", torch.device("cpu")))


def test_five_refusals_pause_it_and_say_why(daemon: Daemon, tmp_path: Path) -> None:
    """An accepted report starts the count anew; the fifth in a row pauses, with the last reason; resume counts from the start."""
    outbox = Outbox(tmp_path)
    path = outbox.outbox / f"{7:012d}.pb"
    path.write_bytes(b"report")
    outbox.refuse(path, "wrong_base")
    for outcome in ["refused"] * (REFUSALS_IN_A_ROW - 1) + ["accepted"] + ["refused"] * (REFUSALS_IN_A_ROW - 1):
        daemon.count_report(outcome, outbox)
    assert daemon.status.reason == "starting"
    daemon.count_report("refused", outbox)
    assert daemon.status.reason == "contributions_rejected"
    assert "wrong_base" in daemon.status.detail
    daemon.wish("resume")
    daemon.count_report("refused", outbox)
    assert daemon.describe()["waits_for"] == ""


def test_rounds_played_again_do_not_pause_it(daemon: Daemon, tmp_path: Path) -> None:
    """A report of a round that the ledger holds already doesn't count, and doesn't start the count anew either."""
    outbox = Outbox(tmp_path)
    for _ in range(3 * REFUSALS_IN_A_ROW):
        daemon.count_report("superseded", outbox)
    assert daemon.status.reason == "starting"
    for round_index, reason in enumerate(["wrong_weight", "already_reported"]):
        path = outbox.outbox / f"{round_index:012d}.pb"
        path.write_bytes(b"report")
        outbox.refuse(path, reason)
    for outcome in ["refused", "superseded"] * REFUSALS_IN_A_ROW:
        daemon.count_report(outcome, outbox)
    assert daemon.status.reason == "contributions_rejected"
    assert "wrong_weight" in daemon.status.detail


def test_addresses() -> None:
    """Host and port of a multiaddress; nothing for what isn't TCP over IP."""
    assert (host_of("/ip4/192.0.2.1/tcp/40000"), port_of("/ip4/192.0.2.1/tcp/40000")) == ("192.0.2.1", 40000)
    assert (host_of("/dns4/example.org/tcp/1"), port_of("/ip4/192.0.2.1/udp/1")) == ("", 0)
