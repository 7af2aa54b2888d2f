"""A process that sends prepared requests over real gRPC with TLS: as fast as answers come, or at a given rate.

One channel per line of requests (one per peer), so that every peer has a connection of its own as in a real swarm.
"""

from __future__ import annotations

import random
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc

from bench.children import arguments, end_with_parent, say
from swarm.rpc.client import CHANNEL_OPTIONS

LENGTH = struct.Struct(">I")
FINISH_S = 60.0
OPTIONS = (*CHANNEL_OPTIONS, ("grpc.use_local_subchannel_pool", 1))

Call = Callable[[bytes], Any]


def write_lines(path: Path, lines: list[list[bytes]]) -> None:
    """Store requests, one list per channel."""
    with path.open("wb") as file:
        for number, line in enumerate(lines):
            for request in line:
                file.write(LENGTH.pack(number) + LENGTH.pack(len(request)) + request)


def read_lines(path: Path) -> list[list[bytes]]:
    """What `write_lines` has stored."""
    raw, position = path.read_bytes(), 0
    lines: list[list[bytes]] = []
    while position < len(raw):
        number, size = LENGTH.unpack_from(raw, position)[0], LENGTH.unpack_from(raw, position + LENGTH.size)[0]
        position += 2 * LENGTH.size
        while len(lines) <= number:
            lines.append([])
        lines[number].append(raw[position : position + size])
        position += size
    return lines


def read_answers(path: Path) -> list[bytes]:
    """What a generator has received."""
    raw, position, answers = path.read_bytes(), 0, []
    while position < len(raw):
        size = LENGTH.unpack_from(raw, position)[0]
        answers.append(raw[position + LENGTH.size : position + LENGTH.size + size])
        position += LENGTH.size + size
    return answers


class Tally:
    """What became of the requests so far."""

    def __init__(self, expected: int) -> None:
        self.answers: list[bytes] = []
        self.latencies_s: list[float] = []
        self.failures: dict[str, int] = {}
        self.finished = threading.Event()
        self._expected = expected
        self._lock = threading.Lock()

    def note(self, answer: Any, since_s: float) -> None:
        """An answer has come, or an error."""
        error = answer.exception()
        with self._lock:
            if error is None:
                self.answers.append(answer.result())
                self.latencies_s.append(time.perf_counter() - since_s)
            else:
                reason = f"{error.code().name}: {error.details()}"
                self.failures[reason] = self.failures.get(reason, 0) + 1
            if len(self.latencies_s) + sum(self.failures.values()) == self._expected:
                self.finished.set()


def send_all(calls: list[Call], lines: list[list[bytes]], in_flight: int, tally: Tally) -> None:
    """Keep `in_flight` requests of every line on the way."""

    def send_next(call: Call, rest: Iterator[bytes]) -> None:
        request = next(rest, None)
        if request is None:
            return
        started_s = time.perf_counter()

        def arrived(answer: Any) -> None:
            tally.note(answer, started_s)
            send_next(call, rest)

        call(request).add_done_callback(arrived)

    for call, line in zip(calls, lines, strict=True):
        rest = iter(line)
        for _ in range(in_flight):
            send_next(call, _Locked(rest))


class _Locked:
    """An iterator that several threads may use."""

    lock = threading.Lock()

    def __init__(self, inner: Iterator[bytes]) -> None:
        self._inner = inner

    def __iter__(self) -> _Locked:
        return self

    def __next__(self) -> bytes:
        with self.lock:
            return next(self._inner)


def send_at(calls: list[Call], lines: list[list[bytes]], per_s: float, tally: Tally) -> None:
    """Send at random moments, `per_s` on average; a request that starts late counts as slow."""
    draw = random.Random(7)
    order = [(index, request) for requests in zip(*lines, strict=True) for index, request in enumerate(requests)]
    due_s = time.perf_counter()
    for index, request in order:
        due_s += draw.expovariate(per_s)
        wait_s = due_s - time.perf_counter()
        if wait_s > 0:
            time.sleep(wait_s)
        calls[index](request).add_done_callback(lambda answer, since_s=due_s: tally.note(answer, since_s))


def main() -> None:
    """Load the requests, say so, wait for a line on stdin, send, and tell how it went."""
    given = arguments()
    lines = read_lines(Path(given["requests"]))
    credentials = grpc.ssl_channel_credentials(Path(given["certificate"]).read_bytes())
    channels = [grpc.secure_channel(given["address"], credentials, OPTIONS) for _ in lines]
    for channel in channels:
        grpc.channel_ready_future(channel).result(FINISH_S)
    calls: list[Call] = [channel.unary_unary(given["method"], None, None).future for channel in channels]
    tally = Tally(sum(map(len, lines)))
    say(ready=True)
    input()
    end_with_parent()
    started_s, processor_s = time.perf_counter(), time.process_time()
    if given.get("per_s"):
        send_at(calls, lines, given["per_s"], tally)
    else:
        send_all(calls, lines, given["in_flight"], tally)
    tally.finished.wait(given["limit_s"])
    seconds = time.perf_counter() - started_s
    Path(given["answers"]).write_bytes(b"".join(LENGTH.pack(len(answer)) + answer for answer in tally.answers))
    say(
        answered=len(tally.answers),
        failures=tally.failures,
        seconds=seconds,
        processor_s=time.process_time() - processor_s,
        latencies_s=tally.latencies_s,
    )
    for channel in channels:
        channel.close()


if __name__ == "__main__":
    main()
