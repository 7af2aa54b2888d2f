"""`swarm run`: describe a training run in a manifest, check it, and sign it."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from google.protobuf.message import DecodeError

from swarm import auto
from swarm.accounts import DAY_S
from swarm.cli.drafting import (
    PRIVATE,
    TEMPLATE,
    adapter_of,
    commented,
    sparing,
    with_base,
    with_config,
    with_data,
    with_defaults,
    with_demo,
    with_strategy,
)
from swarm.cli.folders import new_folder
from swarm.cli.output import print_fields, print_json
from swarm.config import data_path
from swarm.errors import ManifestInvalid, Rejected, UsageError
from swarm.identity import Identity
from swarm.ledger import open_manifest
from swarm.manifest import Lora, Manifest
from swarm.messages import MANIFEST_KIND, payload_hash
from swarm.rpc.v1.signed_pb2 import Signed
from swarm.tickets import MAX_USES, issue, to_text

OWNER_KEY_HELP = "The run's owner; made at first use in your data folder."
LORA_TARGETS = ",".join(Lora().targets)

app = typer.Typer(help="Describe a training run: init, validate, show, sign.", no_args_is_help=True, rich_markup_mode=None)

RunFile = Annotated[Path, typer.Argument(help="The manifest: run.yaml or run.signed.")]
JsonOption = Annotated[bool, typer.Option("--json", help="One line of JSON.")]

TokensOption = Annotated[int, typer.Option("--tokens", min=1, help="The budget: tokens that all peers together train on.")]
PeersOption = Annotated[int, typer.Option("--peers", min=1, max=64, help="How many peers you expect.")]
UploadOption = Annotated[float, typer.Option("--upload-mbit", min=0.001, help="Slowest upload that shall do, in Mbit/s.")]
DownloadOption = Annotated[float, typer.Option("--download-mbit", min=0.001, help="Slowest download, in Mbit/s.")]
StepOption = Annotated[float, typer.Option("--step-s", min=0.000001, help="Seconds per inner step on the slowest device.")]
BatchOption = Annotated[int, typer.Option("--batch-samples", min=1, help="Samples per inner step and peer.")]
ShareOption = Annotated[
    float, typer.Option("--traffic-share", min=0.00001, max=1.0, help="Most traffic, relative to fp16 after every step.")
]


@app.command()
def init(
    path: Annotated[Path, typer.Argument(help="Where to write the manifest.")] = Path("run.yaml"),
    demo: Annotated[bool, typer.Option("--demo", help="A small complete run on Python's own source.")] = False,
    data: Annotated[
        Path | None, typer.Option("--data", help="Folder made by `swarm data build`; with --demo, where to make one (data).")
    ] = None,
    hidden_size: Annotated[int, typer.Option("--hidden-size", min=32, help="With --data: width of the Llama.")] = 512,
    layers: Annotated[int, typer.Option("--layers", min=1, help="With --data: its layers.")] = 8,
    config: Annotated[
        Path | None,
        typer.Option("--config", help="With --data: the model's config.json, of any causal model of transformers, not a Llama."),
    ] = None,
    base: Annotated[
        Path | None, typer.Option("--base", help="With --data: begin with the model in this folder, made by `swarm run base`.")
    ] = None,
    lora: Annotated[
        int, typer.Option("--lora", min=0, help="With --base: train only an adapter of this rank; 0 = everything.")
    ] = 0,
    lora_targets: Annotated[
        str, typer.Option("--lora-targets", help="With --lora: layers to adapt, by the end of their names.")
    ] = LORA_TARGETS,
    base_bits: Annotated[
        int, typer.Option("--base-bits", help="With --lora: 4 has peers fetch and hold the base in 4 bits (QLoRA); 0 = as it is.")
    ] = 0,
    samples_per_prompt: Annotated[
        int, typer.Option("--samples-per-prompt", min=1, help="With prompts as --data: how many samples are written for each.")
    ] = 1,
    strategy: Annotated[str, typer.Option("--strategy", help="auto, diloco (the same in all rounds) or sync.")] = auto.AUTO,
    codec: Annotated[
        str | None, typer.Option("--codec", help="fp16, int8, int4, int2 or sparse instead of a chosen one.")
    ] = None,
    inner_steps: Annotated[int | None, typer.Option("--inner-steps", min=1, help="Instead of a chosen number.")] = None,
    tokens: TokensOption = 100_000_000,
    peers: PeersOption = 4,
    upload_mbit: UploadOption = 20.0,
    download_mbit: DownloadOption = 100.0,
    step_s: StepOption = 2.0,
    batch_samples: BatchOption = 8,
    traffic_share: ShareOption = auto.TRAFFIC_SHARE,
) -> None:
    """Write a commented manifest: to fill in, or ready to sign with --data, or with --demo.

    With `--strategy auto` the budget, the slowest link and the slowest device decide on inner steps, codec and overlap; the
    reasons are printed, and what is written is explicit. Prompts as --data make a run that generates.

    Examples:

      swarm run init --data data --tokens 1000000000

      swarm run init --data data --config config.json
    """
    if path.exists():
        raise UsageError(f"{path} exists already", "choose another path, or remove the file")
    values = TEMPLATE
    changed: tuple[str, ...] = ()
    if config is not None and (demo or data is None or base is not None):
        raise UsageError("--config is for a model that begins from scratch", "give --data with it, and neither --demo nor --base")
    if demo:
        values = with_demo(data or Path("data"))
    elif data is not None and config is not None:
        values, changed = with_config(data, config)
    elif data is not None:
        if base is None:
            values = with_data(data, hidden_size, layers)
        else:
            values = with_base(data, base, adapter_of(lora, lora_targets, base_bits), base_bits, samples_per_prompt)
    budget: dict[str, Any] = {
        "tokens": tokens,
        "peers": peers,
        "upload_mbit": upload_mbit,
        "download_mbit": download_mbit,
        "step_s": step_s,
        "audited": values["audit"] != PRIVATE["audit"],
    }
    budget |= {"batch_samples": batch_samples, "traffic_share": traffic_share, "codec": codec, "inner_steps": inner_steps}
    values, why = with_strategy(values, strategy, budget)
    if values["strategy"]["kind"] != "generate":
        values = with_defaults(values)
        if data is not None and not demo:
            values = sparing(values)
    if config is not None:
        Manifest.from_values(values, str(config))
    try:
        path.write_text(commented(values))
    except OSError as error:
        raise UsageError(f"can't write {path}: {error.strerror}", "choose another path") from error
    for reason in (*changed, *why):
        typer.echo(reason)
    if values["admission"]["kind"] == "invitation":
        typer.echo("admission: by invitation, as the data are private; swarm run invite makes tickets")
    typer.echo(f"{path} written; next: swarm run validate {path}")


@app.command()
def base(
    source: Annotated[str, typer.Argument(help="A hub's model, a folder with config.json and safetensors, or a .gguf file.")],
    to: Annotated[Path, typer.Option("--to", help="Folder for weights and tokenizer; new or empty.")] = Path("base"),
    dtype: Annotated[
        str, typer.Option("--dtype", help="Store weights as float32, float16 or bfloat16 instead of as they are.")
    ] = "",
    as_json: JsonOption = False,
) -> None:
    """Take a pretrained model, for a run that begins with it or adapts it: weights and tokenizer, named by their content.

    Examples:

      swarm run base HuggingFaceTB/SmolLM2-135M --to base

      swarm data build ./texts --tokenizer base/tokenizer.json --to data && swarm run init --base base --data data --lora 8
    """
    from peer.data import tree_path
    from peer.importing import DTYPES, import_pretrained
    from peer.model import count_parameters

    if dtype and dtype not in DTYPES:
        raise UsageError(f"no such type: {dtype}", f"choose {', '.join(DTYPES)}")
    to = new_folder(to)
    made = import_pretrained(source, to, dtype)
    fields: dict[str, object] = {
        "directory": str(to),
        "parameters": count_parameters(made.config),
        "weights": str(tree_path(to, made.base)),
        "tokenizer": str(tree_path(to, made.tokenizer)),
    }
    print_json(fields) if as_json else print_fields(fields)


@app.command()
def validate(
    path: RunFile,
    files: Annotated[Path | None, typer.Option("--files", help="Check the data and the base in this folder, too.")] = None,
    as_json: JsonOption = False,
) -> None:
    """List every problem at once, or say that there is none: in the fields, the model, and with --files in what they name."""
    try:
        manifest, made = _manifest(path)
        _check(manifest, files, str(path))
    except ManifestInvalid as error:
        if as_json:
            print_json({"valid": False, "problems": error.problems})
        raise
    if as_json:
        print_json({"valid": True, "run_id": manifest.run_id})
    else:
        _tell(made)
        typer.echo(f"{path} is valid; run id {manifest.run_id}")


def _check(manifest: Manifest, files: Path | None, source: str) -> None:
    """Build the model without its weights, and look at every file. Raises `ManifestInvalid`."""
    try:
        from peer.checking import problems_of
    except ImportError:
        typer.echo("the model is not checked: torch and transformers aren't installed here", err=True)
        return
    problems = problems_of(manifest, files)
    if problems:
        raise ManifestInvalid(problems, source)


@app.command()
def show(
    path: RunFile,
    as_json: JsonOption = False,
    peers: PeersOption = 4,
    upload_mbit: UploadOption = 20.0,
    download_mbit: DownloadOption = 100.0,
    step_s: StepOption = 2.0,
) -> None:
    """Print the manifest with every default written out, its run id, and what each phase costs on such links and devices."""
    manifest, made = _manifest(path)
    if made is not None:
        peers, step_s = made.draft.peers, made.draft.step_s
        upload_mbit, download_mbit = made.draft.upload_mbit, made.draft.download_mbit
    costs = auto.costs(manifest, peers, upload_mbit, download_mbit, step_s)
    if as_json:
        phases = [asdict(cost) for cost in costs]
        values = manifest.model_dump(mode="json")
        audited = {"audited": manifest.is_audited, "by": manifest.audited_by, "why_not_audited": manifest.why_not_audited}
        print_json({"run_id": manifest.run_id, "manifest": values, "phases": phases, **audited})
        return
    typer.echo(f"# run id {manifest.run_id}")
    for reason in made.why if made is not None else ():
        typer.echo(f"# {reason}")
    typer.echo(f"# {peers} peers, {upload_mbit:g}/{download_mbit:g} Mbit/s, {step_s:g} s a step, payload without framing:")
    for cost in costs:
        typer.echo(f"# {_cost_line(cost)}")
    typer.echo(f"# {_audit_line(manifest)}")
    typer.echo(f"# {_evaluation_line(manifest)}")
    typer.echo(yaml.safe_dump(manifest.model_dump(mode="json"), sort_keys=False), nl=False)


def _audit_line(manifest: Manifest) -> str:
    if not manifest.is_audited:
        return f"contributions are not audited: {manifest.why_not_audited}"
    how = "by computing them again" if manifest.is_replayed else "by what they do to the loss"
    return (
        f"{manifest.audit.rate:.0%} of the contributions are audited {how}, and a new key's first {manifest.audit.first}; "
        f"credit is final after {manifest.hold_rounds} rounds"
    )


def _evaluation_line(manifest: Manifest) -> str:
    settings = manifest.evaluation
    if settings is None:
        return "the held-out loss is not measured"
    when = f"every {settings.every:,} rounds and after the last" if settings.every > 1 else "after every round"
    return (
        f"{settings.evaluators} peers measure the loss on {manifest.evaluation_samples:,} held-out samples {when}; "
        f"it counts where {settings.quorum} agree to {settings.tolerance:.2%}"
    )


def _cost_line(cost: auto.Cost) -> str:
    last = f"to {cost.last_round:,}" if cost.last_round else "on"
    return (
        f"rounds {cost.first_round:,} {last}: {cost.inner_steps} inner steps, {cost.codec}, "
        f"{cost.sent_bytes / 1e6:,.2f} MB sent a round, {cost.train_s:,.1f} s to train and {cost.exchange_s:,.1f} s to exchange"
    )


@app.command()
def sign(
    path: Annotated[Path, typer.Argument(help="The manifest: run.yaml.")],
    to: Annotated[Path, typer.Option("--to", help="Where to write the signed manifest.")] = Path("run.signed"),
    owner_key: Annotated[Path | None, typer.Option("--owner-key", help=OWNER_KEY_HELP)] = None,
    as_json: JsonOption = False,
) -> None:
    """Sign the manifest as the run's owner: what it says can't be changed afterwards."""
    manifest, made = auto.read(path)
    signed = sign_manifest(manifest, owner(owner_key))
    try:
        to.write_bytes(signed.SerializeToString(deterministic=True))
    except OSError as error:
        raise UsageError(f"can't write {to}: {error.strerror}", "choose another path with --to") from error
    fields: dict[str, object] = {"run_id": open_manifest(signed).run_id, "owner": signed.signer, "path": str(to)}
    if as_json:
        print_json(fields)
        return
    _tell(made)
    print_fields(fields)


@app.command()
def invite(
    path: Annotated[Path, typer.Argument(help="The manifest: run.yaml or run.signed.")] = Path("run.signed"),
    uses: Annotated[int, typer.Option("--uses", min=1, max=MAX_USES, help="How many keys it lets in.")] = 1,
    days: Annotated[int, typer.Option("--days", min=1, max=3650, help="How long it holds.")] = 7,
    owner_key: Annotated[Path | None, typer.Option("--owner-key", help=OWNER_KEY_HELP)] = None,
    as_json: JsonOption = False,
) -> None:
    """Make a ticket for a run by invitation. Whoever has it may use it: `swarm join LINK --ticket TICKET`.

    Examples:

      swarm run invite run.signed --uses 20 --days 30
    """
    signed = read_run(path, owner_key)
    key = owner(owner_key)
    if signed.signer != key.peer_id:
        raise UsageError("this key isn't the run's owner", "name the owner's key with --owner-key")
    if open_manifest(signed).admission.kind != "invitation":
        raise UsageError(
            "the run isn't by invitation", "write `admission: {kind: invitation}` into the manifest before signing it"
        )
    ticket = issue(key, payload_hash(signed), uses, time.time(), days * DAY_S)
    if as_json:
        print_json({"ticket": to_text(ticket), "uses": uses, "days": days})
    else:
        typer.echo(to_text(ticket))


def sign_manifest(manifest: Manifest, key: Identity) -> Signed:
    """The manifest's canonical bytes, signed by the run's owner."""
    raw = manifest.canonical_bytes
    return Signed(kind=MANIFEST_KIND, payload=raw, signer=key.peer_id, signature=key.sign(MANIFEST_KIND, raw))


def read_run(path: Path, owner_key: Path | None) -> Signed:
    """The signed manifest in `path`; a YAML manifest is signed now by the owner's key. Raises `ManifestInvalid`."""
    return _signed(path) or sign_manifest(auto.read(path)[0], owner(owner_key))


def owner(path: Path | None) -> Identity:
    """The owner's key, made at the first call."""
    return Identity.load_or_create(path or data_path() / "owner.key")


def _manifest(path: Path) -> tuple[Manifest, auto.Plan | None]:
    signed = _signed(path)
    return auto.read(path) if signed is None else (open_manifest(signed), None)


def _tell(made: auto.Plan | None) -> None:
    """Say why the settings are what they are, where they were left to us."""
    for reason in made.why if made is not None else ():
        typer.echo(reason)


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
