"""`swarm join`: the volunteer's daemon, one peer per device."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Coroutine
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from swarm.cli.output import LAST_LINES_S, configure_logging
from swarm.config import LINK_HELP, GovernorSettings, PeerSettings, find_link, load, remember_link
from swarm.errors import DiskFull, LinkError, UsageError
from swarm.messages import JoinLink
from swarm.notify import SOCKET_VARIABLE, WATCHDOG_VARIABLE, notify
from swarm.tickets import from_text

if TYPE_CHECKING:
    from peer.daemon import Daemon, DaemonOptions
    from peer.held import Held
    from swarm.log_writer import LogWriter

LINK_WAIT_S = 120.0
WATCH_S = 60.0
CPU = "cpu"

_early: list[int] = []  # signals between two programs


def command(
    link: Annotated[str | None, typer.Argument(help=LINK_HELP)] = None,
    gpu: Annotated[str | None, typer.Option("--gpu", help="A GPU's number, several (0,1), or auto.")] = None,
    cpu: Annotated[bool, typer.Option("--cpu", help="Train on the processor.")] = False,
    data_dir: Annotated[Path | None, typer.Option("--dir", help="Folder for state, receipts and checkpoints.")] = None,
    identity: Annotated[Path | None, typer.Option("--identity", help="The peer's key file; made at the first start.")] = None,
    files: Annotated[Path | None, typer.Option("--files", help="Folder where the run's data files lie already.")] = None,
    mirror: Annotated[
        str | None, typer.Option("--mirror", help="Web folder that has the run's data files, such as https://example.org/run.")
    ] = None,
    data: Annotated[
        Path | None, typer.Option("--data", help="Folder with private shards: used where they are, never sent to anybody.")
    ] = None,
    ticket: Annotated[str | None, typer.Option("--ticket", help="Invitation, where the run asks for one.")] = None,
    link_file: Annotated[Path | None, typer.Option("--link-file", help="File that holds the link; waited for.")] = None,
    listen: Annotated[str | None, typer.Option("--listen", help="host:port for other peers; port 0 = any free one.")] = None,
    announce: Annotated[str | None, typer.Option("--announce", help="host:port at which others can dial us.")] = None,
    no_inbound: Annotated[bool, typer.Option("--no-inbound", help="Accept no connections, only dial out.")] = False,
    metrics: Annotated[str | None, typer.Option("--metrics", help="host:port for Prometheus; none by default.")] = None,
    threads: Annotated[int | None, typer.Option("--threads", help="Processor threads for training; 0 = all.")] = None,
    max_upload: Annotated[
        str | None, typer.Option("--max-upload", help="Most to send to other peers, such as 10Mbit/s; 0 = no limit.")
    ] = None,
    max_download: Annotated[
        str | None, typer.Option("--max-download", help="Most to receive from other peers, such as 50Mbit/s; 0 = no limit.")
    ] = None,
    monthly_quota: Annotated[
        str | None,
        typer.Option("--monthly-quota", help="Sent and received per calendar month (UTC), such as 200GB; 0 = no limit."),
    ] = None,
    keep_history: Annotated[
        str | None,
        typer.Option("--keep-history", help="Disk for past rounds, such as 50GB, for swarm export --round; 0 = keep none."),
    ] = None,
    log_level: Annotated[str | None, typer.Option("--log-level", help="debug, info, warning or error.")] = None,
) -> None:
    """Train with your GPU and earn credits.

    First Ctrl-C completes the round and stops; the second stops at once.

    Examples:

      swarm join swarm://host:4300/...#... --gpu 0

      swarm join --gpu 0 --max-upload 10Mbit/s --max-download 50Mbit/s --monthly-quota 200GB

      SWARM_LINK=swarm://... swarm join --cpu --threads 2
    """
    flags = {
        "gpu": CPU if cpu else gpu,
        "data_dir": data_dir,
        "identity": identity or (data_dir / "identity.key" if data_dir else None),
        "ticket": ticket,
        "files": files,
        "mirror": mirror,
        "data": data,
        "link_file": link_file,
        "listen": listen,
        "announce": announce,
        "inbound": False if no_inbound else None,
        "metrics": metrics,
        "threads": threads,
        "max_upload": max_upload,
        "max_download": max_download,
        "monthly_quota": monthly_quota,
        "keep_history": keep_history,
        "log_level": log_level,
    }
    settings = load(PeerSettings, flags)
    log = configure_logging(settings.log_level)
    _check(settings)
    target = _read_link(link, settings)
    remember_link(settings.data_dir, target)
    from peer.held import Held, Waiting

    held = Held.load(settings.data_dir)
    rules = load(GovernorSettings)
    if held is not None and held.holds.first is not None:
        waiting = Waiting(held, settings.data_dir, settings.metrics, rules)
        _give_way(asyncio.run(_to_the_end(waiting.wait())), settings, log)
        return
    devices = _devices(settings.gpu)
    if len(devices) > 1:
        raise typer.Exit(_run_several(devices, str(target), settings))
    from peer.daemon import Daemon

    daemon = Daemon.create(_options(target, devices[0], settings, rules, held))
    if held is None:
        _welcome(daemon, settings)
    else:
        daemon.status.carry_on(held.status)
    _give_way(asyncio.run(_serve(daemon)), settings, log)


def _give_way(held: Held | None, settings: PeerSettings, log: LogWriter) -> None:
    """Start this program anew in the same process, to wait out a pause or to train again; nothing to do at the end.

    Signals that arrive meanwhile wait until the new program can take them.
    """
    if held is None:
        return
    from peer.held import HELD_VARIABLE

    held.save(settings.data_dir)
    signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
    for number in _early:
        signal.pthread_kill(threading.get_ident(), number)
    os.environ[HELD_VARIABLE] = "1"
    log.drain(LAST_LINES_S)
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])  # noqa: S606 - the same program again


def _check(settings: PeerSettings) -> None:
    """Raise `UsageError` for what can be seen to be wrong before anything is started, `DiskFull` where nothing can be kept."""
    for option in ("listen", "announce", "metrics"):
        address = str(getattr(settings, option))
        _, separator, port = address.rpartition(":")
        if address and not (separator and port.isascii() and port.isdigit() and int(port) < 65536):
            raise UsageError(f"--{option} {address!r} is not an address", "an address looks like 0.0.0.0:4400 or [::]:4400")
    for folder, what in ((settings.files, "the run's data files"), (settings.data, "private shards")):
        if folder is not None and not folder.is_dir():
            raise UsageError(f"{folder} is not a folder", f"name the folder that holds {what}")
    if settings.mirror:
        check_address(settings.mirror)
    try:
        settings.data_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryFile(dir=settings.data_dir) as probe:
            probe.write(bytes(1 << 16))
            probe.flush()
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        kind, hint = (DiskFull, "free some space") if full else (UsageError, "check its owner")
        raise kind(
            f"can't write to {settings.data_dir}: {error.strerror}", f"{hint}, or choose another place with --dir"
        ) from error


def check_address(address: str) -> str:
    """The address of a mirror, without a slash at its end. Raises `UsageError` for what is no web folder."""
    import httpx

    try:
        url = httpx.URL(address)
    except httpx.InvalidURL as error:
        raise UsageError(f"{address!r} is no web address: {error}", "it looks like https://example.org/run") from error
    if url.scheme not in ("http", "https") or not url.host or url.query or url.fragment:
        raise UsageError(f"{address!r} is no web folder", "it looks like https://example.org/run")
    return address.rstrip("/")


def _read_link(argument: str | None, settings: PeerSettings) -> JoinLink:
    if argument or settings.link_file is None:
        return find_link(argument)
    deadline = time.monotonic() + LINK_WAIT_S
    while not settings.link_file.exists():
        if time.monotonic() > deadline:
            raise LinkError(f"no link in {settings.link_file}", "the coordinator writes it with --link-file")
        time.sleep(0.2)
    return JoinLink.parse(settings.link_file.read_text())


def _devices(spec: str) -> list[str]:
    """The devices to train on, by name: `cpu`, or `cuda:N`. torch is asked only where a GPU is wanted."""
    if spec.strip().lower() == CPU:
        return [CPU]
    from peer.device import choose_devices

    return [str(device) for device in choose_devices(spec)]


def _options(link: JoinLink, device: str, settings: PeerSettings, rules: GovernorSettings, held: Held | None) -> DaemonOptions:
    import torch

    from peer.daemon import DaemonOptions

    return DaemonOptions(
        link=link,
        directory=settings.data_dir,
        identity_path=settings.identity,
        device=torch.device(device),
        listen=settings.listen,
        announce=settings.announce,
        inbound=settings.inbound,
        metrics=settings.metrics,
        files=settings.files,
        mirror=check_address(settings.mirror) if settings.mirror else "",
        data=settings.data,
        threads=settings.threads,
        max_upload=settings.max_upload,
        max_download=settings.max_download,
        monthly_quota=settings.monthly_quota,
        keep_history=settings.keep_history,
        check_traffic=settings.check_traffic,
        plant=settings.plant,
        traces=settings.traces,
        ticket=from_text(settings.ticket) if settings.ticket else None,
        rules=rules,
        control_socket=held.control_socket if held is not None else None,
    )


def _welcome(daemon: Daemon, settings: PeerSettings) -> None:
    typer.echo(f"peer       {daemon.identity.peer_id}", err=True)
    typer.echo(f"key        {settings.identity} (back it up with: swarm identity backup)", err=True)
    typer.echo(f"device     {daemon.options.device}", err=True)
    if settings.plant:
        typer.echo("planting   audits of this key fail on purpose; it will be suspended, so use one of no other use", err=True)
    typer.echo("Ctrl-C completes the round and stops; a second one stops at once.", err=True)


async def _serve(daemon: Daemon) -> Held | None:
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, daemon.wish, "finish")
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGINT, signal.SIGTERM))
    return await _to_the_end(daemon.serve())


async def _to_the_end(work: Coroutine[Any, Any, Held | None]) -> Held | None:
    """Its outcome, while signals do no harm afterwards: the next program's wait for it, and at the end they change nothing."""
    held = None
    try:
        held = await work
    finally:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)
            signal.signal(number, signal.SIG_IGN if held is None else _keep_for_next)
    return held


