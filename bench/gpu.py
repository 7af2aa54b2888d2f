"""What a peer makes of a GPU: tokens per second beside a bare loop, rounds, and how fast it gives the card back."""

from __future__ import annotations

import asyncio
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from bench import report
from bench.report import Report
from bench.single import open_shards
from bench.swarms import coordinated
from peer.data import sample_indices
from peer.device import choose_devices, read_gpu
from peer.model import build_model, initial_theta
from peer.optimizer import lr_factor, make_inner
from peer.recipes import demo_manifest
from peer.trainer import Trainer
from swarm.local import LocalPeer
from swarm.manifest import DiLoCo, Manifest

HIDDEN_SIZE = 768
LAYERS = 17
SEQUENCE_LENGTH = 1024
BATCH_SAMPLES = 32
STEPS = 30
REPEATS = 3
PEERS = 2
ROUNDS = 4
START_S = 120.0
PAUSE_S = 30.0
LOOK_EVERY_S = 0.05
LEFT_BYTES = 50_000_000


def measure_training(out: Report) -> None:
    """Inner steps by the trainer and by a loop that does nothing else, in turns."""
    device = _device(out)
    if device is None:
        return
    with tempfile.TemporaryDirectory() as folder:
        files = Path(folder)
        run = _manifest(files, out)
        ours, bare = list[float](), list[float]()
        reader = open_shards(run, files, run.data.train)
        theta = initial_theta(run.model)
        trainer = Trainer(run, device, reader)
        trainer.train_round(theta, 0, "warm-up", 2, 0)
        loop = _BareLoop(run, device, reader, trainer.micro_batch or 1)
        loop.steps(2)
        for repeat in range(out.choose(REPEATS, 1)):
            started = time.perf_counter()
            result = trainer.train_round(theta, repeat + 1, "peer", STEPS, 0)
            ours.append(result.tokens / (time.perf_counter() - started))
            started = time.perf_counter()
            bare.append(loop.steps(STEPS) / (time.perf_counter() - started))
        how = (
            f"{torch.cuda.get_device_name(device)}, {run.model.parameters:,} parameters, {STEPS} steps of {BATCH_SAMPLES} "
            f"samples of {SEQUENCE_LENGTH} tokens; with loading the agreed weights and taking the update out; median of "
            "rounds in turns"
        )
        out.figure("tokens_per_s", statistics.median(ours), how)
        out.figure("tokens_per_s_over_bare", statistics.median(ours) / statistics.median(bare), how, ">= 0.98")
        out.row("training", samples_per_pass=trainer.micro_batch, ours=statistics.median(ours), bare=statistics.median(bare))
        trainer.release()


class _BareLoop:
    """Model, optimizer, clipping and schedule of the run in the shortest loop that does the same work."""

    def __init__(self, run: Manifest, device: torch.device, reader: Any, micro_batch: int) -> None:
        if not isinstance(run.strategy, DiLoCo):
            raise TypeError("inner steps are diloco's")
        self._strategy, self._reader, self._device, self._micro = run.strategy, reader, device, micro_batch
        self._run_id, self._done = run.run_id, 0
        self._network: Any = build_model(run.model).to(device).train()
        self._inner = make_inner(run.strategy.inner, self._network)

    def steps(self, count: int) -> int:
        """Train; the tokens that were used."""
        batch_samples = self._strategy.batch_samples
        for _ in range(count):
            indices = sample_indices(self._run_id, 0, "bare", self._done, batch_samples, len(self._reader))
            self._done += batch_samples
            for start in range(0, batch_samples, self._micro):
                batch = self._reader.batch(indices[start : start + self._micro]).to(self._device)
                with torch.autocast("cuda", dtype=torch.bfloat16):
                    logits = self._network(input_ids=batch[:, :-1], use_cache=False).logits
                loss = functional.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())
                torch.autograd.backward(loss * (len(batch) / batch_samples))
            nn.utils.clip_grad_norm_(self._network.parameters(), self._strategy.clip_norm)
            self._inner.set_factor(lr_factor(self._strategy.schedule, self._done * SEQUENCE_LENGTH))
            for part in self._inner.parts:
                part.step()
            self._inner.zero_grad()
        torch.cuda.synchronize(self._device)
        return count * batch_samples * SEQUENCE_LENGTH


