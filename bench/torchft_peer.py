"""One trainer with torchft's DiLoCo over gloo. Trainer 0 runs the lighthouse, where the others find it."""

from __future__ import annotations

import os
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch.distributed import TCPStore  # type: ignore[attr-defined] # exported under another name
from torchft import Manager, ProcessGroupGloo
from torchft.coordination import LighthouseServer
from torchft.local_sgd import DiLoCo

from bench.children import arguments, say, wait_for_go
from bench.rivals import Notes, accumulate, adamw, batches, set_rate
from peer.model import build_model
from swarm.manifest import DiLoCo as DiLoCoStrategy
from swarm.manifest import Manifest

LIGHTHOUSE_PORT = 29510
PATIENCE = timedelta(hours=2)
HEARTBEAT_MS = 600_000


def main() -> None:
    """Train to the end of the steps."""
    given = arguments()
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = given["device"]
    manifest = Manifest.read(Path(given["manifest"]))
    strategy = manifest.strategy
    if not isinstance(strategy, DiLoCoStrategy):
        raise TypeError("the comparison is with diloco")
    network: Any = build_model(manifest.model).train()
    lighthouse = _lighthouse(given) if given["rank"] == 0 else None
    say(ready=True)
    wait_for_go()
    store = TCPStore(given["address"], 0, is_master=True, wait_for_workers=False)  # serves as long as it is held
    manager = _manager(given, network, store.port)
    inner = adamw(manifest, network.parameters())
    outer = torch.optim.SGD(
        network.parameters(), lr=strategy.outer.lr, momentum=strategy.outer.momentum, nesterov=strategy.outer.momentum > 0
    )
    notes = Notes(network, given["record"])
    samples = batches(manifest, Path(given["files"]), str(given["rank"]))
    step_tokens = given["peers"] * strategy.batch_samples * manifest.data.sequence_length
    say(started=True, at_s=time.time())
    computed_s = 0.0
    with DiLoCo(manager, [network], inner, outer, sync_every=strategy.inner_steps, pin_memory=False, use_bucketization=True):
        for step in range(given["steps"]):
            begun = time.monotonic()
            set_rate(manifest, inner, step * step_tokens)
            inner.zero_grad()
            loss = accumulate(network, next(samples), strategy.clip_norm)
            computed_s += time.monotonic() - begun
            inner.step()
            if (step + 1) % strategy.inner_steps == 0:
                notes.take((step + 1) // strategy.inner_steps, step + 1, computed_s, loss)
    manager.shutdown(wait=False)
    if lighthouse is not None:
        lighthouse.shutdown()
    say(ended=True)


def _lighthouse(given: dict[str, Any]) -> Any:
    return LighthouseServer(
        bind=f"0.0.0.0:{LIGHTHOUSE_PORT}",
        min_replicas=given["peers"],
        join_timeout_ms=HEARTBEAT_MS,
        heartbeat_timeout_ms=HEARTBEAT_MS,
    )


def _manager(given: dict[str, Any], network: Any, store_port: int) -> Any:
    """A replica group of one process; all start from the same weights."""
    return Manager(
        pg=ProcessGroupGloo(timeout=PATIENCE),
        load_state_dict=network.load_state_dict,
        state_dict=network.state_dict,
        min_replica_size=given["peers"],
        use_async_quorum=False,
        timeout=PATIENCE,
        quorum_timeout=PATIENCE,
        connect_timeout=PATIENCE,
        rank=0,
        world_size=1,
        store_addr=given["address"],
        store_port=store_port,
        lighthouse_addr=f"http://{given['meeting']}:{LIGHTHOUSE_PORT}",
        replica_id=f"trainer_{given['rank']}",
        hostname=given["address"],
        init_sync=False,
    )


if __name__ == "__main__":
    main()
