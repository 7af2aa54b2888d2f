"""What `swarm run init` writes: the fields of a manifest for data, a model and a budget."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from pydantic import ValidationError

from swarm import auto
from swarm.cli.output import bars
from swarm.errors import UsageError
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
    Model,
    Sampling,
    Schedule,
    SkipSpikes,
    Sync,
)

if TYPE_CHECKING:
    from peer.dataset import Dataset
    from peer.pretrained import Pretrained

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


def with_data(folder: Path, hidden_size: int, layers: int) -> dict[str, Any]:
    """The template with a folder's data, and a Llama for them."""
    from peer.dataset import read
    from peer.model import count_parameters
    from peer.recipes import llama_config

    made = read(folder)
    if made.data.layout == "prompts":
        raise UsageError(f"{folder} holds prompts, for a base to go on from", "name one with --base, made by swarm run base")
    config = llama_config(made.vocabulary_size, made.data.sequence_length, hidden_size, layers, made.end_of_text)
    return _filled(made, Model(config=config, parameters=count_parameters(config)))


def with_config(folder: Path, path: Path) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The template with a folder's data and a model by its configuration, and what had to be changed in that."""
    from peer.architectures import check_positions, fitted, read_config
    from peer.dataset import read
    from peer.model import count_parameters, skeleton

    made = read(folder)
    config, changed = fitted(read_config(path), made.vocabulary_size, made.end_of_text)
    check_positions(skeleton(config).config.get_text_config(), made.data.sequence_length)
    return _filled(made, Model(config=config, parameters=count_parameters(config))), changed


def adapter_of(rank: int, targets: str, base_bits: int) -> Lora | None:
    """The adapter that is asked for. Raises `UsageError` for a base that can't be held in so many bits."""
    if base_bits not in (0, 4):
        raise UsageError(f"a base can't be held in {base_bits} bits", "choose 4, or leave --base-bits out")
    if base_bits and not rank:
        raise UsageError("a base in 4 bits can't be trained itself", "train an adapter on it, with --lora 8")
    return Lora(rank=rank, alpha=2 * rank, targets=tuple(targets.split(","))) if rank else None


def with_base(folder: Path, base: Path, adapter: Lora | None, base_bits: int, samples_per_prompt: int) -> dict[str, Any]:
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


def with_demo(folder: Path) -> dict[str, Any]:
    """A small complete run on Python's own source, whose data are put into the folder."""
    from peer.recipes import demo_manifest

    folder.mkdir(parents=True, exist_ok=True)
    evaluation = Evaluation(prompts=DEMO_PROMPTS)
    return {**demo_manifest(folder).model_dump(mode="json"), "evaluation": evaluation.model_dump(mode="json")}


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


def with_defaults(values: dict[str, Any]) -> dict[str, Any]:
    """What a run that trains has besides: spikes are skipped, and evaluations are as rare as many short rounds want them."""
    values = {**values, "strategy": {**values["strategy"], "skip_spikes": SkipSpikes().model_dump(mode="json")}}
    if values["evaluation"] is None:
        return values
    every = max(values["evaluation"]["every"], -(-values["rounds"]["total"] // MOST_EVALUATIONS))
    return {**values, "evaluation": {**values["evaluation"], "every": every}}


def sparing(values: dict[str, Any]) -> dict[str, Any]:
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


def commented(values: dict[str, Any]) -> str:
    """YAML with a comment above every section."""
    sections = []
    for name, value in values.items():
        text = yaml.safe_dump({name: value}, sort_keys=False, width=110)
        sections.append(f"# {COMMENTS[name]}\n{text}")
    return TITLE + "\n" + "\n".join(sections)
