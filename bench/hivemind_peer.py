"""One trainer with `hivemind.Optimizer`, in a process of its own: `bench.rounds` and `bench.links` start several of them.

Says its DHT addresses, waits for `go`, then says for every epoch how long it took and how much of that was training.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import hivemind
import torch
from hivemind.optim.grad_averager import GradientAverager

from bench.children import arguments, say, wait_for_go
from bench.rivals import Notes, accumulate, adamw, batches
from peer.model import build_model
from peer.optimizer import lr_factor
from swarm.manifest import DiLoCo, Manifest

AVERAGING_TIMEOUT_S = 30.0
DOCUMENTED_MATCHMAKING_S = 3.0


def main() -> None:
    """Train until ended from outside, listening at `address`; after every epoch weights go into `record`, if that is given."""
    given = arguments()
    torch.set_num_threads(1)
    hivemind.p2p.P2P._UNIX_SOCKET_PREFIX = f"/unix{tempfile.gettempdir()}/hivemind-"  # by default they stay behind in /tmp
    manifest = Manifest.read(Path(given["manifest"]))
    network = build_model(manifest.model).train()
    listen = f"/ip4/{given.get('address', '127.0.0.1')}/tcp/0"
    dht = hivemind.DHT(initial_peers=given["initial_peers"], host_maddrs=[listen], start=True)
    optimizer = _optimizer(dht, manifest, network, given)
    notes = Notes(network, given["record"]) if "record" in given else None
    say(addresses=[str(address) for address in dht.get_visible_maddrs()])
    wait_for_go()
    samples = batches(manifest, Path(given["files"]), given["name"])
    steps, computed_s = 0, 0.0
    if notes is not None:
        say(started=True, at_s=time.time())
    while True:
        epoch = _epoch(network, optimizer, samples, manifest.training.clip_norm)
        steps, computed_s = steps + epoch["steps"], computed_s + epoch["train_s"]
        if notes is None:
            say(**epoch)
        else:
            notes.take(epoch["next_epoch"], steps, computed_s, epoch["loss"])


def _optimizer(dht: Any, manifest: Manifest, network: torch.nn.Module, given: dict[str, Any]) -> Any:
    """Local steps, then averaged parameters (`local`); or averaged gradients, hivemind's default (`gradients`).

    `tuned` tells hivemind the group's size, so that it need not wait for more, and lets it look for progress more often.
    """
    strategy, mode, peers = manifest.training, given["mode"], given["peers"]
    if not isinstance(strategy, DiLoCo):
        raise TypeError("the comparison is with diloco")
    epoch_tokens = peers * strategy.inner_steps * strategy.batch_samples * manifest.data.sequence_length
    schedule = partial(
        torch.optim.lr_scheduler.LambdaLR, lr_lambda=lambda epoch: lr_factor(strategy.schedule, epoch * epoch_tokens)
    )
    local, tuned = mode.startswith("local"), mode.endswith("tuned")
    group = {"target_group_size": peers} if tuned else {}
    return hivemind.Optimizer(
        dht=dht,
        run_id=manifest.name,
        batch_size_per_step=strategy.batch_samples,
        target_batch_size=peers * strategy.inner_steps * strategy.batch_samples,
        params=network.parameters(),
        optimizer=partial(adamw, manifest),
        scheduler=schedule if given.get("scheduled") else None,
        matchmaking_time=DOCUMENTED_MATCHMAKING_S,
        averaging_timeout=given.get("averaging_timeout_s", AVERAGING_TIMEOUT_S),
        next_chunk_timeout=given.get("averaging_timeout_s"),
        grad_compression=hivemind.compression.Float16Compression(),
        state_averaging_compression=hivemind.compression.Float16Compression(),
        use_local_updates=local,
        delay_state_averaging=not local,
        averager_opts=group,
        grad_averager_factory=None if local else partial(GradientAverager, **group),
        tracker_opts={"min_refresh_period": 0.1} if tuned else {},
    )


def _epoch(network: torch.nn.Module, optimizer: Any, samples: Iterator[torch.Tensor], clip_norm: float) -> dict[str, Any]:
    """Train until hivemind says that the epoch is over. A step that doesn't end the epoch counts as training."""
    epoch, started = optimizer.local_epoch, time.perf_counter()
    train_s, steps, loss = 0.0, 0, 0.0
    while optimizer.local_epoch == epoch:
        begun = time.perf_counter()
        optimizer.zero_grad()
        loss += accumulate(network, next(samples), clip_norm)
        trained = time.perf_counter()
        optimizer.step()
        ended = time.perf_counter()
        steps += 1
        train_s += (ended if optimizer.local_epoch == epoch else trained) - begun
    return {
        "epoch": epoch,
        "wall_s": time.perf_counter() - started,
        "train_s": train_s,
        "steps": steps,
        "loss": loss / steps,
        "next_epoch": optimizer.local_epoch,
        "peers": optimizer.tracker.global_progress.num_peers,
    }


if __name__ == "__main__":
    main()
