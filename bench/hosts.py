"""Hosts as network namespaces of this machine, joined by a switch, each with a link of a given speed (`tc tbf`).

A host's uplink is shaped where it leaves the host, its downlink where the switch hands over to it. Needs root and iproute2.
"""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

MBIT = 1_000_000
BURST_S, LEAST_BURST_BYTES = 0.02, 4_000
QUEUE_S, LEAST_QUEUE_BYTES = 0.1, 16_000
SUBNET = "10.213.0"
NUMBERS = itertools.count()


@dataclass(frozen=True)
class Link:
    """Bits per second up and down; 0 = as fast as the machine is."""

    up_bit_s: int = 0
    down_bit_s: int = 0


@dataclass(frozen=True)
class Host:
    """A namespace with one address."""

    name: str
    address: str
    device: str

    @property
    def prefix(self) -> tuple[str, ...]:
        """What to put before a command so that it runs on this host."""
        return ("ip", "netns", "exec", self.name)

    def counters(self) -> tuple[int, int]:
        """Bytes that the host's interface has sent and received, by its own counters."""
        folder = f"/sys/class/net/{self.device}/statistics"
        command = [*self.prefix, "cat", f"{folder}/tx_bytes", f"{folder}/rx_bytes"]
        sent, received = _run(*command).split()
        return int(sent), int(received)


def unavailable() -> str:
    """Why hosts can't be made here; empty if they can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if not shutil.which("ip") or not shutil.which("tc"):
        return "ip and tc (iproute2) are missing"
    probe = f"swp{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", probe], capture_output=True, check=False)
    if made.returncode:
        return f"no network namespaces here: {made.stderr.decode().strip()}"
    subprocess.run(["ip", "netns", "del", probe], capture_output=True, check=False)
    return ""


@contextmanager
def hosts(links: Sequence[Link]) -> Iterator[list[Host]]:
    """So many hosts with these links; they are gone when the block is left."""
    tag = f"sw{os.getpid()}n{next(NUMBERS)}"
    switch = f"{tag}s"
    made: list[str] = []
    try:
        _run("ip", "netns", "add", switch)
        made.append(switch)
        _run("ip", "-n", switch, "link", "add", "br0", "type", "bridge")
        _run("ip", "-n", switch, "link", "set", "br0", "up")
        found = []
        for index, link in enumerate(links):
            name = f"{tag}h{index}"
            _run("ip", "netns", "add", name)
            made.append(name)
            found.append(_attach(switch, name, index, link))
        yield found
    finally:
        for name in made:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


def cut(host: Host) -> None:
    """Pull the host's cable."""
    _run("ip", "-n", host.name, "link", "set", host.device, "down")


def mend(host: Host) -> None:
    """Plug it in again."""
    _run("ip", "-n", host.name, "link", "set", host.device, "up")


def _attach(switch: str, name: str, index: int, link: Link) -> Host:
    inside, outside = "eth0", f"port{index}"
    address = f"{SUBNET}.{index + 1}"
    _run("ip", "-n", switch, "link", "add", outside, "type", "veth", "peer", "name", inside, "netns", name)
    _run("ip", "-n", switch, "link", "set", outside, "master", "br0", "up")
    _run("ip", "-n", name, "addr", "add", f"{address}/24", "dev", inside)
    _run("ip", "-n", name, "link", "set", inside, "up")
    _run("ip", "-n", name, "link", "set", "lo", "up")
    _shape(name, inside, link.up_bit_s)
    _shape(switch, outside, link.down_bit_s)
    return Host(name, address, inside)


def _shape(namespace: str, device: str, bit_s: int) -> None:
    if not bit_s:
        return
    burst = max(LEAST_BURST_BYTES, int(bit_s / 8 * BURST_S))
    limit = max(LEAST_QUEUE_BYTES, int(bit_s / 8 * QUEUE_S))
    rate = ("rate", f"{bit_s}bit", "burst", str(burst), "limit", str(limit))
    _run("tc", "-n", namespace, "qdisc", "add", "dev", device, "root", "tbf", *rate)


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, check=False, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout
