"""Every attack of `swarm attack`, two of eight peers, under `centered_clip` and, beside it, plain `mean`.

Real processes on one machine, the same small model and number of rounds for each; honest peers know nothing. The loss of one
clean run under each rule is what the others are held against. `skip_tenth` is in the table but not among the figures: who does
nine tenths of the work passes most audits, and what it has earned by then stays (`bench.audit` says how long it lasts). Frauds
that merges show are tried once more with every part checked.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace

from bench import report
from bench.report import Report
from peer.attacks import KINDS, SLIGHT
from peer.trials import Outcome, Trial, run
from swarm.errors import SwarmError

PEERS, ATTACKERS, ROUNDS = 8, 2, 40
QUICK_PEERS, QUICK_ATTACKERS, QUICK_ROUNDS, QUICK_KINDS = 4, 1, 8, ("sign_flip", "nan")
CHECKED = ("tamper", "equivocate")
RULES = ("centered_clip", "mean")


async def measure(out: Report) -> None:
    """A clean run under each rule, then every kind under each."""
    base = Trial("", out.choose(ATTACKERS, QUICK_ATTACKERS), out.choose(PEERS, QUICK_PEERS), out.choose(ROUNDS, QUICK_ROUNDS))
    clean = {rule: await _taken(out, replace(base, merge=rule)) for rule in RULES}
    ratios, kept, accused = dict[str, float](), dict[str, float](), 0
    for kind in QUICK_KINDS if out.quick else KINDS:
        for rule in RULES:
            outcome = await _taken(out, replace(base, kind=kind, merge=rule))
            reference = clean[rule]
            if outcome is None or reference is None:
                continue
            ratio = outcome.loss / reference.loss
            _row(out, "attacks", outcome, kind=kind, merge=rule, loss_over_clean=ratio)
            accused += outcome.honest_accused
            if rule == RULES[0] and kind not in SLIGHT:
                ratios[kind], kept[kind] = ratio, outcome.credit_kept
    for kind in () if out.quick else CHECKED:
        outcome = await _taken(out, replace(base, kind=kind, check_traffic=1.0))
        if outcome is not None:
            _row(out, "every part checked", outcome, kind=kind)
            accused += outcome.honest_accused
    if ratios:
        how = f"{base.attackers} of {base.peers} peers, {base.rounds} rounds, `{RULES[0]}`"
        worst, most = max(ratios, key=lambda kind: ratios[kind]), max(kept, key=lambda kind: kept[kind])
        out.figure("worst_loss_over_clean", ratios[worst], f"{how}: {worst}, of {', '.join(ratios)}", "<= 1.03")
        out.figure(
            "credit_kept_by_attackers",
            kept[most],
            f"{how}: their share of all credit at the end, for work not done, {most}",
            "== 0",
        )
        out.figure("honest_accused", accused, "honest peers with evidence against them, in all runs under both rules", "== 0")


def _row(out: Report, table: str, outcome: Outcome, **about: str | float) -> None:
    out.row(
        table,
        **about,
        detected_after_rounds=outcome.detected_after,
        convicted=outcome.convicted,
        honest_accused=outcome.honest_accused,
        credit_kept=outcome.credit_kept,
        roots_agree=outcome.roots_agree,
    )


async def _taken(out: Report, trial: Trial) -> Outcome | None:
    """A trial's outcome; a failure is a row, not the end."""
    name = f"{trial.kind or 'clean'}, {trial.merge}"
    with report.workspace() as folder:
        try:
            outcome = await run(trial, folder / "trial")
        except SwarmError as error:
            out.row("not run", what=name, why=" ".join(f"{error.message} {error.hint}".split())[-300:])
            return None
    out.say(f"  {name}: loss {outcome.loss:.4f}, convicted {outcome.convicted}, credit kept {outcome.credit_kept:.3f}")
    return outcome


def main(argv: Sequence[str] | None = None) -> int:
    """Measure."""
    return report.run("attacks", __doc__, {"attacks": measure}, argv)


if __name__ == "__main__":
    sys.exit(main())
