"""One replica group of torchft, or its lighthouse, in a process of its own, with the timeouts of torchft's own example."""

from __future__ import annotations

import os
import time
from datetime import timedelta

import torch
from torch.distributed import TCPStore  # type: ignore[attr-defined]  # re-exported without saying so
from torchft import Manager, ProcessGroupGloo
from torchft.coordination import LighthouseServer

from bench.children import arguments, end_with_parent, say

HOST = "127.0.0.1"
COLLECTIVE_S, MANAGER_S = 5.0, 30.0  # train_ddp.py of torchft 0.2.0
JOIN_MS = 1000  # its README says 10,000; at the default of 100 a group that is a little late is left out of most quorums


def lighthouse(min_replicas: int) -> None:
    """Serve quorums until ended from outside; says `address`."""
    server = LighthouseServer(bind=f"{HOST}:0", min_replicas=min_replicas, join_timeout_ms=JOIN_MS)
    say(address=server.address())
    while True:
        time.sleep(MANAGER_S)


def train(lighthouse_address: str, name: str, min_replicas: int, parameters: int, step_s: float) -> None:
    """Average a gradient of `parameters` values again and again; says the `step` and its `seconds` after each that committed."""
    store = TCPStore(HOST, 0, is_master=True, wait_for_workers=False)
    weights = torch.zeros(parameters)
    manager = Manager(
        pg=ProcessGroupGloo(timeout=timedelta(seconds=COLLECTIVE_S)),
        timeout=timedelta(seconds=MANAGER_S),
        min_replica_size=min_replicas,
        load_state_dict=weights.copy_,
        state_dict=weights.clone,
        replica_id=name,
        rank=0,
        world_size=1,
        store_addr=HOST,
        store_port=store.port,
        lighthouse_addr=lighthouse_address,
        hostname=HOST,
    )
    started = time.monotonic()
    while True:
        manager.start_quorum()
        time.sleep(step_s)
        gradient = torch.ones(parameters)
        manager.allreduce(gradient).wait()
        if not manager.should_commit():
            continue
        weights -= gradient
        now = time.monotonic()
        say(step=manager.current_step(), seconds=now - started, replicas=manager.num_participants())
        started = now


if __name__ == "__main__":
    end_with_parent()
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    given = arguments()
    lighthouse(**given) if "lighthouse_address" not in given else train(**given)
