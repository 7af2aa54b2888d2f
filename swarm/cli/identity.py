"""`swarm identity`: your key, which is your name in the ledger."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from swarm.cli.output import print_fields, print_json
from swarm.config import PeerSettings, load
from swarm.errors import KeyFileError
from swarm.identity import Identity

PASSPHRASE_VARIABLE = "SWARM_PASSPHRASE"  # noqa: S105 - the name of a variable

app = typer.Typer(help="Make, show, back up and restore your key.", no_args_is_help=True, rich_markup_mode=None)

PathOption = Annotated[Path | None, typer.Option("--path", help="Key file; by default the one of `swarm join`.")]
JsonOption = Annotated[bool, typer.Option("--json", help="One line of JSON.")]


@app.command()
def new(path: PathOption = None, as_json: JsonOption = False) -> None:
    """Make a new key; an existing one is never overwritten."""
    place = _place(path)
    identity = Identity.generate()
    identity.save(place)
    _show(identity, place, as_json)


@app.command()
def show(path: PathOption = None, as_json: JsonOption = False) -> None:
    """Print the peer id, never the key."""
    place = _place(path)
    _show(Identity.load(place), place, as_json)


@app.command()
def backup(to: Annotated[Path, typer.Option("--to", help="File to write; it must not exist.")], path: PathOption = None) -> None:
    """Write an encrypted copy of the key. The passphrase is asked for, or taken from SWARM_PASSPHRASE."""
    from swarm.backup import encrypt

    identity = Identity.load(_place(path))
    content = encrypt(identity, _passphrase(confirm=True))
    try:
        descriptor = os.open(to, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except OSError as error:
        raise KeyFileError(f"can't write {to}: {error.strerror}", "choose another path") from error
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
    typer.echo(f"backup of {identity.peer_id} written to {to}")


@app.command()
def restore(
    file: Annotated[Path, typer.Argument(help="What `swarm identity backup` wrote.")],
    path: PathOption = None,
    as_json: JsonOption = False,
) -> None:
    """Bring a key back from its encrypted copy."""
    from swarm.backup import decrypt

    try:
        content = file.read_bytes()
    except OSError as error:
        raise KeyFileError(f"can't read {file}: {error.strerror}", "check the path") from error
    place = _place(path)
    identity = decrypt(content, _passphrase(confirm=False))
    identity.save(place)
    _show(identity, place, as_json)


def _place(path: Path | None) -> Path:
    return load(PeerSettings, {"identity": path}).identity


def _show(identity: Identity, path: Path, as_json: bool) -> None:
    if as_json:
        print_json({"peer_id": identity.peer_id, "path": str(path)})
    else:
        print_fields({"peer id": identity.peer_id, "key file": path})


def _passphrase(confirm: bool) -> str:
    given = os.environ.get(PASSPHRASE_VARIABLE)
    if given is not None:
        return given
    return str(typer.prompt("Passphrase", hide_input=True, confirmation_prompt=confirm, err=True))
