"""A peer that plants: it sends contributions that are wrong on purpose and proves who let one pass."""

from __future__ import annotations

import asyncio
import hashlib
import secrets
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace

import structlog

from peer.frauds import FALSE_PASS
from peer.planting import NONCE_BYTES, Place, planted
from peer.rounds.auditor import Auditor
from peer.rounds.run import Contribution, RoundRun, Services
from swarm.audits import PASSED
from swarm.entries import open_verdict
from swarm.errors import Rejected, SwarmError
from swarm.ledger import parse_entry
from swarm.manifest import Sync
from swarm.messages import parse, payload_hash
from swarm.rpc.client import CoordinatorClient
from swarm.rpc.v1.signed_pb2 import AnnouncedCommit, Commit, Evidence, Signed

POLL_S = 2.0
KEPT_ROUNDS = 64

log = structlog.get_logger(__name__)


@dataclass
class Planter:
    """Makes the leaves of every contribution up, and reads in the ledger what auditors said about them."""

    services: Services
    auditor: Auditor
    client: Callable[[], Awaitable[CoordinatorClient]]
    secret: bytes = field(default_factory=lambda: secrets.token_bytes(NONCE_BYTES))
    _sent: dict[int, RoundRun] = field(default_factory=dict)
    _read: int = -1

    def contribution(self, run: RoundRun, honest: Contribution) -> Contribution:
        """What is committed in the place of an honest contribution: the same update, with leaves that are made up."""
        by_samples = isinstance(self.services.manifest.strategy, Sync)
        leaves = planted(honest.leaves, self._nonce(run.round_index), self._place(run.round_index), by_samples=by_samples)
        if leaves is honest.leaves:
            return honest
        self._sent[run.round_index] = run
        self._sent.pop(run.round_index - KEPT_ROUNDS, None)
        log.info("planted", round=run.round_index, leaves=len(leaves))
        return replace(honest, leaves=leaves)

    async def work(self) -> None:
        """Look for auditors who let one pass, for ever."""
        while True:
            await asyncio.sleep(POLL_S)
            try:
                await self._look()
            except (SwarmError, Rejected) as error:
                log.info("ledger_not_read", error=str(error))

    async def _look(self) -> None:
        client = await self.client()
        if self._read < 0:
            self._read = (await client.checkpoint())[0].size
        async for raw in client.entries(self._read):
            self._read += 1
            entry = parse_entry(raw)
            if entry.WhichOneof("body") == "audited":
                await self._judge(entry.audited)

    async def _judge(self, signed: Signed) -> None:
        """Prove it, where an auditor found nothing wrong with what we had made up."""
        finding = open_verdict(signed)
        run = self._sent.get(finding.round)
        if run is None or run.commit is None or finding.finding != PASSED or finding.commit_hash != payload_hash(run.commit):
            return
        leaves = self.services.transfer.store.get(parse(Commit, run.commit.payload).evidence_root)
        if leaves is None:
            return
        evidence = Evidence(
            kind=FALSE_PASS,
            commits=[AnnouncedCommit(commit=run.commit)],
            contents=[bytes(leaves)],
            verdict=signed,
            nonce=self._nonce(finding.round),
        )
        await self.auditor.prove(run, evidence)

    def _nonce(self, round_index: int) -> bytes:
        return hashlib.blake2b(round_index.to_bytes(8, "big"), digest_size=NONCE_BYTES, key=self.secret).digest()

    def _place(self, round_index: int) -> Place:
        return Place(self.services.checker.run_id, round_index, self.services.identity.peer_id)
