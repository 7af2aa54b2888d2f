"""The libp2p daemon never outlives its parent, and its failures have names."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import socket
import sys
import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from peer.network.node import Node, Unreachable
from peer.network.p2pd import P2pdOptions
from swarm.errors import NetworkBroken, PortBusy
from swarm.identity import Identity
from tests.peer_network import loopback
from tests.waiting import eventually

PARENT = """
import asyncio, sys
from pathlib import Path
from peer.network.node import Node, Unreachable
from peer.network.p2pd import P2pdOptions
from peer.network.p2pd import P2pdOptions

async def main():
    node = await Node.start(P2pdOptions(Path(sys.argv[1]), ("/ip4/127.0.0.1/tcp/0",), map_port=False))
    print(node.daemon.pid, node.daemon._directory, flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""


HOP = "/libp2p/circuit/relay/0.2.0/hop"  # by which strangers ask to be relayed


class Public(P2pdOptions):
    """A daemon that takes itself for publicly reachable, which is when libp2p begins to relay."""

    def arguments(self, binary: Path, control: str) -> list[str]:
        return [*super().arguments(binary, control), "-forceReachabilityPublic=1"]


class Relaying(Public):
    """The same with libp2p's own default for relaying."""

    def arguments(self, binary: Path, control: str) -> list[str]:
        return [item for item in super().arguments(binary, control) if not item.startswith("-relay=")]


def gone(process: psutil.Process) -> bool:
    """Whether a process has ended; one that nobody has collected yet has ended, too."""
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


@pytest.fixture
def key(tmp_path: Path) -> Path:
    Identity.generate().save(tmp_path / "node.key")
    return tmp_path / "node.key"


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
async def test_the_daemon_ends_with_its_parent(key: Path, number: int) -> None:
    """However its parent ends, by SIGKILL too, the kernel ends the daemon."""
    parent = await asyncio.create_subprocess_exec(sys.executable, "-c", PARENT, str(key), stdout=asyncio.subprocess.PIPE)
    try:
        assert parent.stdout is not None
        pid, folder = (await parent.stdout.readline()).decode().split()
        daemon = psutil.Process(int(pid))
        assert Path(daemon.exe()).name == "p2pd"
        os.kill(parent.pid, number)
        assert await asyncio.wait_for(parent.wait(), 30) == -number
        await eventually(lambda: gone(daemon), "the daemon's end", 30)
        shutil.rmtree(folder, ignore_errors=True)
    finally:
        if parent.returncode is None:
            parent.kill()
        await parent.wait()


async def test_close_leaves_neither_process_nor_sockets(key: Path) -> None:
    """After `close` the process is gone and so is the folder with its sockets, which only we could enter."""
    node = await Node.start(loopback(key))
    daemon, folder = psutil.Process(node.daemon.pid), node.daemon._directory
    assert folder.stat().st_mode & 0o077 == 0
    await node.close()
    assert gone(daemon)
    assert not folder.exists()


async def test_a_temporary_folder_with_a_long_path(
    start_node: Callable[..., Awaitable[Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sockets go where their names fit into an address: with longer ones the daemon would answer, but serve no streams."""
    long = tmp_path / ("deep" * 20)
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    served = await start_node()
    asking = await start_node(knows=[served])
    for member in (served, asking):
        assert len(str(member.node.daemon._directory / "p2pclient-xxxxxxxxxxx.sock")) <= 107

    async def answer(peer: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"here")
        await writer.drain()
        writer.close()

    await served.node.serve_streams("swarm/1/test", answer)
    reader, writer = await asking.node.open_stream(served.peer, "swarm/1/test", 10)
    assert await asyncio.wait_for(reader.read(), 10) == b"here"
    writer.close()


async def test_the_end_of_the_daemon_is_noticed(key: Path) -> None:
    """`wait` returns when the daemon is killed from outside."""
    node = await Node.start(loopback(key))
    waiting = asyncio.create_task(node.daemon.wait())
    os.kill(node.daemon.pid, signal.SIGKILL)
    await asyncio.wait_for(waiting, 20)
    await node.close()


async def relays(start_node: Callable[..., Awaitable[Any]], kind: type[P2pdOptions]) -> bool:
    """Whether a node with such options offers to relay for others."""
    relay = await start_node(kind=kind)
    stranger = await start_node(knows=(relay,))
    try:
        _, writer = await stranger.node.open_stream(relay.peer, HOP, 10)
    except Unreachable as error:
        assert "protocol" in str(error)  # noqa: PT017 - any other failure would prove nothing
        return False
    writer.close()
    return True


async def test_strangers_traffic_is_not_relayed(start_node) -> None:
    """libp2p would relay up to 4 GiB per connection for anybody; a volunteer's daemon doesn't, even where it is public."""
    assert await relays(start_node, Relaying)
    assert not await relays(start_node, Public)


async def test_a_busy_port_has_a_name(key: Path) -> None:
    """An address that is taken is `PortBusy`, and nothing is left running."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        before = set(psutil.Process().children())
        with pytest.raises(PortBusy, match="taken"):
            await Node.start(loopback(key, listen=(f"/ip4/127.0.0.1/tcp/{taken.getsockname()[1]}",)))
        assert set(psutil.Process().children()) <= before


async def test_a_bad_address_has_a_name(key: Path) -> None:
    """What the daemon can't parse is `NetworkBroken` with its own words."""
    with pytest.raises(NetworkBroken, match="did not start"):
        await Node.start(loopback(key, listen=("/ip4/not-an-address/tcp/0",)))
