"""`swarm top`: the peers of this machine on a terminal, twice a second; plain lines where there is none."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from swarm.config import PeerSettings, load
from swarm.control import SOCKET_NAME, ask, history
from swarm.errors import NotRunning, SwarmError

if TYPE_CHECKING:
    from textual.app import App

REFRESH_S = 1.0
PLAIN_EVERY_S = 5.0
CURVE_WIDTH = 60
BLOCKS = "▁▂▃▄▅▆▇█"


def command(
    data_dir: Annotated[Path | None, typer.Option("--dir", help="The peer's folder, if it isn't the configured one.")] = None,
    plain: Annotated[bool, typer.Option("--plain", help="Lines instead of a full screen.")] = False,
    lines: Annotated[int, typer.Option("--lines", min=0, help="End after so many plain lines; 0 = never.")] = 0,
) -> None:
    """Watch the peers of this machine: loss, rounds, speed, GPU, traffic, credits, and why it waits. Quit with q."""
    folder = load(PeerSettings, {"data_dir": data_dir}).data_dir
    if plain or lines or not (sys.stdout.isatty() and sys.stdin.isatty()):
        _print_lines(folder, lines)
        return
    make_app(folder).run()


def _print_lines(folder: Path, count: int) -> None:
    printed = 0
    while True:
        answers = asyncio.run(statuses(folder))
        if not answers:
            raise NotRunning(f"no peer is running in {folder}", "start one with: swarm join LINK")
        for answer in answers:
            typer.echo(plain_line(answer))
        printed += 1
        if printed == count:
            return
        time.sleep(PLAIN_EVERY_S)


async def statuses(folder: Path) -> list[dict[str, Any]]:
    """What every peer of the folder says; those that don't answer are left out."""
    answers = await asyncio.gather(*(ask(path, "status", timeout_s=5.0) for path in running(folder)), return_exceptions=True)
    for answer in answers:
        if isinstance(answer, BaseException) and not isinstance(answer, SwarmError):
            raise answer
    return [answer for answer in answers if isinstance(answer, dict) and "peer_id" in answer]


def running(folder: Path) -> list[Path]:
    """Folders in which a peer listens: this one, or one for each GPU."""
    return [path.parent for path in sorted([*folder.glob(SOCKET_NAME), *folder.glob(f"gpu-*/{SOCKET_NAME}")])]


def plain_line(answer: dict[str, Any]) -> str:
    """One peer in one line."""
    loss = "-" if answer["loss"] is None else f"{answer['loss']:.4f}"
    parts = [
        f"{answer['device']} {answer['state']}",
        f"round {answer['round']}",
        f"loss {loss}",
        f"{answer['tokens_per_s']:,.0f} tokens/s",
        f"{answer['roster_size']} peers",
        f"{_megabytes(answer['bytes_sent'])} sent",
        f"{_credits(answer)} credits",
    ]
    return "  ".join([*parts, *([answer["detail"]] if answer.get("detail") else [])])


def panel(answer: dict[str, Any], losses: list[float], width: int) -> str:
    """One peer in a few lines of at most `width` characters, the reason first."""
    return "\n".join(line[:width] for line in _lines(answer, losses, width))


def _lines(answer: dict[str, Any], losses: list[float], width: int) -> Iterator[str]:
    state = f"{answer['state']}: {answer['explanation']}"
    yield f"{answer['device']}  {state}"
    more = " ".join(filter(None, (answer.get("warning"), answer.get("detail"), _waiting(answer), _hint(answer))))
    yield f"  {more}" if more else "  earning" if answer.get("earning") else "  it goes on by itself"
    loss = "-" if answer["loss"] is None else f"{answer['loss']:.4f}"
    yield f"  round {answer['round']:,}  loss {loss}  {answer['tokens_per_s']:,.0f} tokens/s  {answer['roster_size']} peers"
    if answer.get("evaluation"):
        yield f"  {held_out(answer['evaluation'])}"
    yield f"  {sparkline(losses, min(CURVE_WIDTH, width - 4))}"
    yield f"  {_device(answer)}"
    yield f"  {_traffic(answer)}"
    reports = answer["reports_waiting"]
    reach = "coordinator reachable" if answer["coordinator_reachable"] else "coordinator away; reports are kept"
    yield f"  {_credits(answer)} credits in {answer['rounds']:,} rounds, {reports} reports waiting, {reach}"


