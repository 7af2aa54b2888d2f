"""Who measures the held-out loss, what a quorum agrees on, and what no evaluator gets into the ledger."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarm.credit_snapshot import dump, load
from swarm.credits import CreditState, apply_entry, fold, verify_ledger
from swarm.errors import LedgerInvalid, ManifestInvalid
from swarm.evaluations import (
    MOST_TEXT_BYTES,
    OPEN_PANELS,
    Agreed,
    Panel,
    Said,
    agree_on,
    best_of,
    cleaned,
    draw_evaluators,
    spoken_texts,
    thinned,
)
from swarm.identity import Identity
from swarm.manifest import Manifest
from tests.world import COORDINATOR, OTHER_ROOT, World, entry, identity, manifest

SETTINGS = {"every": 2, "evaluators": 3, "quorum": 2, "tolerance": 0.01, "prompts": ["def ", "class "]}
WORLD = World(manifest(evaluation=SETTINGS))
PEERS = [identity(number) for number in range(5)]
TEXTS = ["one", "two\nlines"]
BEACON = bytes(range(32))
SCRIPT = '<script>alert("1")</script>'


def after(*entries: bytes, world: World = WORLD) -> CreditState:
    return fold(entries, COORDINATOR.peer_id)


def drawn(state: CreditState, number: int = 0) -> list[Identity]:
    """Who is asked to measure a round."""
    asked = {peer.peer_id: [panel.round for panel in state.evaluations_due(WORLD.run_id, peer.peer_id)] for peer in PEERS}
    return [peer for peer in PEERS if number in asked[peer.peer_id]]


def spoken(*losses: float, number: int = 0, **changes: object) -> list[bytes]:
    """A ledger of three rounds, in which evaluators of one tell these losses."""
    entries = WORLD.ledger(PEERS, 3)
    evaluators = drawn(after(*entries), number)
    told = [
        entry(evaluated=WORLD.evaluation(peer, number, loss, **changes)) for peer, loss in zip(evaluators, losses, strict=False)
    ]
    return [*entries, *told]


def refused(evaluator: Identity | None = None, number: int = 0, loss: float = 2.0, **changes: object) -> str:
    """Why the ledger takes no such statement."""
    state = after(*WORLD.ledger(PEERS, 3))
    said = entry(evaluated=WORLD.evaluation(evaluator or drawn(state)[0], number, loss, **changes))
    before = dump(state)
    with pytest.raises(LedgerInvalid) as caught:
        apply_entry(state, state.size, said)
    assert dump(state) == before
    return str(caught.value)


def test_evaluators_are_drawn_by_the_beacon_and_from_many_accounts() -> None:
    """Everybody draws the same, another for each beacon and round; no account has two evaluators while others have none."""
    accounts = {f"peer-{number}": "mallory" if number < 8 else f"account-{number}" for number in range(12)}
    first = draw_evaluators(BEACON, 0, accounts, 5)
    assert first == draw_evaluators(BEACON, 0, dict(reversed(accounts.items())), 5)
    assert sorted(accounts[peer] for peer in first).count("mallory") == 1
    others = {draw_evaluators(BEACON, number, accounts, 5) for number in range(20)}
    assert len(others | {draw_evaluators(bytes(32), 0, accounts, 5)}) == 21
    assert len(draw_evaluators(BEACON, 0, accounts, 100)) == 12


@pytest.mark.parametrize(
    ("losses", "agreed"),
    [
        ((2.0, 2.001, 2.01), 2.001),
        ((2.0, 2.001), 2.0005),
        ((2.0, 2.001, 9.0), 2.0005),
        ((0.0, 0.0), 0.0),
        ((2.0,), None),
        ((2.0, 9.0), None),
        ((2.0, 2.0, 9.0, 9.0), None),
        ((1.0, 2.0, 3.0), None),
        ((), None),
    ],
)
def test_a_quorum_agrees_on_the_median_of_those_near_it(losses: tuple[float, ...], agreed: float | None) -> None:
    """One that lies changes nothing; two halves that differ agree on nothing."""
    found = agree_on({str(place): loss for place, loss in enumerate(losses)}, 2, 0.01)
    assert (None if found is None else found.loss) == (None if agreed is None else pytest.approx(agreed))


@given(st.lists(st.floats(1.0, 1.001), min_size=2, max_size=8), st.lists(st.floats(0, 1e6), max_size=8))
def test_a_minority_cant_move_what_the_majority_measures(honest: list[float], lies: list[float]) -> None:
    """However they lie, what comes out is between what honest evaluators measured, but for the tolerance."""
    lies = lies[: len(honest) - 1]
    losses = dict(enumerate([*honest, *lies]))
    found = agree_on({str(place): loss for place, loss in losses.items()}, 2, 0.01)
    assert found is not None
    assert min(honest) * 0.98 <= found.loss <= max(honest) * 1.02


def test_evaluators_agree_in_the_ledger() -> None:
    """A round of two is evaluated; what is agreed is there once a quorum has spoken, and every loss with its entry."""
    entries = spoken(2.0, 2.015625, 2.0, texts=TEXTS)
    states = [after(*entries[:-spare]) for spare in (2, 1)] + [after(*entries)]
    assert [[(each.loss, each.evaluators) for each in state.agreed_evaluations(WORLD.run_id)] for state in states] == [
        [],
        [(2.0078125, 2)],
        [(2.0, 3)],
    ]
    assert [panel.round for panel in states[-1].panels(WORLD.run_id)] == [0, 2]
    panel = states[-1].panels(WORLD.run_id)[0]
    assert [said.entry for said in panel.statements.values()] == [len(entries) - 3, len(entries) - 2, len(entries) - 1]
    assert spoken_texts(panel, panel.evaluators) == (tuple(TEXTS), 3)
    assert dump(verify_ledger(entries, COORDINATOR.peer_id, every_signature=True)) == dump(states[-1])


def test_evaluating_earns_nothing() -> None:
    """Balances, suspensions and totals of audits are what they were."""
    before, later = after(*spoken()), after(*spoken(2.0, 9.0, 5.0))
    assert later.balances(WORLD.run_id) == before.balances(WORLD.run_id)
    assert later.suspended(WORLD.run_id) == {}


def test_disagreement_is_told_and_convicts_nobody() -> None:
    """Once all have spoken and differ, the round is disputed; nobody's losses count."""
    states = [after(*spoken(*losses)) for losses in ((2.0, 9.0), (2.0, 9.0, 5.0))]
    assert [state.disputed_evaluations(WORLD.run_id) for state in states] == [0, 1]
    assert [state.is_disputed(WORLD.run_id, 0) for state in states] == [False, True]
    assert states[1].agreed_evaluations(WORLD.run_id) == []


