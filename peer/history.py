"""Past rounds on disk: what each merged, and a whole state now and then, so that any round's weights can be had again.

A folder holds checkpoints, `round-N.json` with `round-N.safetensors`, of the state after N rounds, and records,
`round-N.record`, of what turned that state into the next: the signed proposal, what names its parts (the reducers' signed spans,
or everybody's commits where all gather), and the encoded parts. A stretch is a checkpoint with the records that go on from it; a
new one begins where the records of the last take as much room as a checkpoint, or a round is missing. The oldest stretches go
when there is no room.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import structlog
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from peer.state import Snapshot, disk_errors, save_checkpoint, write_whole
from swarm.errors import CheckpointCorrupt, Rejected, UsageError
from swarm.merkle import blob_hash
from swarm.messages import parse
from swarm.rpc.v1.signed_pb2 import SealReply

HISTORY = "history"
RECORD_SUFFIX, CHECKPOINT_SUFFIX = ".record", ".json"
FORMAT = "swarm-round-1"
MAX_HEADER_BYTES = 64 << 20
LEAST_STATES = 3

log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class Record:
    """What a round consisted of. `root` is that of the state after it; `parts` are the encoded parts by hash.

    `made` is a `SealReply` that nobody has signed: the proposal, with the commits or the spans that name its parts.
    """

    round_index: int
    root: bytes
    made: SealReply
    parts: Mapping[bytes, bytes | memoryview]


class _Header(BaseModel):
    """The first line of a record; the message and the parts follow, without anything in between."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    format: str = FORMAT
    run_id: str
    round: int
    root: str
    message_bytes: int = Field(ge=0)
    parts: list[tuple[str, int]]


def record_path(directory: Path, round_index: int) -> Path:
    """Where the record of a round lies."""
    return directory / f"round-{round_index:012d}{RECORD_SUFFIX}"


def checkpoint_path(directory: Path, rounds: int) -> Path:
    """Where the header of a checkpoint lies."""
    return directory / f"round-{rounds:012d}{CHECKPOINT_SUFFIX}"


def save_record(directory: Path, record: Record, run_id: str) -> int:
    """Write a record that is either whole or not there; its size in bytes. Raises `DiskFull`."""
    message = record.made.SerializeToString()
    sizes = [(name.hex(), len(part)) for name, part in record.parts.items()]
    header = _Header(run_id=run_id, round=record.round_index, root=record.root.hex(), message_bytes=len(message), parts=sizes)
    first = header.model_dump_json().encode() + b"\n"
    path = record_path(directory, record.round_index)
    with disk_errors(directory):
        directory.mkdir(parents=True, exist_ok=True)
        write_whole(path, iter([first, message, *record.parts.values()]))
    return path.stat().st_size


def load_record(directory: Path, round_index: int, run_id: str) -> Record:
    """A round's record, every part checked against its hash. Raises `CheckpointCorrupt`, which says what is damaged."""
    path = record_path(directory, round_index)
    try:
        raw = memoryview(path.read_bytes())
    except OSError as error:
        raise CheckpointCorrupt(f"{path} can't be read: {error.strerror}", _elsewhere(directory)) from error
    first, place = _first_line(raw)
    header = _read_header(path, first)
    if header.run_id != run_id or header.round != round_index:
        raise CheckpointCorrupt(f"{path} belongs to another run or round", _elsewhere(directory))
    if len(raw) != place + header.message_bytes + sum(size for _, size in header.parts):
        raise CheckpointCorrupt(f"{path} is torn", _elsewhere(directory))
    message, place = raw[place : place + header.message_bytes], place + header.message_bytes
    parts: dict[bytes, bytes | memoryview] = {}
    for number, (name, size) in enumerate(header.parts):
        part, place = raw[place : place + size], place + size
        if blob_hash(part).hex() != name:
            raise CheckpointCorrupt(f"{path} is damaged: part {number} isn't what its hash says", _elsewhere(directory))
        parts[bytes.fromhex(name)] = part
    try:
        return Record(round_index, bytes.fromhex(header.root), parse(SealReply, bytes(message)), parts)
    except (Rejected, ValueError) as error:
        raise CheckpointCorrupt(f"{path} is damaged: {error}", _elsewhere(directory)) from error


def _first_line(raw: memoryview) -> tuple[bytes, int]:
    line, separator, _ = bytes(raw[:MAX_HEADER_BYTES]).partition(b"\n")
    return line, len(line) + len(separator)


def _read_header(path: Path, line: bytes) -> _Header:
    try:
        header = _Header.model_validate_json(line)
    except ValidationError as error:
        raise CheckpointCorrupt(f"{path} is damaged: its first line can't be read", _elsewhere(path.parent)) from error
    if header.format != FORMAT:
        raise CheckpointCorrupt(f"{path} is of another version", "use the version that wrote it")
    return header


def _elsewhere(directory: Path) -> str:
    return f"take {directory.name}/ of another peer that keeps history; here are {kept_rounds(directory)}"


def numbers_of(directory: Path, suffix: str) -> list[int]:
    """The numbers of the files with this ending, ascending; nothing where there is no folder."""
    names = (path.stem.removeprefix("round-") for path in directory.glob(f"round-*{suffix}"))
    return sorted(int(name) for name in names if name.isdecimal())


def kept_states(directory: Path) -> list[int]:
    """The numbers of rounds after which the state can be had again, as far as the files' names tell; ascending."""
    records = set(numbers_of(directory, RECORD_SUFFIX))
    found = set()
    for rounds in numbers_of(directory, CHECKPOINT_SUFFIX):
        found.add(rounds)
        while rounds in records:
            rounds += 1
            found.add(rounds)
    return sorted(found)


