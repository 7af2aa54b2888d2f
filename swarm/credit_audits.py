"""What audits do to credit: the part of the fold over the ledger that opens cases, takes findings and takes credit back."""

from __future__ import annotations

from swarm.audits import CONVICTED, FAILED, MOST_WRONG, PASSED, WITHHELD, Case, draw_case
from swarm.credit_records import RoundRecord, RunRecord, Standings
from swarm.entries import Confirmation, Finding
from swarm.errors import Rejected


def newest_roster(run: RunRecord) -> frozenset[str]:
    """Who takes part after the newest confirmed round."""
    newest = None if run.newest is None else run.rounds[run.newest].next_roster
    return newest or frozenset()


def judge_finding(run: RunRecord, finding: Finding) -> None:
    """Whether the finding may be taken. Raises `Rejected`."""
    check_suspended(run, finding.auditor)
    if finding.finding == CONVICTED:
        _judge_conviction(run, finding)
        return
    current = run.rounds.get(finding.round)
    case = current.cases.get(finding.peer_id) if current is not None else None
    if case is None or case.duty.commit_hash != finding.commit_hash:
        raise Rejected("no_audit", f"round {finding.round}", finding.auditor)
    if not case.has_turn(finding.auditor, run.newest or 0):
        raise Rejected("not_an_auditor", f"round {finding.round}", finding.auditor)


def _judge_conviction(run: RunRecord, finding: Finding) -> None:
    """Once, by a peer of the roster, about a key that was admitted and is still trusted."""
    if finding.auditor not in newest_roster(run):
        raise Rejected("not_in_roster", "only those who take part convict", finding.auditor)
    told = finding.auditor in run.accusers.get(finding.peer_id, ())
    if told or finding.peer_id not in run.members or finding.peer_id in run.suspended:
        raise Rejected("no_audit", "convicted already, or unknown", finding.auditor)


def draw_audits(run: RunRecord, confirmation: Confirmation, current: RoundRecord) -> None:
    """Open a case for each of the round's commits that is drawn: all of a new key's."""
    terms = run.terms
    commits = current.proposals[confirmation.proposal_hash].nomination.commits
    run.audits.contributions += sum(item.weight > 0 for item in commits.values())
    if not terms.audit_rate and not terms.audit_first:
        return
    usual = confirmation.audit_rate or terms.audit_rate
    working = {peer: run.members[peer] for peer, item in commits.items() if item.weight and peer not in run.suspended}
    for peer_id, member in working.items():
        rate = 1.0 if member.contributions < terms.audit_first else usual
        member.contributions = min(member.contributions + 1, terms.audit_first)
        others = [other for other, its in working.items() if its.tally is not member.tally]
        number = confirmation.round
        case = draw_case(confirmation.beacon, number, peer_id, commits[peer_id].commit_hash, rate, others)
        if case is not None:
            current.cases[peer_id] = case
            run.audits.drawn += 1


def take_finding(run: RunRecord, finding: Finding) -> None:
    """Note what an auditor found; void what two of them, or most of the roster, found bad."""
    if finding.finding == CONVICTED:
        accusers = run.accusers.setdefault(finding.peer_id, set())
        accusers.add(finding.auditor)
        if 2 * len(accusers & newest_roster(run)) > len(newest_roster(run)):
            _suspend(run, finding.peer_id, finding.reason)
        return
    cases = run.rounds[finding.round].cases
    case = cases[finding.peer_id]
    case.findings[finding.auditor] = finding.finding
    if case.outcome:
        del cases[finding.peer_id]
        _note_outcome(run, case)
    for auditor in case.wrong:
        member = run.members[auditor]
        member.wrong_audits += 1
        if member.wrong_audits >= MOST_WRONG and auditor not in run.suspended:
            _suspend(run, auditor, "wrong_audits")
    if case.outcome == WITHHELD:
        _void(run, finding.round, finding.peer_id)
        run.standings = Standings(run.tallies.values())
    elif case.outcome == FAILED:
        _suspend(run, finding.peer_id, finding.reason)


def _note_outcome(run: RunRecord, case: Case) -> None:
    """Count the case, and remember who was right."""
    outcome = case.outcome
    setattr(run.audits, outcome, getattr(run.audits, outcome) + 1)
    if outcome == PASSED:
        run.members[case.duty.peer_id].tally.vouched += 1
    for auditor, finding in case.findings.items():
        tally = run.members[auditor].tally
        tally.audits += finding == outcome and outcome in (PASSED, FAILED)
        tally.caught += finding == outcome == FAILED


def _suspend(run: RunRecord, peer_id: str, reason: str) -> None:
    """Take all of a key's credit that isn't final, and take nothing more from it."""
    run.suspended[peer_id] = reason
    run.accusers.pop(peer_id, None)
    for number, current in run.rounds.items():
        run.audits.moot += current.cases.pop(peer_id, None) is not None
        _void(run, number, peer_id)
    run.standings = Standings(run.tallies.values())


def _void(run: RunRecord, number: int, peer_id: str) -> None:
    """Take back what a key has earned in a round, unless it is final; a report that is still to come earns nothing."""
    current = run.rounds[number]
    if current.final:
        return
    current.void.add(peer_id)
    for tally, claim in current.claims:
        if claim.peer_id == peer_id:
            tally.pending -= claim.tokens
    current.claims = [(tally, claim) for tally, claim in current.claims if claim.peer_id != peer_id]
    for tally, tokens, peer in current.held:
        if peer == peer_id:
            tally.verified -= tokens
            tally.rounds -= tokens > 0
    current.held = [each for each in current.held if each[2] != peer_id]


def check_suspended(run: RunRecord, peer_id: str) -> None:
    """Raise `Rejected` for a key whose work was found wrong."""
    reason = run.suspended.get(peer_id)
    if reason is not None:
        raise Rejected("suspended", f"its work was found wrong: {reason}", peer_id)
