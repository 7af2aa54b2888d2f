"""`swarm top` on a terminal of 80 by 24, and as plain lines."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from textual.widgets import Static

from peer.control import ControlServer
from swarm.cli.top import held_out, make_app, panel, plain_line, sparkline
from swarm.control import HISTORY_NAME
from swarm.reasons import TABLE
from tests.runs import run_command
from tests.waiting import eventually

SIZE = (80, 24)


def answer(directory: Path, state: str = "training", **changes: Any) -> dict[str, Any]:
    """What a daemon says."""
    return {
        "peer_id": "12D3KooW",
        "directory": str(directory),
        "device": "cuda:0",
        "state": state,
        "explanation": TABLE[state].explanation,
        "detail": "",
        "hint": TABLE[state].hint,
        "earning": TABLE[state].earning,
        "waits_for": "",
        "round": 7,
        "roster_size": 3,
        "loss": 2.5,
        "tokens_per_s": 12345.6,
        "bytes_sent": 1_500_000,
        "bytes_received": 2_500_000,
        "credits": {"pending": 1.5},
        "rounds": 6,
        "reports_waiting": 0,
        "coordinator_reachable": True,
        "device_free": False,
        "governor": {"temperature_c": 61.0, "power_w": 210.0, "fan_ratio": 0.4, "time_share": 0.5},
        **changes,
    }


@pytest.fixture
async def asked(tmp_path: Path) -> Any:
    """A control socket in `tmp_path` that answers with whatever `say` was told, and the verbs that came."""
    told: dict[str, Any] = answer(tmp_path)
    verbs: list[str] = []

    async def handler(verb: str, arguments: dict[str, Any]) -> dict[str, Any]:
        verbs.append(verb)
        return told

    def say(value: dict[str, Any]) -> None:
        told.clear()
        told.update(value)

    server = ControlServer(tmp_path, handler)
    await server.start()
    (tmp_path / HISTORY_NAME).write_text("".join(json.dumps({"loss": 5 - n / 10, "tokens": 1}) + "\n" for n in range(30)))
    yield say, verbs
    await server.close()


async def test_everything_on_one_screen(tmp_path: Path, asked: tuple[Callable[[dict[str, Any]], None], list[str]]) -> None:
    """Loss, round, speed, GPU, traffic and credits in 80 by 24; the reason changes with the peer's state; p pauses, q quits."""
    say, verbs = asked
    app = make_app(tmp_path)

    def shown() -> str:
        return str(app.query_one("#text", Static).render())

    async with app.run_test(size=SIZE) as pilot:
        await eventually(lambda: "2.5000" in shown(), "the first answer")
        for text in ("round 7", "12,346 tokens/s", "61 °C", "210 W", "1.5 MB sent", "1.500000 credits", "50% of the time"):
            assert text in shown()
        lines = shown().splitlines()
        assert len(lines) < SIZE[1]
        assert max(map(len, lines)) <= SIZE[0]
        say(answer(tmp_path, "gpu_busy", detail="game"))
        await eventually(lambda: "gpu_busy: another program uses the GPU" in shown() and "game" in shown(), "the reason")
        await pilot.press("p")
        await eventually(lambda: "pause" in verbs, "the verb")
        await pilot.press("q")
    assert app.return_code == 0


async def test_nobody_is_there(tmp_path: Path) -> None:
    """It says how to start a peer."""
    app = make_app(tmp_path)
    async with app.run_test(size=SIZE):
        await eventually(lambda: "swarm join" in str(app.query_one("#text", Static).render()), "the hint")


async def test_plain_lines_without_a_terminal(tmp_path: Path, asked: Any) -> None:
    """Where there is no terminal, a line for each peer."""
    done = await run_command("top", "--dir", str(tmp_path), "--lines", "1")
    assert (done.code, done.err) == (0, "")
    assert done.out.strip() == plain_line(answer(tmp_path))
    assert (await run_command("top", "--dir", str(tmp_path / "empty"), "--lines", "1")).code == 50


@pytest.mark.parametrize("state", TABLE)
def test_every_reason_fits(state: str, tmp_path: Path) -> None:
    """No state makes a panel wider than the terminal."""
    text = panel(answer(tmp_path, state, loss=None, waits_for="the round"), [], 76)
    assert max(map(len, text.splitlines())) <= 76
    assert state in text


def test_sparkline() -> None:
    """The lowest value is the lowest block; only the newest fit."""
    assert sparkline([3, 2, 1], 10) == "█▅▁"
    assert sparkline([1.0] * 20, 5) == "▁" * 5
    assert sparkline([], 5) == "no round yet"


def test_held_out_losses_are_shown_where_there_are_any(tmp_path: Path) -> None:
    """What a quorum agreed on last, and the best that is kept, by whomever that was measured."""
    newest, best = {"round": 40, "loss": 2.5, "evaluators": 3}, {"round": 1030, "loss": 2.25, "evaluators": 0}
    told = answer(tmp_path, evaluation={"newest": newest, "best": best})
    line = "held-out loss 2.5000 after round 40 (3 agree), best kept 2.2500 after round 1,030 (measured here alone)"
    assert line in panel(told, [], 120)
    assert held_out({"best": best}).startswith("best kept")
    assert "held-out" not in panel(answer(tmp_path, evaluation={}), [], 120)
