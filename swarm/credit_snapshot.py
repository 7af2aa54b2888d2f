"""A credit state as bytes and back: JSON of plain values, so that a restart need not fold the whole ledger again.

Whoever reads a snapshot trusts who wrote it: it saves time and proves nothing. The ledger stays the truth.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import astuple
from operator import attrgetter
from typing import Any

from pydantic import ValidationError

from swarm.audits import Case, Duty
from swarm.credit_records import (
    AuditTotals,
    Candidate,
    Evaluations,
    Member,
    RoundRecord,
    RoundSet,
    RunRecord,
    Standings,
    Tally,
    Terms,
)
from swarm.credits import CreditState
from swarm.entries import Claim, Commitment, Confirmation, Nomination, Permission
from swarm.errors import LedgerInvalid
from swarm.evaluations import Agreed, Panel, Said
from swarm.history import History, Point
from swarm.manifest import Manifest

VERSION = 5
TALLY = attrgetter(*Tally.__dataclass_fields__)

Json = Any  # what json.loads gives; a snapshot that doesn't have the expected shape is refused as a whole


def dump(state: CreditState) -> bytes:
    """The state as bytes."""
    runs = [[run_id.hex(), _dump_run(run)] for run_id, run in state.records.items()]
    values = {"version": VERSION, "coordinator": state.coordinator, "size": state.size, "runs": runs}
    return json.dumps(values, separators=(",", ":")).encode()


def load(raw: bytes) -> CreditState:
    """The state that `dump` was given. Raises `LedgerInvalid` for anything else."""
    try:
        values = json.loads(raw)
        if values["version"] != VERSION:
            raise LedgerInvalid(f"a snapshot of version {values['version']}, not {VERSION}")
        runs = {bytes.fromhex(run_id): _load_run(bytes.fromhex(run_id), run) for run_id, run in values["runs"]}
        return CreditState.restored(values["coordinator"], values["size"], runs)
    except (ValueError, KeyError, TypeError, IndexError, ValidationError) as error:
        raise LedgerInvalid(f"the snapshot is damaged: {type(error).__name__}") from error


def _dump_run(run: RunRecord) -> Json:
    places = {id(tally): place for place, tally in enumerate(run.tallies.values())}
    return {
        "manifest": run.manifest.canonical_bytes.decode(),
        "owner": run.owner,
        "tickets": [[ticket.hex(), uses] for ticket, uses in run.tickets.items()],
        "tallies": [TALLY(tally) for tally in run.tallies.values()],
        "members": [[peer_id, places[id(member.tally)], *_dump_member(member)] for peer_id, member in run.members.items()],
        "rounds": [[number, _dump_round(record, places)] for number, record in run.rounds.items()],
        "confirmed": run.confirmed.bounds,
        "newest": run.newest,
        "unsettled": run.unsettled,
        "grants": [[grant.round, grant.peer_id, grant.base_root.hex(), grant.present] for grant in run.grants.values()],
        "tokens": run.tokens,
        "suspended": run.suspended,
        "accusers": {peer_id: sorted(accusers) for peer_id, accusers in run.accusers.items()},
        "history": [run.history.stride, [astuple(point) for point in run.history.points]],
        "audits": astuple(run.audits),
        "evaluations": _dump_evaluations(run.evaluations),
    }


def _load_run(run_id: bytes, values: Json) -> RunRecord:
    manifest = Manifest.model_validate_json(values["manifest"])
    tallies = [Tally(*each) for each in values["tallies"]]
    stride, points = values["history"]
    members = {
        peer_id: Member(tallies[place], limit, RoundSet(bounds), *others)
        for peer_id, place, limit, bounds, *others in values["members"]
    }
    certified: dict[str, list[str]] = {}
    for peer_id, member in members.items():
        if member.tally.account != peer_id:
            certified.setdefault(member.tally.account, []).append(peer_id)
    return RunRecord(
        manifest=manifest,
        terms=Terms.of(manifest),
        owner=values["owner"],
        tickets={bytes.fromhex(ticket): uses for ticket, uses in values["tickets"]},
        members=members,
        tallies={tally.account: tally for tally in tallies},
        standings=Standings(tallies),
        rounds={number: _load_round(run_id, number, record, tallies) for number, record in values["rounds"]},
        confirmed=RoundSet(values["confirmed"]),
        newest=values["newest"],
        unsettled=values["unsettled"],
        grants={
            number: Permission(run_id, number, peer_id, bytes.fromhex(root), tuple(present))
            for number, peer_id, root, present in values["grants"]
        },
        tokens=values["tokens"],
        suspended=dict(values["suspended"]),
        accusers={peer_id: set(accusers) for peer_id, accusers in values["accusers"].items()},
        history=History([Point(*each) for each in points], stride),
        audits=AuditTotals(*values["audits"]),
        evaluations=_load_evaluations(values["evaluations"]),
        certified=certified,
    )


def _dump_member(member: Member) -> Iterable[Json]:
    settings = member.weight_limit, member.reported.bounds, member.expires_at, member.revoked
    return *settings, member.contributions, member.wrong_audits


def _dump_evaluations(evaluations: Evaluations) -> Json:
    panels = [
        [panel.round, panel.state_root.hex(), panel.evaluators, panel.place, panel.at_us, panel.statements]
        for panel in evaluations.open.values()
    ]
    return [panels, evaluations.agreed, evaluations.disputed, evaluations.lapsed]


def _load_evaluations(values: Json) -> Evaluations:
    panels, agreed, disputed, lapsed = values
    loaded = {}
    for number, root, evaluators, place, at_us, statements in panels:
        said = {peer: Said(loss, tuple(texts), entry) for peer, (loss, texts, entry) in statements.items()}
        loaded[number] = Panel(number, bytes.fromhex(root), tuple(evaluators), place, at_us, said)
    return Evaluations(loaded, [Agreed(*each) for each in agreed], disputed, lapsed)


def _dump_case(case: Case) -> Json:
    duty = case.duty
    return [duty.round, duty.peer_id, duty.commit_hash.hex(), duty.seed.hex(), case.auditors, case.findings]


def _load_case(values: Json) -> Case:
    number, peer_id, commit_hash, seed, auditors, findings = values
    return Case(Duty(number, peer_id, bytes.fromhex(commit_hash), bytes.fromhex(seed)), tuple(auditors), dict(findings))


def _dump_round(record: RoundRecord, places: Mapping[int, int]) -> Json:
    confirmed = record.confirmed
    return {
        "proposals": [_dump_candidate(candidate) for candidate in record.proposals.values()],
        "ballots": [[*ballot, leader] for ballot, leader in sorted(record.ballots)],
        "claims": [[places[id(tally)], *_dump_claim(claim)] for tally, claim in record.claims],
        "confirmed": None if confirmed is None else [confirmed.proposal_hash.hex(), confirmed.state_root.hex()],
        "final": record.final,
        "held": [[places[id(tally)], tokens, peer_id] for tally, tokens, peer_id in record.held],
        "void": sorted(record.void),
        "cases": [_dump_case(case) for case in record.cases.values()],
        "weighted_loss": record.weighted_loss,
        "weight": record.weight,
        "place": record.place,
    }


def _load_round(run_id: bytes, number: int, values: Json, tallies: list[Tally]) -> RoundRecord:
    candidates = [_load_candidate(run_id, number, each) for each in values["proposals"]]
    proposal_hash, state_root = map(bytes.fromhex, values["confirmed"] or ("", ""))
    return RoundRecord(
        proposals={candidate.nomination.proposal_hash: candidate for candidate in candidates},
        ballots={((term, amendment), leader) for term, amendment, leader in values["ballots"]},
        claims=[(tallies[place], _load_claim(run_id, number, claim)) for place, *claim in values["claims"]],
        confirmed=Confirmation(run_id, number, proposal_hash, state_root) if values["confirmed"] else None,
        final=values["final"],
        held=[(tallies[place], tokens, peer_id) for place, tokens, peer_id in values["held"]],
        void=set(values["void"]),
        cases={case.duty.peer_id: case for case in map(_load_case, values["cases"])},
        weighted_loss=values["weighted_loss"],
        weight=values["weight"],
        place=values["place"],
    )


def _dump_candidate(candidate: Candidate) -> Json:
    nomination = candidate.nomination
    return {
        "hash": nomination.proposal_hash.hex(),
        "ballot": nomination.ballot,
        "leader": nomination.leader,
        "commits": [[peer_id, item.commit_hash.hex(), item.weight] for peer_id, item in nomination.commits.items()],
        "next_roster": sorted(nomination.next_roster),
        "votes": [[root.hex(), count] for root, count in candidate.votes.items()],
    }


def _load_candidate(run_id: bytes, number: int, values: Json) -> Candidate:
    term, amendment = values["ballot"]
    nomination = Nomination(
        run_id,
        number,
        bytes.fromhex(values["hash"]),
        (term, amendment),
        values["leader"],
        {peer_id: Commitment(bytes.fromhex(commit), weight) for peer_id, commit, weight in values["commits"]},
        frozenset(values["next_roster"]),
    )
    return Candidate(nomination, {bytes.fromhex(root): count for root, count in values["votes"]})


def _dump_claim(claim: Claim) -> Iterable[Json]:
    hashes = (claim.proposal_hash, claim.state_root, claim.commit_hash)
    return claim.peer_id, *(each.hex() for each in hashes), claim.weight, claim.tokens, claim.loss


def _load_claim(run_id: bytes, number: int, values: Json) -> Claim:
    peer_id, proposal, root, commit, weight, tokens, loss = values
    hashes = bytes.fromhex(proposal), bytes.fromhex(root), bytes.fromhex(commit)
    return Claim(run_id, number, peer_id, *hashes, weight, tokens, loss)
