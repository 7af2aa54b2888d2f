"""Texts for a run's owner: reading them from files, leaving copies out, and shuffling more of them than fit into memory.

Two passes (Rao, 1961): each document goes to one of many files by its hash, then each file is sorted by it in memory. So copies
meet, the order depends on the contents and the seed alone, and the held-out share (`peer.corpus.is_held_out`) never holds a copy
of what is trained on.
"""

from __future__ import annotations

import hashlib
import json
import struct
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from swarm.errors import DataInvalid

DIGEST_BYTES = 16
HEADER = struct.Struct(f"<{DIGEST_BYTES}sI")
MAX_DOCUMENT_BYTES = 1 << 28
JSON_LINES = frozenset({".jsonl", ".ndjson"})
PARQUET = ".parquet"

Record = tuple[str, dict[str, Any]]
"""A row of a table or an object, with the place that it is from."""


@dataclass
class Counts:
    """What reading came to. `bytes_read` are the texts' own; whatever isn't text is `unreadable`; `origin` is a hub's data set.

    `too_long` and `not_split` are chats that were left out when they were packed.
    """

    files: int = 0
    documents: int = 0
    bytes_read: int = 0
    empty: int = 0
    too_long: int = 0
    not_split: int = 0
    unreadable: list[str] = field(default_factory=list)
    origin: str = ""


def files_of(sources: Sequence[Path]) -> list[Path]:
    """The files among `sources` and in folders among them, sorted; hidden ones are left out. Raises `DataInvalid`."""
    found: list[Path] = []
    for source in sources:
        if source.is_dir():
            inside = (path for path in source.rglob("*") if path.is_file())
            found += (path for path in inside if not any(part.startswith(".") for part in path.relative_to(source).parts))
        elif source.is_file():
            found.append(source)
        else:
            raise DataInvalid(f"there is no {source}", "name text files, JSON lines, Parquet files, or folders of them")
    return sorted(set(found))


def read_documents(
    files: Iterable[Path], text_field: str, counts: Counts, on_file: Callable[[], None] = lambda: None
) -> Iterator[str]:
    """The texts in files: one for each JSON line or Parquet row, under `text_field`; any other file is one text.

    A file that isn't UTF-8 is skipped and counted. Raises `DataInvalid` for a line or a table without that field, with its place.
    """
    for path in files:
        counts.files += 1
        yield from _counted(str(path), _texts_in(path, text_field, counts), counts)
        on_file()


def texts_of(records: Iterable[Record], text_field: str, counts: Counts) -> Iterator[str]:
    """The texts under a field of records. Raises `DataInvalid` for one without it, with its place."""
    for place, record in records:
        if not isinstance(record.get(text_field), str):
            known = ", ".join(name for name, value in record.items() if isinstance(value, str)) or "none"
            hint = f"name another with --column; it has {known}"
            raise DataInvalid(f"{place} has no text under {text_field!r}", hint)
        yield from _counted(place, [record[text_field]], counts)


def _counted(place: str, texts: Iterable[str], counts: Counts) -> Iterator[str]:
    """Those that aren't empty."""
    for text in texts:
        if not text.strip():
            counts.empty += 1
            continue
        size = len(text.encode())
        if size > MAX_DOCUMENT_BYTES:
            raise DataInvalid(f"{place} has a document of {size:,} bytes", f"split it: at most {MAX_DOCUMENT_BYTES:,}")
        counts.documents += 1
        counts.bytes_read += size
        yield text


def read_records(files: Iterable[Path], counts: Counts, on_file: Callable[[], None] = lambda: None) -> Iterator[Record]:
    """The objects in JSON lines and the rows of Parquet files, each with its place; other files are skipped and counted.

    Raises `DataInvalid` for a line that is no object, with its place.
    """
    for path in files:
        counts.files += 1
        match path.suffix.lower():
            case suffix if suffix in JSON_LINES:
                yield from _objects(path)
            case suffix if suffix == PARQUET:
                yield from ((f"{path}, row {number}", row) for number, row in enumerate(_rows(path, None), 1))
            case _:
                counts.unreadable.append(str(path))
        on_file()