def _keep_for_next(number: int, frame: FrameType | None) -> None:
    _early.append(number)


def _run_several(devices: list[str], link: str, settings: PeerSettings) -> int:
    """One process per device, each with its own key and folder, and an equal share of the caps; signals are passed on."""
    environment = {name: value for name, value in os.environ.items() if name not in (SOCKET_VARIABLE, WATCHDOG_VARIABLE)}
    children = [subprocess.Popen(_child_command(device, link, settings, len(devices)), env=environment) for device in devices]

    def pass_on(number: int, frame: object) -> None:
        for child in children:
            child.send_signal(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, pass_on)
    notify("READY=1")
    while running := [child for child in children if child.poll() is None]:
        notify(f"WATCHDOG=1\nSTATUS={len(running)} of {len(children)} peers are running")
        with contextlib.suppress(subprocess.TimeoutExpired):
            running[0].wait(WATCH_S)
    return max(child.returncode for child in children)


def _child_command(device: str, link: str, settings: PeerSettings, devices: int) -> list[str]:
    index = device.rpartition(":")[2]
    folder = settings.data_dir / f"gpu-{index}"
    command = [sys.executable, "-m", "swarm.cli.main", "join", link, "--gpu", index, "--dir", str(folder)]
    command += ["--listen", settings.listen.rpartition(":")[0] + ":0", "--log-level", settings.log_level]
    for option, given in (("--files", settings.files), ("--data", settings.data)):
        if given is not None:
            command += [option, str(given)]
    for option, said in (("--mirror", settings.mirror), ("--ticket", settings.ticket)):
        if said:
            command += [option, said]
    command += ["--max-upload", _share(settings.max_upload, devices, "B/s")]
    command += ["--max-download", _share(settings.max_download, devices, "B/s")]
    command += ["--monthly-quota", _share(settings.monthly_quota, devices, "B")]
    command += ["--keep-history", _share(settings.keep_history, devices, "B")]
    if not settings.inbound:
        command.append("--no-inbound")
    os.makedirs(folder, mode=0o700, exist_ok=True)
    return command


def _share(amount: int, devices: int, unit: str) -> str:
    """A cap's share for one of several devices; 0 stays 0, which is no limit."""
    return f"{amount // devices}{unit}"
