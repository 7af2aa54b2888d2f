"""Which versions of the protocol two sides speak, and which they use: numbers of their own, apart from the package's.

The minor number grows when a message or field is added that the other side may ignore, the major one when something comes to
mean another thing. Each side names the oldest and the newest version that it speaks; the newest that both do is used. Who says
nothing is from before this was asked, and speaks 1.0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from swarm.errors import Rejected
from swarm.rpc.v1.coordinator_pb2 import Announcement, AnnounceResponse, GetRunRequest, GetRunResponse
from swarm.rpc.v1.signed_pb2 import AdmissionToken, ProtocolRange, ProtocolVersion

TOO_OLD = "protocol_too_old"
TOO_NEW = "protocol_too_new"
DISAGREEMENTS = frozenset({TOO_OLD, TOO_NEW})


class Version(NamedTuple):
    """A version of the protocol."""

    major: int
    minor: int

    def __str__(self) -> str:
        return f"{self.major}.{self.minor}"

    @property
    def message(self) -> ProtocolVersion:
        """As it travels."""
        return ProtocolVersion(major=self.major, minor=self.minor)


@dataclass(frozen=True, slots=True)
class Range:
    """All versions from the oldest to the newest that somebody speaks."""

    oldest: Version
    newest: Version

    def __str__(self) -> str:
        return f"{self.oldest}" if self.oldest == self.newest else f"{self.oldest} to {self.newest}"

    def __contains__(self, version: Version) -> bool:
        return self.oldest <= version <= self.newest

    @property
    def message(self) -> ProtocolRange:
        """As it travels."""
        return ProtocolRange(oldest=self.oldest.message, newest=self.newest.message)

    def covers(self, other: Range) -> bool:
        """Whether everything that `other` speaks is spoken here."""
        return other.oldest in self and other.newest in self

    def narrowed(self, other: Range) -> Range:
        """What both speak. Raises `Rejected`."""
        newest = agree(other, self)
        return Range(max(self.oldest, other.oldest), newest)


SILENT = Range(Version(1, 0), Version(1, 0))
OURS = Range(Version(1, 0), Version(1, 2))
MANY_REPORTS = Version(1, 2)
"""The first version with `SubmitReports`."""
MAX_REPORTS = 64
"""In one call: their receipts, each within its limit of 32 KiB, fit into half a message."""


def agree(theirs: Range, ours: Range = OURS, sender: str = "") -> Version:
    """The newest version that both sides speak. Raises `Rejected` with which of them has to be updated."""
    if theirs.newest < ours.oldest:
        raise Rejected("protocol_too_old", f"it speaks {theirs}, needed is {ours}", sender)
    if theirs.oldest > ours.newest:
        raise Rejected("protocol_too_new", f"it speaks {theirs}, known is {ours}", sender)
    return min(theirs.newest, ours.newest)


def spoken_by(said: GetRunRequest | Announcement | AdmissionToken, sender: str = "") -> Range:
    """The versions that a message says its author, or its holder, speaks. Raises `Rejected`."""
    if not said.HasField("protocol"):
        return SILENT
    spoken = Range(_version(said.protocol.oldest), _version(said.protocol.newest))
    if spoken.oldest.major == 0 or spoken.oldest > spoken.newest:
        raise Rejected("malformed", "protocol", sender)
    return spoken


def used_in(answer: GetRunResponse | AnnounceResponse) -> Version:
    """The version that the coordinator says is used."""
    return _version(answer.protocol) if answer.HasField("protocol") else SILENT.newest


def _version(message: ProtocolVersion) -> Version:
    return Version(message.major, message.minor)
