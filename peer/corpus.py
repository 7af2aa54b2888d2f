"""Making data for a run: tokenizers, documents, the held-out split, and shards named by their content.

Only a run's owner needs this; peers read finished shards with `peer.data`.
"""

from __future__ import annotations

import hashlib
import json
import os
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import transformers
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from peer.data import tree_of_file, tree_path
from peer.marks import NO_LOSS, Values, marked
from swarm.errors import DataInvalid
from swarm.manifest import Shard, Tree

TOKENIZER = "tokenizer.json"
"""What transformers calls a tokenizer's file."""
END_OF_TEXT = "<|endoftext|>"
ENDS_OF_TEXT = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>")
"""What tokenizers call it: those of GPT-2, Qwen and SmolLM, of Llama 3, of Llama 2 and Mistral, of Gemma."""
ENCODE_BATCH = 256
SKIPPED_FOLDERS = frozenset({"site-packages", "dist-packages", "__pycache__", "lib2to3"})
TEST_FOLDERS = frozenset({"test", "tests", "idle_test"})


def byte_level_tokenizer() -> Tokenizer:
    """Ids 0 to 255 are the bytes themselves, 256 is the end of a text; no merges."""
    vocabulary = {character: byte for byte, character in enumerate(_byte_characters())}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    return _finish_byte_level(tokenizer)


def train_bpe_tokenizer(documents: Iterable[str], vocabulary_size: int) -> Tokenizer:
    """A byte-level BPE tokenizer trained on `documents`, the end of text included in `vocabulary_size`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=vocabulary_size - 1, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(documents, trainer)
    return _finish_byte_level(tokenizer)


def _finish_byte_level(tokenizer: Tokenizer) -> Tokenizer:
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([END_OF_TEXT])
    return tokenizer


def _byte_characters() -> list[str]:
    """The printable character that stands for each byte in a ByteLevel vocabulary (GPT-2's table)."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    spare = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(spare)) for byte in range(256)]


def end_of_text_id(tokenizer: Tokenizer) -> int:
    """The id that ends a document. Raises `DataInvalid` for a tokenizer without one."""
    found = ends_of_text(tokenizer)
    if not found:
        raise DataInvalid(f"the tokenizer has no token that ends a text: none of {', '.join(ENDS_OF_TEXT)}")
    return found[0][1]


def ends_of_text(tokenizer: Tokenizer) -> list[tuple[str, int]]:
    """The tokens that it may end a text with, and their ids; the first is what `build_shards` is given."""
    ids = ((name, tokenizer.token_to_id(name)) for name in ENDS_OF_TEXT)
    return [(name, number) for name, number in ids if number is not None]


def save_tokenizer(tokenizer: Tokenizer, directory: Path) -> Tree:
    """Write the tokenizer's JSON into `directory`, under its root as name."""
    directory.mkdir(parents=True, exist_ok=True)
    temporary = directory / f".tokenizer.{os.getpid()}"
    temporary.write_text(tokenizer.to_str(), encoding="utf-8")
    return name_by_root(temporary, directory)


def load_tokenizer(path: Path) -> Any:
    """The tokenizer file as transformers uses it. Raises `DataInvalid` for anything but a tokenizer's JSON."""
    try:
        json.loads(path.read_bytes())
        fast = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises Exception itself
        raise DataInvalid(f"{path} is not a tokenizer: {error}") from error
    ends = ends_of_text(fast)
    special = {"eos_token": ends[0][0]} if ends else {}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=fast, **special)


def encode_bytes(documents: Iterable[str]) -> Iterator[NDArray[np.uint8]]:
    """What `encode_documents` gives for the byte-level tokenizer, much faster: a document's UTF-8 bytes."""
    return (np.frombuffer(document.encode(), dtype=np.uint8) for document in documents)


