"""A run small enough to train in milliseconds: a two-layer Llama of width 32 on repeated sentences."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from peer.corpus import build_shards, byte_level_tokenizer, encode_bytes, save_tokenizer, split_documents
from peer.data import ShardReader
from peer.model import count_parameters, flops_per_token
from peer.recipes import llama_config
from swarm.manifest import Manifest

SEQUENCE_LENGTH = 32
VOCABULARY_SIZE = 257
LLAMA = llama_config(VOCABULARY_SIZE, SEQUENCE_LENGTH, hidden_size=32, layers=2, end_of_text=256)
SCHEDULE = {"total_tokens": 1 << 20}
SYNC: dict[str, Any] = {"kind": "sync", "batch_samples": 8, "schedule": SCHEDULE}
DILOCO: dict[str, Any] = {
    "kind": "diloco",
    "inner_steps": 3,
    "batch_samples": 4,
    "inner": {"kind": "adamw", "lr": 1e-2},
    "schedule": SCHEDULE,
}
GPT2: dict[str, Any] = {
    "model_type": "gpt2",
    "vocab_size": VOCABULARY_SIZE,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 2,
    "n_positions": SEQUENCE_LENGTH,
}
CONFIGS = {"llama": LLAMA, "gpt2": GPT2}
STRATEGIES = {"sync": SYNC, "diloco": DILOCO}


@dataclass(frozen=True)
class SmallRun:
    """A manifest with its files."""

    directory: Path
    manifest: Manifest

    @property
    def train(self) -> ShardReader:
        return ShardReader.open(self.manifest.data.train, self.directory, SEQUENCE_LENGTH, VOCABULARY_SIZE)

    @property
    def validation(self) -> ShardReader:
        return ShardReader.open(self.manifest.data.validation, self.directory, SEQUENCE_LENGTH, VOCABULARY_SIZE)


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def small_data(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], Any]:
    """A directory with tokenizer and shards, the manifest's data section and the tokenizer's tree."""
    directory = tmp_path_factory.mktemp("small")
    documents = (f"document {number}: the quick brown fox jumps over {number % 7} lazy dogs. " * 4 for number in range(60))
    train, validation = (
        build_shards(
            encode_bytes(side),
            directory,
            sequence_length=SEQUENCE_LENGTH,
            end_of_text=256,
            vocabulary_size=VOCABULARY_SIZE,
            samples_per_shard=100,
        )
        for side in split_documents(documents, 0.2)
    )
    data = {"sequence_length": SEQUENCE_LENGTH, "train": train, "validation": validation, "license": "CC0-1.0"}
    return directory, data, save_tokenizer(byte_level_tokenizer(), directory)


@pytest.fixture(scope="session")
def small_run(small_data: tuple[Path, dict[str, Any], Any]) -> Callable[..., SmallRun]:
    """Makes a run with a strategy, `sync` or `diloco`, changed by keywords, and a model, `llama` or `gpt2`."""
    directory, data, tokenizer = small_data

    def make(strategy: str = "sync", model: str = "llama", **changes: Any) -> SmallRun:
        config = CONFIGS[model]
        manifest = Manifest.model_validate(
            {
                "name": "small",
                "model": {"config": config, "seed": 7, "parameters": count_parameters(config)},
                "tokenizer": tokenizer,
                "data": data,
                "strategy": STRATEGIES[strategy] | changes,
                "credit": {"flops_per_token": flops_per_token(config, SEQUENCE_LENGTH)},
            }
        )
        return SmallRun(directory, manifest)

    return make
