"""`swarm status`, `pause`, `resume`, `finish` and `stop`: talk to the daemons of this machine over their control sockets."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated, Any

import typer

from swarm.cli.output import print_fields, print_json
from swarm.config import PeerSettings, load
from swarm.control import SOCKET_NAME, ask
from swarm.errors import NotRunning, SwarmError
from swarm.units import format_rate, format_size

DirOption = Annotated[Path | None, typer.Option("--dir", help="The peer's folder, if it isn't the configured one.")]
JsonOption = Annotated[bool, typer.Option("--json", help="One line of JSON.")]


def status(data_dir: DirOption = None, as_json: JsonOption = False) -> None:
    """What the peer on this machine is doing, and why."""
    answers = _ask_all(_folder(data_dir), "status")
    if as_json:
        print_json(answers[0] if len(answers) == 1 else answers)
        return
    for answer in answers:
        print_fields(_summary(answer))


def pause(data_dir: DirOption = None, as_json: JsonOption = False) -> None:
    """Stop training now and free the device."""
    _tell(data_dir, "pause", as_json)


def resume(data_dir: DirOption = None, as_json: JsonOption = False) -> None:
    """Go on training after a pause."""
    _tell(data_dir, "resume", as_json)


def finish(data_dir: DirOption = None, as_json: JsonOption = False) -> None:
    """Complete the round, get the receipt, then stop."""
    _tell(data_dir, "finish", as_json)


def stop(data_dir: DirOption = None, as_json: JsonOption = False) -> None:
    """Stop the peer now."""
    _tell(data_dir, "stop", as_json)


def _tell(data_dir: Path | None, verb: str, as_json: bool) -> None:
    answers = _ask_all(_folder(data_dir), verb)
    if as_json:
        print_json(answers[0] if len(answers) == 1 else answers)
        return
    for answer in answers:
        typer.echo(f"{answer['peer_id']}: {verb} accepted, now {answer['state']}")


def _folder(data_dir: Path | None) -> Path:
    return load(PeerSettings, {"data_dir": data_dir}).data_dir


def _ask_all(folder: Path, verb: str) -> list[dict[str, Any]]:
    folders = [path.parent for path in sorted([*folder.glob(SOCKET_NAME), *folder.glob(f"gpu-*/{SOCKET_NAME}")])]
    if not folders:
        raise NotRunning(f"no peer is running in {folder}", "start one with: swarm join LINK")

    async def everybody() -> list[dict[str, Any]]:
        return list(await asyncio.gather(*(ask(path, verb) for path in folders)))

    answers = asyncio.run(everybody())
    for path, answer in zip(folders, answers, strict=True):
        if "peer_id" not in answer:
            raise SwarmError(f"the peer in {path} says: {answer.get('error', 'nothing')}", "try again in a few seconds")
    return answers


def _summary(answer: dict[str, Any]) -> dict[str, object]:
    earned = answer["credits"]
    loss = answer["loss"]
    return {
        "peer": answer["peer_id"],
        "run": f"{answer['run_name']} ({answer['run_id'][:12]})",
        "state": f"{answer['state']}: {answer['explanation']}",
        "round": f"{answer['round']}, {answer['roster_size']} peers",
        "loss": "-" if loss is None else f"{loss:.4f} nats per token",
        "speed": f"{answer['tokens_per_s']:,.0f} tokens/s in the swarm",
        **_traffic(answer),
        "credits": ", ".join(f"{value:.6f} {state}" for state, value in earned.items()) or "none yet",
        "reports waiting": answer["reports_waiting"],
        "coordinator": "reachable" if answer["coordinator_reachable"] else "away; reports are kept and sent later",
        **({"error": answer["error"]} if answer["error"] else {}),
    }


def _traffic(answer: dict[str, Any]) -> dict[str, object]:
    """Bytes by period, and the caps with what they leave."""
    traffic = answer["traffic"]
    estimated = " (estimated)" if traffic.get("counted_at") == "stream" else ""
    sent = {"sent_bytes": answer["bytes_sent"], "received_bytes": answer["bytes_received"]}
    limits = {"up": traffic["max_upload_bytes_per_s"], "down": traffic["max_download_bytes_per_s"]}
    left, speed = traffic["quota_left_bytes"], traffic.get("upload_bytes_per_s", 0)
    return {
        "traffic": f"{_both(sent)} since the start{estimated}",
        "traffic, last round": _both(traffic["last_round"]),
        "traffic, today": _both(traffic["today"]),
        f"traffic, {traffic['month']['month']}": _both(traffic["month"]),
        **({"quota": f"{format_size(left)} of {format_size(traffic['quota_bytes'])} left"} if left is not None else {}),
        "uplink": format_rate(speed) if speed else "not measured yet",
        "caps": ", ".join(f"{format_rate(limit)} {way}" for way, limit in limits.items() if limit) or "none",
    }


def _both(volume: dict[str, Any]) -> str:
    return f"{format_size(volume['sent_bytes'])} sent, {format_size(volume['received_bytes'])} received"
