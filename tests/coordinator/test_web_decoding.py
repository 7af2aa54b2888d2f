"""Entries in lines that people can read: what strangers wrote stays text, and stays short."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from coordinator.web.decoding import MEANINGS, MOST_LINES, lines, summary
from coordinator.web.words import counted, percent, quantity, short_key, utc
from swarm.entries import SIGNED_BODIES
from swarm.messages import KINDS
from swarm.rpc.v1.ledger_pb2 import LedgerEntry, Report
from swarm.rpc.v1.signed_pb2 import AuditVerdict, CommitReference, Proposal, Signed
from tests.world import NOW_S, World, entry, identity

WORLD = World()
PEERS = [identity(number) for number in range(3)]


def test_every_kind_of_entry_is_told_in_words() -> None:
    """And every line of a list says who is behind the entry, and of which round it is."""
    assert MEANINGS.keys() == {"run_opened", *SIGNED_BODIES}
    rows = [summary(index, raw) for index, raw in enumerate(WORLD.ledger(PEERS, 1))]
    assert [row.kind for row in rows] == [
        "run_opened",
        *["admitted"] * 3,
        "proposed",
        "reported",
        "reported",
        "confirmed",
        "reported",
    ]
    assert [row.who for row in rows[1:5]] == [*(peer.peer_id for peer in PEERS), PEERS[0].peer_id]
    assert {row.round for row in rows[:4]} == {None}
    assert {row.round for row in rows[4:]} == {0}
    assert {row.at_us for row in rows} == {int(NOW_S * 1e6)}


def test_what_is_signed_inside_is_decoded_as_well() -> None:
    """A report's commit and result, down to the loss; keys are marked as such."""
    proposal, reports = WORLD.round(PEERS, 0)
    found = {(line.name, line.value) for line in lines(entry(reported=reports[0]))}
    assert {("loss", "2.5"), ("tokens", "256"), ("issued_at", "1970-01-12 13:46:40 UTC")} <= found
    assert any(line.form == "key" and line.value == PEERS[0].peer_id for line in lines(entry(proposed=proposal)))


def test_a_huge_entry_is_cut() -> None:
    """A proposal with thousands of commits, long texts and long bytes make a short page all the same."""
    commits = [CommitReference(peer_id="x" * 5000)] * 200 + [CommitReference(commit_hash=bytes(1000))] * 200
    proposal = Signed(kind=KINDS[Proposal], payload=Proposal(commits=commits).SerializeToString(), signer="y" * 5000)
    shown = lines(entry(proposed=proposal))
    assert len(shown) <= MOST_LINES
    assert max(len(line.value) for line in shown) < 300
    assert any(line.value == "and 336 more of commits" for line in shown)


def test_signatures_inside_signatures_end_somewhere() -> None:
    """A report whose commit is a report, and so on, is shown as far as it makes sense."""
    signed = Signed(kind=KINDS[Report], payload=Report(round=1).SerializeToString())
    for _ in range(50):
        signed = Signed(kind=KINDS[Report], payload=Report(round=1, commit=signed).SerializeToString())
    shown = lines(entry(reported=signed))
    assert shown[-1].depth <= 10
    assert any(line.name == "…" for line in shown)


@given(st.binary(max_size=300), st.sampled_from(sorted(KINDS.values())), st.text(max_size=80))
def test_any_bytes_can_be_shown(payload: bytes, kind: str, signer: str) -> None:
    """Whatever was signed, by whomever."""
    raw = entry(audited=Signed(kind=kind, payload=payload, signer=signer, signature=payload))
    assert summary(1, raw).size_bytes == len(raw)
    assert lines(raw)
    assert len(lines(payload)) <= MOST_LINES
    assert summary(2, payload).position == 2


def test_moments_that_no_calendar_has() -> None:
    """Are shown as the numbers that they are."""
    body = AuditVerdict(issued_at=2**64 - 1)
    raw = LedgerEntry(appended_at_us=2**64 - 1, audited=Signed(kind=KINDS[AuditVerdict], payload=body.SerializeToString()))
    assert any("µs" in line.value for line in lines(raw.SerializeToString()))
    assert utc(2**64 - 1).endswith("µs")
    assert utc(0) == "1970-01-01 00:00:00 UTC"


def test_how_figures_are_written() -> None:
    """Short, and never as more than they are."""
    assert [quantity(value) for value in (0, 2.345, 999, 12_345, 1_234_567, 4.2e12)] == [
        "0",
        "2.35",
        "999",
        "12.3 k",
        "1.23 M",
        "4.2 T",
    ]
    assert [percent(share) for share in (0, 0.0001, 0.5, 0.9999, 1)] == ["0 %", "< 0.1 %", "50 %", "> 99.9 %", "100 %"]
    assert [counted(1, "round"), counted(2000, "round")] == ["1 round", "2,000 rounds"]
    assert short_key(PEERS[0].peer_id) == f"{PEERS[0].peer_id[:8]}…{PEERS[0].peer_id[-8:]}"
    assert short_key("short") == "short"
