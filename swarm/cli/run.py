"""`swarm run`: describe a training run in a manifest, check it, and sign it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from google.protobuf.message import DecodeError

from swarm.cli.output import print_fields, print_json
from swarm.config import data_path
from swarm.errors import ManifestInvalid, Rejected, UsageError
from swarm.identity import Identity
from swarm.ledger import open_manifest
from swarm.manifest import Manifest
from swarm.messages import MANIFEST_KIND
from swarm.rpc.v1.signed_pb2 import Signed

OWNER_KEY_HELP = "The run's owner; made at first use in your data folder."
TITLE = "# A training run of swarm. Check it with: swarm run validate\n# Every field: docs/reference/manifest.md\n"
COMMENTS = {
    "version": "The format of this file.",
    "name": "Lower-case letters, digits, dots and dashes.",
    "description": "One paragraph for volunteers.",
    "model": "A transformers configuration by value; model_type names one of transformers' own architectures.",
    "tokenizer": "The tokenizer file, named by its Merkle root.",
    "data": "Shards of token ids, in order; size_bytes = samples x (sequence_length + 1) x token_bytes.",
    "objective": "What is learned.",
    "strategy": "sync: gradients every step. diloco: inner_steps local steps, then the difference is averaged.",
    "codec": "How updates travel.",
    "merge": "How updates become one; longer ones than clip_ratio x the median are scaled down.",
    "rounds": "When rounds start and end; total 0 = for ever.",
    "admission": "open: any key may join. allow_list: only the peer ids under allow.",
    "credit": "flops_per_token = 6 x active parameters + attention; 1 credit = 10^15 verified FLOPs.",
    "min_client_version": "Older clients are sent away.",
}
FILL_IN = "<64 hexadecimal digits>"
SEQUENCE_LENGTH = 128
_SHARD = {"root": FILL_IN, "size_bytes": 1000 * (SEQUENCE_LENGTH + 1) * 2, "samples": 1000}
TEMPLATE: dict[str, Any] = {
    "version": 1,
    "name": "my-run",
    "description": "",
    "model": {
        "config": {
            "model_type": "llama",
            "vocab_size": 32000,
            "hidden_size": 512,
            "intermediate_size": 1408,
            "num_hidden_layers": 8,
            "num_attention_heads": 8,
            "num_key_value_heads": 8,
            "max_position_embeddings": SEQUENCE_LENGTH,
        },
        "seed": 0,
        "parameters": 58_499_584,
    },
    "tokenizer": {"root": FILL_IN, "size_bytes": 1},
    "data": {
        "sequence_length": SEQUENCE_LENGTH,
        "train": [_SHARD],
        "validation": [dict(_SHARD)],
        "license": "unknown",
        "description": "",
    },
    "strategy": {
        "kind": "diloco",
        "inner_steps": 20,
        "batch_samples": 8,
        "inner": {"kind": "muon", "lr": 0.004, "adamw": {"kind": "adamw", "lr": 0.002}},
        "outer": {"lr": 1.0, "momentum": 0.0},
        "schedule": {"warmup_tokens": 0, "total_tokens": 100_000_000, "final_fraction": 0.1},
    },
    "rounds": {"min_peers": 1, "max_peers": 32, "total": 0},
    "admission": {"kind": "open", "allow": [], "valid_s": 86_400},
    "credit": {"flops_per_token": 350_997_504, "hold_rounds": 3},
}

app = typer.Typer(help="Describe a training run: init, validate, show, sign.", no_args_is_help=True, rich_markup_mode=None)

RunFile = Annotated[Path, typer.Argument(help="The manifest: run.yaml or run.signed.")]
JsonOption = Annotated[bool, typer.Option("--json", help="One line of JSON.")]


@app.command()
def init(
    path: Annotated[Path, typer.Argument(help="Where to write the manifest.")] = Path("run.yaml"),
    demo: Annotated[bool, typer.Option("--demo", help="A small complete run on Python's own source.")] = False,
    data: Annotated[Path, typer.Option("--data", help="With --demo: folder for tokenizer and shards.")] = Path("data"),
) -> None:
    """Write a commented manifest to fill in, or with --demo one that is ready."""
    if path.exists():
        raise UsageError(f"{path} exists already", "choose another path, or remove the file")
    values = _demo(data) if demo else TEMPLATE
    try:
        path.write_text(commented(values))
    except OSError as error:
        raise UsageError(f"can't write {path}: {error.strerror}", "choose another path") from error
    typer.echo(f"{path} written; next: swarm run validate {path}")


@app.command()
def validate(path: RunFile, as_json: JsonOption = False) -> None:
    """List every problem at once, or say that there is none."""
    try:
        manifest = _manifest(path)
    except ManifestInvalid as error:
        if as_json:
            print_json({"valid": False, "problems": error.problems})
        raise
    if as_json:
        print_json({"valid": True, "run_id": manifest.run_id})
    else:
        typer.echo(f"{path} is valid; run id {manifest.run_id}")


@app.command()
def show(path: RunFile, as_json: JsonOption = False) -> None:
    """Print the manifest with every default written out, and its run id."""
    manifest = _manifest(path)
    if as_json:
        print_json({"run_id": manifest.run_id, "manifest": manifest.model_dump(mode="json")})
        return
    typer.echo(f"# run id {manifest.run_id}")
    typer.echo(yaml.safe_dump(manifest.model_dump(mode="json"), sort_keys=False), nl=False)


@app.command()
def sign(
    path: Annotated[Path, typer.Argument(help="The manifest: run.yaml.")],
    to: Annotated[Path, typer.Option("--to", help="Where to write the signed manifest.")] = Path("run.signed"),
    owner_key: Annotated[Path | None, typer.Option("--owner-key", help=OWNER_KEY_HELP)] = None,
    as_json: JsonOption = False,
) -> None:
    """Sign the manifest as the run's owner: what it says can't be changed afterwards."""
    signed = sign_manifest(Manifest.read(path), owner(owner_key))
    try:
        to.write_bytes(signed.SerializeToString(deterministic=True))
    except OSError as error:
        raise UsageError(f"can't write {to}: {error.strerror}", "choose another path with --to") from error
    fields: dict[str, object] = {"run_id": open_manifest(signed).run_id, "owner": signed.signer, "path": str(to)}
    print_json(fields) if as_json else print_fields(fields)


def sign_manifest(manifest: Manifest, key: Identity) -> Signed:
    """The manifest's canonical bytes, signed by the run's owner."""
    raw = manifest.canonical_bytes
    return Signed(kind=MANIFEST_KIND, payload=raw, signer=key.peer_id, signature=key.sign(MANIFEST_KIND, raw))


def read_run(path: Path, owner_key: Path | None) -> Signed:
    """The signed manifest in `path`; a YAML manifest is signed now by the owner's key. Raises `ManifestInvalid`."""
    return _signed(path) or sign_manifest(Manifest.read(path), owner(owner_key))


