"""`swarm run`: describe a training run in a manifest, check it, and sign it."""

from __future__ import annotations

import os
import shutil
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import yaml
from google.protobuf.message import DecodeError
from pydantic import ValidationError

from swarm import auto
from swarm.accounts import DAY_S
from swarm.cli.folders import new_folder
from swarm.cli.output import bars, print_fields, print_json
from swarm.config import data_path
from swarm.errors import ManifestInvalid, Rejected, UsageError
from swarm.identity import Identity
from swarm.ledger import open_manifest
from swarm.manifest import (
    UNAUDITED,
    AdamW,
    Base,
    Codec,
    DiLoCo,
    Distillation,
    Evaluation,
    Generate,
    Lora,
    Manifest,
    Model,
    Sampling,
    Schedule,
    SkipSpikes,
    Sync,
)
from swarm.messages import MANIFEST_KIND, payload_hash
from swarm.rpc.v1.signed_pb2 import Signed
from swarm.tickets import MAX_USES, issue, to_text

if TYPE_CHECKING:
    from peer.dataset import Dataset
    from peer.pretrained import Pretrained

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
    "distillation": "share x divergence from data.teacher + (1 - share) x cross-entropy of the labels.",
    "strategy": "sync: gradients every step. diloco: inner_steps local steps, then they are averaged. generate: samples.\n"
    "# skip_spikes: a round whose loss is so many deviations above the last window's changes nothing; null = every round counts.",
    "codec": "How updates travel.",
    "merge": "How updates become one. centered_clip bounds what a minority can do; mean is for peers that you know.",
    "rounds": "When rounds start and end; total 0 = for ever.",
    "admission": "open: any key may join. invitation: with a ticket, swarm run invite. allow_list: the peer ids under allow.",
    "credit": "flops_per_token = 6 x active parameters + attention; 1 credit = 10^15 verified FLOPs.",
    "audit": "rate: share of contributions that others compute again; first: of a new key, so many are all audited.",
    "evaluation": "Held-out loss every so many rounds, by peers drawn by lot; it counts where a quorum agrees.",
    "min_client_version": "Older clients are sent away.",
}
FILL_IN = "<64 hexadecimal digits>"
SEQUENCE_LENGTH = 128
DEFAULT_INNER_STEPS = 20
LORA_TARGETS = ",".join(Lora().targets)
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
    "merge": {"kind": "centered_clip"},
    "rounds": {"min_peers": 1, "max_peers": 64, "total": 0},
    "admission": {"kind": "open", "allow": [], "valid_s": 86_400},
    "credit": {"flops_per_token": 350_997_504, "hold_rounds": 3},
    "audit": {"rate": 0.05, "first": 10, "within_rounds": 10},
    "evaluation": Evaluation().model_dump(mode="json"),
}
MOST_EVALUATIONS = 200
DEMO_PROMPTS = ("def ", "class ")

PRIVATE: dict[str, Any] = {
    "merge": {"kind": "mean"},
    "admission": {**TEMPLATE["admission"], "kind": "invitation"},
    "audit": {**TEMPLATE["audit"], **UNAUDITED},
    "evaluation": None,
}
"""What a run with private data has instead: people who know each other, as nobody can audit what they train on."""

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
        values = _demo(data or Path("data"))
    elif data is not None and config is not None:
        values, changed = _with_config(data, config)
    elif data is not None:
        if base is None:
            values = _with_data(data, hidden_size, layers)
        else:
            values = _with_base(data, base, _adapter(lora, lora_targets, base_bits), base_bits, samples_per_prompt)
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
        values = _paced({**values, "strategy": {**values["strategy"], "skip_spikes": SkipSpikes().model_dump(mode="json")}})
        if data is not None and not demo:
            values = _sparing(values)
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