def encode_documents(tokenizer: Tokenizer, documents: Iterable[str]) -> Iterator[list[int]]:
    """The token ids of each document, without special tokens."""
    batch: list[str] = []
    for document in documents:
        batch.append(document)
        if len(batch) == ENCODE_BATCH:
            yield from _encode(tokenizer, batch)
            batch = []
    yield from _encode(tokenizer, batch)


def _encode(tokenizer: Tokenizer, batch: list[str]) -> Iterator[list[int]]:
    return (encoding.ids for encoding in tokenizer.encode_batch(batch, add_special_tokens=False))


def standard_library_documents(max_bytes: int, *, tests: bool = False, root: Path | None = None) -> Iterator[str]:
    """The Python standard library's own source files in order of their names.

    A file with which there would be more than `max_bytes` is left out.
    """
    root = Path(sysconfig.get_path("stdlib")) if root is None else root
    skipped = SKIPPED_FOLDERS if tests else SKIPPED_FOLDERS | TEST_FOLDERS
    names = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.py"))
    used_bytes = 0
    for name in names:
        if skipped.intersection(Path(name).parts[:-1]):
            continue
        text = _read_source(root / name, max_bytes - used_bytes)
        used_bytes += len(text.encode())
        if text:
            yield text


def _read_source(path: Path, limit_bytes: int) -> str:
    """The file's text, or nothing if it is longer than the limit or not UTF-8."""
    try:
        return path.read_text(encoding="utf-8") if path.stat().st_size <= limit_bytes else ""
    except (OSError, UnicodeDecodeError):
        return ""


def is_held_out(document: str, fraction: float) -> bool:
    """Whether a document belongs to the validation set: decided by its hash, so that copies never fall on both sides."""
    digest = hashlib.blake2b(document.encode(), digest_size=8, person=b"swarm.heldout").digest()
    return int.from_bytes(digest, "big") < fraction * 2**64


def split_documents(documents: Iterable[str], fraction: float) -> tuple[list[str], list[str]]:
    """Documents for training and, about `fraction` of them, for validation; both in the given order."""
    sides: tuple[list[str], list[str]] = ([], [])
    for document in documents:
        sides[is_held_out(document, fraction)].append(document)
    return sides


def build_shards(
    documents: Iterable[Sequence[int] | NDArray[np.integer]],
    directory: Path,
    *,
    sequence_length: int,
    end_of_text: int,
    vocabulary_size: int,
    samples_per_shard: int = 1 << 16,
) -> tuple[Shard, ...]:
    """Pack documents, each followed by `end_of_text`, into rows of `sequence_length + 1` ids and write them as shards.

    Files are named by their roots. An incomplete last row is dropped. Raises `DataInvalid` for an id outside the
    vocabulary and where there isn't one whole row.
    """
    directory.mkdir(parents=True, exist_ok=True)
    token_bytes = 2 if vocabulary_size <= 1 << 16 else 4
    values_per_shard = samples_per_shard * (sequence_length + 1)
    shards = [
        _write_shard(values, directory, sequence_length, token_bytes)
        for values in _pack(documents, end_of_text, vocabulary_size, values_per_shard)
        if values.size > sequence_length
    ]
    if not shards:
        raise DataInvalid(f"the documents don't fill one row of {sequence_length + 1} tokens")
    return tuple(shards)


def build_marked_shards(
    documents: Iterable[Values],
    directory: Path,
    *,
    sequence_length: int,
    end_of_text: int,
    samples_per_shard: int = 1 << 16,
) -> tuple[tuple[Shard, ...], int]:
    """Pack marked documents whole, in order, into rows of `sequence_length + 1` values, and write them as shards.

    A row takes the next document while it fits, and is filled up with `end_of_text` without a loss. Returns the shards and how
    many tokens in them have a loss. Raises `DataInvalid` where none has, `ValueError` for a document longer than a row.
    """
    counted = 0

    def rows() -> Iterator[Values]:
        nonlocal counted
        for row in _marked_rows(documents, sequence_length + 1, end_of_text):
            counted += int(np.count_nonzero(row[1:] & NO_LOSS == 0))
            yield row

    shards = _write_rows(rows(), directory, sequence_length, samples_per_shard)
    if not counted:
        raise DataInvalid(
            f"no document has a loss and fits into a row of {sequence_length + 1} tokens", "try a larger --sequence-length"
        )
    return shards, counted


