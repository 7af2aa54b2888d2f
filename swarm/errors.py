"""Every error that a user can meet, with its exit code and a hint.

    SwarmError                      1  unexpected
    +-- UsageError                  2  wrong arguments (also raised by the command line itself)
    +-- LinkError                  10  a join link that can't be read
    +-- CoordinatorUnreachable     11  nothing answers at the link's address
    +-- FingerprintMismatch        12  something else answers at the link's address
    +-- UnknownRun                 13  the coordinator doesn't know the run
    +-- NotAdmitted                14  the coordinator refuses this key
    +-- VersionTooOld              15  the run needs a newer client
    +-- ProtocolMismatch           16  no version of the protocol that both sides speak
    +-- ManifestInvalid            20  problems in a manifest, all listed
    +-- KeyFileError               21  a key file that is missing, readable by others or broken
    +-- DataInvalid                22  data, tokenizer or model don't fit the manifest
    +-- NoDevice                   30  no usable GPU
    +-- OutOfMemory                31  the device or host has too little memory
    +-- DiskFull                   32  too little disk
    +-- PortBusy                   33  an address is taken
    +-- NetworkBroken              34  the peer-to-peer network can't start or be reached
    +-- CheckpointCorrupt          40  no whole checkpoint where one is needed
    +-- DatabaseCorrupt            41  the coordinator's database can't be used
    +-- LedgerInvalid              42  the ledger doesn't verify
    +-- StateDisputed              43  our verified state is not the majority's
    +-- NotRunning                 50  no daemon answers on the control socket
    +-- AlreadyRunning             51  another daemon holds this directory

Messages that strangers send raise `Rejected`, which never ends a process: it is counted and names the sender.
"""

from __future__ import annotations


class SwarmError(Exception):
    """What went wrong in one line, what to do about it, and the exit code."""

    exit_code = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UsageError(SwarmError):
    """Wrong arguments."""

    exit_code = 2


class LinkError(SwarmError):
    """A join link that can't be read."""

    exit_code = 10


class CoordinatorUnreachable(SwarmError):
    """Nothing answers at the coordinator's address."""

    exit_code = 11


class FingerprintMismatch(SwarmError):
    """The server's key is not the one that the join link pins."""

    exit_code = 12


class UnknownRun(SwarmError):
    """The coordinator doesn't know the run."""

    exit_code = 13


class NotAdmitted(SwarmError):
    """The coordinator refuses this key."""

    exit_code = 14


class VersionTooOld(SwarmError):
    """The run needs a newer client."""

    exit_code = 15


class ProtocolMismatch(SwarmError):
    """No version of the protocol that both this client and the coordinator speak."""

    exit_code = 16


class ManifestInvalid(SwarmError):
    """A manifest with errors; `problems` lists every one of them."""

    exit_code = 20

    def __init__(self, problems: list[str], source: str = "manifest") -> None:
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        super().__init__(f"{source} has {count}: " + "; ".join(problems), "see docs/reference/manifest.md")
        self.problems = problems


class KeyFileError(SwarmError):
    """A key file that is missing, readable by others, or broken."""

    exit_code = 21


class DataInvalid(SwarmError):
    """Data, tokenizer or model that don't fit the manifest."""

    exit_code = 22


class NoDevice(SwarmError):
    """No usable GPU."""

    exit_code = 30


class OutOfMemory(SwarmError):
    """Too little memory on the device or the host."""

    exit_code = 31


class DiskFull(SwarmError):
    """Too little disk space."""

    exit_code = 32


class PortBusy(SwarmError):
    """An address that is taken already."""

    exit_code = 33


class NetworkBroken(SwarmError):
    """The peer-to-peer network can't start or reach anybody."""

    exit_code = 34


class CheckpointCorrupt(SwarmError):
    """No whole checkpoint where one is needed."""

    exit_code = 40


class DatabaseCorrupt(SwarmError):
    """The coordinator's database can't be used."""

    exit_code = 41


class LedgerInvalid(SwarmError):
    """The ledger doesn't verify; the message names the first fault."""

    exit_code = 42


class StateDisputed(SwarmError):
    """Computed again from verified parts, our state is still not the majority's."""

    exit_code = 43


class EvidenceInvalid(SwarmError):
    """Evidence that proves nothing."""

    exit_code = 44


class NotRunning(SwarmError):
    """No daemon answers on the control socket."""

    exit_code = 50


class AlreadyRunning(SwarmError):
    """Another daemon holds the directory."""

    exit_code = 51


class Rejected(Exception):
    """A message from the network that breaks a rule. `reason` is a short code that metrics count; `sender` names who."""

    def __init__(self, reason: str, detail: str = "", sender: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
        self.detail = detail
        self.sender = sender
