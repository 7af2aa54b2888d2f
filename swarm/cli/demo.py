"""`swarm demo`: a coordinator and several peers on this machine train a small model on the Python standard library."""

from __future__ import annotations

import asyncio
import shutil
import signal
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from swarm.cli.output import print_fields, print_table
from swarm.credits import FLOPS_PER_CREDIT
from swarm.errors import SwarmError, UsageError
from swarm.identity import Identity
from swarm.local import LocalPeer, LocalSwarm
from swarm.messages import JoinLink

if TYPE_CHECKING:
    from rich.table import Table

    from swarm.manifest import Manifest
    from swarm.rpc.v1.coordinator_pb2 import Balance, GetProgressResponse

MARKER = ".swarm-demo"
REFRESH_S = 0.5
PLAIN_EVERY_S = 5.0
VALIDATION_SAMPLES = 512
ROUNDS, INNER_STEPS = 20, 20
PEER_COLUMNS = ("peer", "state", "round", "loss", "tokens", "sent", "credits")
NUMBERS = ("round", "loss", "tokens", "sent", "credits")


def command(
    peers: Annotated[int, typer.Option("--peers", min=1, max=16, help="Peers to start.")] = 3,
    rounds: Annotated[
        int | None, typer.Option("--rounds", min=1, max=100_000, help="Rounds to train; about 4 minutes' by default.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seed of the initial weights.")] = 0,
    directory: Annotated[Path, typer.Option("--dir", help="Folder for everything that the demo writes.")] = Path("demo-run"),
    strategy: Annotated[str, typer.Option("--strategy", help="auto, diloco or sync.")] = "auto",
    inner_steps: Annotated[int | None, typer.Option("--inner-steps", min=1, help="Inner steps a round (not in sync).")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the outcome to this file.")] = None,
) -> None:
    """A coordinator and several peers on this machine.

    They find each other through hivemind's DHT, train a byte-level Llama on the Python standard library's own source, exchange
    updates directly, and earn credits. Another terminal may join meanwhile: the link is shown.

    Examples:

      swarm demo

      swarm demo --peers 4 --rounds 40 --json outcome.json
    """
    if strategy not in ("auto", "diloco", "sync"):
        raise UsageError(f"no such strategy: {strategy}", "choose auto, diloco or sync")
    _prepare(directory)
    pinned = rounds is not None or inner_steps is not None
    demo = Demo(directory, peers, rounds or ROUNDS, seed, strategy, inner_steps or INNER_STEPS, pinned)
    outcome = asyncio.run(demo.run())
    if json_file is not None:
        import json

        json_file.write_text(json.dumps(outcome, indent=1) + "\n")


def _prepare(directory: Path) -> None:
    """Use a new or empty folder, or one of an earlier demo, which is emptied."""
    if directory.exists() and any(directory.iterdir()) and not (directory / MARKER).exists():
        raise UsageError(f"{directory} is not empty and not of an earlier demo", "choose another folder with --dir")
    if directory.exists():
        shutil.rmtree(directory)
    directory.mkdir(parents=True)
    (directory / MARKER).touch()


@dataclass
class Demo:
    """One demonstration, from the data to the closing report."""

    directory: Path
    peer_count: int
    rounds: int
    seed: int
    strategy: str
    inner_steps: int
    pinned: bool
    started_s: float = field(default_factory=time.monotonic)

    async def run(self) -> dict[str, Any]:
        """Train, then check, export and report. Ctrl-C ends everything that was started."""
        interrupted = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, interrupted.set)
        typer.echo("preparing data, tokenizer and manifest ...", err=True)
        manifest = await asyncio.to_thread(self._make_run)
        async with LocalSwarm(self.directory) as swarm:
            work = asyncio.create_task(self._train_and_report(swarm, manifest))
            stop = asyncio.create_task(interrupted.wait())
            await asyncio.wait({work, stop}, return_when=asyncio.FIRST_COMPLETED)
            stop.cancel()
            if work.done():
                return work.result()
            work.cancel()
            with suppress(asyncio.CancelledError):
                await work
        raise KeyboardInterrupt

    def _make_run(self) -> Manifest:
        import yaml

        from peer.recipes import demo_manifest

        manifest = demo_manifest(
            self.directory / "files",
            self.seed,
            peers=self.peer_count,
            rounds=self.rounds,
            inner_steps=self.inner_steps,
            strategy=self.strategy,
            pinned=self.pinned,
        )
        self.rounds = manifest.rounds.total
        (self.directory / "run.yaml").write_text(yaml.safe_dump(manifest.model_dump(mode="json"), sort_keys=False))
        Identity.generate().save(self.directory / "owner.key")
        return manifest

    async def _train_and_report(self, swarm: LocalSwarm, manifest: Manifest) -> dict[str, Any]:
        link = await swarm.start_coordinator(self.directory / "run.yaml", self.directory / "owner.key")
        typer.echo(
            f"coordinator http://{swarm.metrics}/\njoin from another terminal with:\n  swarm join '{link}' --cpu\n", err=True
        )
        for index in range(self.peer_count):
            options = ("--files", str(self.directory / "files")) if index == 0 else ()
            await swarm.join(f"peer-{index}", *options)
        await self._watch(swarm)
        return await self._report(swarm, manifest, JoinLink.parse(link))

    async def _watch(self, swarm: LocalSwarm) -> None:
        with _screen() as show:
            while any(peer.running for peer in swarm.peers):
                if not any(peer.history() for peer in swarm.peers):
                    _check_ended_well(swarm.peers)
                statuses = await asyncio.gather(*(peer.status() for peer in swarm.peers))
                show(self.rounds, swarm.peers, statuses)
                await asyncio.sleep(REFRESH_S)
        _check_ended_well(swarm.peers)

    async def _report(self, swarm: LocalSwarm, manifest: Manifest, link: JoinLink) -> dict[str, Any]:
        typer.echo("\nchecking the ledger, measuring the held-out loss, exporting ...", err=True)
        balances, progress = await _ask_coordinator(link)
        verified = await self._verify_ledger(swarm, link)
        results = await asyncio.to_thread(self._evaluate, manifest, balances, progress)
        statuses = [await peer.status() for peer in swarm.peers]
        outcome = _outcome(self, manifest, swarm.peers, statuses, balances, progress, verified, results)
        _print_report(outcome, balances, results["sample"])
        return outcome

    async def _verify_ledger(self, swarm: LocalSwarm, link: JoinLink) -> bool:
        """`swarm ledger verify`, as anybody would run it, with one volunteer's receipts."""
        from swarm.local import swarm_command

        receipts = swarm.peers[0].directory / "receipts"
        command = [*swarm_command(), "ledger", "verify", str(link), "--receipts", str(receipts)]
        log = (self.directory / "ledger-verify.log").open("wb")
        with log:
            process = await asyncio.create_subprocess_exec(*command, stdout=log, stderr=log)
            return await process.wait() == 0

    def _evaluate(self, manifest: Manifest, balances: Sequence[Balance], progress: GetProgressResponse) -> dict[str, Any]:
        from peer.outcome import export, held_out_losses, newest_weights, provenance_of, sample

        files = self.directory / "files"
        snapshot = newest_weights(self.directory / "peer-0", manifest)
        losses = held_out_losses(manifest, files, snapshot.state.theta, VALIDATION_SAMPLES)
        provenance = provenance_of(snapshot, progress, balances, losses.last)
        model = export(manifest, files, snapshot, self.directory / "model", provenance)
        return {"losses": losses, "model": model, "sample": sample(model)}


