"""What `swarm run validate` finds out beyond the manifest's fields: whether the model can be built and the files fit it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from peer.corpus import load_tokenizer
from peer.data import ShardReader, tree_path, verify_tree_file
from peer.model import build_model, check_parameters
from swarm.errors import DataInvalid
from swarm.manifest import Manifest, Shard

ROWS_AT_ONCE = 1024


def problems_of(manifest: Manifest, files: Path | None) -> list[str]:
    """Every problem, a line each. `files` is a folder with the run's files, or None where they aren't looked at."""
    return [error.message for error in _problems(manifest, files)]


def _problems(manifest: Manifest, files: Path | None) -> Iterator[DataInvalid]:
    try:
        check_parameters(manifest.model)
    except DataInvalid as error:
        yield error
        return
    if files is None:
        return
    damaged = False
    for tree in manifest.files:
        try:
            verify_tree_file(tree_path(files, tree), tree)
        except DataInvalid as error:
            damaged = True
            yield error
    if damaged:
        return
    yield from _contents(manifest, files)


def _contents(manifest: Manifest, files: Path) -> Iterator[DataInvalid]:
    vocabulary = int(manifest.model.config.get("vocab_size", 1 << 32))
    try:
        size = len(load_tokenizer(tree_path(files, manifest.tokenizer)))
        if size > vocabulary:
            yield DataInvalid(f"the tokenizer has {size} tokens, model.config.vocab_size is {vocabulary}")
    except DataInvalid as error:
        yield error
    for shard in (*manifest.data.train, *manifest.data.validation):
        try:
            _read(manifest, shard, files, vocabulary)
        except DataInvalid as error:
            yield DataInvalid(f"shard {shard.root[:12]}: {error.message}")
    if manifest.model.base is not None:
        try:
            with torch.no_grad():
                build_model(manifest.model, files)
        except DataInvalid as error:
            yield error


def _read(manifest: Manifest, shard: Shard, files: Path, vocabulary: int) -> None:
    reader = ShardReader.open([shard], files, manifest.data.sequence_length, vocabulary, manifest.data.layout)
    for first in range(0, len(reader), ROWS_AT_ONCE):
        reader.batch(range(first, min(first + ROWS_AT_ONCE, len(reader))))
