"""The figures that change while somebody looks, as the texts that stand in the page: the same at first and by events."""

from __future__ import annotations

from coordinator.journal import Journal
from coordinator.web.words import quantity, utc
from swarm.history import History

NONE_YET = "none yet"


def live(journal: Journal) -> dict[str, str]:
    """By the names that elements have in `data-live`."""
    ledger, run_id = journal.credits, journal.run_id
    if run_id not in ledger.run_ids:
        return {}
    agreed = ledger.agreed_evaluations(run_id)
    progress, history, audits = ledger.progress(run_id), ledger.history(run_id), ledger.audit_totals(run_id)
    return {
        "round": f"{progress.confirmed_round:,}" if progress.state_root else NONE_YET,
        "loss": f"{progress.loss:.4f}" if progress.state_root else NONE_YET,
        "held-out": f"{agreed[-1].loss:.4f}" if agreed else NONE_YET,
        "tokens": f"{progress.tokens:,}",
        "tokens-short": quantity(progress.tokens),
        "peers": f"{len(journal.presence):,}",
        "accounts": f"{ledger.account_count(run_id):,}",
        "entries": f"{len(journal.tree):,}",
        "state": journal.orders.state,
        "confirmed-at": confirmed_at(history),
        "audits": f"{audits.done:,}",
        "suspended": f"{len(ledger.suspended(run_id)):,}",
    }


def confirmed_at(history: History) -> str:
    """When the newest round was confirmed."""
    return utc(history.points[-1].at_us) if history.points else NONE_YET
