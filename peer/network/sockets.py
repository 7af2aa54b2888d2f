"""Bytes that a process has moved over TCP, by the kernel's own counters (`sock_diag(7)`): Linux, no privileges needed.

What crosses the wire is more than what a stream carries: encryption, multiplexing, the DHT, retransmissions, TCP and IP headers.
libp2p does all that in a child process, so the kernel is asked about the child's sockets. Headers are counted per segment, at the
size that they have on nearly every link (TCP with timestamps); what the link itself adds, such as Ethernet's frames, is not.
"""

from __future__ import annotations

import os
import socket
import struct
import time
from collections.abc import Iterator, Set
from dataclasses import dataclass, field, replace

NETLINK_SOCK_DIAG = 4
SOCK_DIAG_BY_FAMILY = 20
NLM_F_REQUEST_DUMP = 0x301
NLMSG_ERROR, NLMSG_DONE = 2, 3
DESTROYED_GROUPS = 1 << 0 | 1 << 2  # SKNLGRP_INET_TCP_DESTROY, SKNLGRP_INET6_TCP_DESTROY
INET_DIAG_INFO = 2
STATES = 0xFFF & ~(1 << 6 | 1 << 10)  # all but TIME_WAIT and LISTEN
HEADER_BYTES = {int(socket.AF_INET): 20 + 32, int(socket.AF_INET6): 40 + 32}
RECEIVE_BYTES = 1 << 18
TIMEOUT_S = 1.0
LAST_WORD_S = 2.0  # for which a socket that is gone from the list is waited for

NETLINK = struct.Struct("=IH10x")  # nlmsghdr: length, type
REQUEST = struct.Struct("=IHHIIBBBxI48x")  # nlmsghdr, then inet_diag_req_v2: family, protocol, extensions, states
SOCKET = struct.Struct("=B43x8s8xI4xI")  # inet_diag_msg: family, cookie, write queue, inode
ATTRIBUTE = struct.Struct("=HH")
TCP_INFO = struct.Struct("=120xQQII24xQ24xQ")  # bytes acked and received, segments out and in, busy microseconds, bytes sent


@dataclass(frozen=True)
class Reading:
    """Totals of a process's sockets since they were opened.

    `sent_bytes` and `received_bytes` have headers and retransmissions; `acknowledged_bytes` is what has arrived at the other
    ends, `busy_s` the time for which there was something to send, added up over the sockets, and `queued_bytes` what is still
    on its way out.
    """

    sent_bytes: int = 0
    received_bytes: int = 0
    acknowledged_bytes: int = 0
    busy_s: float = 0.0
    queued_bytes: int = 0

    def __add__(self, other: Reading) -> Reading:
        return Reading(
            self.sent_bytes + other.sent_bytes,
            self.received_bytes + other.received_bytes,
            self.acknowledged_bytes + other.acknowledged_bytes,
            self.busy_s + other.busy_s,
            self.queued_bytes + other.queued_bytes,
        )


