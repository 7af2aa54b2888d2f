"""A swarm over shaped links: a coordinator and peers, each on a host of its own (`bench.hosts`), and what they note."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bench import hosts
from bench.children import Child, child
from bench.hosts import Host, Link
from swarm.local import LocalSwarm
from swarm.manifest import Manifest
from swarm.scenario import write_run

START_S = 240.0
UPDATE_SIZE = 1e-3

Note = dict[str, Any]


@dataclass(frozen=True)
class Linked:
    """Running peers, in the order of their hosts."""

    hosts: Sequence[Host]
    peers: Sequence[Child]

    async def next_round(self, timeout_s: float) -> list[Note]:
        """What every peer notes of its next round."""
        return list(await asyncio.gather(*(peer.receive(timeout_s) for peer in self.peers)))

    async def first_round(self) -> list[Note]:
        """What every peer notes of the first round that is trained in. Raises `RuntimeError` where somebody came too late."""
        notes = await self.next_round(START_S)
        if any(note["round"] != 1 or note["roster"] != len(self.peers) for note in notes):
            raise RuntimeError(f"not everybody took part in round 1: {notes}")
        return notes

    def sent_bytes(self) -> list[int]:
        """What every peer's host has sent so far, by its interface's own counter: Ethernet, IP and TCP headers included."""
        return [host.counters()[0] for host in self.hosts]

    def received_bytes(self) -> list[int]:
        """What every peer's host has received so far."""
        return [host.counters()[1] for host in self.hosts]


def _write_updates(path: Path, parameters: int) -> None:
    """Normally distributed values, [parameters]."""
    values = np.random.default_rng(0).standard_normal(parameters, dtype=np.float32)
    np.save(path, np.multiply(values, np.float32(UPDATE_SIZE), out=values))


@asynccontextmanager
async def running(
    folder: Path, manifest: Manifest, files: Path, links: Sequence[Link], *, step_s: float | None = None, record: bool = False
) -> AsyncIterator[Linked]:
    """Train `manifest` with one peer per link and a coordinator on a host with a fast one.

    With `step_s` training is emulated: every inner step is waited for so long, in a run that nobody audits, as there is nothing
    to see. With `record` peer 0 keeps the weights after every round in `folder/weights`.
    """
    problem = hosts.unavailable()
    if problem:
        raise RuntimeError(problem)
    run, key = write_run(folder, manifest)
    updates = folder / "updates.npy"
    if step_s is not None:
        await asyncio.to_thread(_write_updates, updates, manifest.model.parameters)
    async with AsyncExitStack() as stack:
        made = stack.enter_context(hosts.hosts([*links, Link()]))
        swarm = await stack.enter_async_context(LocalSwarm(folder / "swarm"))
        link = await swarm.start_coordinator(run, key, listen=f"{made[-1].address}:0", prefix=made[-1].prefix)
        peers = []
        for index, host in enumerate(made[:-1]):
            directory = folder / f"peer-{index}"
            directory.mkdir(mode=0o700, exist_ok=True)
            process = child(
                "linked_peer",
                directory / "log",
                prefix=host.prefix,
                link=link,
                directory=str(directory),
                files=str(files),
                address=host.address,
                waiting=None if step_s is None else {"step_s": step_s, "updates": str(updates), "rank": index},
                record=str(folder / "weights") if record and index == 0 else None,
            )
            peers.append(await stack.enter_async_context(process))
        yield Linked(made[:-1], peers)