def held_out(evaluation: dict[str, Any]) -> str:
    """The newest held-out loss on which a quorum agreed, and the best that is kept."""
    parts = []
    for name, words in (("newest", "held-out loss"), ("best", "best kept")):
        found = evaluation.get(name)
        if found is not None:
            by = f"{found['evaluators']} agree" if found["evaluators"] else "measured here alone"
            parts.append(f"{words} {found['loss']:.4f} after round {found['round']:,} ({by})")
    return ", ".join(parts)


def _waiting(answer: dict[str, Any]) -> str:
    return f"waits for {answer['waits_for']}." if answer.get("waits_for") else ""


def _hint(answer: dict[str, Any]) -> str:
    return f"({answer['hint']})" if answer.get("hint") and not answer.get("earning") else ""


def _device(answer: dict[str, Any]) -> str:
    governor = answer.get("governor", {})
    shown = (("temperature_c", "{:.0f} °C"), ("power_w", "{:.0f} W"), ("fan_ratio", "fan {:.0%}"))
    parts = [text.format(governor[name]) for name, text in shown if governor.get(name) is not None]
    if governor.get("time_share", 1.0) not in (0.0, 1.0):
        parts.append(f"training {governor['time_share']:.0%} of the time")
    parts.append("device free" if answer.get("device_free") else "device in use")
    return ", ".join(parts)


def _traffic(answer: dict[str, Any]) -> str:
    text = f"{_megabytes(answer['bytes_sent'])} sent, {_megabytes(answer['bytes_received'])} received"
    traffic = answer.get("traffic") or {}
    for name, label in (("max_upload_bytes_per_s", "up"), ("max_download_bytes_per_s", "down")):
        if traffic.get(name):
            text += f", {label} at most {traffic[name] * 8 / 1e6:,.0f} Mbit/s"
    if traffic.get("quota_bytes"):
        text += f", {_megabytes(traffic.get('quota_left_bytes') or 0)} of the month's quota left"
    return text


def _megabytes(size_bytes: float) -> str:
    return f"{size_bytes / 1e6:,.1f} MB"


def _credits(answer: dict[str, Any]) -> str:
    return f"{sum(answer['credits'].values()):.6f}"


def sparkline(values: list[float], width: int) -> str:
    """The newest values as blocks, the least lowest."""
    shown = values[-max(1, width) :]
    if not shown:
        return "no round yet"
    low, high = min(shown), max(shown)
    span = (high - low) or 1.0
    return "".join(BLOCKS[round((value - low) / span * (len(BLOCKS) - 1))] for value in shown)


def losses_of(folder: Path) -> list[float]:
    """The loss of each round that a peer was part of."""
    return [float(line["loss"]) for line in history(folder)[-CURVE_WIDTH:] if line["tokens"]]


def make_app(folder: Path) -> App[None]:
    """The full-screen view. textual is imported here, so that plain lines need only the base install."""
    from textual.app import App, ComposeResult
    from textual.containers import VerticalScroll
    from textual.widgets import Footer, Static

    class Top(App[None]):
        """Panels below each other; quits with q."""

        CSS = "Static { padding: 0 1; } #peers { height: 1fr; }"
        BINDINGS = [("q", "quit", "Quit"), ("p", "verb('pause')", "Pause"), ("r", "verb('resume')", "Resume")]  # noqa: RUF012
        ENABLE_COMMAND_PALETTE = False

        def compose(self) -> ComposeResult:
            """The panels, and the keys below."""
            with VerticalScroll(id="peers"):
                yield Static("asking ...", id="text", markup=False)
            yield Footer()

        def on_mount(self) -> None:
            """Look now and then every second."""
            self.set_interval(REFRESH_S, self.look)
            self.call_later(self.look)

        async def look(self) -> None:
            """Ask every peer and show what they say."""
            answers = await statuses(folder)
            width = max(20, self.size.width - 4)
            panels = [panel(answer, losses_of(Path(answer["directory"])), width) for answer in answers]
            empty = f"no peer is running in {folder}\nstart one with: swarm join LINK"
            self.query_one("#text", Static).update("\n\n".join(panels) or empty)

        async def action_verb(self, verb: str) -> None:
            """Pause or resume every peer."""
            for answer in await statuses(folder):
                await ask(Path(answer["directory"]), verb)
            await self.look()

    return Top()
