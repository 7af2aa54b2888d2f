"""A node's traffic against the counters of its network interface, in network namespaces."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bench.hosts import MBIT, Host, Link, hosts, unavailable
from peer.network.traffic import TYPICAL_FRAMING
from swarm.identity import Identity
from tests.runs import REPOSITORY, clean_environment

MIB = 1 << 20
BLOB_BYTES, BLOBS = 256 << 10, 32
TOLERANCE = 0.02
ETHERNET_BYTES = 14
READY_S = 60.0

NODE = """
import asyncio, json, os, sys
from pathlib import Path
from peer.network.blobs import BlobStore
from peer.network.metering import Metering
from peer.network.node import Node
from peer.network.p2pd import P2pdOptions
from peer.network.transfer import Transfer

def say(**values):
    print(json.dumps(values), flush=True)

async def main(key, address, blobs, blob_bytes, upload, download):
    node = await Node.start(P2pdOptions(Path(key), (f"/ip4/{address}/tcp/0",), map_port=False))
    transfer = Transfer(node, BlobStore(1 << 30), bytes(32), lambda peer, token: True, lambda: None)
    transfer.limit(upload, download)
    names = [transfer.store.put(os.urandom(blob_bytes), 0).hex() for _ in range(blobs)]
    await transfer.start()
    watching = asyncio.create_task(Metering(node.traffic, transfer).watch())
    say(peer=node.peer_id, addresses=node.addresses, names=names)
    loop = asyncio.get_running_loop()
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        asked = json.loads(line)
        if "fetch" in asked:
            node.learn(asked["peer"], asked["addresses"])
            await node.connect(asked["peer"])
            started = loop.time()
            sizes = dict.fromkeys(map(bytes.fromhex, asked["fetch"]), blob_bytes or 1 << 20)
            await transfer.fetch(asked["peer"], sizes)
            say(seconds=loop.time() - started)
        else:
            node.traffic.measure()
            say(sent=node.traffic.sent, received=node.traffic.received, at_socket=node.traffic.at_socket,
                upload=transfer.upload_meter.bytes_per_s, sources=[item.bytes_per_s for item in transfer.sources.values()])
    watching.cancel()
    await node.close()

asyncio.run(main(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:])))
"""


class Remote:
    """A node in a process of its own, on a host of its own."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.about: dict[str, Any] = {}

    @classmethod
    async def start(cls, host: Host, key: Path, blobs: int, upload: int = 0, download: int = 0) -> Remote:
        Identity.generate().save(key)
        numbers = map(str, (blobs, BLOB_BYTES, upload, download))
        command = [*host.prefix, sys.executable, "-c", NODE, str(key), host.address, *numbers]
        process = await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            env=clean_environment(),
            cwd=REPOSITORY,
            limit=1 << 20,
        )
        remote = cls(process)
        remote.about = await remote.hear()
        return remote

    async def hear(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        answer: dict[str, Any] = json.loads(await asyncio.wait_for(self.process.stdout.readline(), READY_S))
        return answer

    async def ask(self, **values: Any) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(values).encode() + b"\n")
        return await self.hear()

    async def end(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        await asyncio.wait_for(self.process.wait(), READY_S)


@pytest.fixture
def namespaces() -> None:
    reason = unavailable()
    if reason:
        pytest.skip(reason)


def one_segment_per_packet(host: Host) -> None:
    """As on a real wire: otherwise the interface counts many segments as one packet with one header."""
    subprocess.run(["ip", "-n", host.name, "link", "set", "dev", host.device, "gso_max_segs", "1"], check=True)


def without_ethernet(host: Host) -> tuple[int, int]:
    """What the interface has sent and received, less the frames that IP packets travel in here."""
    folder = f"/sys/class/net/{host.device}/statistics"
    command = [*host.prefix, "cat", f"{folder}/tx_packets", f"{folder}/rx_packets"]
    packets = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    sent, received = (size - ETHERNET_BYTES * int(count) for size, count in zip(host.counters(), packets, strict=True))
    return sent, received


@pytest.mark.usefixtures("namespaces")
@pytest.mark.timeout(180)
async def test_bytes_are_those_of_the_interface(tmp_path: Path) -> None:
    """For a bulk transfer of some MiB our counters, headers included, are within 2 per cent of the interface's, both ways.

    The transfer also measures the uplink at the server and the source at the client, and shows what framing costs.
    """
    with hosts([Link(80 * MBIT, 0), Link()]) as (first, second):
        for host in (first, second):
            one_segment_per_packet(host)
        server = await Remote.start(first, tmp_path / "server.key", BLOBS)
        client = await Remote.start(second, tmp_path / "client.key", 0)
        try:
            where = {"peer": server.about["peer"], "addresses": server.about["addresses"]}
            await client.ask(fetch=server.about["names"], **where)
            for host, remote in ((first, server), (second, client)):
                told = await remote.ask()
                sent, received = without_ethernet(host)
                assert told["at_socket"]
                assert sum(told["sent"].values()) == pytest.approx(sent, rel=TOLERANCE, abs=4000)
                assert sum(told["received"].values()) == pytest.approx(received, rel=TOLERANCE, abs=4000)
            told = await server.ask()
            assert BLOBS * BLOB_BYTES < told["sent"]["bulk"] < 1.001 * BLOBS * BLOB_BYTES + 1000
            assert told["sent"]["framing"] / told["sent"]["bulk"] == pytest.approx(TYPICAL_FRAMING, abs=0.01)
            assert told["upload"] == pytest.approx(10e6, rel=0.25)
            assert (await client.ask())["sources"][0] == pytest.approx(10e6, rel=0.25)
        finally:
            await asyncio.gather(server.end(), client.end())


@pytest.mark.usefixtures("namespaces")
@pytest.mark.timeout(180)
@pytest.mark.parametrize("capped", ["upload", "download"])
async def test_caps_hold_on_the_wire(tmp_path: Path, capped: str) -> None:
    """Over a fast link, what the interface moves per second stays within a volunteer's cap, and near it."""
    cap = 2_000_000
    with hosts([Link(), Link()]) as (first, second):
        for host in (first, second):
            one_segment_per_packet(host)
        server = await Remote.start(first, tmp_path / "server.key", BLOBS, upload=cap if capped == "upload" else 0)
        client = await Remote.start(second, tmp_path / "client.key", 0, download=cap if capped == "download" else 0)
        try:
            where = {"peer": server.about["peer"], "addresses": server.about["addresses"]}
            before = first.counters()[0]
            seconds = (await client.ask(fetch=server.about["names"], **where))["seconds"]
            rate = (first.counters()[0] - before) / seconds
            assert 0.8 * cap < rate < 1.1 * cap
        finally:
            await asyncio.gather(server.end(), client.end())
