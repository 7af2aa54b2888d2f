"""One process that trains by itself with the manifest's inner optimizer, on samples of its own, and keeps its weights."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import torch

from bench.children import arguments, say, wait_for_go
from bench.single import open_shards
from peer.model import initial_theta
from peer.trainer import Trainer
from swarm.manifest import Manifest


def main() -> None:
    """Train to the end of the steps; after every `every` steps the weights go into the folder `record`."""
    given = arguments()
    torch.set_num_threads(1)
    manifest = Manifest.read(Path(given["manifest"]))
    files, folder, every = Path(given["files"]), Path(given["record"]), int(given["every"])
    folder.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(manifest, torch.device("cpu"), open_shards(manifest, files, manifest.data.train))
    theta, tokens, computed_s = initial_theta(manifest.model), 0, 0.0
    say(ready=True)
    wait_for_go()
    say(started=True, at_s=time.time())
    for index in range(1, given["steps"] // every + 1):
        done = trainer.train_round(theta, index, given["name"], every, tokens)
        theta, tokens, computed_s = theta - done.update, tokens + done.tokens, computed_s + done.seconds
        at_s = time.time()
        np.save(folder / f"round-{index}.npy", theta)
        say(at_s=at_s, round=index, steps=index * every, computed_s=computed_s, loss=done.loss_last)
    say(ended=True)


if __name__ == "__main__":
    main()
