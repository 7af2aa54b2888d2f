"""The state of a run after a round as hashed chunks, and as checkpoints on disk.

Chunk 0 is a canonical JSON header with the counters and what spikes are told by; after it every array, first `theta`, then the
outer buffers by name, is cut into chunks of 1 MiB of little-endian float32. A chunk's name is its BLAKE2b-256; the state root is
the RFC 6962 root over the names.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from peer.outer import SECOND_MOMENT, THETA, OuterState, buffer_names
from peer.spikes import Recent
from swarm import manifest
from swarm.errors import CheckpointCorrupt, DiskFull, Rejected
from swarm.merkle import HASH_BYTES, blob_hash, root_of

Vector = NDArray[np.float32]
Buffer = bytes | bytearray | memoryview

CHUNK_BYTES = 1 << 20
CHUNK_VALUES = CHUNK_BYTES // 4
MAX_HEADER_BYTES = 4096
MAX_COUNTER = 1 << 62
HASH_THREADS = 4
THREADED_FROM_CHUNKS = 16
FORMAT = "swarm-state-1"
CHECKPOINT_FORMAT = "swarm-checkpoint-1"
FULL_DISK = frozenset({errno.ENOSPC, errno.EDQUOT})


class _Recent(BaseModel):
    """The last rounds' figures, in runs that skip spikes."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    losses: list[float]
    norms: list[Annotated[float, Field(ge=0)]]
    skipped: int = Field(ge=0, le=MAX_COUNTER)


