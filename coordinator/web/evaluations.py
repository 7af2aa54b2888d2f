"""What the page says about held-out losses: who told which, what a quorum agrees on, and what the model wrote.

Texts are strangers': bounded and without control characters by the ledger's rules, and escaped by the templates.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from swarm.credits import CreditState
from swarm.evaluations import Agreed, Panel, best_of, perplexity, spoken_texts
from swarm.manifest import Evaluation


class Statement(NamedTuple):
    """An evaluator, the loss that it told in which entry, and whether it is near what was agreed on."""

    peer_id: str
    loss: float
    entry: int
    agrees: bool


class Round(NamedTuple):
    """An evaluated round: `loss` is what was agreed on; None without an agreement."""

    round: int
    loss: float | None
    perplexity: float | None
    evaluators: int
    statements: list[Statement]


class Written(NamedTuple):
    """What the model wrote after which prompts, with the weights of which round, as so many evaluators have it alike."""

    round: int
    by: int
    texts: list[tuple[str, str]]


class Shown(NamedTuple):
    """The newest evaluated rounds first, the best one, and texts."""

    settings: Evaluation
    samples: int
    rounds: list[Round]
    best: Agreed | None
    written: Written | None


def shown(ledger: CreditState, run_id: bytes) -> Shown | None:
    """What there is to show; None where the run isn't evaluated."""
    manifest = ledger.manifest(run_id)
    settings = manifest.evaluation
    if settings is None:
        return None
    panels = ledger.panels(run_id)[::-1]
    written = next(filter(None, (_written(panel, settings) for panel in panels)), None)
    best = best_of(ledger.agreed_evaluations(run_id))
    return Shown(settings, manifest.evaluation_samples, [_round(panel, settings) for panel in panels], best, written)


def as_json(ledger: CreditState, run_id: bytes) -> dict[str, Any]:
    """The same and all that was agreed on, for programs; `settings` is null where the run isn't evaluated."""
    view = shown(ledger, run_id)
    if view is None:
        return {"settings": None, "samples": 0, "agreed": [], "best": None, "rounds": [], "disputed": 0, "written": None}
    return {
        "settings": view.settings.model_dump(mode="json"),
        "samples": view.samples,
        "agreed": [_agreed(each) for each in ledger.agreed_evaluations(run_id)],
        "best": None if view.best is None else _agreed(view.best),
        "rounds": [{**each._asdict(), "statements": [said._asdict() for said in each.statements]} for each in view.rounds],
        "disputed": ledger.disputed_evaluations(run_id),
        "written": None if view.written is None else view.written._asdict(),
    }


def _agreed(agreed: Agreed) -> dict[str, Any]:
    counts = {"evaluators": agreed.evaluators, "statements": agreed.statements}
    return {"round": agreed.round, "loss": agreed.loss, "perplexity": perplexity(agreed.loss), **counts}


def _round(panel: Panel, settings: Evaluation) -> Round:
    found = panel.agreement(settings.quorum, settings.tolerance)
    near = found.by if found is not None else ()
    statements = [Statement(peer, said.loss, said.entry, peer in near) for peer, said in panel.statements.items()]
    loss = None if found is None else found.loss
    return Round(panel.round, loss, None if loss is None else perplexity(loss), len(panel.evaluators), statements)


def _written(panel: Panel, settings: Evaluation) -> Written | None:
    """The texts of those who agree on the loss, if they have told any."""
    found = panel.agreement(settings.quorum, settings.tolerance)
    texts, by = spoken_texts(panel, found.by) if found is not None else ((), 0)
    return Written(panel.round, by, list(zip(settings.prompts, texts, strict=True))) if texts else None