def build_prompt_shards(
    prompts: Iterable[Values], directory: Path, *, sequence_length: int, end_of_text: int, samples_per_shard: int = 1 << 16
) -> tuple[Shard, ...]:
    """Write prompts, marked and none longer than `sequence_length + 1`, as rows of one each.

    What is left of a row is a document of `end_of_text` without a loss. Raises `DataInvalid` where there is no prompt.
    """
    length = sequence_length + 1
    rows = (np.concatenate([prompt, _padding(length - prompt.size, end_of_text)]) for prompt in prompts)
    shards = _write_rows(rows, directory, sequence_length, samples_per_shard)
    if not shards:
        raise DataInvalid(f"no prompt fits into a row of {length} tokens", "try a larger --sequence-length")
    return shards


def _write_rows(rows: Iterable[Values], directory: Path, sequence_length: int, samples_per_shard: int) -> tuple[Shard, ...]:
    directory.mkdir(parents=True, exist_ok=True)
    left = iter(rows)
    batches = iter(lambda: list(islice(left, samples_per_shard)), [])
    return tuple(_write_shard(np.concatenate(batch), directory, sequence_length, 4) for batch in batches)


def _marked_rows(documents: Iterable[Values], length: int, end_of_text: int) -> Iterator[Values]:
    """Rows of whole documents, [length] each."""
    pending: list[Values] = []
    room = length
    for document in documents:
        if document.size > length:
            raise ValueError(f"a document of {document.size} tokens doesn't fit into a row of {length}")
        if document.size > room:
            yield np.concatenate([*pending, _padding(room, end_of_text)])
            pending, room = [], length
        pending.append(document)
        room -= document.size
    if pending:
        yield np.concatenate([*pending, _padding(room, end_of_text)])


def _padding(length: int, end_of_text: int) -> Values:
    return marked(np.full(length, end_of_text, dtype=np.int64), np.zeros(length, dtype=np.bool_))


def _pack(
    documents: Iterable[Sequence[int] | NDArray[np.integer]], end_of_text: int, vocabulary_size: int, values_per_shard: int
) -> Iterator[NDArray[np.int64]]:
    pending: list[NDArray[np.int64]] = []
    length = 0
    for document in documents:
        ids = np.asarray(document, dtype=np.int64)
        if not ids.size or ids[-1] != end_of_text:
            ids = np.append(ids, end_of_text)
        if int(ids.min()) < 0 or int(ids.max()) >= vocabulary_size:
            raise DataInvalid(f"a document has a token outside the vocabulary of {vocabulary_size}")
        pending.append(ids)
        length += ids.size
        while length >= values_per_shard:
            joined = np.concatenate(pending)
            yield joined[:values_per_shard]
            pending, length = [joined[values_per_shard:]], length - values_per_shard
    if length:
        yield np.concatenate(pending)


def _write_shard(values: NDArray[np.int64], directory: Path, sequence_length: int, token_bytes: int) -> Shard:
    samples = values.size // (sequence_length + 1)
    rows = values[: samples * (sequence_length + 1)].astype(f"<u{token_bytes}")
    temporary = directory / f".shard.{os.getpid()}"
    temporary.write_bytes(rows.tobytes())
    tree = name_by_root(temporary, directory)
    return Shard(**tree.model_dump(), samples=samples, token_bytes=2 if token_bytes == 2 else 4)


def name_by_root(temporary: Path, directory: Path) -> Tree:
    """Move a finished file into `directory`, under its root as name."""
    tree = tree_of_file(temporary)
    temporary.replace(tree_path(directory, tree))
    return tree