def kept_rounds(directory: Path) -> str:
    """The rounds whose weights can be had again, for people: "rounds 3-17, 20-41"."""
    spans: list[list[int]] = []
    for rounds in filter(None, kept_states(directory)):
        if spans and spans[-1][1] == rounds - 2:
            spans[-1][1] = rounds - 1
        else:
            spans.append([rounds - 1, rounds - 1])
    named = (str(first) if first == last else f"{first}-{last}" for first, last in spans)
    return "rounds " + (", ".join(named) or "none")


def check_limit(limit_bytes: int, state_bytes: int) -> None:
    """Raise `UsageError` where a history would hold too little to be of use."""
    if limit_bytes < LEAST_STATES * state_bytes:
        raise UsageError(
            f"{limit_bytes:,} bytes are too few for a history: a state of this run takes {state_bytes:,}",
            f"give --keep-history at least {LEAST_STATES} times that",
        )


@dataclass
class Keeper:
    """Keeps rounds as they pass, in at most `limit_bytes` (and one record more). For one thread at a time."""

    directory: Path
    run_id: str
    limit_bytes: int
    _end: tuple[int, str] | None = field(init=False)

    def __post_init__(self) -> None:
        for leftover in self.directory.glob(".round-*.tmp"):
            leftover.unlink(missing_ok=True)
        self._end = self._find_end()

    def keep(self, record: Record, base_root: bytes, before: Snapshot | None, after: Snapshot) -> None:
        """Keep a round that turned `before`, whose root is `base_root`, into `after`.

        Where it doesn't go on from what is kept a new stretch begins: with `before` where that is here, else with `after` and
        without the round. Raises `DiskFull`.
        """
        here = record.round_index, base_root.hex()
        goes_on = self._end == here
        if not goes_on:
            self._drop_abandoned(*here)
        if not goes_on or self._is_long():
            if before is None or (before.round, before.root_hex) != here:
                self._begin(after)
                return
            self._begin(before)
        save_record(self.directory, record, self.run_id)
        self._end = after.round, after.root_hex
        self._make_room()

    def describe(self) -> dict[str, Any]:
        """What is kept, for the status."""
        size_bytes = sum(_sizes(self.directory).values())
        return {"rounds": kept_rounds(self.directory), "size_bytes": size_bytes, "limit_bytes": self.limit_bytes}

    def _begin(self, snapshot: Snapshot) -> None:
        save_checkpoint(self.directory, snapshot, self.run_id, keep=None)
        self._end = snapshot.round, snapshot.root_hex
        self._make_room()

    def _is_long(self) -> bool:
        """Whether the records of the last stretch take as much as its checkpoint."""
        sizes = _sizes(self.directory)
        start = max(numbers_of(self.directory, CHECKPOINT_SUFFIX))
        whole = sum(size for (number, suffix), size in sizes.items() if number == start and suffix != RECORD_SUFFIX)
        return sum(size for (number, suffix), size in sizes.items() if number >= start and suffix == RECORD_SUFFIX) >= whole

    def _drop_abandoned(self, rounds: int, root: str) -> None:
        """Forget what was kept of rounds that all have given up: those from here on, and the last if it came to another state."""
        for number, suffix in _sizes(self.directory):
            if number >= rounds:
                (self.directory / f"round-{number:012d}{suffix}").unlink(missing_ok=True)
        record = record_path(self.directory, rounds - 1)
        if record.exists() and self._root_after(rounds) != root:
            log.warning("history_corrected", round=rounds - 1)
            record.unlink()

    def _make_room(self) -> None:
        """Remove whole stretches from the oldest on; the last one too if it is too long by itself, as its end is kept anew."""
        sizes, starts = _sizes(self.directory), numbers_of(self.directory, CHECKPOINT_SUFFIX)
        borders = [0, *starts[1:], max((number for number, _ in sizes), default=0) + 1]
        for first, end in itertools.pairwise(borders):
            if sum(sizes.values()) <= self.limit_bytes:
                return
            for number, suffix in sorted(key for key in sizes if first <= key[0] < end):
                (self.directory / f"round-{number:012d}{suffix}").unlink(missing_ok=True)
                del sizes[number, suffix]
            if end == borders[-1]:
                self._end = None

    def _find_end(self) -> tuple[int, str] | None:
        """The number and root of the last state that is kept."""
        states = kept_states(self.directory)
        root = self._root_after(states[-1]) if states else None
        return (states[-1], root) if root is not None else None

    def _root_after(self, rounds: int) -> str | None:
        """The root that the state after so many rounds had, by its record or checkpoint; None where that can't be read."""
        record, checkpoint = record_path(self.directory, rounds - 1), checkpoint_path(self.directory, rounds)
        try:
            if record.exists():
                with record.open("rb") as file:
                    return _read_header(record, file.readline(MAX_HEADER_BYTES)).root
            return str(json.loads(checkpoint.read_bytes())["root"])
        except (CheckpointCorrupt, OSError, ValueError, KeyError, TypeError) as error:
            log.warning("history_unreadable", round=rounds - 1, error=str(error))
            return None


def _sizes(directory: Path) -> dict[tuple[int, str], int]:
    """Bytes of each file by its number and ending."""
    return {(int(path.stem.removeprefix("round-")), path.suffix): path.stat().st_size for path in _files(directory)}


def _files(directory: Path) -> Iterator[Path]:
    for path in directory.glob("round-*"):
        if path.stem.removeprefix("round-").isdecimal():
            yield path
