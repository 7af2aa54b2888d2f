"""Prometheus metrics of the coordinator, in a registry that is passed in. Base units; names per the Prometheus conventions."""

from __future__ import annotations

from collections.abc import Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector

from swarm import __version__
from swarm.audits import FINDINGS
from swarm.evaluations import Agreed, best_of

PREFIX = "swarm_coordinator_"
DURATION_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)


class CallMetrics:
    """What is measured of calls, and of the process."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.rejected_messages_total = Counter(
            PREFIX + "rejected_messages_total", "Messages that broke a rule.", ["reason"], registry=registry
        )
        self.calls_total = Counter(PREFIX + "calls_total", "Calls by gRPC status.", ["method", "code"], registry=registry)
        self.calls_in_progress = Gauge(PREFIX + "calls_in_progress", "Calls that are being answered.", registry=registry)
        self.request_duration_seconds = Histogram(
            PREFIX + "request_duration_seconds",
            "Time to answer a call.",
            ["method"],
            buckets=DURATION_BUCKETS_S,
            registry=registry,
        )
        build = Gauge(PREFIX + "build_info", "Always 1; the version is a label.", ["version"], registry=registry)
        build.labels(__version__).set(1)
        ProcessCollector(registry=registry)


class Metrics:
    """Every metric that the coordinator exposes of a run; those of calls are shared where it serves several."""

    def __init__(self, registry: CollectorRegistry, calls: CallMetrics | None = None) -> None:
        self.registry = registry
        self.calls = calls or CallMetrics(registry)
        self.reports_total = Counter(PREFIX + "reports_total", "Reports by outcome.", ["outcome"], registry=registry)
        self.admissions_total = Counter(PREFIX + "admissions_total", "Announcements by outcome.", ["outcome"], registry=registry)
        self.announcements_total = Counter(
            PREFIX + "announcements_total",
            "Announcements that were accepted, by the version of the protocol that is used with the peer.",
            ["protocol"],
            registry=registry,
        )
        self.grants_total = Counter(PREFIX + "grants_total", "Requests for a grant by outcome.", ["outcome"], registry=registry)
        self.commit_failures_total = Counter(
            PREFIX + "commit_failures_total", "Groups of entries that the store didn't take.", registry=registry
        )
        self.tokens_verified_total = Counter(
            PREFIX + "tokens_verified_total", "Training tokens that became verified.", registry=registry
        )
        self.flops_verified_total = Counter(
            PREFIX + "flops_verified_total", "Training FLOPs that became verified.", registry=registry
        )
        self.audits_total = Counter(
            PREFIX + "audits_total",
            "What auditors found, and findings that were refused, by outcome.",
            ["outcome"],
            registry=registry,
        )
        for finding in FINDINGS:
            self.audits_total.labels(finding)
        self.audits_drawn_total = Counter(
            PREFIX + "audits_drawn_total", "Contributions that were drawn for an audit.", registry=registry
        )
        self.audits_open = Gauge(PREFIX + "audits_open", "Contributions whose audit isn't decided.", registry=registry)
        self.audits_overdue = Gauge(
            PREFIX + "audits_overdue", "Of these, those whose first auditor was given up waiting for.", registry=registry
        )
        self.audit_ratio = Gauge(
            PREFIX + "audit_ratio", "Share of the contributions that is audited now; 0 = the run isn't.", registry=registry
        )
        self.suspended_keys = Gauge(
            PREFIX + "suspended_keys", "Keys suspended by audits, and by the operator.", ["by"], registry=registry
        )
        self.evaluations_total = Counter(
            PREFIX + "evaluations_total", "Held-out losses that peers told, by outcome.", ["outcome"], registry=registry
        )
        self.evaluations_total.labels("accepted")
        self.evaluations_disputed_total = Counter(
            PREFIX + "evaluations_disputed_total",
            "Rounds whose evaluators have all told a loss, and differ.",
            registry=registry,
        )
        self.evaluation_loss_nats = Gauge(
            PREFIX + "evaluation_loss_nats", "Held-out loss on which a quorum last agreed, per token.", registry=registry
        )
        self.best_evaluation_loss_nats = Gauge(
            PREFIX + "best_evaluation_loss_nats", "Lowest held-out loss on which a quorum agreed, per token.", registry=registry
        )
        self.evaluated_round = Gauge(
            PREFIX + "evaluated_round", "Newest round on whose held-out loss a quorum agreed.", registry=registry
        )
        self.queue_events = Gauge(PREFIX + "queue_events", "Events that wait for the ledger.", registry=registry)
        self.writer = Gauge(PREFIX + "writer", "Whether this replica writes the ledger: 1 or 0.", registry=registry)
        self.ledger_entries = Gauge(PREFIX + "ledger_entries", "Entries in the ledger.", registry=registry)
        self.peers_alive = Gauge(PREFIX + "peers_alive", "Peers heard from within the time to live.", registry=registry)
        self.confirmed_round = Gauge(PREFIX + "confirmed_round", "Newest confirmed round.", registry=registry)
        self.train_loss_nats = Gauge(
            PREFIX + "train_loss_nats", "Mean training loss of the newest confirmed round.", registry=registry
        )
        self.commit_duration_seconds = Histogram(
            PREFIX + "commit_duration_seconds",
            "Time to make a group of entries durable.",
            buckets=DURATION_BUCKETS_S,
            registry=registry,
        )
        self._tokens = 0

    def evaluated(self, agreed: Sequence[Agreed]) -> None:
        """Show the newest and the best held-out loss on which a quorum agrees."""
        best = best_of(agreed)
        if best is not None:
            self.evaluation_loss_nats.set(agreed[-1].loss)
            self.evaluated_round.set(agreed[-1].round)
            self.best_evaluation_loss_nats.set(best.loss)

    def tokens_verified(self, tokens: int, flops_per_token: int) -> None:
        """Bring the counters of verified work up to the ledger's total."""
        if tokens > self._tokens:
            self.tokens_verified_total.inc(tokens - self._tokens)
            self.flops_verified_total.inc((tokens - self._tokens) * flops_per_token)
            self._tokens = tokens
