"""A past round's weights, from a kept checkpoint and what the rounds after it merged; every state on the way is checked.

It applies what peers applied, with the run's own outer step, spikes skipped as they skipped them. Offline: nobody is asked.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from peer.codec import Codecs, Vector
from peer.history import (
    CHECKPOINT_SUFFIX,
    RECORD_SUFFIX,
    Record,
    checkpoint_path,
    kept_rounds,
    kept_states,
    load_record,
    numbers_of,
    record_path,
)
from peer.progress import Bar, no_bar
from peer.rounds.applying import applied, was_skipped
from peer.rounds.checks import fits
from peer.rounds.parts import Parts
from peer.rounds.values import CommitFacts, ProposalFacts, SpanFacts
from peer.rounds.wire import Checker
from peer.state import Layout, Snapshot, load_checkpoint
from swarm.errors import CheckpointCorrupt, Rejected, StateDisputed
from swarm.manifest import Manifest


@dataclass(frozen=True)
class Rebuilt:
    """A state that was rebuilt from the one after `start` rounds; `skipped` rounds on the way were spikes.

    `confirmed_by` says what besides the history's own notes its root was found in: "ledger", "next proposal" or "".
    """

    snapshot: Snapshot
    start: int
    skipped: tuple[int, ...]
    confirmed_by: str


@dataclass(frozen=True)
class Rebuilder:
    """Reads the history in `directory`. `confirmed` has the roots that a ledger confirms by round, where one is at hand."""

    directory: Path
    run: Manifest
    checker: Checker
    confirmed: Mapping[int, bytes]

    @classmethod
    def of(cls, directory: Path, run: Manifest, coordinator: str, confirmed: Mapping[int, bytes] | None = None) -> Rebuilder:
        """For the history of a run whose grants the `coordinator` signs."""
        checker = Checker(run, bytes.fromhex(run.run_id), coordinator, lambda peer: True)
        return cls(directory, run, checker, confirmed or {})

    def after(self, round_index: int, bar: Bar = no_bar) -> Rebuilt:
        """The state after a round. `bar` gives what is called after each round that was applied, out of so many.

        Raises `CheckpointCorrupt` for rounds that aren't kept and damaged files, and `StateDisputed` where a root differs.
        """
        rounds = round_index + 1
        if rounds not in kept_states(self.directory):
            raise CheckpointCorrupt(self._why_not(round_index), "keep more with: swarm join --keep-history 100GB")
        snapshot = self._checkpoint(rounds)
        start, skipped = snapshot.round, list[int]()
        advance = bar("rounds", rounds - start)
        for index in range(start, rounds):
            before, snapshot = snapshot, self._next(snapshot, index)
            if was_skipped(before.state, snapshot.state):
                skipped.append(index)
            advance()
        return Rebuilt(snapshot, start, tuple(skipped), self._confirmed_by(snapshot, round_index))

    def _why_not(self, round_index: int) -> str:
        there, kept = kept_states(self.directory), kept_rounds(self.directory)
        if not there or not there[0] <= round_index + 1 <= there[-1]:
            return f"round {round_index} isn't kept in {self.directory}; there are {kept}"
        lacking = max(set(range(round_index + 1)) - set(numbers_of(self.directory, RECORD_SUFFIX)), default=round_index)
        return f"round {lacking} is missing in {self.directory}, so round {round_index} can't be rebuilt; there are {kept}"

    def _checkpoint(self, rounds: int) -> Snapshot:
        """The nearest whole checkpoint from which records lead to the state after so many rounds."""
        damage: CheckpointCorrupt | None = None
        for start in reversed(numbers_of(self.directory, CHECKPOINT_SUFFIX)):
            if start > rounds:
                continue
            path = checkpoint_path(self.directory, start)
            if not all(record_path(self.directory, index).exists() for index in range(start, rounds)):
                break
            try:
                return load_checkpoint(path, Layout.of(self.run), self.run.run_id)
            except CheckpointCorrupt as error:
                damage = damage or CheckpointCorrupt(f"{path}: {error.message}", f"there are {kept_rounds(self.directory)}")
        raise damage or CheckpointCorrupt(f"no checkpoint in {self.directory} leads to round {rounds - 1}")

    def _next(self, before: Snapshot, index: int) -> Snapshot:
        """The state after a round, from the one before it."""
        record = load_record(self.directory, index, self.run.run_id)
        try:
            proposal, merged = self._merged(record)
        except Rejected as error:
            path = record_path(self.directory, index)
            raise CheckpointCorrupt(f"{path} is damaged: {error}", f"there are {kept_rounds(self.directory)}") from error
        _require_root(before, proposal.base_root, f"round {index}'s proposal begins with")
        snapshot = Snapshot.from_state(applied(self.run, before.state, proposal, merged))
        _require_root(snapshot, record.root, f"after round {index} the peer had")
        if index in self.confirmed:
            _require_root(snapshot, self.confirmed[index], f"after round {index} the ledger confirms")
        return snapshot

    def _merged(self, record: Record) -> tuple[ProposalFacts, Vector | None]:
        """A round's proposal and its merged update, [parameters]; everything signed is checked. Raises `Rejected`."""
        made, codec = record.made, Codecs(self.run).at(record.round_index)
        number, proposal = self.checker.proposal(made.accepted)
        if number != record.round_index:
            raise Rejected("wrong_round", "proposal")
        commits = {facts.peer: facts for _, facts in map(self.checker.commit, made.commits)}
        spans = [facts for _, facts in map(self.checker.span, made.spans)]
        _require_right(proposal, commits, spans, all_gather=codec.topology == "all_gather")
        parts = Parts(codec, self.run.merge, lambda name: record.parts.get(name))
        wanted = len(proposal.contributors) if codec.topology == "all_gather" else min(1, len(proposal.contributors))
        if sorted(part for part, *_ in parts.needed(proposal, commits, spans)) != sorted([*range(codec.part_count)] * wanted):
            raise Rejected("wrong_parts", "not every part once")
        return proposal, parts.collected(proposal, commits, spans)

    def _confirmed_by(self, snapshot: Snapshot, round_index: int) -> str:
        """What besides the peer's own notes names the root of this state. A damaged record of the next round names nothing."""
        if round_index in self.confirmed:
            return "ledger"
        try:
            made = load_record(self.directory, round_index + 1, self.run.run_id).made
            _, proposal = self.checker.proposal(made.accepted)
        except (CheckpointCorrupt, Rejected):
            return ""
        _require_root(snapshot, proposal.base_root, f"round {round_index + 1}'s proposal begins with")
        return "next proposal"


def _require_right(
    proposal: ProposalFacts, commits: Mapping[str, CommitFacts], spans: list[SpanFacts], *, all_gather: bool
) -> None:
    """Raise `Rejected` unless what names the parts is what the proposal asks for."""
    if all_gather:
        named = {item.peer: item.commit_hash for item in proposal.contributors}
        if named != {peer: facts.commit_hash for peer, facts in commits.items()}:
            raise Rejected("wrong_commit", "not those that the proposal names")
    elif not all(fits(proposal, span) for span in spans):
        raise Rejected("wrong_spans", "not those that the proposal names")


def _require_root(snapshot: Snapshot, root: bytes, whose: str) -> None:
    if snapshot.root != root:
        message = f"{whose} the state {root.hex()[:12]}, the rebuilt one is {snapshot.root_hex[:12]}"
        raise StateDisputed(message, "compare with another peer's history; the ledger tells which is right")
