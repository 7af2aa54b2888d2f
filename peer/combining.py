"""One run's data from several people's: their descriptions, and the files of those shards that others may have.

Private shards are named only; their files stay with whoever has them.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from peer.corpus import save_tokenizer
from peer.data import tree_path, verify_tree_file
from peer.dataset import CARD, FILE, Dataset, make_tokenizer, read, read_description
from peer.folders import appearing, describe
from swarm.errors import DataInvalid
from swarm.manifest import Data, Teacher, Tree

MOST_DESCRIPTION_CHARACTERS, MOST_LICENSE_CHARACTERS = 2000, 200
ALIKE: dict[str, Callable[[Dataset], object]] = {
    "tokenizer": lambda made: made.tokenizer.root,
    "vocabulary": lambda made: made.vocabulary_size,
    "end of text": lambda made: made.end_of_text,
    "sequence length": lambda made: made.data.sequence_length,
    "layout": lambda made: made.data.layout,
    "chat template": lambda made: made.data.chat_template,
    "teacher": lambda made: made.data.teacher and made.data.teacher.model_dump(exclude={"shards"}),
}
"""What data of one run have in common."""


def combine(sources: Sequence[Path], to: Path, tokenizer: str = "") -> Dataset:
    """Write what several folders of data, or their `dataset.yaml` alone, are together into `to`, all or nothing.

    Without a `tokenizer`, named as `make_tokenizer` takes it, it is copied from one of the folders. Raises `DataInvalid` where
    they don't fit together, and where a file is missing that isn't private.
    """
    parts = [read(source) if source.is_dir() else read_description(source) for source in sources]
    _check_alike(sources, parts)
    made = parts[0].model_copy(update={"data": _together([part.data for part in parts])})
    folders = [source if source.is_dir() else source.parent for source in sources]
    with appearing(to) as unfinished:
        for tree in (*([] if tokenizer else [made.tokenizer]), *made.data.trees):
            _copy(tree, folders, unfinished)
        if tokenizer and save_tokenizer(make_tokenizer(tokenizer, ()), unfinished) != made.tokenizer:
            raise DataInvalid(f"{tokenizer} isn't the tokenizer of {sources[0]}", "name the one that the data were built with")
        describe(unfinished / FILE, made)
        (unfinished / CARD).write_text(_card(made, len(parts)))
    return made


def _check_alike(sources: Sequence[Path], parts: Sequence[Dataset]) -> None:
    for what, of in ALIKE.items():
        other = next((source for source, part in zip(sources, parts, strict=True) if of(part) != of(parts[0])), None)
        if other is not None:
            hint = "build all of them with the same --tokenizer, --sequence-length and --kind"
            raise DataInvalid(f"the {what} of {other} isn't that of {sources[0]}", hint)
    roots = [shard.root for part in parts for shard in (*part.data.train, *part.data.validation)]
    twice = next((root for root in roots if roots.count(root) > 1), None)
    if twice is not None:
        raise DataInvalid(f"shard {twice[:12]} is there twice", "name each folder once; the same texts count once")


def _together(parts: Sequence[Data]) -> Data:
    first = parts[0]
    values: dict[str, Any] = {
        **first.model_dump(mode="json"),
        "train": [shard for part in parts for shard in part.train],
        "validation": [shard for part in parts for shard in part.validation],
        "counted_tokens": sum(part.counted_tokens for part in parts),
        "license": ", ".join(dict.fromkeys(part.license for part in parts))[:MOST_LICENSE_CHARACTERS],
        "description": " ".join(dict.fromkeys(filter(None, (part.description for part in parts))))[:MOST_DESCRIPTION_CHARACTERS],
    }
    taught = [part.teacher for part in parts if part.teacher is not None]
    if taught:
        shards = tuple(tree for teacher in taught for tree in teacher.shards)
        values["teacher"] = Teacher(**{**taught[0].model_dump(), "shards": shards})
    return Data.model_validate(values)


def _copy(tree: Tree, folders: Sequence[Path], to: Path) -> None:
    found = next((path for folder in folders if (path := tree_path(folder, tree)).exists()), None)
    if found is None:
        hint = "name the folder that it lies in, or the tokenizer with --tokenizer"
        raise DataInvalid(f"none of the folders has {tree.root[:12]}, which isn't private", hint)
    verify_tree_file(found, tree)
    shutil.copyfile(found, tree_path(to, tree))


def _card(made: Dataset, parts: int) -> str:
    data = made.data
    sides = {"training samples": data.train, "held-out samples": data.validation}
    rows = {"licence": data.license, "put together from": f"{parts:,} descriptions"}
    for name, shards in sides.items():
        private = sum(shard.samples for shard in shards if shard.private)
        rows[name] = f"{sum(shard.samples for shard in shards):,} of {data.sequence_length:,} tokens, {private:,} of them private"
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    return f"# Data\n\n{data.description}\n\n| | |\n| --- | --- |\n{table}\n\nFiles are named by the roots in `{FILE}`.\n"
