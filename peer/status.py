"""What a peer is doing, and why it isn't training: one list of reason codes, for status, log, metrics and dashboard."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import structlog

from peer.frauds import FRAUDS
from peer.metrics import PeerMetrics
from peer.network.traffic import Volume
from peer.routing import ExpertLoad
from swarm import __version__
from swarm.audits import FAILED, PASSED, UNABLE, WITHHELD
from swarm.clock import Clock, SystemClock
from swarm.reasons import EXPLANATIONS as REASONS
from swarm.reasons import TABLE

if TYPE_CHECKING:
    from peer.rounds.engine import RoundReport

CHECKED = ("right", "wrong", "unable")
MEASURED = ("measured", "unable")
FOUND = (PASSED, FAILED, WITHHELD, UNABLE)
EXPECTED = frozenset({"stale", "too_early", "starting"})
TELL_EVERY_S, MAX_TOLD = 10.0, 1024

NOTHING = Volume()

log = structlog.get_logger(__name__)


@dataclass
class Status:
    """The peer's present state and totals; also the rounds' observer."""

    metrics: PeerMetrics
    reason: str = "starting"
    detail: str = ""
    error: str = ""
    warning: str = ""
    round_index: int = 0
    roster_size: int = 0
    loss: float | None = None
    tokens: int = 0
    samples: int = 0
    rounds_contributed: int = 0
    rounds_followed: int = 0
    rounds_skipped: int = 0
    tokens_per_s: float = 0.0
    overhead_s: list[float] = field(default_factory=list)
    first_loss: float | None = None
    root: str = ""
    experts: ExpertLoad | None = None
    tokens_total: int = 0
    history: Path | None = None
    clock: Clock = SystemClock()
    _told_s: dict[tuple[str, str], float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.metrics.build.labels(version=__version__).set(1)
        for reason in REASONS:
            self.metrics.state.labels(state=reason).set(0)
        for outcome in ("contributed", "followed", "missed"):
            self.metrics.rounds.labels(outcome=outcome)
        for outcome in ("accepted", "refused", "superseded"):
            self.metrics.reports.labels(outcome=outcome)
        for outcome in CHECKED:
            self.metrics.merge_checks.labels(outcome=outcome)
        for kind in FRAUDS:
            self.metrics.proofs.labels(kind=kind)
        for finding in FOUND:
            self.metrics.audits.labels(finding=finding)
        for outcome in MEASURED:
            self.metrics.evaluations.labels(outcome=outcome)
        self.state(self.reason)

    def state(self, reason: str, detail: str = "") -> None:
        """Change the reason code; `detail` says more about this case."""
        self.metrics.state.labels(state=self.reason).set(0)
        self.metrics.state.labels(state=reason).set(1)
        if reason != self.reason:
            log.info("state", reason=reason, round=self.round_index, **({"detail": detail} if detail else {}))
        self.reason, self.detail = reason, detail

    def carry_on(self, before: dict[str, Any]) -> None:
        """Go on counting from what `as_dict` gave before a pause."""
        self.tokens, self.samples = int(before.get("tokens", 0)), int(before.get("samples", 0))
        self.rounds_contributed, self.rounds_followed = int(before.get("rounds", 0)), int(before.get("rounds_followed", 0))
        self.loss, self.first_loss = before.get("loss"), before.get("loss_first")
        self.round_index, self.root = int(before.get("round", 0)), str(before.get("state_root", ""))
        self.overhead_s = list(before.get("round_overhead_s", ()))
        self.tokens_total, self.rounds_skipped = int(before.get("tokens_total", 0)), int(before.get("rounds_skipped", 0))

    def refused(self, sender: str, reason: str) -> None:
        """Count a message that broke a rule and name who sent it."""
        self.metrics.rejected.labels(reason=reason).inc()
        if reason not in EXPECTED and self._is_news(sender, reason):
            log.warning("message_rejected", sender=sender, reason=reason)

    def _is_news(self, sender: str, reason: str) -> bool:
        """Whether this wasn't logged a moment ago: nobody fills our disk with complaints about him."""
        now_s = self.clock.monotonic_s()
        if now_s < self._told_s.get((sender, reason), -TELL_EVERY_S) + TELL_EVERY_S:
            return False
        if len(self._told_s) >= MAX_TOLD:
            self._told_s.clear()
        self._told_s[sender, reason] = now_s
        return True

    def merged(self, weights: Sequence[int], scales: Sequence[float]) -> None:
        """A part of each contributor was merged by us, each scaled by a factor of at most 1."""
        self.metrics.merged_parts.inc(len(scales))
        self.metrics.clipped_parts.inc(sum(scale < 1 for scale in scales))
        self.metrics.merged_weight.inc(sum(weights))
        self.metrics.clipped_weight.inc(sum(weight * (1 - scale) for weight, scale in zip(weights, scales, strict=True)))

    def merge_checked(self, outcome: str) -> None:
        """Another's merged part was merged again, or couldn't be."""
        self.metrics.merge_checks.labels(outcome=outcome).inc()

    def proven(self, kind: str) -> None:
        """A proof of fraud holds."""
        self.metrics.proofs.labels(kind=kind).inc()

    def audited(self, finding: str) -> None:
        """We have audited a contribution."""
        self.metrics.audits.labels(finding=finding).inc()

    def routed(self, load: ExpertLoad | None) -> None:
        """A round's tokens were spread like this over the experts, if the model has any."""
        if load is None:
            return
        self.experts = load
        self.metrics.expert_load.labels(expert="busiest").set(load.busiest)
        self.metrics.expert_load.labels(expert="idlest").set(load.idlest)
        self.metrics.experts_unused.set(load.unused)

    def evaluated(self, outcome: str, loss: float | None = None) -> None:
        """We have measured a held-out loss, or couldn't."""
        self.metrics.evaluations.labels(outcome=outcome).inc()
        if loss is not None:
            self.metrics.validation_loss.set(loss)

    def phase(self, name: str, seconds: float) -> None:
        """A part of the round took this long."""
        self.metrics.phase.labels(phase=name).observe(seconds)

    def round_done(self, report: RoundReport, moved: Volume = NOTHING) -> None:
        """Take a finished round, and what was sent and received for it, into the totals."""
        sequence = report.tokens // max(1, sum(item.weight for item in report.proposal.commits))
        outcome = "contributed" if report.weight else "followed"
        self.metrics.rounds.labels(outcome=outcome).inc()
        self.round_index, self.roster_size, self.root = report.round_index, report.roster_size, report.root.hex()
        self.tokens_total = report.tokens_total
        self.metrics.round.set(report.round_index)
        self.metrics.roster_size.set(report.roster_size)
        self.metrics.round_duration.observe(report.wall_s)
        if report.weight:
            tokens = report.weight * sequence
            self.tokens, self.samples = self.tokens + tokens, self.samples + report.weight
            self.rounds_contributed += 1
            self.metrics.tokens.inc(tokens)
            self.metrics.samples.inc(report.weight)
        else:
            self.rounds_followed += 1
        if report.skipped:
            self.rounds_skipped += 1
            self.metrics.skipped.inc()
        if report.tokens:
            self.metrics.round_overhead.observe(report.overhead_s)
            self.overhead_s = [*self.overhead_s[-999:], report.overhead_s]
            self.tokens_per_s = report.tokens / report.wall_s
            self.loss = report.loss
            self.first_loss = report.loss if self.first_loss is None else self.first_loss
            self.metrics.train_loss.set(report.loss)
        line = {
            "round": report.round_index,
            "root": report.root.hex(),
            "roster_size": report.roster_size,
            "weight": report.weight,
            "tokens": report.tokens,
            "tokens_total": report.tokens_total,
            "loss": report.loss,
            "wall_s": report.wall_s,
            "overhead_s": report.overhead_s,
            "bytes_sent": moved.sent_bytes,
            "bytes_received": moved.received_bytes,
            **({"skipped": True} if report.skipped else {}),
        }
        self._remember(line)
        log.info(
            "round_committed",
            round=report.round_index,
            roster=report.roster_size,
            weight=report.weight,
            tokens=report.tokens,
            loss=round(report.loss, 4),
            wall_s=round(report.wall_s, 3),
            overhead_s=round(report.overhead_s, 3),
            bytes_sent=moved.sent_bytes,
            bytes_received=moved.received_bytes,
            root=report.root.hex()[:12],
        )

    def _remember(self, line: dict[str, Any]) -> None:
        """Append the round to the history file; a full disk costs the line, nothing else."""
        if self.history is None:
            return
        try:
            with self.history.open("a") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            log.warning("history_not_written", error=error.strerror)

    def as_dict(self) -> dict[str, Any]:
        """For `swarm status --json`."""
        return {
            "state": self.reason,
            "explanation": REASONS.get(self.reason, ""),
            "detail": self.detail,
            "earning": TABLE[self.reason].earning,
            "ends_by_itself": TABLE[self.reason].by_itself,
            "hint": TABLE[self.reason].hint,
            "error": self.error,
            "warning": self.warning,
            "round": self.round_index,
            "roster_size": self.roster_size,
            "loss": self.loss,
            "loss_first": self.first_loss,
            "tokens": self.tokens,
            "samples": self.samples,
            "tokens_total": self.tokens_total,
            "tokens_per_s": self.tokens_per_s,
            "rounds": self.rounds_contributed,
            "rounds_followed": self.rounds_followed,
            "rounds_skipped": self.rounds_skipped,
            "round_overhead_s": self.overhead_s[-200:],
            "state_root": self.root,
            "experts": None if self.experts is None else asdict(self.experts),
            "version": __version__,
        }