def test_only_who_is_drawn_says_something_once_about_the_confirmed_state() -> None:
    """Hostile statements are refused with a reason, and change nothing."""
    evaluators = drawn(after(*WORLD.ledger(PEERS, 3)))
    stranger = next(peer for peer in PEERS if peer not in evaluators)
    assert len(evaluators) == 3
    assert "not_an_evaluator" in refused(stranger)
    assert "no_evaluation" in refused(number=1)
    assert "no_evaluation" in refused(number=4)
    assert "wrong_state" in refused(state_root=OTHER_ROOT)
    assert "unknown_run" in refused(run_id=b"\x09" * 32)
    for loss in (math.nan, math.inf, -1.0, 1e300):
        assert "not_finite" in refused(loss=loss)
    assert "malformed" in refused(samples=9)
    assert "malformed" in refused(texts=["one"])
    assert "too_large" in refused(texts=["x"] * 5)
    assert "too_large" in refused(texts=["x" * (MOST_TEXT_BYTES + 1), ""])
    assert "malformed" in refused(texts=["\x1b[31m", "x"])
    assert "malformed" in refused(texts=["turned \u202e round", "x"])
    entries = spoken(2.0)
    with pytest.raises(LedgerInvalid, match="already_evaluated"):
        after(*entries, entries[-1])
    with pytest.raises(LedgerInvalid, match="already_evaluated"):
        after(*entries, entry(evaluated=WORLD.evaluation(evaluators[0], 0, 3.0)))


def test_a_forged_statement_is_named() -> None:
    """Whoever verifies the ledger finds a statement whose signature isn't its evaluator's."""
    entries = spoken(2.0)
    forged = WORLD.evaluation(drawn(after(*WORLD.ledger(PEERS, 3)))[1], 0)
    forged.signature = bytes(64)
    with pytest.raises(LedgerInvalid, match=f"entry {len(entries)}: bad_signature"):
        verify_ledger([*entries, entry(evaluated=forged)], COORDINATOR.peer_id)


