"""A finished model as a directory that transformers loads with no code of ours."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from numpy.typing import NDArray
from transformers import GenerationConfig

from peer.corpus import load_tokenizer
from peer.data import tree_path
from peer.folders import appearing
from peer.model import FlatParameters, build_model
from peer.nf4 import unpack_layers
from swarm.credits import FLOPS_PER_CREDIT
from swarm.errors import UsageError
from swarm.evaluations import perplexity
from swarm.manifest import Data, Manifest

Vector = NDArray[np.float32]

CARD = "README.md"
MAX_NAME_CHARACTERS = 80
MAX_LISTED = 1000
TEMPERATURE, TOP_P = 0.7, 0.95


@dataclass(frozen=True)
class Contributor:
    """Somebody's share in a run, as the ledger has it; `flops` are verified and final ones."""

    name: str
    flops: int
    rounds: int
    tokens: int


@dataclass(frozen=True)
class Provenance:
    """Where the weights come from: what the model card says."""

    round: int
    tokens: int
    state_root: str
    ledger_root: str = ""
    ledger_size: int = 0
    contributors: Sequence[Contributor] = ()
    validation_loss: float | None = None
    evaluations: Sequence[tuple[int, float, int]] = ()
    """Rounds with the held-out loss on which so many evaluators agreed."""


def export_model(
    run: Manifest, theta: Vector, files: Path, directory: Path, provenance: Provenance, *, merged: bool = False
) -> Path:
    """Write config, safetensors, tokenizer, generation settings and a model card into `directory`.

    The directory appears whole or not at all. `theta` is [parameters]; `files` is where the run's files lie. Of an adapter the
    adapter alone is written, in peft's format, or with `merged` the whole model with the adapter in it. Raises `UsageError` if
    the directory exists and has something in it.
    """
    require_new(directory)
    directory.parent.mkdir(parents=True, exist_ok=True)
    with appearing(directory) as unfinished:
        _write(run, theta, files, unfinished, provenance, merged)
        unfinished.chmod(0o755)
    return directory


def require_new(directory: Path) -> None:
    """Raise `UsageError` if the directory exists and has something in it."""
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise UsageError(f"{directory} exists and isn't empty", "name a new directory")


def _write(run: Manifest, theta: Vector, files: Path, directory: Path, provenance: Provenance, merged: bool) -> None:
    adapts = run.model.adapter is not None
    network: Any = build_model(run.model, files)
    FlatParameters(network).write(network, theta)
    if adapts and merged:
        unpack_layers(network)
        network = network.merge_and_unload()
    tokenizer = load_tokenizer(tree_path(files, run.tokenizer))
    end = tokenizer.eos_token_id
    tokenizer.model_max_length = run.data.sequence_length
    if run.data.chat_template:
        tokenizer.chat_template = run.data.chat_template
    network.generation_config = GenerationConfig(
        eos_token_id=end, pad_token_id=end, bos_token_id=getattr(network.config, "bos_token_id", None)
    )
    without_a_hub = {"save_embedding_layers": False} if adapts and not merged else {}  # peft would ask one whether they changed
    network.save_pretrained(directory, **without_a_hub)
    tokenizer.save_pretrained(directory)
    (directory / CARD).write_text(model_card(run, provenance), encoding="utf-8")


def model_card(run: Manifest, provenance: Provenance) -> str:
    """The model card in Markdown; whatever strangers wrote is reduced to plain characters."""
    base, adapter = run.model.base, run.model.adapter
    library = "transformers" if adapter is None else "peft"
    front: dict[str, Any] = {"library_name": library, "pipeline_tag": "text-generation", "tags": ["swarm"], "license": "other"}
    if base is not None and base.name:
        front["base_model"] = _plain(base.name)
    front["license_name"] = _plain(run.data.license)
    loss = (
        "" if provenance.validation_loss is None else f"| validation loss, nats per token | {provenance.validation_loss:.4f} |\n"
    )
    return (
        f"---\n{yaml.safe_dump(front, sort_keys=True)}---\n\n# {run.name}\n\n{_plain(run.description, 2000)}\n\n"
        "Trained together by volunteers with `swarm`.\n\n| | |\n| --- | --- |\n"
        f"| run | `{run.run_id}` |\n| rounds | {provenance.round} |\n| tokens | {provenance.tokens} |\n"
        f"| trained parameters | {run.model.parameters} |\n{_origin(run)}| state root | `{provenance.state_root}` |\n"
        f"| ledger | {_ledger(provenance)} |\n{loss}\n{_data_card(run.data)}\n{_evaluations(provenance)}"
        f"{_contributors(provenance.contributors)}"
    )


