"""When participants of a round hold different states though each has merged what it was given: who told them different things."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import structlog

from peer.frauds import EQUIVOCATION
from peer.network.node import PeerFailure
from peer.rounds.agreement import Agreement, strongest
from peer.rounds.auditor import Auditor
from peer.rounds.inbox import Inbox
from peer.rounds.run import RoundRun, Services
from peer.rounds.values import ProposalFacts
from swarm.errors import Rejected
from swarm.rpc.v1.peer_pb2 import SyncRequest
from swarm.rpc.v1.signed_pb2 import Evidence

MOST_SPANS = 64

log = structlog.get_logger(__name__)


@dataclass
class Disputes:
    """Counts what participants hold after a round, and compares merges with those who hold something else."""

    services: Services
    auditor: Auditor
    inbox: Inbox
    _compared: set[tuple[int, str]] = field(default_factory=set)

    def agreement(self, run: RoundRun, proposal: ProposalFacts, mine: bytes) -> Agreement:
        """What the participants of a round hold. Who is proven to have lied has no vote.

        Where one of them is and the rest is split, the honest take the strongest root: they were told different things.
        """
        voters = [item.peer for item in proposal.commits if item.peer not in self.auditor.docket.barred]
        found = self.inbox.agreement(run.round_index, voters, mine)
        if found.verdict != "split" or len(voters) == len(proposal.commits):
            return found
        root, holders = strongest({peer: result.root for peer, result in self.inbox.results(run.round_index).items()}, voters)
        return Agreement("agreed" if root == mine else "differs", root, holders)

    def to_compare(self, run: RoundRun, proposal: ProposalFacts, mine: bytes) -> list[str]:
        """Participants that hold another root and haven't been asked for their merges: each is in turn once in a round."""
        others = {(run.round_index, peer) for peer in self.inbox.others_than(mine, run.round_index, proposal)} - self._compared
        self._compared = {item for item in self._compared if item[0] == run.round_index} | others
        return sorted(peer for _, peer in others)

    async def is_contradicted(self, run: RoundRun, proposal: ProposalFacts, peers: Iterable[str]) -> bool:
        """Whether a reducer signed another merge of its span for one of these peers than for us; the roster hears of it then."""
        for peer in peers:
            token = self.services.admissions.token(self.services.identity.peer_id)
            request = SyncRequest(run_id=run.setup.run_id, admission=token, proposal_hash=proposal.proposal_hash)
            try:
                reply = await self.services.post.sync(peer, request)
                theirs = [self.services.checker.span(signed)[1] for signed in reply.spans[:MOST_SPANS]]
            except (PeerFailure, Rejected) as error:
                log.info("not_compared", round=run.round_index, peer=peer, reason=error.reason)
                continue
            for span in theirs:
                ours = run.state.spans.get(span.reducer)
                if ours is None or ours.signed is None or ours.part_hashes == span.part_hashes:
                    continue
                if await self.auditor.prove(run, Evidence(kind=EQUIVOCATION, statements=[ours.signed, span.signed])):
                    return True
        return False
