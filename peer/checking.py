"""What `swarm run validate` finds out beyond the manifest's fields: whether the model can be built and the files fit it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

from peer.corpus import load_tokenizer
from peer.data import ShardReader, tree_path, verify_tree_file
from peer.model import check_parameters, initial_theta
from swarm.errors import DataInvalid
from swarm.manifest import Manifest, Shard

ROWS_AT_ONCE = 1024

Check = Callable[[], object]


def problems_of(manifest: Manifest, files: Path | None) -> list[str]:
    """Every problem, a line each. `files` is a folder with the run's files, or None where they aren't looked at."""
    found = _problems([partial(check_parameters, manifest.model)])
    if found or files is None:
        return found
    found = _problems(partial(verify_tree_file, tree_path(files, tree), tree) for tree in manifest.files)
    return found or _problems(_contents(manifest, files))


def _problems(checks: Iterable[Check]) -> list[str]:
    """What the checks raise."""
    found = []
    for check in checks:
        try:
            check()
        except DataInvalid as error:
            found.append(error.message)
    return found


def _contents(manifest: Manifest, files: Path) -> list[Check]:
    shards = (*manifest.data.train, *manifest.data.validation)
    reads: list[Check] = [partial(_read, manifest, shard, files) for shard in shards]
    begins: list[Check] = [partial(initial_theta, manifest.model, files)] if manifest.model.base is not None else []
    return [partial(_check_tokenizer, manifest, files), *reads, *begins]


def _check_tokenizer(manifest: Manifest, files: Path) -> None:
    size, vocabulary = len(load_tokenizer(tree_path(files, manifest.tokenizer))), manifest.model.vocabulary_size
    if size > vocabulary:
        raise DataInvalid(f"the tokenizer has {size} tokens, model.config.vocab_size is {vocabulary}")


def _read(manifest: Manifest, shard: Shard, files: Path) -> None:
    data = manifest.data
    try:
        reader = ShardReader.open([shard], files, data.sequence_length, manifest.model.vocabulary_size, data.layout)
        for first in range(0, len(reader), ROWS_AT_ONCE):
            reader.batch(range(first, min(first + ROWS_AT_ONCE, len(reader))))
    except DataInvalid as error:
        raise DataInvalid(f"shard {shard.root[:12]}: {error.message}") from error