def _objects(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in _lines(path):
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataInvalid(f"{path}, line {number}, is no JSON: {error}") from error
        if not isinstance(value, dict) or len(line) > MAX_DOCUMENT_BYTES:
            raise DataInvalid(f"{path}, line {number}, is no object of at most {MAX_DOCUMENT_BYTES:,} bytes")
        yield f"{path}, line {number}", value


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """The lines that aren't blank, with their numbers."""
    with path.open("rb") as lines:
        yield from ((number, line) for number, line in enumerate(lines, 1) if line.strip())


def _texts_in(path: Path, text_field: str, counts: Counts) -> Iterator[str]:
    suffix = path.suffix.lower()
    if suffix in JSON_LINES:
        return _json_lines(path, text_field)
    if suffix == PARQUET:
        return _parquet_rows(path, text_field)
    return _whole(path, counts)


def _whole(path: Path, counts: Counts) -> Iterator[str]:
    try:
        yield path.read_bytes().decode()
    except (OSError, UnicodeDecodeError):
        counts.unreadable.append(str(path))


def _json_lines(path: Path, text_field: str) -> Iterator[str]:
    for number, line in _lines(path):
        try:
            text = json.loads(line)[text_field]
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise DataInvalid(
                f"{path}, line {number}, has no text under {text_field!r}", "name another field with --field"
            ) from error
        if not isinstance(text, str):
            raise DataInvalid(f"{path}, line {number}: {text_field!r} is no text", "name another field with --field")
        yield text


def _parquet_rows(path: Path, text_field: str) -> Iterator[str]:
    return (row[text_field] for row in _rows(path, text_field) if isinstance(row[text_field], str))


def _rows(path: Path, text_field: str | None) -> Iterator[dict[str, Any]]:
    """A table's rows: all their fields, or one."""
    try:
        from pyarrow import ArrowException, parquet  # noqa: PLC0415 - large, and only for those who have such files
    except ImportError as error:
        raise DataInvalid(f"reading {path} needs pyarrow", "pip install pyarrow") from error
    try:
        table = parquet.ParquetFile(path)
        if text_field is not None and text_field not in table.schema_arrow.names:
            raise DataInvalid(f"{path} has no column {text_field!r} of texts", "name another with --field")
        for batch in table.iter_batches(columns=None if text_field is None else [text_field]):
            yield from batch.to_pylist()
    except (ArrowException, OSError, ValueError) as error:
        raise DataInvalid(f"{path} is no Parquet file: {error}") from error


class Shuffled:
    """Documents without copies, in an order that follows from their contents and `seed`; kept in temporary files.

    Use as a context manager; iterate as often as you like.
    """

    def __init__(self, documents: Iterable[str], seed: int, folder: Path | None = None) -> None:
        self.copies = 0
        self._documents, self._seed = documents, seed
        self._directory = tempfile.TemporaryDirectory(prefix="swarm-data-", dir=folder)

    def __enter__(self) -> Shuffled:
        try:
            self._fill()
        except BaseException:
            self._directory.cleanup()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._directory.cleanup()

    def __iter__(self) -> Iterator[str]:
        copies = 0
        for path in sorted(Path(self._directory.name).iterdir()):
            known: dict[bytes, str] = {}
            for digest, text in _read_bucket(path):
                copies += digest in known
                known.setdefault(digest, text)
            for digest in sorted(known):
                yield known[digest]
        self.copies = copies

    def _fill(self) -> None:
        opened: dict[int, IO[bytes]] = {}
        key = self._seed.to_bytes(8, "little", signed=True)
        try:
            for text in self._documents:
                raw = text.encode()
                digest = hashlib.blake2b(raw, digest_size=DIGEST_BYTES, key=key, person=b"swarm.shuffle").digest()
                place = digest[0]
                if place not in opened:
                    opened[place] = (Path(self._directory.name) / f"{place:02x}").open("wb")
                opened[place].write(HEADER.pack(digest, len(raw)))
                opened[place].write(raw)
        finally:
            for file in opened.values():
                file.close()


def _read_bucket(path: Path) -> Iterator[tuple[bytes, str]]:
    with path.open("rb") as file:
        while header := file.read(HEADER.size):
            digest, size = HEADER.unpack(header)
            yield digest, file.read(size).decode()
