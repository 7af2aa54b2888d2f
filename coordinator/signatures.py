"""Checks Ed25519 signatures: in place while there are few, and in processes of their own once there are many.

A check takes longer than everything else about a report, and it would hold up the event loop or, in threads, fight with it over
the interpreter's lock. A process gets many at once over a socket and knows nothing but keys, bytes and signatures:

    request   4 bytes: number of proofs; 4 bytes: bytes that follow; per proof key (32), signature (64), length (4), message
    answer    one byte per proof, 1 = valid
"""

from __future__ import annotations

import asyncio
import os
import socket
import struct
import sys
from collections import deque
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from itertools import islice
from typing import BinaryIO, NamedTuple

import structlog

from swarm import tracing
from swarm.errors import Rejected
from swarm.identity import SIGNATURE_BYTES, is_valid, pre_authentication_encoding, public_key_of
from swarm.rpc.v1.signed_pb2 import Signed

HEADER = struct.Struct(">II")
PROOF = struct.Struct(">32s64sI")
BATCH_PROOFS = 384
START_AFTER = 96  # proofs that wait or were checked in place within a second
GATHER_S = 0.02  # for a batch to grow, while many come
LARGE_BYTES = 1 << 16
STOP_S = 2.0

log = structlog.get_logger(__name__)


class Proof(NamedTuple):
    """What a signature is checked against."""

    public_key: bytes
    signature: bytes
    message: bytes
    signer: str = ""
    kind: str = ""

    @classmethod
    def of(cls, signed: Signed) -> Proof:
        """The proof inside a signed message. Raises `Rejected` where it can't be one."""
        signature, signer, kind = signed.signature, signed.signer, signed.kind
        if len(signature) != SIGNATURE_BYTES:
            raise Rejected("bad_signature", "wrong length", signer)
        return cls(public_key_of(signer), signature, pre_authentication_encoding(kind, signed.payload), signer, kind)


class _Batch(NamedTuple):
    """Proofs of one caller that wait for a process."""

    proofs: Sequence[Proof]
    done: asyncio.Future[bytes]