def _check_ended_well(peers: Sequence[LocalPeer]) -> None:
    """Raise `SwarmError` for a peer that has failed; before the first round the others would wait for it for ever."""
    for peer in peers:
        if peer.process.returncode:
            raise SwarmError(f"{peer.name} ended with exit code {peer.process.returncode}", f"see {peer.directory / 'log'}")


async def _ask_coordinator(link: JoinLink) -> tuple[list[Balance], GetProgressResponse]:
    from swarm.rpc.client import CoordinatorClient

    async with await CoordinatorClient.connect(link) as client:
        return list((await client.credits(limit=100)).balances), await client.progress()


def _outcome(
    demo: Demo,
    manifest: Manifest,
    peers: Sequence[LocalPeer],
    statuses: Sequence[dict[str, Any]],
    balances: Sequence[Balance],
    progress: GetProgressResponse,
    verified: bool,
    results: dict[str, Any],
) -> dict[str, Any]:
    histories = [peer.history() for peer in peers]
    rounds = [line for line in histories[0] if line["tokens"]]
    overheads = sorted(line["overhead_s"] for lines in histories for line in lines if line["tokens"])
    by_peer = {balance.peer_id: balance for balance in balances}
    return {
        "run_id": manifest.run_id,
        "wall_s": time.monotonic() - demo.started_s,
        "rounds": len(rounds),
        "tokens": progress.tokens,
        "loss": {
            "train_first": rounds[0]["loss"],
            "train_last": rounds[-1]["loss"],
            "validation_first": results["losses"].first,
            "validation_last": results["losses"].last,
        },
        "state_roots_agree": _roots_agree(histories),
        "round_overhead_s": {"p50": statistics.median(overheads), "p95": overheads[int(0.95 * (len(overheads) - 1))]},
        "bytes_sent_total": sum(status["bytes_sent"] for status in statuses),
        "peers": [_peer_outcome(status, by_peer.get(status["peer_id"])) for status in statuses],
        "ledger": {"size": progress.ledger_size, "root": progress.ledger_root.hex(), "verified": verified},
        "export_dir": str(results["model"]),
    }


