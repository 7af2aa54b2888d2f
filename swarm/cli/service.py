"""`swarm service`: a systemd unit for this installation, as text or installed for one user."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

from swarm.cli.output import print_fields
from swarm.config import LINK_HELP, find_link
from swarm.errors import SwarmError, UsageError

NAME = "swarm-peer.service"
app = typer.Typer(help="Start with the machine: print, install, uninstall.", no_args_is_help=True, rich_markup_mode=None)

GpuOption = Annotated[str, typer.Option("--gpu", help="A GPU's number, several (0,1), auto, or cpu.")]
UserOption = Annotated[bool, typer.Option("--user", help="For your own account, without root.")]

COMMON = """\
Type=notify
NotifyAccess=main
# Fetching the run's data may take long; the control socket and the log tell how far it is.
TimeoutStartSec=infinity
WatchdogSec=5min
Environment=PYTHONUNBUFFERED=1
ExecStart={command} join {device}
Restart=on-failure
RestartSec=30
# Wrong arguments or link, refused key, old version, bad key file, no GPU, already running: starting again changes nothing.
RestartPreventExitStatus=2 10 12 13 14 15 21 22 30 51
# SIGTERM goes to the daemon only; its network process lives until the round is finished and the receipt is there.
KillSignal=SIGTERM
KillMode=mixed
TimeoutStopSec=15min
# Whoever sits at the machine goes first.
Nice=15
CPUWeight=20
IOSchedulingClass=idle
OOMScoreAdjust=500
TasksMax=1024

NoNewPrivileges=yes
RestrictAddressFamilies=AF_INET AF_INET6 AF_UNIX AF_NETLINK
RestrictNamespaces=yes
RestrictRealtime=yes
RestrictSUIDSGID=yes
LockPersonality=yes
SystemCallArchitectures=native
SystemCallFilter=@system-service
SystemCallErrorNumber=EPERM
UMask=0077
"""

USER_UNIT = """\
[Unit]
Description=swarm peer: trains a shared model on this machine

[Service]
# SWARM_LINK=swarm://... stands in this file.
EnvironmentFile=%E/swarm/peer.env
{common}
[Install]
WantedBy=default.target
"""

SYSTEM_UNIT = """\
[Unit]
Description=swarm peer: trains a shared model on this machine
Wants=network-online.target
After=network-online.target

[Service]
User=swarm
Group=swarm
SupplementaryGroups=video render
StateDirectory=swarm-peer
StateDirectoryMode=0700
ConfigurationDirectory=swarm
Environment=SWARM_IDENTITY=%S/swarm-peer/identity.key SWARM_DATA_DIR=%S/swarm-peer/peer HOME=%S/swarm-peer
# SWARM_LINK=swarm://... stands in this file.
EnvironmentFile=%E/swarm/peer.env
{common}
CapabilityBoundingSet=
AmbientCapabilities=
PrivateTmp=yes
# Devices: the usual harmless ones, NVIDIA's and the kernel's GPU nodes, nothing else.
DevicePolicy=closed
DeviceAllow=char-nvidia rw
DeviceAllow=char-nvidia-frontend rw
DeviceAllow=char-nvidiactl rw
DeviceAllow=char-nvidia-uvm rw
DeviceAllow=char-nvidia-caps r
DeviceAllow=char-drm rw
DeviceAllow=char-kfd rw
ProtectSystem=strict
ProtectHome=read-only
ProtectClock=yes
ProtectHostname=yes
ProtectKernelLogs=yes
ProtectKernelModules=yes
ProtectKernelTunables=yes
ProtectControlGroups=yes
RemoveIPC=yes
SystemCallFilter=~@privileged

[Install]
WantedBy=multi-user.target
"""


def unit(command: Path, gpu: str, *, user: bool) -> str:
    """The unit's text for a `swarm` program."""
    device = "--cpu" if gpu == "cpu" else f"--gpu {gpu}"
    common = COMMON.format(command=_quoted(command), device=device)
    return (USER_UNIT if user else SYSTEM_UNIT).format(common=common)


@app.command("print")
def show(gpu: GpuOption = "auto", user: UserOption = False) -> None:
    """Write the unit to standard output: for the whole machine, or with --user for your account."""
    typer.echo(unit(_program(), _device(gpu), user=user), nl=False)


@app.command()
def install(
    link: Annotated[str | None, typer.Argument(help=LINK_HELP)] = None,
    gpu: GpuOption = "auto",
    user: UserOption = False,
    start: Annotated[bool, typer.Option(help="Start it now, and with the machine.")] = True,
) -> None:
    """Install, enable and start the unit for your account. For the whole machine: swarm service print, as root."""
    if not user:
        raise UsageError("only units of your own account are installed", "add --user, or as root use: swarm service print")
    target = str(find_link(link))
    folder, settings = unit_path().parent, settings_path()
    for place in (folder, settings.parent):
        place.mkdir(parents=True, exist_ok=True, mode=0o700)
    unit_path().write_text(unit(_program(), _device(gpu), user=True))
    descriptor = os.open(settings, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(f"SWARM_LINK='{target}'\n")
    if start:
        _systemctl("daemon-reload")
        _systemctl("enable", "--now", NAME)
    print_fields(
        {
            "unit": unit_path(),
            "link": settings,
            "state": "started" if start else f"not started; systemctl --user enable --now {NAME}",
            "after logging out": "it goes on with: loginctl enable-linger",
        }
    )


@app.command()
def uninstall(user: UserOption = False) -> None:
    """Stop the unit of your account, after its round, and remove it. Keys, receipts and weights stay."""
    if not user:
        raise UsageError("only units of your own account are removed", "add --user")
    if not unit_path().exists():
        raise UsageError(f"there is no {unit_path()}", "install it with: swarm service install --user LINK")
    if shutil.which("systemctl") is not None:
        _systemctl("disable", "--now", NAME, may_fail=True)
    unit_path().unlink()
    settings_path().unlink(missing_ok=True)
    if shutil.which("systemctl") is not None:
        _systemctl("daemon-reload", may_fail=True)
    typer.echo(f"removed {unit_path()}")


def unit_path() -> Path:
    """Where systemd looks for units of this account."""
    return _configuration() / "systemd" / "user" / NAME


def settings_path() -> Path:
    """The file with the join link."""
    return _configuration() / "swarm" / "peer.env"


def _configuration() -> Path:
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config")


def _program() -> Path:
    """The `swarm` beside this Python, or the one that was called."""
    beside = Path(sys.executable).parent / "swarm"
    return beside if beside.exists() else Path(shutil.which("swarm") or sys.argv[0]).resolve()


def _device(gpu: str) -> str:
    if not gpu.replace(",", "").isalnum() or not gpu.isascii():
        raise UsageError(f"--gpu {gpu!r} can't be read", 'use "auto", "cpu", "0" or "0,1"')
    return gpu


def _quoted(path: Path) -> str:
    """A path as systemd reads it back."""
    text = str(path).replace("%", "%%").replace("$", "$$")
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"' if " " in text or '"' in text else text


def _systemctl(*arguments: str, may_fail: bool = False) -> None:
    if shutil.which("systemctl") is None:
        raise SwarmError("there is no systemctl here", "print the unit with: swarm service print --user")
    done = subprocess.run(["systemctl", "--user", *arguments], capture_output=True, text=True, check=False)
    if done.returncode and not may_fail:
        problem = (done.stderr or done.stdout).strip().splitlines()
        raise SwarmError(f"systemctl --user {' '.join(arguments)}: {problem[-1] if problem else done.returncode}", "")
