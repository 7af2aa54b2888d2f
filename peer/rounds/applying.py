"""What a proposal and its merged update make of the agreed state: the same for all who take part, catch up, repair or rebuild."""

from __future__ import annotations

from peer.outer import OuterState, Vector, advance
from peer.rounds.values import ProposalFacts
from peer.spikes import weighted_median
from swarm.manifest import Manifest


def tokens_of(run: Manifest, proposal: ProposalFacts) -> int:
    """Tokens behind a round's update."""
    return sum(item.weight for item in proposal.commits) * run.tokens_per_weight


def loss_of(proposal: ProposalFacts) -> float:
    """A round's loss in nats per token, as the proposal quotes it: the contributors' weighted median; 0 without any."""
    quoted = [(item.loss, item.weight) for item in proposal.contributors]
    return weighted_median(quoted) if quoted else 0.0


def applied(run: Manifest, state: OuterState, proposal: ProposalFacts, merged: Vector | None) -> OuterState:
    """The state after the round of `proposal`, whose merged update is `merged`, [parameters]; None where nobody contributed."""
    return advance(run.strategy, state, merged, tokens_of(run, proposal), loss_of(proposal))


def was_skipped(before: OuterState, after: OuterState) -> bool:
    """Whether the round between two states was a spike, which changed nothing."""
    return after.recent.skipped > before.recent.skipped
