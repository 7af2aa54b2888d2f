"""One trainer with `hivemind.Optimizer`, in a process of its own: `bench.rounds` starts several of them.

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
from torch.nn import functional

from bench.children import arguments, say, wait_for_go
from peer.data import ShardReader, sample_indices
from peer.model import build_model
from swarm.manifest import DiLoCo, Manifest

AVERAGING_TIMEOUT_S = 30.0
DOCUMENTED_MATCHMAKING_S = 3.0


def main() -> None:
    """Train until ended from outside."""
    given = arguments()
    torch.set_num_threads(1)
    hivemind.p2p.P2P._UNIX_SOCKET_PREFIX = f"/unix{tempfile.gettempdir()}/hivemind-"  # by default they stay behind in /tmp
    manifest = Manifest.read(Path(given["manifest"]))
    network = build_model(manifest.model).train()
    dht = hivemind.DHT(initial_peers=given["initial_peers"], host_maddrs=["/ip4/127.0.0.1/tcp/0"], start=True)
    optimizer = _optimizer(dht, manifest, network, given["mode"], given["peers"])
    say(addresses=[str(address) for address in dht.get_visible_maddrs()])
    wait_for_go()
    batches = _batches(manifest, Path(given["files"]), given["name"])
    while True:
        say(**_epoch(network, optimizer, batches))


def _optimizer(dht: Any, manifest: Manifest, network: torch.nn.Module, mode: str, peers: int) -> Any:
    """Local steps, then averaged parameters (`local`); or averaged gradients, hivemind's default (`gradients`).

    `tuned` tells hivemind the group's size, so that it need not wait for more, and lets it look for progress more often.
    """
    strategy = manifest.strategy
    if not isinstance(strategy, DiLoCo) or strategy.inner.kind != "adamw":
        raise TypeError("the comparison is with diloco and AdamW inside")
    inner = strategy.inner
    settings: dict[str, Any] = {"lr": inner.lr, "betas": (inner.beta1, inner.beta2), "weight_decay": inner.weight_decay}
    local, tuned = mode.startswith("local"), mode.endswith("tuned")
    group = {"target_group_size": peers} if tuned else {}
    return hivemind.Optimizer(
        dht=dht,
        run_id=manifest.name,
        batch_size_per_step=strategy.batch_samples,
        target_batch_size=peers * strategy.inner_steps * strategy.batch_samples,
        params=network.parameters(),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, eps=inner.epsilon, **settings),
        matchmaking_time=DOCUMENTED_MATCHMAKING_S,
        averaging_timeout=AVERAGING_TIMEOUT_S,
        grad_compression=hivemind.compression.Float16Compression(),
        state_averaging_compression=hivemind.compression.Float16Compression(),
        use_local_updates=local,
        delay_state_averaging=not local,
        averager_opts=group,
        grad_averager_factory=None if local else partial(GradientAverager, **group),
        tracker_opts={"min_refresh_period": 0.1} if tuned else {},
    )


def _batches(manifest: Manifest, files: Path, name: str) -> Iterator[torch.Tensor]:
    data, samples = manifest.data, manifest.strategy.batch_samples
    reader = ShardReader.open(data.train, files, data.sequence_length, int(manifest.model.config["vocab_size"]))
    position = 0
    while True:
        yield reader.batch(sample_indices(manifest.run_id, 0, name, position, samples, len(reader)))
        position += samples


def _epoch(network: torch.nn.Module, optimizer: Any, batches: Iterator[torch.Tensor]) -> dict[str, Any]:
    """Train until hivemind says that the epoch is over. A step that doesn't end the epoch counts as training."""
    epoch, started = optimizer.local_epoch, time.perf_counter()
    train_s, steps, loss = 0.0, 0, 0.0
    while optimizer.local_epoch == epoch:
        begun = time.perf_counter()
        loss += _train(network, optimizer, next(batches))
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


def _train(network: Any, optimizer: Any, batch: torch.Tensor) -> float:
    optimizer.zero_grad()
    logits = network(input_ids=batch[:, :-1], use_cache=False).logits
    loss = functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
    loss.backward()  # type: ignore[no-untyped-call] # torch gives no type
    return float(loss)


if __name__ == "__main__":
    main()
