"""Whether what others propose and publish keeps the rules of the round, as far as one peer can tell."""

from __future__ import annotations

from peer.rounds.planning import spans_of
from peer.rounds.state import RoundState
from peer.rounds.values import IncludedCommit, ProposalFacts, SpanFacts

TERMS_AHEAD = 1024


def problem_of(state: RoundState, proposal: ProposalFacts) -> str:
    """Why a proposal breaks the rules; empty if it doesn't."""
    setup = state.setup
    names = [commit.peer for commit in proposal.commits]
    members = [member.peer for member in proposal.next_roster]
    known = [(state.commits[item.peer], item) for item in proposal.commits if knows(state, item)]
    checks = (
        ("wrong_leader", proposal.leader == setup.leader(proposal.ballot.term)),
        ("bad_ballot", proposal.ballot.term <= state.term + TERMS_AHEAD),
        ("wrong_base", proposal.base_root == setup.base_root),
        ("unsorted", names == sorted(set(names)) and members == sorted(set(members))),
        ("not_in_roster", set(names) <= set(setup.peers)),
        ("no_quorum", bool(names) and (len(names) >= setup.quorum or proposal.grant)),
        ("roster_too_large", 0 < len(members) <= setup.max_peers),
        ("wrong_commit", all(facts.weight == item.weight for facts, item in known)),
        ("wrong_loss", not misquotes(state, proposal)),
        ("over_quota", not any(setup.is_too_heavy(item.peer, item.weight) for item in proposal.commits)),
        ("wrong_spans", _spans_are_right(state, proposal)),
    )
    return next((reason for reason, fine in checks if not fine), "")


def knows(state: RoundState, item: IncludedCommit) -> bool:
    """Whether we have the very commit that a proposal names. A peer that signs two gets in with the one that is proposed."""
    known = state.commits.get(item.peer)
    return known is not None and known.commit_hash == item.commit_hash


def misquotes(state: RoundState, proposal: ProposalFacts) -> bool:
    """Whether a proposal names another loss than a commit that we have, where losses decide."""
    quoted = ((state.commits[item.peer].loss, item.loss) for item in proposal.commits if knows(state, item))
    return state.setup.quotes_losses and any(said != told for said, told in quoted)


def _spans_are_right(state: RoundState, proposal: ProposalFacts) -> bool:
    """The contributors' spans cover all parts once, in order; and they are the planned ones, as far as we can recompute them."""
    setup, contributors = state.setup, proposal.contributors
    table = {item.peer: (item.first_part, item.part_span) for item in proposal.reducers}
    if not contributors or setup.all_gather:
        return not table
    if not all(knows(state, item) for item in contributors):
        ends = [0]
        for first, span in table.values():
            ends.append(first + span if first == ends[-1] else -1)
        return ends[-1] == setup.part_count and -1 not in ends and set(table) <= {item.peer for item in contributors}
    uploads = {item.peer: state.commits[item.peer].upload_bytes_per_s for item in contributors}
    return table == {peer: span for peer, span in spans_of(setup.part_count, uploads).items() if span[1]}


def fits(proposal: ProposalFacts, span: SpanFacts) -> bool:
    """Whether a merged span is of this proposal, by the reducer of just these parts."""
    place = proposal.included(span.reducer)
    return (
        span.proposal_hash == proposal.proposal_hash
        and place is not None
        and place.part_span > 0
        and (place.first_part, place.part_span) == (span.first_part, len(span.part_hashes))
    )


def unknown_commits(state: RoundState, proposal: ProposalFacts) -> list[str]:
    """The contributors whose commit hasn't come."""
    return [item.peer for item in proposal.contributors if not knows(state, item)]
