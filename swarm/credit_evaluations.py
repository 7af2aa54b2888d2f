"""The part of the fold over the ledger that draws evaluators, takes their statements, and keeps what they agree on."""

from __future__ import annotations

from swarm.credit_audits import check_suspended
from swarm.credit_records import RoundRecord, RunRecord
from swarm.entries import Confirmation, Measurement
from swarm.errors import Rejected
from swarm.evaluations import OPEN_PANELS, Agreed, Panel, Said, draw_evaluators, thinned


def draw_panel(run: RunRecord, confirmation: Confirmation, current: RoundRecord, at_us: int) -> None:
    """Draw who measures the state after a round, if it is one that is evaluated, of those who worked in it."""
    settings, number = run.manifest.evaluation, confirmation.round
    if settings is None or not run.manifest.is_evaluated(number):
        return
    commits = current.proposals[confirmation.proposal_hash].nomination.commits
    working = [peer for peer, item in commits.items() if item.weight and _is_trusted(run, peer)]
    accounts = {peer: run.members[peer].tally.account for peer in working}
    evaluators = draw_evaluators(confirmation.beacon, number, accounts, settings.evaluators)
    if not evaluators:
        return
    run.evaluations.open[number] = Panel(number, confirmation.state_root, evaluators, current.place, at_us)
    while len(run.evaluations.open) > OPEN_PANELS:
        _close(run, min(run.evaluations.open))


def _is_trusted(run: RunRecord, peer_id: str) -> bool:
    return peer_id not in run.suspended and not run.members[peer_id].revoked


def judge_measurement(run: RunRecord, measured: Measurement) -> None:
    """Whether the statement may be taken. Raises `Rejected`."""
    check_suspended(run, measured.peer_id)
    panel, settings = run.evaluations.open.get(measured.round), run.manifest.evaluation
    if panel is None or settings is None:
        raise Rejected("no_evaluation", f"round {measured.round}", measured.peer_id)
    if measured.peer_id not in panel.evaluators:
        raise Rejected("not_an_evaluator", f"round {measured.round}", measured.peer_id)
    if measured.peer_id in panel.statements:
        raise Rejected("already_evaluated", f"round {measured.round}", measured.peer_id)
    if measured.state_root != panel.state_root:
        raise Rejected("wrong_state", f"round {measured.round}", measured.peer_id)
    if measured.samples != run.manifest.evaluation_samples:
        raise Rejected("malformed", f"{measured.samples} samples, not {run.manifest.evaluation_samples}", measured.peer_id)
    if len(measured.texts) not in (0, len(settings.prompts)):
        raise Rejected("malformed", f"{len(measured.texts)} texts for {len(settings.prompts)} prompts", measured.peer_id)


def take_measurement(run: RunRecord, measured: Measurement, entry: int) -> None:
    """Note what an evaluator has stated, as this entry of the ledger."""
    panel = run.evaluations.open[measured.round]
    panel.statements[measured.peer_id] = Said(measured.loss, measured.texts, entry)


def agreed_on(run: RunRecord, panel: Panel) -> Agreed | None:
    """What a panel agrees on."""
    settings = run.manifest.evaluation
    found = None if settings is None else panel.agreement(settings.quorum, settings.tolerance)
    if found is None:
        return None
    return Agreed(panel.round, panel.place, panel.at_us, found.loss, len(found.by), len(panel.statements))


def all_agreed(run: RunRecord) -> list[Agreed]:
    """Everything that was agreed on, as far as it is remembered, in the order of the rounds."""
    found = (agreed_on(run, panel) for panel in run.evaluations.open.values())
    return sorted([*run.evaluations.agreed, *(each for each in found if each is not None)])


def is_disputed(run: RunRecord, panel: Panel) -> bool:
    """Whether all have spoken, and don't agree."""
    return panel.is_complete and agreed_on(run, panel) is None


def _close(run: RunRecord, number: int) -> None:
    """Take no more statements about a round."""
    evaluations = run.evaluations
    panel = evaluations.open.pop(number)
    agreed = agreed_on(run, panel)
    if agreed is not None:
        evaluations.agreed = thinned(sorted([*evaluations.agreed, agreed]))
    elif panel.is_complete:
        evaluations.disputed += 1
    else:
        evaluations.lapsed += 1