def test_a_panel_is_heard_for_a_while() -> None:
    """After a few more evaluations it takes no more, and what it agreed on stays."""
    entries = spoken(2.0, 2.0)
    late = WORLD.evaluation(drawn(after(*entries), 0)[0], 0)
    rounds = World(WORLD.manifest).ledger(PEERS, 2 * OPEN_PANELS + 1)[len(WORLD.ledger(PEERS, 3)) :]
    state = after(*entries, *rounds)
    assert [panel.round for panel in state.panels(WORLD.run_id)] == [2, 4, 6, 8]
    assert [each.round for each in state.agreed_evaluations(WORLD.run_id)] == [0]
    with pytest.raises(LedgerInvalid, match="no_evaluation"):
        apply_entry(state, state.size, entry(evaluated=late))


def test_a_restored_state_knows_its_evaluations() -> None:
    """Written down and read back in the midst of them."""
    entries = spoken(2.0, 2.001, 2.002, texts=TEXTS)
    for cut in range(len(entries) - 4, len(entries) + 1):
        state = load(dump(after(*entries[:cut])))
        for index, raw in enumerate(entries[cut:], cut):
            apply_entry(state, index, raw)
        assert dump(state) == dump(after(*entries))
        assert state.panels(WORLD.run_id) == after(*entries).panels(WORLD.run_id)


def test_many_evaluations_take_bounded_memory() -> None:
    """Every other one is forgotten; never the newest or the best."""
    agreed = [Agreed(number, number, 0, abs(number - 41) + 1.0, 2, 3) for number in range(100)]
    kept = thinned(agreed, 99)
    assert len(kept) <= 51
    assert (kept[-1], best_of(kept)) == (agreed[-1], agreed[41])
    assert thinned(agreed, 100) == agreed
    assert best_of([]) is None


def test_texts_that_most_have_written_are_shown() -> None:
    """Of several evaluators, with how many wrote the same."""
    panel = Panel(0, b"", ("a", "b", "c"), statements={"a": Said(1.0, ("x",)), "b": Said(1.0, ("y",)), "c": Said(1.0, ("y",))})
    assert spoken_texts(panel, ("a", "b", "c")) == (("y",), 2)
    assert spoken_texts(panel, ("a",)) == (("x",), 1)
    assert spoken_texts(Panel(0, b"", ()), ()) == ((), 0)


@given(st.text())
def test_a_cleaned_text_stays_as_it_is(text: str) -> None:
    """It fits, has no control characters but line breaks, and cleaning it again changes nothing."""
    shown = cleaned(text, 64)
    assert len(shown.encode()) <= 64
    assert cleaned(shown, 64) == shown
    assert not any(each < " " and each != "\n" for each in shown)


def test_markup_is_no_control_character() -> None:
    """What is only dangerous unescaped is kept: the page escapes it."""
    assert cleaned(SCRIPT) == SCRIPT
    assert cleaned("a\u202eb\tc\x00d\n") == "a b c d\n"


@pytest.mark.parametrize(
    "settings",
    [
        {"quorum": 4},
        {"every": 0},
        {"tolerance": 0},
        {"prompts": ["x"] * 5},
        {"prompts": [""]},
        {"prompts": ["x" * 201]},
        {"text_tokens": 999},
    ],
    ids=str,
)
def test_settings_that_cant_be(settings: dict[str, object]) -> None:
    """They are refused by name."""
    with pytest.raises(ManifestInvalid, match="evaluation"):
        Manifest.from_values({**manifest().model_dump(mode="json"), "evaluation": settings})


def test_a_run_without_evaluations_keeps_its_id() -> None:
    """The field is written only where it is used; the last round is evaluated in any case."""
    assert "evaluation" not in manifest().model_dump(mode="json")
    ending = manifest(evaluation=SETTINGS, rounds={"total": 5})
    assert [number for number in range(7) if ending.is_evaluated(number)] == [0, 2, 4, 5, 6]
    assert ending.evaluation_samples == 10
    assert not manifest().is_evaluated(0)
