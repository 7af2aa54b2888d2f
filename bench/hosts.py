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
    """A namespace with one address; `card` is its Ethernet address."""

    name: str
    address: str
    device: str
    switch: str
    port: str
    card: str

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
        for host in found:
            _introduce(host, found)
        yield found
    finally:
        for name in made:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


def cut(host: Host) -> None:
    """Pull the host's cable at the switch: it keeps its address, and whoever runs on it still reaches each other."""
    _run("ip", "-n", host.switch, "link", "set", host.port, "down")


def mend(host: Host) -> None:
    """Plug it in again."""
    _run("ip", "-n", host.switch, "link", "set", host.port, "up")


def slow_down(host: Host, up_bit_s: int) -> None:
    """Change what a host can send from now on."""
    _run("tc", "-n", host.name, "qdisc", "replace", "dev", host.device, "root", "tbf", *_rate(up_bit_s))


def _attach(switch: str, name: str, index: int, link: Link) -> Host:
    inside, outside = "eth0", f"port{index}"
    address = f"{SUBNET}.{index + 1}"
    _run("ip", "-n", switch, "link", "add", outside, "type", "veth", "peer", "name", inside, "netns", name)
    _run("ip", "-n", switch, "link", "set", outside, "master", "br0", "up")
    card = f"02:00:00:00:{index >> 8:02x}:{index & 255:02x}"
    _run("ip", "-n", name, "addr", "add", f"{address}/24", "dev", inside)
    _run("ip", "-n", name, "link", "set", inside, "address", card, "up")
    _run("ip", "-n", name, "link", "set", "lo", "up")
    _shape(name, inside, link.up_bit_s)
    _shape(switch, outside, link.down_bit_s)
    return Host(name, address, inside, switch, outside, card)


def _introduce(host: Host, others: Sequence[Host]) -> None:
    """Tell a host where the others are: what 32 hosts find out by asking (ARP) overflows a table that all of them share."""
    lines = [f"neigh replace {other.address} lladdr {other.card} dev {host.device} nud permanent\n" for other in others]
    _run("ip", "-n", host.name, "-batch", "-", typed="".join(lines))


def _shape(namespace: str, device: str, bit_s: int) -> None:
    if bit_s:
        _run("tc", "-n", namespace, "qdisc", "add", "dev", device, "root", "tbf", *_rate(bit_s))


def _rate(bit_s: int) -> tuple[str, ...]:
    burst = max(LEAST_BURST_BYTES, int(bit_s / 8 * BURST_S))
    limit = max(LEAST_QUEUE_BYTES, int(bit_s / 8 * QUEUE_S))
    return ("rate", f"{bit_s}bit", "burst", str(burst), "limit", str(limit))


def _run(*command: str, typed: str | None = None) -> str:
    done = subprocess.run(command, capture_output=True, check=False, text=True, input=typed)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout
