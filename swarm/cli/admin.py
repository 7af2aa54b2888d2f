"""`swarm admin`: what a run's operator sees and orders, over the coordinator's admin address. Every order is kept, signed."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from google.protobuf.message import Message

from swarm.cli.output import print_fields, print_json, print_table
from swarm.errors import LinkError, UsageError
from swarm.identity import Identity
from swarm.messages import JoinLink
from swarm.rpc.v1.coordinator_pb2 import ExecuteResponse

LINK_VARIABLE = "SWARM_ADMIN_LINK"

app = typer.Typer(help="Watch and steer a run that you operate.", no_args_is_help=True, rich_markup_mode=None)

LinkOption = Annotated[str | None, typer.Option("--link", envvar=LINK_VARIABLE, help="Admin link that the coordinator prints.")]
KeyOption = Annotated[Path | None, typer.Option("--key", help="Your admin key; admin.key in your data folder by default.")]
JsonOption = Annotated[bool, typer.Option("--json", help="One line of JSON.")]
LimitOption = Annotated[int, typer.Option("--limit", min=1, max=10_000, help="At most so many lines.")]
PeerArgument = Annotated[str, typer.Argument(help="Peer id.")]
ReasonOption = Annotated[str, typer.Option("--reason", help="Why; kept in the log, and told to the peer.")]


@app.command()
def key(key: KeyOption = None, as_json: JsonOption = False) -> None:
    """Show your admin key's id for SWARM_COORDINATOR_ADMIN_KEYS; the key is made at first use."""
    path = _key_path(key)
    fields: dict[str, object] = {"admin": Identity.load_or_create(path).peer_id, "path": str(path)}
    print_json(fields) if as_json else print_fields(fields)


@app.command()
def peers(link: LinkOption = None, key: KeyOption = None, limit: LimitOption = 100, as_json: JsonOption = False) -> None:
    """Who is suspended and who is alive."""
    _show_peers(_execute(link, key, action="peers", limit=limit), as_json)


@app.command()
def suspend(
    peer_id: PeerArgument, reason: ReasonOption = "", link: LinkOption = None, key: KeyOption = None, as_json: JsonOption = False
) -> None:
    """Take nothing more from a key, and tell nobody where it is."""
    _show_peers(_execute(link, key, action="suspend", peer_id=peer_id, reason=reason), as_json)


@app.command()
def reinstate(
    peer_id: PeerArgument, reason: ReasonOption = "", link: LinkOption = None, key: KeyOption = None, as_json: JsonOption = False
) -> None:
    """Let a suspended key take part again."""
    _show_peers(_execute(link, key, action="reinstate", peer_id=peer_id, reason=reason), as_json)


@app.command()
def invite(
    peer_id: PeerArgument, reason: ReasonOption = "", link: LinkOption = None, key: KeyOption = None, as_json: JsonOption = False
) -> None:
    """Admit a key to a run with an allow-list that doesn't name it."""
    _show_peers(_execute(link, key, action="invite", peer_id=peer_id, reason=reason), as_json)


@app.command()
def runs(link: LinkOption = None, key: KeyOption = None, as_json: JsonOption = False) -> None:
    """The coordinator's run, its state and its numbers."""
    _show_runs(_execute(link, key, action="runs"), as_json)


@app.command()
def pause(reason: ReasonOption = "", link: LinkOption = None, key: KeyOption = None, as_json: JsonOption = False) -> None:
    """Let all peers complete their round and rest, admit nobody new and give no grants."""
    _show_runs(_execute(link, key, action="pause", reason=reason), as_json)


@app.command()
def resume(reason: ReasonOption = "", link: LinkOption = None, key: KeyOption = None, as_json: JsonOption = False) -> None:
    """Go on after a pause; peers come back within five minutes."""
    _show_runs(_execute(link, key, action="resume", reason=reason), as_json)


@app.command()
def finish(reason: ReasonOption = "", link: LinkOption = None, key: KeyOption = None, as_json: JsonOption = False) -> None:
    """End the run for good: peers complete their round and end. Reports of what was done are still taken."""
    _show_runs(_execute(link, key, action="finish", reason=reason), as_json)


@app.command("audit-rate")
def audit_rate(
    rate: Annotated[float, typer.Argument(help="Share of the contributions, more than 0 and at most 1.")],
    reason: ReasonOption = "",
    link: LinkOption = None,
    key: KeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """Have another share of the contributions audited than the manifest says, from the next round on; the ledger tells."""
    _show_runs(_execute(link, key, action="audit-rate", rate=rate, reason=reason), as_json)


@app.command()
def log(link: LinkOption = None, key: KeyOption = None, limit: LimitOption = 100, as_json: JsonOption = False) -> None:
    """What was ordered by whom, newest first."""
    answer = _execute(link, key, action="log", limit=limit)
    if as_json:
        print_json({"log": _dicts(answer.log)})
        return
    rows = [(_time(line.at_us), line.action, line.about, line.outcome, line.reason, line.admin) for line in answer.log]
    print_table(("when", "what", "about", "outcome", "reason", "by"), rows)


def _execute(link: str | None, key: Path | None, **command: Any) -> ExecuteResponse:
    from swarm.rpc.admin import AdminClient

    if not link:
        raise LinkError("no admin link", f"give the one that the coordinator prints with --link or in {LINK_VARIABLE}")
    path = _key_path(key)
    if not path.exists():
        raise UsageError(f"no admin key at {path}", "make one with: swarm admin key")
    admin = Identity.load(path)

    async def execute() -> ExecuteResponse:
        async with await AdminClient.connect(JoinLink.parse(link)) as client:
            return await client.execute(admin, time.time(), **command)

    return asyncio.run(execute())


def _key_path(key: Path | None) -> Path:
    from swarm.config import data_path

    return key or data_path() / "admin.key"


def _show_peers(answer: ExecuteResponse, as_json: bool) -> None:
    if as_json:
        print_json({"peers": _dicts(answer.peers)})
        return
    rows = [
        (peer.peer_id, "yes" if peer.admitted else "no", f"{peer.age_s:.0f} s" if peer.alive else "", peer.round, peer.suspended)
        for peer in answer.peers
    ]
    print_table(("peer", "admitted", "heard", "round", "suspended"), rows, numbers=("heard", "round"))


def _show_runs(answer: ExecuteResponse, as_json: bool) -> None:
    if as_json:
        print_json({"runs": _dicts(answer.runs)})
        return
    for run in answer.runs:
        print_fields(
            {
                "run": run.name,
                "run id": run.run_id.hex(),
                "state": run.state,
                "confirmed round": run.confirmed_round,
                "peers alive": run.peers_alive,
                "peers admitted": run.peers_admitted,
                "ledger entries": run.ledger_size,
                "audit rate": run.audit_rate or "the manifest's",
            }
        )


def _dicts(messages: Iterable[Message]) -> list[dict[str, object]]:
    """Flat messages as plain values, bytes in hexadecimal."""
    return [{field.name: _plain(getattr(each, field.name)) for field in each.DESCRIPTOR.fields} for each in messages]


def _plain(value: object) -> object:
    return value.hex() if isinstance(value, bytes) else value


def _time(at_us: int) -> str:
    return datetime.fromtimestamp(at_us / 1e6, UTC).isoformat(sep=" ", timespec="seconds")
