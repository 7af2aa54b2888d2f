"""The peer's side of the control plane: admission, presence, grants. Training goes on while the coordinator is away."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import structlog

from peer.admissions import Admissions
from peer.folders import write_atomically
from peer.network.node import Node
from peer.reports import read
from peer.rounds.state import RoundSetup
from swarm import __version__
from swarm.clock import Clock, SystemClock, boot_s
from swarm.control import RUN_NAME
from swarm.errors import CoordinatorUnreachable, LedgerInvalid, NotAdmitted, ProtocolMismatch, Rejected, SwarmError, VersionTooOld
from swarm.identity import Identity
from swarm.ledger import open_manifest
from swarm.messages import START_BYTES, JoinLink, open_signed, parse, seal
from swarm.protocol import OURS, Range, spoken_by, used_in
from swarm.rpc.client import CoordinatorClient, RunInfo
from swarm.rpc.v1.coordinator_pb2 import TWIN_UNSPECIFIED, Announcement, AnnounceResponse, GetRunResponse, GrantRequest
from swarm.rpc.v1.signed_pb2 import AdmissionToken, Signed

FIRST_INTERVAL_S = 5.0
CLOCK_WARNING_S = 60.0
PRESENCE_CACHE = "admission.pb"

log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class Standing:
    """What we tell the coordinator about ourselves."""

    round_index: int
    state: str
    hardware_class: str
    reachable: bool
    state_root: bytes = b""


@dataclass
class Coordination:
    """One run's coordinator as this peer sees it. `last` is its newest answer; None until it has answered once.

    `held` is the certificate of the account that we earn for, None where we earn for ourselves; `ticket` an invitation. An
    empty `start` is that of somebody who only has a look, and changes nothing for a peer that runs with the same key.
    """

    link: JoinLink
    identity: Identity
    directory: Path
    held: Signed | None = None
    ticket: Signed | None = None
    spoken: Range = OURS
    clock: Clock = SystemClock()
    client: CoordinatorClient | None = None
    last: AnnounceResponse | None = None
    clock_offset_s: float = 0.0
    on_answer: Callable[[AnnounceResponse], None] = lambda answer: None
    start: bytes = field(default_factory=lambda: os.urandom(START_BYTES))
    _began_s: float = field(default_factory=boot_s)
    _lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    _nudged: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def reachable(self) -> bool:
        """Whether the coordinator answered last time."""
        return self.client is not None

    async def describe(self) -> RunInfo:
        """The run, from the coordinator or, while that is away, as it was last seen. Raises `SwarmError`."""
        cache = self.directory / RUN_NAME
        try:
            run = await (await self.connected()).get_run()
        except CoordinatorUnreachable:
            if not cache.exists():
                raise
            return self._remembered(cache)
        answer = GetRunResponse(
            run_id=run.run_id,
            manifest=run.signed_manifest,
            coordinator=run.coordinator,
            version=run.version,
            protocol=run.protocol.message,
        )
        _keep(cache, answer.SerializeToString())
        return run

    async def announce(self, node: Node, standing: Standing, *, leaving: bool = False) -> AnnounceResponse:
        """Say where we are; get the admission and the peers. Raises `SwarmError` or `Rejected`."""
        message = Announcement(
            run_id=self.link.run_id,
            addresses=node.addresses,
            round=standing.round_index,
            state=standing.state,
            client_version=__version__,
            hardware_class=standing.hardware_class,
            issued_at=int(self.clock.wall_s()),
            leaving=leaving,
            reachable=standing.reachable,
            state_root=standing.state_root,
            held=self.held,
            ticket=self.ticket,
            start=self.start,
            uptime_s=boot_s() - self._began_s,
            protocol=self.spoken.message,
        )
        client = await self.connected()
        try:
            answer = await client.announce(seal(self.identity, message))
        except CoordinatorUnreachable:
            await self._disconnect()
            raise
        self._take(answer, node)
        return answer

    async def announce_for_ever(self, node: Node, standing: Callable[[], Standing]) -> None:
        """Renew presence and admission at the interval that the coordinator asks for; what fails is tried again.

        Raises `VersionTooOld` once the run asks for a newer client, `ProtocolMismatch` once it has another protocol.
        """
        while True:
            interval_s = self.last.interval_s if self.last is not None else FIRST_INTERVAL_S
            self._nudged.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(min(60.0, max(0.2, interval_s))):
                    await self._nudged.wait()
            try:
                await self.announce(node, standing())
            except (VersionTooOld, ProtocolMismatch):
                raise
            except NotAdmitted as error:
                log.error("not_admitted", error=error.message)
            except (SwarmError, Rejected) as error:
                log.info("announce_failed", error=str(error))

    def nudge(self) -> None:
        """Announce now: what we do has changed."""
        self._nudged.set()

    async def grant(self, setup: RoundSetup, present: tuple[str, ...]) -> Signed | None:
        """Ask to go on without a quorum; None if that isn't allowed (yet)."""
        message = GrantRequest(
            run_id=setup.run_id,
            round=setup.round_index,
            base_root=setup.base_root,
            roster=setup.peers,
            present=present,
            issued_at=int(self.clock.wall_s()),
        )
        try:
            answer = await (await self.connected()).request_grant(seal(self.identity, message))
        except (SwarmError, Rejected) as error:
            log.info("grant_failed", error=str(error))
            return None
        if not answer.HasField("grant"):
            log.info("grant_refused", reason=answer.reason, retry_after_s=answer.retry_after_s)
            return None
        return answer.grant

    def remember_admission(self, admissions: Admissions) -> None:
        """Take the admission of an earlier start, for when the coordinator is away."""
        cache = self.directory / PRESENCE_CACHE
        if not cache.exists():
            return
        try:
            answer = parse(AnnounceResponse, read(cache))
            self._check_spoken(answer.admission)
            admissions.admit(answer.admission)
        except Rejected as error:
            log.info("old_admission_refused", reason=error.reason)
            return
        answer.genesis = False
        answer.twin = TWIN_UNSPECIFIED
        self.last = answer

    def _check_spoken(self, admission: Signed) -> None:
        """An admission that names what we don't speak (any more) would mislead the others. Raises `Rejected`."""
        if not self.spoken.covers(spoken := spoken_by(open_signed(admission, AdmissionToken))):
            raise Rejected("protocol_too_old", f"the admission says {spoken}, we speak {self.spoken}", self.identity.peer_id)

    async def close(self) -> None:
        """Close the channel."""
        await self._disconnect()

    def _take(self, answer: AnnounceResponse, node: Node) -> None:
        self.last = answer
        self.clock_offset_s = answer.coordinator_time_s - self.clock.wall_s()
        if abs(self.clock_offset_s) > CLOCK_WARNING_S:
            log.warning("clock_differs", offset_s=round(self.clock_offset_s), hint="set this machine's clock")
        for peer in answer.peers:
            node.learn(peer.peer_id, peer.addresses)
        _keep(self.directory / PRESENCE_CACHE, answer.SerializeToString())
        self.on_answer(answer)

    async def connected(self) -> CoordinatorClient:
        """The open channel, or a new one. Raises `CoordinatorUnreachable` or `FingerprintMismatch`."""
        async with self._lock:
            if self.client is None:
                self.client = await CoordinatorClient.connect(self.link, spoken=self.spoken)
            return self.client

    async def _disconnect(self) -> None:
        client, self.client = self.client, None
        if client is not None:
            await client.close()

    def _remembered(self, cache: Path) -> RunInfo:
        try:
            answer = parse(GetRunResponse, read(cache))
            manifest = open_manifest(answer.manifest, self.link.run_id)
        except Rejected as error:
            raise LedgerInvalid(f"{cache} is damaged: {error}", "delete it and start again") from error
        return RunInfo(self.link.run_id, manifest, answer.manifest, answer.coordinator, answer.version, used_in(answer))


def _keep(path: Path, content: bytes) -> None:
    """Remember for later; a full disk costs only that."""
    try:
        write_atomically(path, content)
    except OSError as error:
        log.warning("not_remembered", path=str(path), error=error.strerror)
