"""The kernel's counters of a process's TCP sockets."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator

import pytest

from peer.network.sockets import HEADER_BYTES, SocketCounters
from tests.waiting import eventually

MIB = 1 << 20
CLIENT = """
import socket, sys
link = socket.create_connection(("127.0.0.1", int(sys.argv[1])))
link.sendall(bytes(int(sys.argv[2])))
link.shutdown(socket.SHUT_WR)
link.recv(1)
link.close()
print("closed", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def counters() -> Iterator[SocketCounters]:
    """Of this process."""
    made = SocketCounters.open(os.getpid())
    if made is None:
        pytest.skip("the kernel has no sock_diag here")
    yield made
    made.close()


def exchange(size: int, family: socket.AddressFamily = socket.AF_INET) -> tuple[socket.socket, socket.socket]:
    """A connection within this process over which so many bytes have gone."""
    host = "::1" if family == socket.AF_INET6 else "127.0.0.1"
    with socket.create_server((host, 0), family=family) as server:
        client = socket.create_connection(server.getsockname()[:2])
        accepted, _ = server.accept()
    left = size
    while left:
        client.sendall(bytes(min(left, 1 << 15)))
        received = 0
        while received < min(left, 1 << 15):
            received += len(accepted.recv(1 << 15))
        left -= received
    return client, accepted


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6])
def test_bytes_and_headers_are_counted(counters: SocketCounters, family: socket.AddressFamily) -> None:
    """Payload in both directions, plus a header for each segment, and what has arrived."""
    before = counters.read()
    try:
        client, accepted = exchange(MIB, family)
    except OSError as error:
        pytest.skip(f"no such loopback here: {error}")
    after = counters.read()
    sent, received = after.sent_bytes - before.sent_bytes, after.received_bytes - before.received_bytes
    assert MIB + 2 * HEADER_BYTES[int(family)] < sent < 1.2 * MIB
    assert MIB + 2 * HEADER_BYTES[int(family)] < received < 1.2 * MIB
    assert after.acknowledged_bytes - before.acknowledged_bytes == pytest.approx(MIB, abs=8)
    assert after.queued_bytes == 0
    client.close()
    accepted.close()


async def test_connections_that_have_ended_still_count(counters: SocketCounters) -> None:
    """A socket that closes between two readings is counted to its end once the kernel has said so; the totals never fall."""
    client, accepted = exchange(MIB)
    first = counters.read()
    client.sendall(bytes(1000))
    accepted.recv(1000)
    client.close()
    accepted.close()
    assert counters.read().sent_bytes >= first.sent_bytes
    second = await eventually(lambda: (now := counters.read()).sent_bytes >= first.sent_bytes + 1000 and now, "the end")
    assert counters.read() == second


def test_another_process_doesnt_count(counters: SocketCounters) -> None:
    """Of a connection to another process only our end is ours, and its counters are those of its own process."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        before = counters.read()
        command = [sys.executable, "-c", CLIENT, str(server.getsockname()[1]), str(MIB)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
            theirs = SocketCounters.open(child.pid)
            assert theirs is not None
            accepted, _ = server.accept()
            while accepted.recv(MIB):
                pass
            assert theirs.read().sent_bytes > MIB
            after = counters.read()
            accepted.close()
            assert child.stdout is not None
            assert child.stdout.readline() == b"closed\n"
            assert theirs.read().sent_bytes > MIB
            theirs.close()
            assert child.stdin is not None
            child.stdin.close()
    assert after.received_bytes - before.received_bytes > MIB
    assert after.sent_bytes - before.sent_bytes < MIB / 10


def test_a_process_that_is_gone_has_no_counters() -> None:
    """Counting for nobody is no error: there is nothing to count."""
    counters = SocketCounters.open(1 << 22)
    if counters is None:
        pytest.skip("the kernel has no sock_diag here")
    assert counters.read().sent_bytes == 0
    counters.close()
