"""What a teacher, a model in transformers' own format, expects at each token of a run's training data; written as shards by hash.

Only a run's owner needs this. The teacher is read from a directory: safetensors, and no code of its own.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

from peer.batches import grouped
from peer.corpus import TOKENIZER, load_tokenizer, name_by_root
from peer.data import ShardReader, tree_path, verify_tree_file
from peer.dataset import CARD, FILE, Dataset, read
from peer.device import autocast, autocast_dtype
from peer.distillation import bucketed, row_type
from peer.folders import appearing, describe
from peer.marks import lesson
from swarm.errors import DataInvalid
from swarm.manifest import PACKS_DOCUMENTS, Shard, Tree

CONFIG = "config.json"
LEAST_LOG_PROBABILITY = -1e4
MOST_NAME_CHARACTERS = 200


@dataclass(frozen=True)
class Model:
    """A teacher on a device, and what it is called."""

    network: Any
    name: str
    device: torch.device


def load_teacher(directory: Path, data: Dataset, tokenizer_file: Path, device: torch.device) -> Model:
    """The model in `directory`, if it can teach on this data. Raises `DataInvalid` where it can't, with the reason."""
    config = _config(directory)
    _check_tokenizer(directory, tokenizer_file)
    _check_config(config, data)
    disable_progress_bar()
    try:
        network = AutoModelForCausalLM.from_pretrained(
            directory, local_files_only=True, use_safetensors=True, trust_remote_code=False, dtype=torch.float32
        )
    except Exception as error:  # what transformers raises for nonsense has no common base
        raise DataInvalid(f"{directory} can't be loaded: {' '.join(str(error).split())[:200]}") from error
    return Model(network.eval().to(device), directory.resolve().name[:MOST_NAME_CHARACTERS], device)


def _config(directory: Path) -> dict[str, Any]:
    try:
        config = json.loads((directory / CONFIG).read_bytes())
    except (OSError, ValueError) as error:
        raise DataInvalid(f"{directory} has no {CONFIG}", "name a directory of transformers with safetensors") from error
    if not isinstance(config, dict) or "auto_map" in config:
        raise DataInvalid(f"{directory} brings code of its own", "only transformers' own architectures teach")
    return config


def _check_tokenizer(directory: Path, tokenizer_file: Path) -> None:
    """The teacher's ids have to mean what the run's mean."""
    theirs: Tokenizer = load_tokenizer(directory / TOKENIZER).backend_tokenizer
    ours: Tokenizer = load_tokenizer(tokenizer_file).backend_tokenizer
    if (directory / TOKENIZER).read_bytes() == tokenizer_file.read_bytes():
        return
    mine, known = ours.get_vocab(), theirs.get_vocab()
    other = sum(known.get(token) != number for token, number in mine.items())
    if other:
        hint = f"build the data with the teacher's: swarm data build --tokenizer {directory / TOKENIZER}"
        raise DataInvalid(f"the teacher's tokenizer is another: {other:,} of {len(mine):,} tokens differ", hint)


def _check_config(config: dict[str, Any], data: Dataset) -> None:
    size, kind = config.get("vocab_size"), config.get("model_type")
    if not isinstance(size, int) or size < data.vocabulary_size:
        raise DataInvalid(f"the teacher knows {size} tokens, the data has {data.vocabulary_size}")
    longest = config.get("max_position_embeddings", config.get("n_positions"))
    if isinstance(longest, int) and longest < data.data.sequence_length:
        raise DataInvalid(f"the teacher reads {longest} tokens at once, samples have {data.data.sequence_length}")
    if data.data.layout == "marked" and kind not in PACKS_DOCUMENTS:
        raise DataInvalid(f"a {kind} teacher doesn't keep the documents in a sample apart")


