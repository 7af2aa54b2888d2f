"""What `swarm run validate` finds out beyond the manifest's fields: whether the model can be built and the files fit it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from peer.architectures import check_positions
from peer.corpus import ends_of_text, load_tokenizer
from peer.data import ShardReader, present, tree_path, verify_tree_file
from peer.distillation import TeacherReader
from peer.generating import check_length
from peer.marks import NO_LOSS, STARTS, Values
from peer.model import check_parameters, frozen_base, initial_theta, skeleton
from swarm.errors import DataInvalid
from swarm.manifest import Data, Generate, Manifest, Shard, Teacher, Tree

ROWS_AT_ONCE = 1024
SPECIAL_IDS = ("bos_token_id", "eos_token_id")

Check = Callable[[], object]


def problems_of(manifest: Manifest, files: Path | None) -> list[str]:
    """Every problem, a line each. `files` is a folder with the run's files, or None where they aren't looked at.

    Private shards are looked at where they are there.
    """
    found = _problems([partial(check_parameters, manifest.model)]) or _problems([partial(_check_length, manifest)])
    if found or files is None:
        return found
    data = present(manifest.data, files)
    trees = dict.fromkeys((*manifest.files, *data.trees, *data.private_trees))
    found = _problems(partial(verify_tree_file, tree_path(files, tree), tree) for tree in trees)
    return found or _problems(_contents(manifest, data, files))


def _problems(checks: Iterable[Check]) -> list[str]:
    """What the checks raise."""
    found = []
    for check in checks:
        try:
            check()
        except DataInvalid as error:
            found.append(error.message)
    return found


def _contents(manifest: Manifest, data: Data, files: Path) -> Iterator[Check]:
    yield partial(_check_tokenizer, manifest, files)
    for shard in (*data.train, *data.validation):
        yield partial(_read, manifest, shard, files)
    if data.teacher is not None:
        for shard, tree in zip(data.train, data.teacher.shards, strict=True):
            yield partial(_read_teacher, manifest, data.teacher, shard, tree, files)
    yield from _begins(manifest, files)


def _begins(manifest: Manifest, files: Path) -> Iterator[Check]:
    """What a base is used for."""
    strategy, model = manifest.strategy, manifest.model
    if isinstance(strategy, Generate):
        yield partial(frozen_base, model, files)
        yield partial(check_length, model.config, manifest.data.sequence_length + 1, strategy.sampling)
    elif model.base is not None:
        yield partial(initial_theta, model, files)


def _check_length(manifest: Manifest) -> None:
    check_positions(skeleton(manifest.model.config).config.get_text_config(), manifest.data.sequence_length)


def _check_tokenizer(manifest: Manifest, files: Path) -> None:
    """Its ids are the model's, and so is something that a text begins or ends with; a configuration may name others besides."""
    fast = load_tokenizer(tree_path(files, manifest.tokenizer))
    size, vocabulary = max(fast.get_vocab().values(), default=-1) + 1, manifest.model.vocabulary_size
    if size > vocabulary:
        raise DataInvalid(f"the tokenizer has {size} tokens, model.config.vocab_size is {vocabulary}")
    config = manifest.model.config
    said = [(name, number) for name in SPECIAL_IDS for number in _numbers(config.get(name))]
    special = {number for number, token in fast.added_tokens_decoder.items() if token.special}
    if said and not any(number in special for _, number in said):
        wrong = ", ".join(f"{name} {number}" for name, number in said)
        raise DataInvalid(
            f"the tokenizer isn't the model's: by model.config texts begin or end with {wrong}, its ordinary tokens"
        )


def _numbers(value: Any) -> list[int]:
    return [number for number in (value if isinstance(value, list) else [value]) if isinstance(number, int)]


def _read(manifest: Manifest, shard: Shard, files: Path) -> None:
    """Every token is known, and no document is empty or too long."""
    data = manifest.data
    ends = [number for _, number in ends_of_text(load_tokenizer(tree_path(files, manifest.tokenizer)).backend_tokenizer)]
    try:
        reader = ShardReader.open([shard], files, data.sequence_length, manifest.model.vocabulary_size, data.layout)
        for first in range(0, len(reader), ROWS_AT_ONCE):
            rows = reader.batch(range(first, min(first + ROWS_AT_ONCE, len(reader)))).numpy()
            bad, problem = _marked_problem(rows) if data.layout == "marked" else _plain_problem(rows, ends[:1])
            if bad.any():
                raise DataInvalid(f"sample {first + int(bad.argmax())} {problem}")
    except DataInvalid as error:
        raise DataInvalid(f"shard {shard.root[:12]}: {error.message}") from error


def _plain_problem(rows: Values, ends: list[int]) -> tuple[NDArray[np.bool_], str]:
    """Which rows have two ends of a text with nothing between."""
    is_end = np.isin(rows, ends)
    empty: NDArray[np.bool_] = np.any(is_end[:, 1:] & is_end[:, :-1], axis=1)
    return empty, "has an empty document"


def _marked_problem(rows: Values) -> tuple[NDArray[np.bool_], str]:
    """Which rows go on with a document of the row before, or else which teach nothing."""
    cut: NDArray[np.bool_] = rows[:, 0] & STARTS == 0
    if cut.any():
        return cut, "doesn't begin with a document: one is longer than a sample"
    dull: NDArray[np.bool_] = np.all(rows[:, 1:] & NO_LOSS != 0, axis=1)
    return dull, "has no token with a loss: its documents are empty"


def _read_teacher(manifest: Manifest, teacher: Teacher, shard: Shard, tree: Tree, files: Path) -> None:
    """What it expects is tokens of the vocabulary, with probabilities."""
    one = manifest.data.model_copy(update={"train": (shard,)})
    try:
        reader = TeacherReader(teacher.model_copy(update={"shards": (tree,)}), one, files, manifest.model.vocabulary_size)
        for first in range(0, shard.samples, ROWS_AT_ONCE):
            reader.batch(range(first, min(first + ROWS_AT_ONCE, shard.samples)))
    except DataInvalid as error:
        raise DataInvalid(f"teacher's shard {tree.root[:12]}: {error.message}") from error
