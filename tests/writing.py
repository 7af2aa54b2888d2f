"""Runs that generate, with a model that writes in milliseconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from peer.corpus import byte_level_tokenizer
from peer.data import tree_path
from peer.dataset import Plan, build
from peer.documents import Counts, Shuffled
from peer.importing import import_pretrained
from peer.model import generation_flops_per_token
from peer.recipes import llama_config
from swarm.manifest import Manifest
from tests.checkpoints import save_checkpoint

PROMPTS, EACH = 12, 2
CONFIG = llama_config(257, 48, hidden_size=32, layers=2, end_of_text=256) | {"initializer_range": 0.3}


def writing_run(folder: Path, seed: int = 3, batch_samples: int = 10, **sampling: Any) -> tuple[Manifest, Path, Path]:
    """A manifest, its files, and the folder of its base, whose weights follow from `seed`; all in a folder that is made."""
    files, base = folder / "files", folder / "base"
    torch.manual_seed(seed)
    made = import_pretrained(str(save_checkpoint(folder / "tiny", CONFIG, byte_level_tokenizer())), base)
    with Shuffled((f'"number {number}"' for number in range(PROMPTS)), 0, folder) as prompts:
        data = build(prompts, files, Plan(sequence_length=15, kind="prompts", license="CC0-1.0"), Counts()).data
    for tree in (made.base, made.tokenizer):
        tree_path(files, tree).write_bytes(tree_path(base, tree).read_bytes())
    manifest = Manifest.model_validate(
        {
            "name": "writing",
            "model": {"config": made.config, "parameters": 1, "base": made.base},
            "tokenizer": made.tokenizer,
            "data": data,
            "strategy": {
                "kind": "generate",
                "batch_samples": batch_samples,
                "samples_per_prompt": EACH,
                "sampling": {"max_tokens": 16, **sampling},
            },
            "credit": {"flops_per_token": generation_flops_per_token(made.config, 31)},
        }
    )
    return manifest, files, base
