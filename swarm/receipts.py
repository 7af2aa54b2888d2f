"""A volunteer's receipts, apart from any coordinator: checked one by one and against each other, and kept in one file."""

from __future__ import annotations

import base64
import binascii
import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from swarm.errors import LedgerInvalid, Rejected, UsageError
from swarm.ledger import verify_receipt
from swarm.merkle import leaf_hash
from swarm.messages import parse
from swarm.rpc.v1.ledger_pb2 import Receipt
from swarm.rpc.v1.signed_pb2 import Signed

SUFFIX = ".receipt"
FORMAT = "swarm-receipts-1"
MAX_LINE_BYTES = 1 << 20
DAMAGED = "restore it from a backup, or leave it out"
TWO_HISTORIES = "keep both: anybody can see from them that the coordinator signed two histories"


@dataclass(frozen=True)
class Kept:
    """One receipt as it was kept."""

    name: str
    raw: bytes

    def signed(self) -> Signed:
        """The signed message. Raises `LedgerInvalid`."""
        try:
            return parse(Signed, self.raw)
        except Rejected as error:
            raise LedgerInvalid(f"{self.name} is damaged: {error}", DAMAGED) from error

    def claimed(self) -> Receipt:
        """What it says, unchecked. Raises `LedgerInvalid`."""
        try:
            return parse(Receipt, self.signed().payload)
        except Rejected as error:
            raise LedgerInvalid(f"{self.name} is damaged: {error}", DAMAGED) from error

    def verified(self, coordinator: str) -> Receipt:
        """What it proves. Raises `LedgerInvalid`."""
        try:
            return verify_receipt(self.signed(), coordinator)
        except LedgerInvalid as error:
            raise LedgerInvalid(f"{self.name}: {error.message}", error.hint) from error


def read_receipts(place: Path) -> list[Kept]:
    """All receipts in a folder and those below it, or in a file that `write_receipts` wrote.

    Raises `UsageError` where there are none, and `LedgerInvalid` for a damaged file.
    """
    kept = _read_file(place) if place.is_file() else _read_folder(place)
    if not kept:
        raise UsageError(f"no receipts in {place}", f"a peer keeps them as *{SUFFIX} in its data folder")
    return kept


def write_receipts(path: Path, kept: Iterable[Kept]) -> None:
    """Write them into one file: a line of JSON that names the format, then one for each. Raises `UsageError`."""
    lines = [json.dumps({"format": FORMAT})]
    lines += [json.dumps({"name": each.name, "receipt": base64.b64encode(each.raw).decode()}) for each in kept]
    try:
        path.write_text("\n".join(lines) + "\n")
    except OSError as error:
        raise UsageError(f"can't write {path}: {error.strerror}", "choose another path") from error


def coordinator_of(kept: Iterable[Kept]) -> str:
    """Who signed most of them."""
    return Counter(each.signed().signer for each in kept).most_common(1)[0][0]


def check_together(receipts: Mapping[str, Receipt]) -> None:
    """Whether verified receipts, by name, can be of one history. Raises `LedgerInvalid` with the two that can't.

    Two roots over equally many entries, or two entries in one place, are a proof against the coordinator. That a smaller tree is
    part of a larger one takes the coordinator's consistency proof, or the ledger itself.
    """
    roots: dict[tuple[bytes, int], tuple[str, bytes]] = {}
    places: dict[tuple[bytes, int], tuple[str, bytes]] = {}
    for name, receipt in receipts.items():
        root = (name, receipt.ledger_root)
        leaf = (name, leaf_hash(receipt.entry))
        for known, key, mine in (
            (roots, (receipt.run_id, receipt.ledger_size), root),
            (places, (receipt.run_id, receipt.ledger_index), leaf),
        ):
            other = known.setdefault(key, mine)
            if other[1] != mine[1]:
                what = f"two roots over {key[1]} entries" if known is roots else f"two entries at place {key[1]}"
                raise LedgerInvalid(f"{other[0]} and {name} contradict each other: {what}", TWO_HISTORIES)


def _read_folder(folder: Path) -> list[Kept]:
    try:
        return [Kept(str(path.relative_to(folder)), path.read_bytes()) for path in sorted(folder.rglob(f"*{SUFFIX}"))]
    except OSError as error:
        raise UsageError(f"can't read {folder}: {error.strerror}", "check the path and who owns the files") from error


def _read_file(path: Path) -> list[Kept]:
    try:
        with path.open("rb") as file:
            if json.loads(file.readline(MAX_LINE_BYTES)) != {"format": FORMAT}:
                raise ValueError("another format")
            return [_read_line(line) for line in iter(lambda: file.readline(MAX_LINE_BYTES), b"")]
    except OSError as error:
        raise UsageError(f"can't read {path}: {error.strerror}", "check the path") from error
    except (ValueError, KeyError, TypeError, binascii.Error) as error:
        raise LedgerInvalid(f"{path} is no file of receipts, or damaged", "write one with: swarm receipts export") from error


def _read_line(line: bytes) -> Kept:
    fields = json.loads(line)
    return Kept(str(fields["name"])[:200], base64.b64decode(fields["receipt"], validate=True))
