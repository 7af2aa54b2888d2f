"""`swarm data generate` and its like: a run's data that a model has written, and checking that it has."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer
from pydantic import BaseModel, ValidationError

from swarm.cli.export import read_run_of
from swarm.cli.folders import new_folder
from swarm.cli.output import bars, print_fields, print_json
from swarm.config import PeerSettings, link_of, load
from swarm.control import RUN_NAME
from swarm.errors import DataInvalid, UsageError
from swarm.manifest import Filters, Generate, Sampling
from swarm.rpc.client import CoordinatorClient

if TYPE_CHECKING:
    from peer.synthetic import Provenance

M = TypeVar("M", bound=BaseModel)

HELD_OUT, ALL = 0.05, 1 << 62
DEFAULT, DRAWN = Filters(), Sampling()

BaseOption = Annotated[Path, typer.Option("--base", help="The model's folder, made by `swarm run base`.")]
ToOption = Annotated[Path, typer.Option("--to", help="Folder for the data; new or empty.")]
GpuOption = Annotated[str | None, typer.Option("--gpu", help="A GPU's number; without it the processor computes.")]
JsonOption = Annotated[bool, typer.Option("--json", help="One line of JSON.")]
RowOption = Annotated[
    int | None, typer.Option("--sequence-length", min=8, help="Tokens of a training sample; by default what the longest takes.")
]
HeldOutOption = Annotated[
    float, typer.Option("--held-out", min=0.001, max=0.5, help="Share of the prompts whose samples are kept for validation.")
]
LicenseOption = Annotated[str, typer.Option("--license", help="The data's licence, for the manifest and the card.")]
DescriptionOption = Annotated[str, typer.Option("--description", help="One paragraph about the data.")]


def generate(
    base: BaseOption,
    prompts: Annotated[Path, typer.Option("--prompts", help="Folder made by `swarm data build --kind prompts`.")],
    to: ToOption,
    samples_per_prompt: Annotated[int, typer.Option("--samples-per-prompt", min=1, help="How many are written for each.")] = 1,
    max_tokens: Annotated[int, typer.Option("--max-tokens", min=1, help="A sample ends after so many.")] = DRAWN.max_tokens,
    temperature: Annotated[float, typer.Option("--temperature", help="Below 1 likelier tokens get likelier.")] = 1.0,
    top_p: Annotated[float, typer.Option("--top-p", help="Draw from the fewest tokens that have this probability.")] = 1.0,
    top_k: Annotated[int, typer.Option("--top-k", min=0, help="Draw from so many likeliest tokens; 0 = all.")] = 0,
    stop: Annotated[list[str] | None, typer.Option("--stop", help="A further token that ends a sample; may be repeated.")] = None,
    min_tokens: Annotated[int, typer.Option("--min-tokens", min=1, help="Drop shorter samples.")] = 1,
    min_perplexity: Annotated[float, typer.Option("--min-perplexity", help="Drop duller samples.")] = DEFAULT.min_perplexity,
    max_perplexity: Annotated[float, typer.Option("--max-perplexity", help="Drop noisier samples.")] = DEFAULT.max_perplexity,
    max_repeated: Annotated[
        float, typer.Option("--max-repeated", help="Drop samples with a larger share of repeated n-grams.")
    ] = DEFAULT.max_repeated,
    max_overlap: Annotated[
        float, typer.Option("--max-overlap", help="Drop samples that have more n-grams in common with an earlier one.")
    ] = DEFAULT.max_overlap,
    n_gram: Annotated[int, typer.Option("--n-gram", help="Tokens of an n-gram.")] = DEFAULT.n_gram,
    only_finished: Annotated[bool, typer.Option("--only-finished", help="Drop samples that --max-tokens has cut.")] = False,
    seed: Annotated[int, typer.Option("--seed", help="Draw other tokens.")] = 0,
    sequence_length: RowOption = None,
    held_out: HeldOutOption = HELD_OUT,
    license_: LicenseOption = "unknown",
    description: DescriptionOption = "",
    gpu: GpuOption = None,
    micro_batch: Annotated[int, typer.Option("--micro-batch", min=0, help="Samples at once; 0 = as usual for the device.")] = 0,
    as_json: JsonOption = False,
) -> None:
    """Let a model write samples for prompts, on this machine; filtered, without copies, as data for a run.

    Each token follows from the model and the settings, so that whoever has both can check samples. An interrupted call goes on
    where it was when it is repeated. `swarm run init --data FOLDER` makes a manifest of what is kept. How many machines write
    together is in docs/recipes/synthetic.md.

    Examples:

      swarm data generate --base base --prompts prompts --samples-per-prompt 4 --max-tokens 256 --top-p 0.95 --to synthetic
    """
    from peer import synthetic
    from peer.dataset import read
    from peer.device import choose_devices
    from peer.pretrained import read_pretrained

    to = new_folder(to)
    device = choose_devices(gpu or "", cpu=gpu is None)[0]
    data, pretrained = read(prompts), read_pretrained(base)
    if data.data.layout != "prompts":
        raise UsageError(f"{prompts} holds no prompts", "make them with: swarm data build FILE --kind prompts --to prompts")
    ends = synthetic.stop_ids(pretrained.config, data, prompts, stop or ())
    drawn = _checked(Sampling, max_tokens=max_tokens, temperature=temperature, top_p=top_p, top_k=top_k, stop=ends)
    limits = {"min_perplexity": min_perplexity, "max_perplexity": max_perplexity, "max_repeated": max_repeated}
    limits |= {"max_overlap": max_overlap, "n_gram": n_gram, "only_finished": only_finished, "min_tokens": min_tokens}
    settings = synthetic.Settings.for_one_machine(pretrained.base, data, samples_per_prompt, drawn, seed)
    keeping = synthetic.Keeping(
        filters=_checked(Filters, **limits),
        sequence_length=sequence_length or settings.longest_prompt + max_tokens - 1,
        held_out=held_out,
        license=license_,
        description=description,
    )
    with bars() as bar:

        def begin(done: int, total: int) -> Any:
            moved = bar("generating", total)
            moved(done)
            return moved

        made = synthetic.generate(base, prompts, to, settings, keeping, device, micro_batch, begin)
    report(to, made, as_json=as_json)


def collect(
    to: ToOption,
    data_dir: Annotated[Path | None, typer.Option("--dir", help="The peer's folder, if it isn't the configured one.")] = None,
    offline: Annotated[bool, typer.Option("--offline", help="Don't ask the coordinator whose contributions count.")] = False,
    sequence_length: RowOption = None,
    held_out: HeldOutOption = HELD_OUT,
    license_: Annotated[str, typer.Option("--license", help="The data's licence; by default that of the prompts.")] = "",
    description: DescriptionOption = "",
    base: Annotated[
        Path | None, typer.Option("--base", help="Write what is missing here, with the run's model in this folder.")
    ] = None,
    gpu: GpuOption = None,
    as_json: JsonOption = False,
) -> None:
    """Make data of what the peers of a run that generates have written, from the folder of one of them.

    Every peer keeps the pieces of all, checked by their hashes. The manifest's filters apply. Pieces of keys that are suspended
    after audits are left out, for which the coordinator is asked.

    Examples:

      swarm data collect --to synthetic
    """
    from peer import synthetic
    from peer.device import choose_devices

    to = new_folder(to)
    folder = load(PeerSettings, {"data_dir": data_dir}).data_dir
    manifest, _ = read_run_of(folder / RUN_NAME)
    if not isinstance(manifest.strategy, Generate):
        raise UsageError("the run trains, it doesn't generate", "its outcome is written by: swarm export --to DIR")
    suspended = () if offline else asyncio.run(_suspended(folder, bytes.fromhex(manifest.run_id)))
    keeping = synthetic.Keeping(
        filters=manifest.strategy.filters,
        sequence_length=sequence_length or synthetic.longest_row(manifest),
        held_out=held_out,
        license=license_ or manifest.data.license,
        description=description,
    )
    device = choose_devices(gpu or "", cpu=gpu is None)[0]
    completing = None if base is None else synthetic.Completing(base, device)
    about = {"suspended": sorted(suspended), "coordinator_asked": not offline}
    report(to, synthetic.collect(manifest, folder, to, keeping, suspended, about, completing), as_json=as_json)


async def _suspended(folder: Path, run_id: bytes) -> tuple[str, ...]:
    """The keys whose contributions don't count. Raises `SwarmError` where the coordinator can't be reached."""
    link = link_of(folder)
    if link.run_id != run_id:
        raise UsageError("the run joined last is another", "leave the coordinator out with --offline")
    async with await CoordinatorClient.connect(link) as client:
        return tuple((await client.list_audits("")).suspended)


def verify_generated(
    folder: Annotated[Path, typer.Argument(help="Made by `swarm data generate` or `swarm data collect`.")],
    base: BaseOption,
    samples: Annotated[int, typer.Option("--samples", min=0, help="How many to check against the model; 0 = all.")] = 32,
    seed: Annotated[int, typer.Option("--seed", help="Draw other samples to check.")] = 0,
    gpu: GpuOption = None,
    as_json: JsonOption = False,
) -> None:
    """Check generated data: build the shards again from the pieces, and compute samples again, drawn at random.

    Examples:

      swarm data verify-generated synthetic --base base --samples 100
    """
    from peer import synthetic
    from peer.device import choose_devices

    device = choose_devices(gpu or "", cpu=gpu is None)[0]
    with bars() as bar:
        found = synthetic.verify(folder, base, device, samples or ALL, seed, bar("checking", samples or 0))
    fields: dict[str, object] = {
        "checked": found.checked,
        "failed": len(found.failed),
        "worst_gap": round(found.worst_gap, 6),
    }
    print_json({**fields, "failed_samples": list(found.failed)}) if as_json else print_fields(fields)
    if found.failed:
        listed = ", ".join(map(str, found.failed[:5]))
        raise DataInvalid(f"the model can't have written {len(found.failed)} of {found.checked} samples: {listed}")


def report(to: Path, made: Provenance, *, as_json: bool) -> None:
    """Print what has become of the samples."""
    fields: dict[str, object] = {"directory": str(to), **made.counts}
    if as_json:
        print_json(fields)
        return
    print_fields(fields)
    typer.echo(f"{to / 'dataset.yaml'} written; next: swarm run init --data {to}")


def _checked(kind: type[M], **values: Any) -> M:
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        problems = "; ".join(f"--{str(item['loc'][0]).replace('_', '-')}: {item['msg']}" for item in error.errors())
        raise UsageError(problems, "see swarm data generate --help") from error