def _evaluations(provenance: Provenance) -> str:
    """Held-out losses as a table."""
    newest = list(provenance.evaluations)[-MAX_LISTED:]
    if not newest:
        return ""
    rows = [f"| {number} | {loss:.4f} | {perplexity(loss):.4g} | {evaluators} |" for number, loss, evaluators in newest]
    return (
        "## Evaluations\n\nHeld-out loss after a round, on which so many evaluators agreed. They are drawn by lot, and what each "
        "of them said is in the run's ledger.\n\n"
        "| round | loss, nats per token | perplexity | evaluators |\n| --- | --- | --- | --- |\n" + "\n".join(rows) + "\n\n"
    )


def _ledger(provenance: Provenance) -> str:
    if not provenance.ledger_root:
        return "not recorded"
    return f"{provenance.ledger_size} entries, root `{_plain(provenance.ledger_root)}`"


def _data_card(data: Data) -> str:
    """What was trained on: how much, under which licence, and what of it nobody else has seen."""
    private = sum(shard.samples for shard in data.train if shard.private)
    rows = {
        "licence": _plain(data.license, 200),
        "training samples": f"{data.train_samples} of {data.sequence_length} tokens",
        "held-out samples": f"{sum(shard.samples for shard in data.validation)}",
        "private training samples": f"{private}, which stayed with those who have them" if private else "",
        "tokens with a loss": f"{data.counted_tokens}" if data.counted_tokens else "",
        "teacher": f"{_plain(data.teacher.name) or 'unnamed'}, {data.teacher.top_k} tokens" if data.teacher is not None else "",
    }
    table = "".join(f"| {name} | {value} |\n" for name, value in rows.items() if value)
    return f"## Data\n\n{_plain(data.description, 2000) or 'Not described.'}\n\n| | |\n| --- | --- |\n{table}"


def _contributors(contributors: Sequence[Contributor]) -> str:
    lines = [
        f"- {_plain(one.name)}: {one.flops / FLOPS_PER_CREDIT:.6g} credits, {one.rounds} rounds, {one.tokens} tokens"
        for one in contributors[:MAX_LISTED]
    ]
    return "## Contributors\n\n" + "\n".join(lines or ["- not recorded"]) + "\n"


def _origin(run: Manifest) -> str:
    base, adapter = run.model.base, run.model.adapter
    stored = ", in 4 bits (NF4)" if base is not None and base.stored == "nf4" else ""
    rows = "" if base is None else f"| base | {_plain(base.name) or 'unnamed'}{stored}, file root `{base.root}` |\n"
    return rows if adapter is None else rows + f"| adapter | LoRA, rank {adapter.rank}, alpha {adapter.alpha} |\n"


def _plain(text: str, limit: int = MAX_NAME_CHARACTERS) -> str:
    return re.sub(r"[^\w .,:;@+()/-]", "", " ".join(text.split()))[:limit]


def generate_sample(model: Any, tokenizer: Any, prompt: str, max_new_tokens: int = 64, seed: int = 0) -> str:
    """What a transformers model continues `prompt` with; the same each time for a seed, and nobody else's random numbers change.

    Tokens are drawn, as small models repeat themselves for ever where the likeliest is always taken (Holtzman et al., 2020).
    """
    inputs = tokenizer(prompt, return_tensors="pt")
    ids, mask = inputs["input_ids"].to(model.device), inputs["attention_mask"].to(model.device)
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(seed)
        out = model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=max_new_tokens,
            do_sample=True,
            temperature=TEMPERATURE,
            top_p=TOP_P,
            pad_token_id=tokenizer.eos_token_id,
        )
    return str(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))