class _Header(BaseModel):
    """Chunk 0."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    format: str = FORMAT
    round: int = Field(ge=0, le=MAX_COUNTER)
    tokens: int = Field(ge=0, le=MAX_COUNTER)
    step: int = Field(ge=0, le=MAX_COUNTER)
    beta1_power: float = Field(ge=0, le=1)
    beta2_power: float = Field(ge=0, le=1)
    chunk_bytes: int = CHUNK_BYTES
    arrays: list[tuple[str, int]]
    recent: _Recent | None = None

    def canonical(self) -> bytes:
        """JSON with sorted keys and no spaces; floats in Python's shortest round-trip form; what isn't there is left out."""
        return json.dumps(self.model_dump(exclude_none=True), sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


@dataclass(frozen=True)
class Layout:
    """What a state of a run has to look like, known from the manifest before a byte is fetched.

    It has figures of the last `window` rounds at most; 0 = it has none, as the run skips no spikes.
    """

    names: tuple[str, ...]
    parameters: int
    window: int = 0

    @classmethod
    def of(cls, run: manifest.Manifest) -> Layout:
        """The layout of a manifest's states."""
        window = run.skip_spikes.window if run.skip_spikes is not None else 0
        return cls((THETA, *buffer_names(run.strategy)), run.model.parameters, window)

    @property
    def chunks_per_array(self) -> int:
        """Number of chunks that one array takes."""
        return -(-self.parameters // CHUNK_VALUES)

    @property
    def chunk_count(self) -> int:
        """Number of chunks, the header included."""
        return 1 + len(self.names) * self.chunks_per_array

    @property
    def size_limit_bytes(self) -> int:
        """The most bytes that a whole state can have."""
        return MAX_HEADER_BYTES + 4 * len(self.names) * self.parameters

    def chunk_size_limit(self, index: int) -> int:
        """The most bytes that chunk `index` can have; exact for all but the header."""
        if index == 0:
            return MAX_HEADER_BYTES
        _, start, end = self.place(index)
        return 4 * (end - start)

    def place(self, index: int) -> tuple[str, int, int]:
        """The array that data chunk `index` belongs to, its first value and the one after its last."""
        if not 0 < index < self.chunk_count:
            raise IndexError(index)
        array, position = divmod(index - 1, self.chunks_per_array)
        start = position * CHUNK_VALUES
        return self.names[array], start, min(start + CHUNK_VALUES, self.parameters)


@dataclass(frozen=True)
class Snapshot:
    """A state that is served and voted on: its chunks, their hashes and its root. Data is not copied."""

    state: OuterState
    header: bytes
    layout: Layout
    chunk_hashes: tuple[bytes, ...]
    root: bytes

    @classmethod
    def from_state(cls, state: OuterState, *, threads: int = HASH_THREADS) -> Snapshot:
        """Hash every chunk of `state`."""
        header = _header_of(state).canonical()
        layout = Layout(tuple(name for name, _ in state.arrays()), state.theta.size)
        hashes = tuple(_hash_all(lambda index: _chunk(state, header, layout, index), layout.chunk_count, threads))
        return cls(state, header, layout, hashes, root_of(hashes))

    @property
    def round(self) -> int:
        """Number of rounds behind this state."""
        return self.state.round

    @property
    def root_hex(self) -> str:
        """The root in hexadecimal."""
        return self.root.hex()

    @property
    def chunk_count(self) -> int:
        """Number of chunks, the header included."""
        return self.layout.chunk_count

    @property
    def size_bytes(self) -> int:
        """Bytes of all chunks together."""
        return len(self.header) + 4 * len(self.layout.names) * self.layout.parameters

    def chunk(self, index: int) -> memoryview:
        """The bytes of chunk `index`, read-only, without a copy."""
        return _chunk(self.state, self.header, self.layout, index)


def _header_of(state: OuterState) -> _Header:
    recent = state.recent
    figures = _Recent(losses=list(recent.losses), norms=list(recent.norms), skipped=recent.skipped)
    return _Header(
        round=state.round,
        tokens=state.tokens,
        step=state.step,
        beta1_power=state.beta1_power,
        beta2_power=state.beta2_power,
        arrays=[(name, array.size) for name, array in state.arrays()],
        recent=figures if recent != Recent() else None,
    )


def _chunk(state: OuterState, header: bytes, layout: Layout, index: int) -> memoryview:
    if index == 0:
        return memoryview(header)
    name, start, end = layout.place(index)
    array = state.theta if name == THETA else state.buffers[name]
    return array[start:end].astype("<f4", copy=False).data.cast("B")


def _hash_all(chunk: Callable[[int], memoryview], count: int, threads: int) -> Iterator[bytes]:
    if threads == 1 or count < THREADED_FROM_CHUNKS:
        yield from (blob_hash(chunk(index)) for index in range(count))
        return
    with ThreadPoolExecutor(threads) as pool:
        yield from pool.map(lambda index: blob_hash(chunk(index)), range(count))


def check_chunk_hashes(hashes: Sequence[bytes], root: bytes, layout: Layout) -> None:
    """Raise `Rejected("bad_state")` unless a stranger's list of chunk hashes belongs to `root`."""
    if len(hashes) != layout.chunk_count or any(len(item) != HASH_BYTES for item in hashes):
        raise Rejected("bad_state", f"not {layout.chunk_count} chunk hashes")
    if root_of(hashes) != root:
        raise Rejected("bad_state", "the chunk hashes don't give the root")


def differing_chunks(mine: Sequence[bytes], theirs: Sequence[bytes]) -> list[int]:
    """Indices of the chunks of `theirs` whose hash is not the one at the same place of `mine`."""
    return [index for index, item in enumerate(theirs) if index >= len(mine) or mine[index] != item]


def to_state(chunks: Sequence[Buffer], layout: Layout) -> OuterState:
    """The state behind a stranger's chunks, already checked against their hashes.

    Raises `Rejected("bad_state")` unless the header is canonical and within bounds, every size is the one that the
    manifest gives, and every value is finite.
    """
    if len(chunks) != layout.chunk_count:
        raise Rejected("bad_state", f"{len(chunks)} chunks instead of {layout.chunk_count}")
    header = _parse_header(bytes(chunks[0][: MAX_HEADER_BYTES + 1]), layout)
    for index in range(1, layout.chunk_count):
        if len(chunks[index]) != layout.chunk_size_limit(index):
            raise Rejected("bad_state", f"chunk {index} has {len(chunks[index])} bytes")
    arrays = {name: np.empty(layout.parameters, dtype=np.float32) for name in layout.names}
    for index in range(1, layout.chunk_count):
        name, start, end = layout.place(index)
        arrays[name][start:end] = _checked_values(chunks[index], name, index)
    figures = header.recent
    recent = Recent(tuple(figures.losses), tuple(figures.norms), figures.skipped) if figures is not None else Recent()
    powers = header.beta1_power, header.beta2_power
    return OuterState(arrays.pop(THETA), arrays, header.round, header.tokens, header.step, *powers, recent)


def _parse_header(raw: bytes, layout: Layout) -> _Header:
    if len(raw) > MAX_HEADER_BYTES:
        raise Rejected("bad_state", "the header is too long")
    try:
        header = _Header.model_validate_json(raw)
        canonical = header.canonical()
    except (ValidationError, RecursionError) as error:
        raise Rejected("bad_state", "the header can't be read") from error
    if canonical != raw or header.format != FORMAT or header.chunk_bytes != CHUNK_BYTES:
        raise Rejected("bad_state", "the header is not in its canonical form")
    if header.arrays != [(name, layout.parameters) for name in layout.names]:
        raise Rejected("bad_state", "the arrays are not the manifest's")
    if header.recent is not None and not _fits(header.recent, layout.window):
        raise Rejected("bad_state", "the figures of the last rounds are not the manifest's")
    return header


def _fits(figures: _Recent, window: int) -> bool:
    """Whether the figures are there for a reason: canonically, nothing is written in their place."""
    return len(figures.losses) == len(figures.norms) <= window and bool(window and (figures.losses or figures.skipped))


def _checked_values(chunk: Buffer, name: str, index: int) -> Vector:
    values = np.frombuffer(chunk, dtype="<f4")
    if not np.isfinite(values).all() or (name == SECOND_MOMENT and (values < 0).any()):
        raise Rejected("bad_state", f"chunk {index} has values that can't be")
    return values.astype(np.float32, copy=False)


@dataclass(frozen=True)
class Skipped:
    """A checkpoint that can't be used, and why."""

    path: Path
    reason: str


@dataclass(frozen=True)
class Loaded:
    """The newest whole checkpoint, or None, and the newer ones that were passed over."""

    snapshot: Snapshot | None
    skipped: tuple[Skipped, ...]


class _CheckpointHeader(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    format: str = CHECKPOINT_FORMAT
    run_id: str
    round: int
    root: str
    file: str
    file_blake2b: str
    state: dict[str, Any]


def save_checkpoint(directory: Path, snapshot: Snapshot, run_id: str, keep: int | None = 2) -> Path:
    """Write a checkpoint that is either whole or not there, and remove all but the `keep` newest (None: none). The header's path.

    First the safetensors file, then the header that names it by hash: each is written beside its place, fsynced and
    renamed. Raises `DiskFull`.
    """
    stem = f"round-{snapshot.round:012d}"
    data, header = directory / f"{stem}.safetensors", directory / f"{stem}.json"
    with disk_errors(directory):
        directory.mkdir(parents=True, exist_ok=True)
        digest = write_whole(data, _safetensors(snapshot))
        values = _CheckpointHeader(
            run_id=run_id,
            round=snapshot.round,
            root=snapshot.root_hex,
            file=data.name,
            file_blake2b=digest,
            state=json.loads(snapshot.header),
        )
        write_whole(header, iter([values.model_dump_json(indent=1).encode()]))
        if keep is not None:
            _prune(directory, keep)
    return header


def load_newest(directory: Path, layout: Layout, run_id: str) -> Loaded:
    """The newest checkpoint of the run that is whole; torn or damaged ones are skipped with a reason."""
    skipped: list[Skipped] = []
    for path in sorted(directory.glob("round-*.json"), reverse=True):
        try:
            return Loaded(load_checkpoint(path, layout, run_id), tuple(skipped))
        except CheckpointCorrupt as error:
            skipped.append(Skipped(path, error.message))
    return Loaded(None, tuple(skipped))


def load_checkpoint(path: Path, layout: Layout, run_id: str) -> Snapshot:
    """The state in a checkpoint, whose header lies at `path`. Raises `CheckpointCorrupt`."""
    try:
        header = _CheckpointHeader.model_validate_json(path.read_bytes())
        data = path.with_name(Path(header.file).name).read_bytes()
    except (OSError, ValueError) as error:
        raise CheckpointCorrupt("the header or its file can't be read") from error
    if header.format != CHECKPOINT_FORMAT or header.run_id != run_id:
        raise CheckpointCorrupt("it belongs to another run or version")
    if hashlib.blake2b(data, digest_size=HASH_BYTES).hexdigest() != header.file_blake2b:
        raise CheckpointCorrupt("the file is torn or damaged")
    try:
        snapshot = Snapshot.from_state(to_state(_chunks_of_file(data, header, layout), layout))
    except (Rejected, ValueError, KeyError, TypeError) as error:
        raise CheckpointCorrupt(f"the state in it is not valid: {error}") from error
    if snapshot.root_hex != header.root or snapshot.round != header.round:
        raise CheckpointCorrupt("the state in it doesn't have the root that the header names")
    return snapshot


def _safetensors(snapshot: Snapshot) -> Iterator[Buffer]:
    """The pieces of a safetensors file: length, table, data (https://github.com/huggingface/safetensors#format)."""
    size = 4 * snapshot.layout.parameters
    table: dict[str, Any] = {
        name: {"dtype": "F32", "shape": [snapshot.layout.parameters], "data_offsets": [place * size, (place + 1) * size]}
        for place, name in enumerate(snapshot.layout.names)
    }
    table["__metadata__"] = {"format": "np", "root": snapshot.root_hex}
    raw = json.dumps(table, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    yield len(raw).to_bytes(8, "little")
    yield raw
    for index in range(1, snapshot.chunk_count):
        yield snapshot.chunk(index)


def _chunks_of_file(data: bytes, header: _CheckpointHeader, layout: Layout) -> list[Buffer]:
    view = memoryview(data)
    start = 8 + int.from_bytes(view[:8], "little")
    chunks: list[Buffer] = [json.dumps(header.state, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()]
    for index in range(1, layout.chunk_count):
        end = start + layout.chunk_size_limit(index)
        chunks.append(view[start:end])
        start = end
    return chunks


def write_whole(path: Path, pieces: Iterator[Buffer]) -> str:
    """Write, fsync, rename, fsync the folder; returns the content's BLAKE2b-256."""
    temporary = path.with_name(f".{path.name}.tmp")
    digest = hashlib.blake2b(digest_size=HASH_BYTES)
    try:
        with temporary.open("wb") as file:
            for piece in pieces:
                digest.update(piece)
                file.write(piece)
            _sync(file)
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    _sync_directory(path.parent)
    return digest.hexdigest()


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _prune(directory: Path, keep: int) -> None:
    for header in sorted(directory.glob("round-*.json"), reverse=True)[keep:]:
        header.unlink(missing_ok=True)
    kept = {header.stem for header in directory.glob("round-*.json")}
    for data in directory.glob("round-*.safetensors"):
        if data.stem not in kept:
            data.unlink(missing_ok=True)
    for leftover in directory.glob(".round-*.tmp"):
        leftover.unlink(missing_ok=True)


@contextmanager
def disk_errors(directory: Path) -> Iterator[None]:
    """Raise `DiskFull` where the body finds no space."""
    try:
        yield
    except OSError as error:
        if error.errno in FULL_DISK:
            raise DiskFull(f"no space left in {directory}", "free some space; training goes on meanwhile") from error
        raise
