"""What came out of a run, from a peer's folder: the newest agreed weights, their held-out loss, and the export."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from peer.data import ShardReader
from peer.export import Provenance, export_model, generate_sample
from peer.model import initial_theta
from peer.state import Layout, Snapshot, load_newest
from peer.trainer import Trainer, Vector
from swarm.errors import CheckpointCorrupt
from swarm.manifest import Manifest

CHECKPOINTS = "checkpoints"
EVIDENCE = "evidence"
FILES = "files"
PROMPT = "def "
SAMPLE_TOKENS = 120


@dataclass(frozen=True)
class Losses:
    """Held-out loss in nats per token, of the initial and of the newest weights."""

    first: float
    last: float


def newest_weights(directory: Path, run: Manifest) -> Snapshot:
    """The newest whole checkpoint in a peer's folder. Raises `CheckpointCorrupt` if there is none."""
    loaded = load_newest(directory / CHECKPOINTS, Layout.of(run), run.run_id)
    if loaded.snapshot is None:
        reasons = "; ".join(f"{item.path.name}: {item.reason}" for item in loaded.skipped) or "no checkpoint yet"
        raise CheckpointCorrupt(f"nothing to export in {directory}: {reasons}", "let the peer finish a round first")
    return loaded.snapshot


def held_out_losses(run: Manifest, files: Path, theta: Vector, samples: int) -> Losses:
    """The loss on the first `samples` held-out samples, before and after training."""
    vocabulary = int(run.model.config.get("vocab_size", 1 << 32))
    train = ShardReader.open(run.data.train, files, run.data.sequence_length, vocabulary, run.data.layout)
    validation = ShardReader.open(run.data.validation, files, run.data.sequence_length, vocabulary, run.data.layout)
    trainer = Trainer(run, torch.device("cpu"), train, validation, files=files)
    return Losses(trainer.evaluate(initial_theta(run.model, files), samples), trainer.evaluate(theta, samples))


def export(run: Manifest, files: Path, snapshot: Snapshot, to: Path, provenance: Provenance, *, merged: bool = False) -> Path:
    """Write the Hugging Face directory; of an adapter the adapter alone, or the `merged` model."""
    disable_progress_bar()
    return export_model(run, snapshot.state.theta, files, to, provenance, merged=merged)


def sample(directory: Path, prompt: str = PROMPT) -> str:
    """What the exported model writes, loaded as anybody would."""
    disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(directory)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    return generate_sample(model, tokenizer, prompt, SAMPLE_TOKENS)