def teach(
    folder: Path,
    to: Path,
    directory: Path,
    top_k: int,
    device: torch.device,
    micro_batch: int = 8,
    begin: Callable[[int], Callable[[], None]] = lambda samples: lambda: None,
) -> Dataset:
    """Write the data of `folder` and what the teacher in `directory` expects in it into `to`, all or nothing.

    `begin` is told how many samples there are and gives what hears of each micro-batch. Raises `DataInvalid`.
    """
    data = read(folder)
    if top_k >= data.vocabulary_size:
        raise DataInvalid(f"a vocabulary of {data.vocabulary_size} tokens has no {top_k} besides others")
    for tree in (data.tokenizer, *data.data.train, *data.data.validation):
        verify_tree_file(tree_path(folder, tree), tree)
    model = load_teacher(directory, data, tree_path(folder, data.tokenizer), device)
    on_batch = begin(-(-data.data.train_samples // micro_batch))
    with appearing(to) as unfinished:
        for tree in {tree.root: tree for tree in (data.tokenizer, *data.data.train, *data.data.validation)}.values():
            shutil.copyfile(tree_path(folder, tree), tree_path(unfinished, tree))
        made = _taught(data, unfinished, model, top_k, micro_batch, on_batch)
        _describe(made, folder, unfinished)
    return made


def _taught(data: Dataset, to: Path, model: Model, top_k: int, micro_batch: int, on_batch: Callable[[], None]) -> Dataset:
    token_bytes = 2 if data.vocabulary_size <= 1 << 16 else 4
    row = row_type(data.data.sequence_length, top_k, token_bytes)
    trees = [_write(shard, data, to, model, row, micro_batch, on_batch) for shard in data.data.train]
    teacher = {"shards": trees, "top_k": top_k, "token_bytes": token_bytes, "name": model.name}
    values = {**data.data.model_dump(mode="json"), "teacher": teacher}
    return Dataset.model_validate({**data.model_dump(mode="json"), "data": values})


def _write(
    shard: Shard, data: Dataset, to: Path, model: Model, row: np.dtype[np.void], micro_batch: int, on_batch: Callable[[], None]
) -> Tree:
    reader = ShardReader.open([shard], to, data.data.sequence_length, data.vocabulary_size, data.data.layout)
    temporary = to / f".teacher.{os.getpid()}"
    with temporary.open("wb") as file:
        for rows in _expected(reader, data, model, row, micro_batch):
            file.write(rows.tobytes())
            on_batch()
    return name_by_root(temporary, to)


def _expected(
    reader: ShardReader, data: Dataset, model: Model, row: np.dtype[np.void], micro_batch: int
) -> Iterator[NDArray[np.void]]:
    top_k = row["ids"].shape[-1]
    for indices in grouped(np.arange(len(reader)), micro_batch):
        batch = reader.batch(indices).to(model.device)
        shown = lesson(batch) if data.data.layout == "marked" else None
        ids, more = (batch[:, :-1], {}) if shown is None else (shown.ids, {"position_ids": shown.positions})
        with torch.no_grad(), autocast(model.device, autocast_dtype(model.device)):
            logits = model.network(input_ids=ids, use_cache=False, **more).logits[..., : data.vocabulary_size].float()
        top = logits.topk(top_k).indices.sort(-1).values
        rows = np.empty(len(indices), dtype=row)
        rows["ids"] = top.cpu().numpy()
        values = bucketed(logits, top).log_softmax(-1).clamp(min=LEAST_LOG_PROBABILITY).cpu().numpy()
        if not np.isfinite(values).all():
            raise DataInvalid(f"the teacher {model.name} doesn't give finite numbers")
        rows["log_probabilities"] = values
        yield rows


def _describe(made: Dataset, folder: Path, to: Path) -> None:
    teacher = made.data.teacher
    if teacher is None:
        raise ValueError("nothing was taught")
    describe(to / FILE, made)
    size = sum(tree.size_bytes for tree in teacher.shards)
    card = (folder / CARD).read_text() if (folder / CARD).exists() else "# Data\n"
    note = f"\nTeacher: {teacher.name}, its {teacher.top_k} likeliest tokens at each training position, {size:,} bytes.\n"
    (to / CARD).write_text(card + note)