def with_strategy(values: dict[str, Any], strategy: str, budget: dict[str, Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """A manifest's fields with the strategy of this name for a budget, and the reasons. Raises `UsageError`."""
    if values["data"].get("layout") == "prompts":
        return _generating(values, budget), ()
    draft = _draft(values, budget)
    match strategy:
        case auto.AUTO:
            made = auto.plan(draft)
            return made.applied(values), made.why
        case "diloco":
            return _fixed(values, draft), ()
        case "sync":
            total = draft.steps * draft.tokens_per_step
            sync = Sync(batch_samples=draft.peers * draft.batch_samples, optimizer=AdamW(), schedule=Schedule(total_tokens=total))
            codec = Codec.model_validate({"kind": draft.codec or "fp16"})
            return _replaced(values, sync, codec, draft.steps), ()
    raise UsageError(f"no such strategy: {strategy}", "choose auto, diloco or sync")


def _paced(values: dict[str, Any]) -> dict[str, Any]:
    """Evaluations as rare as a run of many short rounds wants them."""
    if values["evaluation"] is None:
        return values
    every = max(values["evaluation"]["every"], -(-values["rounds"]["total"] // MOST_EVALUATIONS))
    return {**values, "evaluation": {**values["evaluation"], "every": every}}


def _generating(values: dict[str, Any], budget: dict[str, Any]) -> dict[str, Any]:
    """The fields of a run that generates, whose rounds are as long as all its samples take."""
    batch = budget["peers"] * budget["batch_samples"]
    strategy = Generate.model_validate({**values["strategy"], "batch_samples": batch})
    samples = sum(shard["samples"] for shard in values["data"]["train"]) * strategy.samples_per_prompt
    limits = {**values["rounds"], "total": -(-samples // batch)}
    made = {"strategy": strategy.model_dump(mode="json"), "merge": {"kind": "mean"}, "rounds": limits, "evaluation": None}
    return {**values, **made}


def _draft(values: dict[str, Any], budget: dict[str, Any]) -> auto.Draft:
    known = {"parameters": values["model"]["parameters"], "sequence_length": values["data"]["sequence_length"]}
    try:
        return auto.Draft.model_validate({**budget, **known})
    except ValidationError as error:
        problems = "; ".join(f"{item['loc'][0]}: {item['msg']}" for item in error.errors())
        raise UsageError(problems, "see swarm run init --help") from error


def _fixed(values: dict[str, Any], draft: auto.Draft) -> dict[str, Any]:
    """The same inner steps and codec in all rounds."""
    steps = draft.inner_steps or DEFAULT_INNER_STEPS
    schedule = Schedule(total_tokens=draft.steps * draft.tokens_per_step)
    strategy = DiLoCo(inner_steps=steps, batch_samples=draft.batch_samples, schedule=schedule)
    return _replaced(values, strategy, Codec.model_validate({"kind": draft.codec or "fp16"}), -(-draft.steps // steps))


def _replaced(values: dict[str, Any], strategy: DiLoCo | Sync, codec: Codec, rounds: int) -> dict[str, Any]:
    kind = {**(values.get("codec") or {}), "kind": codec.kind}
    limits = {**values["rounds"], "total": rounds}
    return {**values, "strategy": strategy.model_dump(mode="json"), "codec": kind, "rounds": limits}


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


def commented(values: dict[str, Any]) -> str:
    """YAML with a comment above every section."""
    sections = []
    for name, value in values.items():
        text = yaml.safe_dump({name: value}, sort_keys=False, width=110)
        sections.append(f"# {COMMENTS[name]}\n{text}")
    return TITLE + "\n" + "\n".join(sections)


def _with_data(folder: Path, hidden_size: int, layers: int) -> dict[str, Any]:
    """The template with a folder's data, and a Llama for them."""
    from peer.dataset import read
    from peer.model import count_parameters
    from peer.recipes import llama_config

    made = read(folder)
    if made.data.layout == "prompts":
        raise UsageError(f"{folder} holds prompts, for a base to go on from", "name one with --base, made by swarm run base")
    config = llama_config(made.vocabulary_size, made.data.sequence_length, hidden_size, layers, made.end_of_text)
    return _filled(made, Model(config=config, parameters=count_parameters(config)))


def _with_config(folder: Path, path: Path) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The template with a folder's data and a model by its configuration, and what had to be changed in that."""
    from peer.architectures import check_positions, fitted, read_config
    from peer.dataset import read
    from peer.model import count_parameters, skeleton

    made = read(folder)
    config, changed = fitted(read_config(path), made.vocabulary_size, made.end_of_text)
    check_positions(skeleton(config).config.get_text_config(), made.data.sequence_length)
    return _filled(made, Model(config=config, parameters=count_parameters(config))), changed


def _adapter(rank: int, targets: str, base_bits: int) -> Lora | None:
    """The adapter that is asked for. Raises `UsageError` for a base that can't be held in so many bits."""
    if base_bits not in (0, 4):
        raise UsageError(f"a base can't be held in {base_bits} bits", "choose 4, or leave --base-bits out")
    if base_bits and not rank:
        raise UsageError("a base in 4 bits can't be trained itself", "train an adapter on it, with --lora 8")
    return Lora(rank=rank, alpha=2 * rank, targets=tuple(targets.split(","))) if rank else None


def _with_base(folder: Path, base: Path, adapter: Lora | None, base_bits: int, samples_per_prompt: int) -> dict[str, Any]:
    """The template with a folder's data and a pretrained model, whose file is put beside the data. Raises `UsageError`."""
    from peer.data import tree_path
    from peer.dataset import read
    from peer.model import count_parameters
    from peer.pretrained import read_pretrained

    made, pretrained = read(folder), read_pretrained(base)
    generates = made.data.layout == "prompts"
    if generates and adapter is not None:
        raise UsageError("prompts are for a run that generates, with a base as it is", "leave --lora out")
    if made.tokenizer.root != pretrained.tokenizer.root:
        hint = f"build the data with --tokenizer {tree_path(base, pretrained.tokenizer)}"
        raise UsageError(f"the data in {folder} are not in the tokens of {pretrained.base.name}", hint)
    parameters = 1 if generates else count_parameters(pretrained.config, adapter)
    if base_bits:
        file = _quantised(pretrained, base, folder)
    else:
        file = pretrained.base
        _put(tree_path(base, file), tree_path(folder, file))
    values = _filled(made, Model(config=pretrained.config, parameters=parameters, base=file, adapter=adapter))
    return _writing(values, made, pretrained, base, samples_per_prompt) if generates else values


def _quantised(made: Pretrained, base: Path, folder: Path) -> Base:
    """The base in 4 bits, beside the data; how far it has come is shown on a terminal."""
    from peer.importing import in_four_bits

    with bars() as bar:
        return in_four_bits(made, base, folder, bar)


def _writing(values: dict[str, Any], made: Dataset, pretrained: Pretrained, base: Path, each: int) -> dict[str, Any]:
    """The fields for a base that writes `each` samples for each of the prompts."""
    from peer.generating import room
    from peer.model import generation_flops_per_token
    from peer.synthetic import stop_ids

    left, stop = room(pretrained.config, made.data.sequence_length + 1), stop_ids(pretrained.config, made, base)
    if not left:
        raise UsageError("the longest prompt leaves the base no room", "build the prompts with a smaller --sequence-length")
    drawn = Sampling(max_tokens=min(Sampling().max_tokens, left), stop=stop)
    flops = generation_flops_per_token(pretrained.config, made.data.sequence_length + drawn.max_tokens)
    strategy = {"kind": "generate", "samples_per_prompt": each, "sampling": drawn.model_dump(mode="json")}
    return {**values, "strategy": strategy, "credit": {**values["credit"], "flops_per_token": flops}}


def _filled(made: Dataset, model: Model) -> dict[str, Any]:
    """The template with data and a model for them."""
    from peer.model import flops_per_token

    distillation = {"distillation": Distillation().model_dump(mode="json")} if made.data.teacher is not None else {}
    flops = flops_per_token(model.config, made.data.sequence_length, model.adapter)
    return {
        **TEMPLATE,
        "model": model.model_dump(mode="json"),
        "tokenizer": made.tokenizer.model_dump(mode="json"),
        "data": made.data.model_dump(mode="json"),
        **distillation,
        "credit": {**TEMPLATE["credit"], "flops_per_token": flops},
        **(PRIVATE if made.data.private_trees else {}),
    }


def _sparing(values: dict[str, Any]) -> dict[str, Any]:
    """Leave zeros out of sparse updates where the model has experts, as some may not be visited in a round."""
    from peer.model import experts_of, skeleton

    if experts_of(skeleton(values["model"]["config"]).config.get_text_config()) == (1, 1):
        return values

    def changed(codec: dict[str, Any]) -> dict[str, Any]:
        return {**codec, "leave_out_zeros": True} if codec["kind"] == "sparse" else codec

    strategy = values["strategy"]
    if strategy.get("phases"):
        strategy = {**strategy, "phases": [{**phase, "codec": changed(phase["codec"])} for phase in strategy["phases"]]}
    return {**values, "strategy": strategy, "codec": changed(values["codec"])}


def _put(source: Path, to: Path) -> None:
    """Have a file at a second place: the same one where both are on one disk, else a copy. Raises `UsageError`."""
    try:
        if not to.exists():
            try:
                os.link(source, to)
            except OSError:
                shutil.copyfile(source, to)
    except OSError as error:
        raise UsageError(f"can't copy {source} to {to.parent}: {error.strerror}", "free some space") from error


def _demo(folder: Path) -> dict[str, Any]:
    from peer.recipes import demo_manifest

    folder.mkdir(parents=True, exist_ok=True)
    evaluation = Evaluation(prompts=DEMO_PROMPTS)
    return {**demo_manifest(folder).model_dump(mode="json"), "evaluation": evaluation.model_dump(mode="json")}


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