def owner(path: Path | None) -> Identity:
    """The owner's key, made at the first call."""
    return Identity.load_or_create(path or data_path() / "owner.key")


def commented(values: dict[str, Any]) -> str:
    """YAML with a comment above every section."""
    sections = []
    for name, value in values.items():
        text = yaml.safe_dump({name: value}, sort_keys=False, width=110)
        sections.append(f"# {COMMENTS[name]}\n{text}")
    return TITLE + "\n" + "\n".join(sections)


def _demo(folder: Path) -> dict[str, Any]:
    from peer.recipes import demo_manifest

    folder.mkdir(parents=True, exist_ok=True)
    return demo_manifest(folder).model_dump(mode="json")


def _manifest(path: Path) -> Manifest:
    signed = _signed(path)
    return Manifest.read(path) if signed is None else open_manifest(signed)


def _signed(path: Path) -> Signed | None:
    """The signed manifest in `path`, or None where the file is something else. Raises `ManifestInvalid` if it is forged."""
    try:
        signed = Signed.FromString(path.read_bytes())
    except DecodeError:
        return None
    except OSError as error:
        raise ManifestInvalid([f"can't be read: {error.strerror}"], str(path)) from error
    if signed.kind != MANIFEST_KIND:
        return None
    try:
        open_manifest(signed)
    except Rejected as error:
        raise ManifestInvalid([f"the signature is not valid: {error}"], str(path)) from error
    return signed
