"""What is read only when somebody asks for metrics: backlog, calls in progress, the writer's role, open audits, suspensions."""

from __future__ import annotations

from coordinator.guard import Guard
from coordinator.journal import Journal
from coordinator.metrics import CallMetrics, Metrics


def watch_calls(metrics: CallMetrics, guard: Guard) -> None:
    """Let the gauges of calls read from the guard, on the event loop that owns it."""
    metrics.calls_in_progress.set_function(lambda: guard.calls_in_progress)


def watch(metrics: Metrics, journal: Journal) -> None:
    """Let the gauges of a run read from its journal, on the event loop that owns it."""
    metrics.queue_events.set_function(lambda: journal.waiting)
    metrics.writer.set_function(lambda: journal.is_writer)
    metrics.audit_ratio.set_function(lambda: journal.audit_rate)
    metrics.audits_open.set_function(lambda: journal.open_audits[0])
    metrics.audits_overdue.set_function(lambda: journal.open_audits[1])
    metrics.suspended_keys.labels("operator").set_function(lambda: len(journal.orders.suspended))
    metrics.suspended_keys.labels("audits").set_function(lambda: journal.suspended_by_audits)