async def measure_swarm(out: Report) -> None:
    """Two peers that share the card, as real processes: rounds, then a pause, and what it leaves on the card."""
    device = _device(out)
    if device is None:
        return
    before = _used_bytes(device)
    with tempfile.TemporaryDirectory() as folder:
        files = Path(folder) / "files"
        run = await asyncio.to_thread(_manifest, files, out)
        async with coordinated(Path(folder), run) as (swarm, _):
            for index in range(PEERS):
                await swarm.join(f"peer-{index}", "--files", str(files), device=("--gpu", "0"))
            await _until_rounds(swarm.peers, out.choose(ROUNDS, 2))
            for line in swarm.peers[0].history():
                wanted = ("round", "tokens", "wall_s", "overhead_s", "bytes_sent", "loss")
                out.row("rounds", **{key: line[key] for key in wanted})
            held = _used_bytes(device)
            paused_s = await _pause(swarm.peers, device, before)
            how = f"{PEERS} peers on {torch.cuda.get_device_name(device)}, {run.model.parameters:,} parameters"
            out.figure("pause_frees_gpu_s", paused_s, f"{how}, told at once; until the driver shows their memory as free", "<= 2")
            out.figure("held_bytes", held - before, f"{how}; while they train, by the driver")


async def _until_rounds(peers: Sequence[LocalPeer], rounds: int) -> None:
    limit = time.monotonic() + START_S
    while any(len(peer.history()) < rounds for peer in peers):
        for peer in peers:
            if not peer.running:
                raise RuntimeError(f"{peer.name} ended: {peer.log()[-2000:]}")
        if time.monotonic() > limit:
            raise RuntimeError(f"no {rounds} rounds in {START_S:.0f} s: {peers[0].log()[-3000:]}")
        await asyncio.sleep(0.5)


async def _pause(peers: Sequence[LocalPeer], device: torch.device, before_bytes: int) -> float:
    """Seconds until the card has the memory of all of them back."""
    started = time.monotonic()
    await asyncio.gather(*(peer.ask("pause") for peer in peers))
    while _used_bytes(device) > before_bytes + LEFT_BYTES:
        if time.monotonic() > started + PAUSE_S:
            raise RuntimeError(f"the card isn't free after {PAUSE_S:.0f} s: {peers[0].log()[-2000:]}")
        await asyncio.sleep(LOOK_EVERY_S)
    return time.monotonic() - started


def _used_bytes(device: torch.device) -> int:
    reading = read_gpu(device)
    if reading is None:
        raise RuntimeError("NVML doesn't answer")
    return reading.memory_used_bytes


def _device(out: Report) -> torch.device | None:
    if not torch.cuda.is_available():
        out.say("  no CUDA device: left out")
        return None
    return choose_devices("0")[0]


def _manifest(files: Path, out: Report) -> Manifest:
    """About 124 M parameters on the Python standard library."""
    files.mkdir(parents=True, exist_ok=True)
    run = demo_manifest(
        files,
        peers=PEERS,
        rounds=1000,
        sequence_length=SEQUENCE_LENGTH,
        inner_steps=STEPS,
        batch_samples=BATCH_SAMPLES,
        hidden_size=HIDDEN_SIZE,
        layers=out.choose(LAYERS, 4),
        name="gpu",
    )
    return Manifest.model_validate({**run.model_dump(mode="json"), "codec": {"kind": "int4"}})


def main(argv: Sequence[str] | None = None) -> int:
    """Measure."""
    return report.run("gpu", __doc__, {"training": measure_training, "swarm": measure_swarm}, argv)


if __name__ == "__main__":
    sys.exit(main())
