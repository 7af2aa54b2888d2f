"""What a node sends and receives: counted by kind where we hand it over, and as a whole where it leaves the machine."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from typing import Literal

import structlog

from peer.network.sockets import Reading, SocketCounters

Direction = Literal["sent", "received"]
Kind = Literal["bulk", "control", "framing", "web"]
DIRECTIONS: tuple[Direction, ...] = ("sent", "received")
KINDS: tuple[Kind, ...] = ("bulk", "control", "framing", "web")
TYPICAL_FRAMING = 0.04  # of bulk, measured over links of 80 Mbit/s with packets of 1500 bytes

log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class Volume:
    """Bytes in both directions."""

    sent_bytes: int = 0
    received_bytes: int = 0

    @property
    def total_bytes(self) -> int:
        """Both together."""
        return self.sent_bytes + self.received_bytes

    def __add__(self, other: Volume) -> Volume:
        return Volume(self.sent_bytes + other.sent_bytes, self.received_bytes + other.received_bytes)

    def __sub__(self, other: Volume) -> Volume:
        return Volume(self.sent_bytes - other.sent_bytes, self.received_bytes - other.received_bytes)


def _zeros() -> dict[Kind, int]:
    return dict.fromkeys(KINDS, 0)


@dataclass
class Traffic:
    """Totals of one node, over all its network daemons.

    `bulk` is blobs, `control` everything else that we send ourselves, `framing` what comes on top at the daemon's sockets:
    encryption, multiplexing, the DHT, retransmissions and headers. Where the kernel doesn't tell (`at_socket` is false) framing
    is taken as a twenty-fifth of the rest. `web` is the run's files from a mirror, which don't go through a daemon.
    """

    sent: dict[Kind, int] = field(default_factory=_zeros)
    received: dict[Kind, int] = field(default_factory=_zeros)
    reading: Reading = field(default_factory=Reading)
    _former: Reading = field(default_factory=Reading)
    _counters: SocketCounters | None = None

    @property
    def at_socket(self) -> bool:
        """Whether the totals are those of the daemon's sockets."""
        return self._counters is not None or self.reading.sent_bytes > 0

    @property
    def total(self) -> Volume:
        """Everything, as of the last measurement."""
        return Volume(sum(self.sent.values()), sum(self.received.values()))

    def count(self, direction: Direction, kind: Kind, size_bytes: int) -> None:
        """Note what was handed over to the daemon or came from it."""
        (self.sent if direction == "sent" else self.received)[kind] += size_bytes

    def follow(self, pid: int) -> None:
        """Count the sockets of this daemon from now on; what earlier ones have moved stays."""
        self.close()
        self._counters = SocketCounters.open(pid)
        if self._counters is None:
            log.warning("traffic_is_estimated", reason="the kernel has no sock_diag here")

    def close(self) -> None:
        """Stop counting at sockets."""
        if self._counters is None:
            return
        self.measure()
        self._former = self.reading
        self._counters.close()
        self._counters = None

    def measure(self) -> Reading:
        """Bring the framing up to date; what the sockets say."""
        if self._counters is not None:
            with contextlib.suppress(OSError):
                self.reading = self._former + self._counters.read()
        sockets = {"sent": self.reading.sent_bytes, "received": self.reading.received_bytes}
        for direction in DIRECTIONS:
            counts = self.sent if direction == "sent" else self.received
            payload = counts["bulk"] + counts["control"]
            framing = sockets[direction] - payload if self.at_socket else int(TYPICAL_FRAMING * payload)
            counts["framing"] = max(counts["framing"], framing)
        return self.reading
