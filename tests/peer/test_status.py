"""What a peer says about itself: reason codes, totals, the history file."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry
from structlog.testing import capture_logs

from peer.metrics import PeerMetrics
from peer.network.traffic import Volume
from peer.rounds.engine import RoundReport
from peer.rounds.values import BallotNumber, IncludedCommit, ProposalFacts
from peer.routing import ExpertLoad
from peer.status import REASONS, TELL_EVERY_S, Status
from swarm.clock import ManualClock
from swarm.control import history
from tests.runs import REPOSITORY
from tests.world import World, identity

PEER = identity(1)


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


@pytest.fixture
def status(registry: CollectorRegistry, tmp_path: Path) -> Status:
    return Status(PeerMetrics(registry), history=tmp_path / "history.jsonl")


def finished(number: int, weight: int = 4, others: int = 12) -> RoundReport:
    """A round in which we gave `weight` samples and the others the rest, with 64 tokens each."""
    world = World()
    commit = world.commit(PEER, number)
    proposal = world.proposal(PEER, number, [commit])
    included = tuple(IncludedCommit(str(index), b"", samples, 0, 0) for index, samples in enumerate((weight, others)) if samples)
    facts = ProposalFacts(b"h" * 32, BallotNumber(0, 0), PEER.peer_id, b"b" * 32, included, (), False, proposal)
    tokens = 64 * (weight + others)
    return RoundReport(number, facts, commit, None, b"\x0a" * 32, weight, tokens, tokens * number, 2.5, 2.0, 0.5, 2)


def test_one_reason_at_a_time(status: Status, registry: CollectorRegistry) -> None:
    """Every reason has an explanation and a series, and exactly one of them is 1."""
    for reason in REASONS:
        status.state(reason)
        values = {name: registry.get_sample_value("swarm_peer_state", {"state": name}) for name in REASONS}
        assert [name for name, value in values.items() if value] == [reason]
        assert status.as_dict()["explanation"] == REASONS[reason]


def test_skipped_rounds_are_counted(status: Status, registry: CollectorRegistry) -> None:
    """In status, metrics and history; the round itself counts as any other, and a pause doesn't lose the count."""
    status.round_done(finished(1))
    status.round_done(replace(finished(2), skipped=True))
    assert registry.get_sample_value("swarm_peer_rounds_skipped_total") == 1
    assert (status.as_dict()["rounds_skipped"], status.as_dict()["rounds"]) == (1, 2)
    assert [line.get("skipped") for line in history(status.history.parent)] == [None, True]  # type: ignore[union-attr]
    later = Status(PeerMetrics(CollectorRegistry()))
    later.carry_on(status.as_dict())
    assert later.rounds_skipped == 1


def test_who_waits_needs_no_torch() -> None:
    """A paused peer's program has metrics and status, and none of what training takes of the memory."""
    look = "import sys, peer.held; print(sorted({'torch', 'transformers', 'hivemind'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", look], capture_output=True, text=True, check=True, cwd=REPOSITORY)
    assert done.stdout.strip() == "[]"


def test_trust_is_counted(status: Status, registry: CollectorRegistry) -> None:
    """Merged and clipped parts with their weight, checks of merges, proofs and audits; all series are there from the start."""
    counted = registry.get_sample_value
    assert counted("swarm_peer_audits_total", {"finding": "failed"}) == 0
    assert counted("swarm_peer_proofs_total", {"kind": "equivocation"}) == 0
    status.merged([4, 8], [1.0, 0.25])
    status.merge_checked("wrong")
    status.proven("wrong_merge")
    status.audited("failed")
    names = ("merged_parts", "clipped_parts", "merged_weight_samples", "clipped_weight_samples")
    assert [counted(f"swarm_peer_{name}_total") for name in names] == [2, 1, 12, 6]
    assert counted("swarm_peer_merge_checks_total", {"outcome": "wrong"}) == 1
    assert counted("swarm_peer_proofs_total", {"kind": "wrong_merge"}) == 1
    assert counted("swarm_peer_audits_total", {"finding": "failed"}) == 1


