"""Keeping finished rounds in a peer's history, beside the rounds that go on."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

import structlog

from peer.history import Keeper, Record
from peer.rounds.run import RoundRun, Services
from peer.rounds.values import ProposalFacts
from peer.state import Snapshot
from swarm.errors import DiskFull, Rejected
from swarm.rpc.v1.signed_pb2 import SealReply

MOST_WAITING = 2  # parts of older rounds are dropped

log = structlog.get_logger(__name__)


@dataclass
class Keeping:
    """Hands finished rounds to a keeper in order, without holding up the next; one that can't be kept is a gap."""

    services: Services
    keeper: Keeper
    on_gap: Callable[[], None] = lambda: None
    _waiting: int = 0
    _turn: asyncio.Lock = field(default_factory=asyncio.Lock)

    def keep(self, run: RoundRun, proposal: ProposalFacts, before: Snapshot | None, after: Snapshot) -> None:
        """Keep a round that has been applied."""
        if self._waiting >= MOST_WAITING:
            self._note_gap(run.round_index, "the disk is too slow")
            return
        self._waiting += 1
        self.services.post.spawn(self._keep(run, proposal, before, after))

    async def _keep(self, run: RoundRun, proposal: ProposalFacts, before: Snapshot | None, after: Snapshot) -> None:
        try:
            async with self._turn:
                await asyncio.to_thread(self._write, run, proposal, before, after)
        except (DiskFull, OSError, Rejected) as error:
            self._note_gap(run.round_index, str(error))
        finally:
            self._waiting -= 1

    def _write(self, run: RoundRun, proposal: ProposalFacts, before: Snapshot | None, after: Snapshot) -> None:
        self.keeper.keep(self._record(run, proposal, after), run.setup.base_root, before, after)

    def _record(self, run: RoundRun, proposal: ProposalFacts, after: Snapshot) -> Record:
        """What the round consisted of. Raises `Rejected` where a part is gone already."""
        state, wanted = run.state, {item.peer for item in proposal.contributors}
        all_gather = run.setup.all_gather
        commits = {peer: commit for peer, commit in state.commits.items() if all_gather and peer in wanted}
        spans = [] if all_gather else [state.spans[item.peer] for item in proposal.reducers]
        parts: dict[bytes, bytes | memoryview] = {}
        for part, name, peer in run.exchange.parts.needed(proposal, commits, spans):
            content = self.services.transfer.store.get(name)
            if content is None:
                raise Rejected("lost_blob", f"part {part}", peer)
            parts[name] = content
        made = SealReply(
            accepted=proposal.signed,
            commits=[commit.signed for commit in commits.values()],
            spans=[span.signed for span in spans],
        )
        return Record(run.round_index, after.root, made, parts)

    def _note_gap(self, round_index: int, why: str) -> None:
        log.warning("round_not_kept", round=round_index, reason=why)
        self.on_gap()