@dataclass
class SocketCounters:
    """Counts for one process. Sockets that close between two readings are counted to their end."""

    pid: int
    _live: dict[bytes, Reading] = field(default_factory=dict)
    _ended: Reading = field(default_factory=Reading)
    _missed_s: dict[bytes, float] = field(default_factory=dict)
    _foreign: set[bytes] = field(default_factory=set)
    _query: socket.socket = field(default_factory=lambda: _netlink(0))
    _destroyed: socket.socket = field(default_factory=lambda: _netlink(DESTROYED_GROUPS))

    @classmethod
    def open(cls, pid: int) -> SocketCounters | None:
        """Counters for a process, or None where the kernel doesn't offer them."""
        try:
            counters = cls(pid)
        except (AttributeError, OSError):
            return None
        try:
            counters.read()
        except OSError:
            counters.close()
            return None
        return counters

    def close(self) -> None:
        """Free the sockets; what was counted stays."""
        self._query.close()
        self._destroyed.close()

    def read(self) -> Reading:
        """The totals now. Raises `OSError`."""
        found = {entry.cookie: entry for family in HEADER_BYTES for entry in self._dump(family)}
        self._live |= {cookie: entry.reading for cookie, entry in found.items() if cookie in self._live}
        unknown = [entry for cookie, entry in found.items() if entry.inode and cookie not in self._live.keys() | self._foreign]
        if unknown:
            mine = _socket_inodes(self.pid)
            self._live |= {entry.cookie: entry.reading for entry in unknown if entry.inode in mine}
            self._foreign |= {entry.cookie for entry in unknown if entry.inode not in mine}
        self._settle({entry.cookie: entry.reading for entry in self._just_destroyed()}, found.keys())
        self._foreign &= found.keys()
        return sum(self._live.values(), self._ended)

    def _settle(self, destroyed: dict[bytes, Reading], found: Set[bytes]) -> None:
        """Add up sockets that have ended. The kernel's last word on one may come a moment after it is gone from the list."""
        now_s = time.monotonic()
        self._live |= {cookie: reading for cookie, reading in destroyed.items() if cookie in self._live}
        for cookie in self._live.keys() - found:
            self._live[cookie] = replace(self._live[cookie], queued_bytes=0)
            missed_s = self._missed_s.setdefault(cookie, now_s)
            if cookie in destroyed or now_s - missed_s > LAST_WORD_S:
                self._ended += self._live.pop(cookie)
                del self._missed_s[cookie]

    def _dump(self, family: int) -> Iterator[_Entry]:
        extensions = 1 << (INET_DIAG_INFO - 1)
        request = REQUEST.pack(
            REQUEST.size, SOCK_DIAG_BY_FAMILY, NLM_F_REQUEST_DUMP, 0, 0, family, socket.IPPROTO_TCP, extensions, STATES
        )
        self._query.send(request)
        done = False
        while not done:
            for kind, body in _messages(self._query.recv(RECEIVE_BYTES)):
                if kind == NLMSG_ERROR:
                    raise OSError(-struct.unpack_from("=i", body)[0], "sock_diag")
                done = done or kind == NLMSG_DONE
                if kind == SOCK_DIAG_BY_FAMILY and (entry := _entry(body)) is not None:
                    yield entry

    def _just_destroyed(self) -> Iterator[_Entry]:
        """Sockets that have ended since the last time, with their final counts."""
        while True:
            try:
                content = self._destroyed.recv(RECEIVE_BYTES)
            except OSError:  # nothing more, or too many for the buffer: then their last bytes are lost
                return
            yield from (entry for _, body in _messages(content) if (entry := _entry(body)) is not None)


@dataclass(frozen=True)
class _Entry:
    """One socket. Its cookie stays the same for its whole life, its inode is 0 where no process holds it."""

    cookie: bytes
    inode: int
    reading: Reading


def _netlink(groups: int) -> socket.socket:
    made = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_SOCK_DIAG)
    try:
        made.bind((0, groups))
    except OSError:
        made.close()
        raise
    made.settimeout(0 if groups else TIMEOUT_S)
    return made


def _messages(content: bytes) -> Iterator[tuple[int, memoryview]]:
    rest = memoryview(content)
    while len(rest) >= NETLINK.size:
        length, kind = NETLINK.unpack_from(rest)
        yield kind, rest[NETLINK.size : length]
        rest = rest[_aligned(length) :]


def _entry(body: memoryview) -> _Entry | None:
    """What a message says about a socket; None where it has no counters."""
    family, cookie, queued, inode = SOCKET.unpack_from(body)
    rest = body[SOCKET.size :]
    while len(rest) >= ATTRIBUTE.size:
        length, kind = ATTRIBUTE.unpack_from(rest)
        if kind == INET_DIAG_INFO and length >= ATTRIBUTE.size + TCP_INFO.size:
            return _Entry(cookie, inode, _reading(family, queued, TCP_INFO.unpack_from(rest, ATTRIBUTE.size)))
        rest = rest[max(ATTRIBUTE.size, _aligned(length)) :]
    return None


def _reading(family: int, queued_bytes: int, info: tuple[int, ...]) -> Reading:
    acknowledged, received, segments_out, segments_in, busy_us, sent = info
    header = HEADER_BYTES.get(family, 0)
    return Reading(sent + segments_out * header, received + segments_in * header, acknowledged, busy_us / 1e6, queued_bytes)


def _aligned(length: int) -> int:
    return (length + 3) & ~3


def _socket_inodes(pid: int) -> set[int]:
    """Inodes of the sockets that a process holds; none if it has ended."""
    found: set[int] = set()
    try:
        descriptors = list(os.scandir(f"/proc/{pid}/fd"))
    except FileNotFoundError:
        return found
    for descriptor in descriptors:
        try:
            target = os.readlink(descriptor.path)
        except OSError:  # closed meanwhile
            continue
        if target.startswith("socket:["):
            found.add(int(target[8:-1]))
    return found
