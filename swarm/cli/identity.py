"""`swarm identity`: your key, which is your name in the ledger."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from swarm.accounts import LONGEST_DAYS
from swarm.accounts import certify as certify_key
from swarm.accounts import revoke as revoke_key
from swarm.cli.output import print_fields, print_json
from swarm.config import LINK_HELP, PeerSettings, find_link, load
from swarm.errors import KeyFileError, Rejected, UsageError
from swarm.identity import Identity
from swarm.messages import JoinLink

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
def backup(
    to: Annotated[Path | None, typer.Option("--to", help="File to write; it must not exist.")] = None,
    words: Annotated[bool, typer.Option("--words", help="Show 24 words to write down instead.")] = False,
    path: PathOption = None,
) -> None:
    """Write an encrypted copy of the key, or show it as words. The passphrase is asked for, or taken from SWARM_PASSPHRASE."""
    identity = Identity.load(_place(path))
    if words:
        _show_words(identity)
        return
    if to is None:
        raise UsageError("where to?", "give --to FILE, or --words for 24 words to write down")
    from swarm.backup import encrypt

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
    file: Annotated[Path | None, typer.Argument(help="What `swarm identity backup` wrote.")] = None,
    words: Annotated[bool, typer.Option("--words", help="Read 24 words from standard input instead.")] = False,
    path: PathOption = None,
    as_json: JsonOption = False,
) -> None:
    """Bring a key back from its encrypted copy, or from its words."""
    if words:
        place = _place(path)
        identity = _read_words()
        identity.save(place)
        _show(identity, place, as_json)
        return
    if file is None:
        raise UsageError("from what?", "name the backup file, or give --words")
    from swarm.backup import decrypt

    try:
        content = file.read_bytes()
    except OSError as error:
        raise KeyFileError(f"can't read {file}: {error.strerror}", "check the path") from error
    place = _place(path)
    identity = decrypt(content, _passphrase(confirm=False))
    identity.save(place)
    _show(identity, place, as_json)


@app.command()
def certify(
    peer_id: Annotated[str, typer.Argument(help="The machine's peer id: swarm identity show, on that machine.")],
    to: Annotated[Path, typer.Option("--to", help="File to write, to lie beside the machine's key as identity.certificate.")],
    days: Annotated[int, typer.Option("--days", min=1, max=LONGEST_DAYS, help="How long it holds.")] = 365,
    path: PathOption = None,
    as_json: JsonOption = False,
) -> None:
    """Certify a machine's key with this key as the account: what the machine earns from then on is the account's.

    Examples:

      swarm identity certify 12D3KooW... --path account.key --to identity.certificate
    """
    account = Identity.load(_place(path))
    try:
        certificate = certify_key(account, peer_id, time.time(), days)
    except Rejected as error:
        raise UsageError(f"not a peer id: {error}", "on the machine: swarm identity show") from error
    try:
        to.write_bytes(certificate.SerializeToString())
    except OSError as error:
        raise KeyFileError(f"can't write {to}: {error.strerror}", "choose another path") from error
    fields: dict[str, object] = {"account": account.peer_id, "peer_id": peer_id, "days": days, "path": str(to)}
    print_json(fields) if as_json else print_fields(fields)


@app.command()
def revoke(
    peer_id: Annotated[str, typer.Argument(help="The machine key that is lost or stolen.")],
    link: Annotated[str | None, typer.Argument(help=LINK_HELP)] = None,
    path: PathOption = None,
    as_json: JsonOption = False,
) -> None:
    """Revoke a machine's key in a run, with the account key that certified it: it earns nothing from then on.

    Examples:

      swarm identity revoke 12D3KooW... 'swarm://host:4300/...' --path account.key
    """
    import asyncio

    account, target = Identity.load(_place(path)), find_link(link)
    try:
        repeated = asyncio.run(_revoke(account, peer_id, target))
    except Rejected as error:
        raise UsageError(f"not revoked: {error}", "only the account that certified a key, in a run that it joined") from error
    fields: dict[str, object] = {"account": account.peer_id, "peer_id": peer_id, "revoked": True, "before": repeated}
    print_json(fields) if as_json else print_fields(fields)


async def _revoke(account: Identity, peer_id: str, link: JoinLink) -> bool:
    from swarm.rpc.client import CoordinatorClient

    async with await CoordinatorClient.connect(link) as client:
        return await client.revoke_key(revoke_key(account, peer_id, link.run_id, time.time()))


def _show_words(identity: Identity) -> None:
    from swarm.words import to_words

    typer.echo(f"Whoever reads these words has the key of {identity.peer_id}. Write them down; keep no photo.", err=True)
    numbered = [f"{place:2}. {word:<10}" for place, word in enumerate(to_words(identity), 1)]
    for start in range(0, len(numbered), 4):
        typer.echo("".join(numbered[start : start + 4]).rstrip())


def _read_words() -> Identity:
    from swarm.words import from_words

    if sys.stdin.isatty():
        typer.echo("The 24 words, then an empty line:", err=True)
        return from_words("\n".join(iter(sys.stdin.readline, "\n")))
    return from_words(sys.stdin.read(4096))


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
