"""What came out of a run, from a peer's folder: the newest agreed weights, their held-out loss, and the export."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from peer.best import BEST, BestCheckpoint
from peer.export import Contributor, Provenance, export_model, generate_sample
from peer.model import initial_theta
from peer.state import Layout, Snapshot, load_newest
from peer.trainer import Trainer, Vector
from swarm.errors import CheckpointCorrupt, UsageError
from swarm.manifest import Manifest
from swarm.rpc.v1.coordinator_pb2 import Balance, GetProgressResponse

CHECKPOINTS = "checkpoints"
EVIDENCE = "evidence"
FILES = "files"
PIECES = "pieces"
ADAPTER_FILE = "adapter_config.json"
PROMPT = "def "
SAMPLE_TOKENS = 120


@dataclass(frozen=True)
class Losses:
    """Held-out loss in nats per token, of the initial and of the newest weights."""

    first: float
    last: float


def newest_weights(directory: Path, run: Manifest) -> Snapshot:
    """The newest whole checkpoint in a peer's folder. Raises `CheckpointCorrupt` if there is none."""
    return _weights(directory, CHECKPOINTS, run, "let the peer finish a round first")


def best_weights(directory: Path, run: Manifest) -> Snapshot:
    """The best checkpoint by held-out loss in a peer's folder. Raises `CheckpointCorrupt` if there is none."""
    hint = "the run's manifest has no evaluation" if run.evaluation is None else "let a round of the run be evaluated first"
    return _weights(directory, BEST, run, hint)


def _weights(directory: Path, folder: str, run: Manifest, hint: str) -> Snapshot:
    loaded = load_newest(directory / folder, Layout.of(run), run.run_id)
    if loaded.snapshot is None:
        reasons = "; ".join(f"{item.path.name}: {item.reason}" for item in loaded.skipped) or "no checkpoint yet"
        raise CheckpointCorrupt(f"nothing to export in {directory}: {reasons}", hint)
    return loaded.snapshot


def provenance_of(
    snapshot: Snapshot, standing: GetProgressResponse | None, balances: Iterable[Balance], loss: float | None = None
) -> Provenance:
    """What the card of these weights says: `standing` and `balances` are the coordinator's words, where it has been asked."""
    contributors = [
        Contributor(one.account or one.peer_id, int(one.verified_flops) + int(one.final_flops), one.rounds, one.tokens)
        for one in balances
    ]
    root, size = ("", 0) if standing is None else (standing.ledger_root.hex(), standing.ledger_size)
    return Provenance(snapshot.round, snapshot.state.tokens, snapshot.root_hex, root, size, contributors, loss)


def provenance(
    directory: Path,
    run: Manifest,
    snapshot: Snapshot,
    standing: GetProgressResponse | None = None,
    balances: Iterable[Balance] = (),
) -> Provenance:
    """What the card of a checkpoint in a peer's folder says, with what is known there of held-out losses."""
    known = BestCheckpoint.open(directory, run)
    told = provenance_of(snapshot, standing, balances, known.loss_of(snapshot.round - 1))
    return replace(told, evaluations=[(each.round, each.loss, each.evaluators) for each in known.agreed])


def held_out_losses(run: Manifest, files: Path, theta: Vector, samples: int) -> Losses:
    """The loss on the first `samples` held-out samples, before and after training."""
    trainer = Trainer.open(run, torch.device("cpu"), files)
    return Losses(trainer.evaluate(initial_theta(run.model, files), samples), trainer.evaluate(theta, samples))


def export(run: Manifest, files: Path, snapshot: Snapshot, to: Path, provenance: Provenance, *, merged: bool = False) -> Path:
    """Write the Hugging Face directory; of an adapter the adapter alone, or the `merged` model."""
    disable_progress_bar()
    return export_model(run, snapshot.state.theta, files, to, provenance, merged=merged)


def sample(
    directory: Path,
    prompt: str = PROMPT,
    tokens: int = SAMPLE_TOKENS,
    *,
    chat: bool = False,
    base: Path | None = None,
    seed: int = 0,
) -> str:
    """What an exported model writes; `base` is what an adapter adapts.

    Raises `UsageError` as `load_exported` and `require_chats` do.
    """
    model, tokenizer = load_exported(directory, base)
    if chat:
        require_chats(tokenizer)
        prompt = tokenizer.apply_chat_template([{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True)
    return generate_sample(model, tokenizer, prompt, tokens, seed)


def load_exported(directory: Path, base: Path | None = None) -> tuple[Any, Any]:
    """An exported model and its tokenizer, loaded as anybody would; `base` is what an adapter adapts.

    Raises `UsageError` for an adapter without a base, and for what is no model.
    """
    disable_progress_bar()
    try:
        if (directory / ADAPTER_FILE).exists():
            model = _adapted(directory, base)
        else:
            model = AutoModelForCausalLM.from_pretrained(directory, use_safetensors=True)
        return model, AutoTokenizer.from_pretrained(directory)
    except (OSError, ValueError) as error:
        raise UsageError(f"can't load {directory}: {' '.join(str(error).split())[:200]}", "export the model anew") from error


def require_chats(tokenizer: Any) -> None:
    """Raise `UsageError` for a tokenizer without a chat template."""
    if not tokenizer.chat_template:
        raise UsageError("the model's tokenizer has no chat template", "leave --chat out")


def _adapted(directory: Path, base: Path | None) -> Any:
    from peft import PeftModel  # noqa: PLC0415 - takes as long to import as everything else, and few models need it

    if base is None:
        raise UsageError(f"{directory} is an adapter", "name the model that it adapts with --base, or export with --merged")
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, use_safetensors=True), directory)