class SignatureChecker:
    """Use as `async with SignatureChecker(processes)`; 0 processes check everything in place."""

    def __init__(self, processes: int = -1, start_after: int = START_AFTER) -> None:
        self._wanted = max(1, (os.cpu_count() or 1) - 1) if processes < 0 else processes  # one core is the event loop's
        self._start_after = start_after
        self._waiting: deque[_Batch] = deque()
        self._wake = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._running = 0
        self._second = 0
        self._in_place = 0

    async def __aenter__(self) -> SignatureChecker:
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._fail_waiting()

    @property
    def processes(self) -> int:
        """How many processes are at work."""
        return self._running

    async def check(self, signed: Iterable[Signed]) -> None:
        """Return if all signatures are valid. Raises `Rejected` for the first that isn't."""
        (refusal,) = await self.refusals((signed,))
        if refusal is not None:
            raise refusal

    async def refusals(self, groups: Sequence[Iterable[Signed]]) -> list[Rejected | None]:
        """Of each group of messages, why it is refused, or None where all its signatures are valid."""
        proven = [_proofs(group) for group in groups]
        proofs = [proof for group in proven if not isinstance(group, Rejected) for proof in group]
        with tracing.span("check_signatures", {"swarm.signatures": len(proofs)}):
            valid = iter(await self._checked(proofs) if proofs else b"")
        return [group if isinstance(group, Rejected) else _refusal(group, bytes(islice(valid, len(group)))) for group in proven]

    async def _checked(self, proofs: list[Proof]) -> bytes:
        if self._running:
            batch = _Batch(proofs, asyncio.get_running_loop().create_future())
            self._waiting.append(batch)
            self._wake.set()
            return await batch.done
        self._count(len(proofs))
        if sum(len(proof.message) for proof in proofs) > LARGE_BYTES:
            return await asyncio.to_thread(_check_all, proofs)
        return _check_all(proofs)

    def _count(self, proofs: int) -> None:
        """Start the processes when this second has brought many proofs."""
        second = int(asyncio.get_running_loop().time())
        self._in_place = proofs if second != self._second else self._in_place + proofs
        self._second = second
        if self._in_place > self._start_after and not self._tasks:
            self._tasks = [asyncio.create_task(self._serve()) for _ in range(self._wanted)]

    async def _serve(self) -> None:
        """Keep one process busy; what it leaves undone when it ends is checked in place."""
        try:
            async with _process() as (reader, writer):
                await reader.readexactly(1)
                self._running += 1
                try:
                    await self._feed(reader, writer)
                finally:
                    self._running -= 1
        except (asyncio.IncompleteReadError, OSError) as error:
            log.error("signature_process_lost", exc_info=error)
            self._fail_waiting()

    async def _feed(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        batches: list[_Batch] = []
        while True:
            while not self._waiting:
                self._wake.clear()
                await self._wake.wait()
                if len(batches) > 1 and sum(len(batch.proofs) for batch in self._waiting) < BATCH_PROOFS:
                    await asyncio.sleep(GATHER_S)
            batches = self._take()
            try:
                writer.write(_packed([proof for batch in batches for proof in batch.proofs]))
                valid = await reader.readexactly(sum(len(batch.proofs) for batch in batches))
            except BaseException:
                _answer_in_place(batches)
                raise
            _answer(batches, valid)

    def _take(self) -> list[_Batch]:
        """Callers' proofs, whole, up to the size of a batch."""
        taken, count = [self._waiting.popleft()], 0
        while self._waiting and count < BATCH_PROOFS:
            count += len(self._waiting[0].proofs)
            taken.append(self._waiting.popleft())
        return taken

    def _fail_waiting(self) -> None:
        if not self._running:
            _answer_in_place(list(self._waiting))
            self._waiting.clear()


def _proofs(group: Iterable[Signed]) -> list[Proof] | Rejected:
    try:
        return [Proof.of(signed) for signed in group]
    except Rejected as error:
        return error


def _refusal(proofs: Sequence[Proof], valid: bytes) -> Rejected | None:
    if all(valid):
        return None
    forged = next(proof for proof, ok in zip(proofs, valid, strict=True) if not ok)
    return Rejected("bad_signature", forged.kind, forged.signer)


def _check_all(proofs: Iterable[Proof]) -> bytes:
    return bytes(is_valid(proof.public_key, proof.signature, proof.message) for proof in proofs)


def _answer(batches: Iterable[_Batch], valid: bytes) -> None:
    position = 0
    for batch in batches:
        end = position + len(batch.proofs)
        if not batch.done.done():
            batch.done.set_result(valid[position:end])
        position = end


def _answer_in_place(batches: Sequence[_Batch]) -> None:
    _answer(batches, _check_all(proof for batch in batches for proof in batch.proofs))


def _packed(proofs: Sequence[Proof]) -> bytes:
    parts: list[bytes] = []
    for proof in proofs:
        parts += (PROOF.pack(proof.public_key, proof.signature, len(proof.message)), proof.message)
    body = b"".join(parts)
    return HEADER.pack(len(proofs), len(body)) + body


@asynccontextmanager
async def _process() -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """A process and the socket to it. It ends by itself when the socket closes, so also when we are killed."""
    ours, theirs = socket.socketpair()
    async with AsyncExitStack() as stack:
        stack.callback(ours.close)
        with theirs:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "coordinator.signatures", str(theirs.fileno())),
                pass_fds=(theirs.fileno(),),
                stdin=asyncio.subprocess.DEVNULL,
                start_new_session=True,
            )
        stack.push_async_callback(_end, process)
        reader, writer = await asyncio.open_connection(sock=ours)
        stack.callback(writer.close)
        yield reader, writer


async def _end(process: asyncio.subprocess.Process) -> None:
    """Wait for it to end by itself, kill it if it doesn't or we have no time, and leave nobody uncollected."""
    try:
        with suppress(TimeoutError):
            await asyncio.wait_for(process.wait(), STOP_S)
    finally:
        if process.returncode is None:
            with suppress(ProcessLookupError):
                process.kill()
            await process.wait()


# --- in the process -----------------------------------------------------------------------------------------------------


def work(requests: BinaryIO, answers: socket.socket) -> None:
    """Answer batch after batch until the other end closes."""
    answers.sendall(b"\x01")
    while header := requests.read(HEADER.size):
        count, size = HEADER.unpack(header)
        answers.sendall(_judged(requests.read(size), count))


def _judged(body: bytes, count: int) -> bytes:
    valid, position = bytearray(count), 0
    for number in range(count):
        key, signature, size = PROOF.unpack_from(body, position)
        position += PROOF.size
        valid[number] = is_valid(key, signature, body[position : position + size])
        position += size
    return bytes(valid)


def main() -> None:
    """Serve the socket whose number is the argument."""
    connection = socket.socket(fileno=int(sys.argv[1]))
    with connection, connection.makefile("rb") as requests, suppress(ConnectionError):
        work(requests, connection)


if __name__ == "__main__":
    main()
