"""`swarm status`, `pause`, `snooze`, `resume`, `finish` and `stop`: talk to this machine's daemons over their control sockets."""

from __future__ import annotations

import asyncio
import re
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from swarm.cli.output import print_fields, print_json
from swarm.cli.top import held_out
from swarm.config import PeerSettings, load
from swarm.control import SOCKET_NAME, TIMEOUT_S, ask
from swarm.errors import NotRunning, SwarmError, UsageError
from swarm.units import format_rate, format_size

DirOption = Annotated[Path | None, typer.Option("--dir", help="The peer's folder, if it isn't the configured one.")]
JsonOption = Annotated[bool, typer.Option("--json", help="One line of JSON.")]
GpuOption = Annotated[str | None, typer.Option("--gpu", help="Only the peer on this GPU; by default all of this machine.")]

EFFECT_S = 2.0
LOOK_EVERY_S = 0.1
UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def status(data_dir: DirOption = None, as_json: JsonOption = False) -> None:
    """What the peer on this machine is doing, and why."""
    answers = _ask_all(_folders(_folder(data_dir)), "status")
    if as_json:
        print_json(answers[0] if len(answers) == 1 else answers)
        return
    for answer in answers:
        print_fields(_summary(answer))


def pause(data_dir: DirOption = None, gpu: GpuOption = None, as_json: JsonOption = False) -> None:
    """Stop training now and free the device."""
    _tell(data_dir, gpu, "pause", as_json)


def snooze(
    duration: Annotated[str, typer.Argument(help="How long: 30m, 2h, 1d.")],
    data_dir: DirOption = None,
    gpu: GpuOption = None,
    as_json: JsonOption = False,
) -> None:
    """Pause for a while; training goes on by itself."""
    _tell(data_dir, gpu, "snooze", as_json, seconds=parse_duration(duration))


def resume(data_dir: DirOption = None, gpu: GpuOption = None, as_json: JsonOption = False) -> None:
    """Go on training after a pause."""
    _tell(data_dir, gpu, "resume", as_json)


def finish(data_dir: DirOption = None, gpu: GpuOption = None, as_json: JsonOption = False) -> None:
    """Complete the round, get the receipt, then stop."""
    _tell(data_dir, gpu, "finish", as_json)


def stop(data_dir: DirOption = None, gpu: GpuOption = None, as_json: JsonOption = False) -> None:
    """Stop the peer now."""
    _tell(data_dir, gpu, "stop", as_json)


def parse_duration(text: str) -> float:
    """Seconds in `90s`, `30m`, `2h`, `1d` or `1h30m`. Raises `UsageError`."""
    parts = re.findall(r"(\d+(?:\.\d+)?)([smhd])", text.lower())
    if not parts or "".join(number + unit for number, unit in parts) != text.lower().replace(" ", ""):
        raise UsageError(f"{text!r} is not a duration", "write for example 30m, 2h or 1d")
    return sum(float(number) * UNITS_S[unit] for number, unit in parts)


def _tell(data_dir: Path | None, gpu: str | None, verb: str, as_json: bool, **arguments: Any) -> None:
    folders = _folders(_folder(data_dir), gpu)
    answers = _settled(folders, _ask_all(folders, verb, **arguments))
    if as_json:
        print_json(answers[0] if len(answers) == 1 else answers)
        return
    for answer in answers:
        typer.echo(f"{answer['peer_id']}: {verb} accepted, {_now(answer)}")


def _settled(folders: list[Path], answers: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The answers once the verb has taken effect, or after two seconds with what it waits for."""
    deadline = time.monotonic() + EFFECT_S
    while any(answer.get("waits_for") for answer in answers) and time.monotonic() < deadline:
        time.sleep(LOOK_EVERY_S)
        try:
            fresh = _ask_all(folders, "status", EFFECT_S)
        except SwarmError:
            return [_gone(answer) for answer in answers]
        answers = [{**now, "accepted": answer["accepted"]} for now, answer in zip(fresh, answers, strict=True)]
    return answers


def _gone(answer: dict[str, Any]) -> dict[str, Any]:
    """A peer that doesn't answer any more has ended, if it was to."""
    return {**answer, "waits_for": "", "state": "stopped"} if answer["accepted"] in ("finish", "stop") else answer


def _now(answer: dict[str, Any]) -> str:
    detail = f" ({answer['detail']})" if answer.get("detail") else ""
    waiting = answer.get("waits_for")
    return f"waits for {waiting}" if waiting else f"now {answer['state']}{detail}"


def _folder(data_dir: Path | None) -> Path:
    return load(PeerSettings, {"data_dir": data_dir}).data_dir


def _folders(folder: Path, gpu: str | None = None) -> list[Path]:
    """Folders of the running peers, or of the one on a GPU. Raises `NotRunning`."""
    folders = [path.parent for path in sorted([*folder.glob(SOCKET_NAME), *folder.glob(f"gpu-*/{SOCKET_NAME}")])]
    if not folders:
        raise NotRunning(f"no peer is running in {folder}", "start one with: swarm join LINK")
    if gpu is None:
        return folders
    devices = [answer["device"] for answer in _ask_all(folders, "status")]
    chosen = [path for path, device in zip(folders, devices, strict=True) if device in (gpu, f"cuda:{gpu}")]
    if not chosen:
        raise NotRunning(f"no peer is running on GPU {gpu}", f"running: {', '.join(devices)}")
    return chosen


def _ask_all(folders: list[Path], verb: str, timeout_s: float = TIMEOUT_S, **arguments: Any) -> list[dict[str, Any]]:
    async def everybody() -> list[dict[str, Any]]:
        return list(await asyncio.gather(*(ask(path, verb, timeout_s, **arguments) for path in folders)))

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
        **({"detail": answer["detail"]} if answer["detail"] else {}),
        **({"hint": answer["hint"]} if answer["hint"] and not answer["earning"] else {}),
        **({"waits for": answer["waits_for"]} if answer["waits_for"] else {}),
        "round": f"{answer['round']}, {answer['roster_size']} peers",
        **({"skipped": f"{answer['rounds_skipped']} rounds whose loss jumped"} if answer.get("rounds_skipped") else {}),
        "loss": "-" if loss is None else f"{loss:.4f} nats per token",
        **_experts(answer.get("experts")),
        **({"held-out loss": held_out(answer["evaluation"])} if answer.get("evaluation") else {}),
        "speed": f"{answer['tokens_per_s']:,.0f} tokens/s in the swarm",
        **_traffic(answer),
        **({"history": _history(answer["history"])} if "history" in answer else {}),
        "credits": ", ".join(f"{value:.6f} {state}" for state, value in earned.items()) or "none yet",
        "reports waiting": answer["reports_waiting"],
        "coordinator": "reachable" if answer["coordinator_reachable"] else "away; reports are kept and sent later",
        **({"warning": answer["warning"]} if answer.get("warning") else {}),
        **({"error": answer["error"]} if answer["error"] else {}),
    }


def _history(kept: dict[str, Any]) -> str:
    return f"{kept['rounds']}; {format_size(kept['size_bytes'])} of {format_size(kept['limit_bytes'])}"


def _experts(load: dict[str, Any] | None) -> dict[str, object]:
    """How evenly a mixture's experts are used; nothing for other models."""
    if load is None:
        return {}
    spread = f"busiest {load['busiest']:.2f}, idlest {load['idlest']:.2f} of an even share"
    return {"experts": f"{spread}; {load['unused']} of {load['experts']} unused in the last round"}


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
