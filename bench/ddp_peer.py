"""One trainer with torch's `DistributedDataParallel` over gloo, gradients averaged in fp16 at every step."""

from __future__ import annotations

import os
import time
from datetime import timedelta
from pathlib import Path

import torch
from torch import distributed
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook
from torch.nn.parallel import DistributedDataParallel

from bench.children import arguments, say, wait_for_go
from bench.rivals import Notes, accumulate, adamw, batches, set_rate
from peer.model import build_model
from swarm.manifest import Manifest

PATIENCE = timedelta(hours=2)


def main() -> None:
    """Train to the end of the steps."""
    given = arguments()
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = given["device"]
    manifest = Manifest.read(Path(given["manifest"]))
    network = build_model(manifest.model).train()
    distributed.init_process_group(
        "gloo", init_method=f"tcp://{given['meeting']}", rank=given["rank"], world_size=given["peers"], timeout=PATIENCE
    )
    shared = DistributedDataParallel(network)
    shared.register_comm_hook(None, fp16_compress_hook)
    optimizer = adamw(manifest, shared.parameters())
    notes = Notes(network, given["record"])
    samples = batches(manifest, Path(given["files"]), str(given["rank"]))
    step_tokens = given["peers"] * manifest.training.batch_samples * manifest.data.sequence_length
    say(ready=True)
    wait_for_go()
    say(started=True, at_s=time.time())
    for step in range(given["steps"]):
        set_rate(manifest, optimizer, step * step_tokens)
        loss = accumulate(shared, next(samples), manifest.training.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        notes.take(step + 1, step + 1, 0.0, loss)
    say(ended=True)


if __name__ == "__main__":
    main()