def _peer_outcome(status: dict[str, Any], balance: Balance | None) -> dict[str, Any]:
    names = ("pending", "verified", "final")
    flops = (balance.pending_flops, balance.verified_flops, balance.final_flops) if balance else ("0", "0", "0")
    return {
        "peer_id": status["peer_id"],
        "tokens": status["tokens"],
        "bytes_sent": status["bytes_sent"],
        "bytes_received": status["bytes_received"],
        "rounds": status["rounds"],
        "credits": {name: int(value or 0) / FLOPS_PER_CREDIT for name, value in zip(names, flops, strict=True)},
    }


def _roots_agree(histories: Sequence[Sequence[dict[str, Any]]]) -> bool:
    """Whether all peers had one and the same root after every round that they took part in."""
    roots: dict[int, set[str]] = {}
    for lines in histories:
        for line in lines:
            roots.setdefault(line["round"], set()).add(line["root"])
    return bool(roots) and all(len(found) == 1 for found in roots.values())


def _earned(balance: Balance) -> float:
    """Credits that are verified or final."""
    return (int(balance.verified_flops or 0) + int(balance.final_flops or 0)) / FLOPS_PER_CREDIT


def _print_report(outcome: dict[str, Any], balances: Sequence[Balance], text: str) -> None:
    loss, ledger = outcome["loss"], outcome["ledger"]
    verdict = "verified" if ledger["verified"] else "DOES NOT VERIFY"
    fields: dict[str, object] = {
        "run": outcome["run_id"],
        "rounds": f"{outcome['rounds']} in {outcome['wall_s']:.0f} s",
        "held-out loss": f"{loss['validation_first']:.3f} -> {loss['validation_last']:.3f} nats per token",
        "overhead": f"{outcome['round_overhead_s']['p50']:.3f} s a round in the median",
        "state roots": "equal on all peers after every round" if outcome["state_roots_agree"] else "DIFFER",
        "ledger": f"{ledger['size']} entries, root {ledger['root'][:16]}, {verdict}",
        "model": outcome["export_dir"],
    }
    print_fields(fields)
    rows = [
        (
            item.peer_id,
            f"{_earned(item):.6f}",
            item.rounds,
            item.tokens,
        )
        for item in balances
    ]
    print_table(("peer", "credits", "rounds", "tokens"), rows, numbers=("credits", "rounds", "tokens"))
    typer.echo(f"\nthe model writes:\n{text}")


@contextmanager
def _screen() -> Iterator[Any]:
    """A live table on a terminal, a line now and then elsewhere."""
    from rich.console import Console
    from rich.live import Live

    console = Console(stderr=True, highlight=False)
    if not console.is_terminal:
        yield _plain_lines(console)
        return
    with Live(console=console, auto_refresh=False) as live:
        yield lambda rounds, peers, statuses: live.update(_table(rounds, peers, statuses), refresh=True)


def _plain_lines(console: Any) -> Any:
    shown_s = 0.0

    def show(rounds: int, peers: Sequence[LocalPeer], statuses: Sequence[dict[str, Any]]) -> None:
        nonlocal shown_s
        if time.monotonic() - shown_s < PLAIN_EVERY_S:
            return
        shown_s = time.monotonic()
        console.print(_headline(rounds, statuses))

    return show


def _headline(rounds: int, statuses: Sequence[dict[str, Any]]) -> str:
    known = [status for status in statuses if status]
    done = max((status["round"] for status in known), default=0)
    losses = [status["loss"] for status in known if status["loss"] is not None]
    speed = max((status["tokens_per_s"] for status in known), default=0.0)
    sent = sum(status["bytes_sent"] for status in known)
    states = ", ".join(sorted({status["state"] for status in known})) or "starting"
    loss = f"{losses[0]:.3f}" if losses else "-"
    return f"round {done}/{rounds}  loss {loss}  {speed:,.0f} tokens/s  {sent / 1e6:,.1f} MB sent  {len(known)} peers  {states}"


def _table(rounds: int, peers: Sequence[LocalPeer], statuses: Sequence[dict[str, Any]]) -> Table:
    from rich.table import Table

    table = Table(title=_headline(rounds, statuses), title_justify="left", box=None, pad_edge=False)
    for column in PEER_COLUMNS:
        table.add_column(column, justify="right" if column in NUMBERS else "left")
    for peer, status in zip(peers, statuses, strict=True):
        table.add_row(peer.name, *_cells(status))
    return table


def _cells(status: dict[str, Any]) -> tuple[str, ...]:
    if not status:
        return ("starting", "", "", "", "", "")
    loss = status["loss"]
    return (
        status["state"],
        str(status["round"]),
        "-" if loss is None else f"{loss:.3f}",
        f"{status['tokens']:,}",
        f"{status['bytes_sent'] / 1e6:.1f} MB",
        f"{sum(status['credits'].values()):.6f}",
    )