def test_rounds_add_up(status: Status, registry: CollectorRegistry) -> None:
    """Own tokens are a share of the round's by weight; followed rounds count apart and give no tokens."""
    status.round_done(finished(1))
    status.round_done(finished(2, weight=0))
    shown = status.as_dict()
    assert (shown["rounds"], shown["rounds_followed"], shown["round"]) == (1, 1, 2)
    assert (shown["tokens"], shown["tokens_total"]) == (256, 64 * 12 * 2)
    assert shown["tokens_per_s"] == 64 * 12 / 2.0
    assert shown["loss"] == 2.5
    assert registry.get_sample_value("swarm_peer_tokens_total") == 256
    assert registry.get_sample_value("swarm_peer_rounds_total", {"outcome": "followed"}) == 1
    assert json.loads(json.dumps(shown)) == shown


def test_the_history_tells_each_rounds_traffic(status: Status, tmp_path: Path) -> None:
    """Bytes of both directions, framing included, stand beside the round's other figures."""
    status.round_done(finished(1), Volume(1000, 3000))
    assert [(line["bytes_sent"], line["bytes_received"]) for line in history(tmp_path)] == [(1000, 3000)]


def test_the_load_of_experts_is_shown(status: Status, registry: CollectorRegistry) -> None:
    """Two series for the busiest and the idlest, however many experts there are; none, and nothing to tell, for other models."""
    shown = registry.get_sample_value
    assert status.as_dict()["experts"] is None
    assert shown("swarm_peer_expert_load_ratio", {"expert": "busiest"}) is None
    status.routed(ExpertLoad.of([[6.0, 2.0, 0.0, 0.0], [2.0, 2.0, 1.0, 3.0]]))
    status.routed(None)
    assert status.as_dict()["experts"] == {"busiest": 3.0, "idlest": 0.0, "unused": 2, "experts": 8}
    assert shown("swarm_peer_expert_load_ratio", {"expert": "busiest"}) == 3.0
    assert shown("swarm_peer_expert_load_ratio", {"expert": "idlest"}) == 0.0
    assert shown("swarm_peer_experts_unused") == 2


def test_an_empty_round_changes_no_loss(status: Status) -> None:
    """A round that nobody trained in (the first) leaves loss and overhead alone."""
    status.round_done(finished(0, weight=0, others=0))
    assert status.as_dict()["loss"] is None
    assert status.as_dict()["round_overhead_s"] == []


def test_the_history_has_a_line_per_round(status: Status, tmp_path: Path) -> None:
    """Each finished round is a line of JSON with its root, across restarts."""
    for number in range(3):
        status.round_done(finished(number))
    Status(PeerMetrics(CollectorRegistry()), history=tmp_path / "history.jsonl").round_done(finished(3))
    lines = history(tmp_path)
    assert [line["round"] for line in lines] == [0, 1, 2, 3]
    assert {line["root"] for line in lines} == {"0a" * 32}


def test_a_history_that_can_not_be_written_costs_nothing_else(status: Status, tmp_path: Path) -> None:
    """With a full disk the totals go on."""
    broken = replace(status, history=tmp_path)
    broken.round_done(finished(1))
    assert broken.as_dict()["rounds"] == 1


def test_rejections_are_counted_by_reason(status: Status, registry: CollectorRegistry) -> None:
    """Every rejected message counts under its reason."""
    for reason in ("stale", "stale", "bad_signature"):
        status.refused(PEER.peer_id, reason)
    assert registry.get_sample_value("swarm_peer_rejected_messages_total", {"reason": "stale"}) == 2
    assert registry.get_sample_value("swarm_peer_rejected_messages_total", {"reason": "bad_signature"}) == 1


def test_nobody_fills_the_log_with_refusals(registry: CollectorRegistry) -> None:
    """The same sender and reason are logged again only after a while, others at once; all of them are counted."""
    clock = ManualClock()
    status = Status(PeerMetrics(registry), clock=clock)
    with capture_logs() as logs:
        for _ in range(3):
            status.refused("mallory", "malformed")
        status.refused("mallory", "bad_signature")
        status.refused("trudy", "malformed")
        clock.advance(TELL_EVERY_S)
        status.refused("mallory", "malformed")
    told = [(line["sender"], line["reason"]) for line in logs]
    assert told == [("mallory", "malformed"), ("mallory", "bad_signature"), ("trudy", "malformed"), ("mallory", "malformed")]
    assert registry.get_sample_value("swarm_peer_rejected_messages_total", {"reason": "malformed"}) == 5
