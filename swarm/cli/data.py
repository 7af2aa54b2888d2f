"""`swarm data`: a run's data from texts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from swarm.cli import synthetic
from swarm.cli.folders import new_folder
from swarm.cli.output import Bar, bars, print_fields, print_json
from swarm.errors import UsageError

if TYPE_CHECKING:
    from peer.dataset import Dataset, Kind
    from peer.documents import Counts, Record, Shuffled

app = typer.Typer(help="Make a run's data from texts, or let a model write them.", no_args_is_help=True, rich_markup_mode=None)

KINDS = ("text", "chat", "prompts")
SourcesArgument = Annotated[
    list[Path] | None, typer.Argument(help="Text files, JSON lines, Parquet files, or folders of them.", show_default=False)
]
HubOption = Annotated[
    str, typer.Option("--hub", help="Instead of files: a hub's data set, owner/name, or a local folder in a hub's layout.")
]
ConfigOption = Annotated[str | None, typer.Option("--config", help="With --hub: its configuration, where it has several.")]
SplitOption = Annotated[str, typer.Option("--split", help="With --hub: which of its splits.")]
LimitOption = Annotated[int | None, typer.Option("--limit", min=1, help="With --hub: only so many of its rows, the first ones.")]
FieldOption = Annotated[
    str, typer.Option("--field", "--column", help="Where a JSON line, a Parquet row or a hub's row has its text.")
]
KindOption = Annotated[str, typer.Option("--kind", help="text; chat: loss on answers only; prompts: to generate from.")]
TemplateOption = Annotated[
    Path | None, typer.Option("--chat-template", help="A Jinja file instead of the tokenizer's own, or ChatML.")
]
HeldOutOption = Annotated[
    float, typer.Option("--held-out", min=0.001, max=0.5, help="Share of the documents that is kept for validation.")
]
SeedOption = Annotated[int, typer.Option("--seed", help="Another order of the same documents.")]
JsonOption = Annotated[bool, typer.Option("--json", help="One line of JSON.")]


@app.callback()
def data() -> None:
    """Make a run's data from texts: build, and before it perhaps a tokenizer, after it combine and teach; or generate."""


app.command("generate")(synthetic.generate)
app.command("collect")(synthetic.collect)
app.command("verify-generated")(synthetic.verify_generated)


@app.command()
def tokenizer(
    sources: SourcesArgument = None,
    to: Annotated[Path, typer.Option("--to", help="Folder for the tokenizer; new or empty.")] = Path("tokenizer"),
    vocabulary: Annotated[
        int, typer.Option("--vocabulary", min=257, max=1 << 20, help="How many tokens it has; ChatML's markers come on top.")
    ] = 8192,
    held_out: HeldOutOption = 0.05,
    kind: KindOption = "text",
    chat_template: TemplateOption = None,
    field: FieldOption = "text",
    hub: HubOption = "",
    config: ConfigOption = None,
    split: SplitOption = "train",
    limit: LimitOption = None,
    as_json: JsonOption = False,
) -> None:
    """Train a byte-level BPE tokenizer on texts, for several builds, or several people, that need the same one.

    It doesn't see what `swarm data build` with the same --held-out keeps for validation.

    Examples:

      swarm data tokenizer ./texts --vocabulary 8192 --to tokenizer

      swarm data build ./texts --tokenizer tokenizer --to data
    """
    from peer.dataset import Plan, train_tokenizer

    source = Source(sources or [], kind, field, Hub(hub, config, split, limit))
    to = new_folder(to)
    with source.opened(to.parent) as (documents, counts, _):
        plan = Plan(held_out=held_out, kind="chat" if kind == "chat" else "text", chat_template=chat_template)
        made = train_tokenizer(documents, to, vocabulary, plan)
    fields: dict[str, object] = {
        "directory": str(to),
        "documents": counts.documents,
        "vocabulary_size": made.get_vocab_size(),
    }
    if as_json:
        print_json(fields)
        return
    print_fields(fields)
    typer.echo(f"next: swarm data build SOURCE --tokenizer {to}")


@app.command()
def build(
    sources: SourcesArgument = None,
    to: Annotated[Path, typer.Option("--to", help="Folder for tokenizer and shards; new or empty.")] = Path("data"),
    tokenizer: Annotated[
        str, typer.Option("--tokenizer", help="bytes, bpe:8192 to train one of that size, a tokenizer.json or its folder.")
    ] = "bytes",
    sequence_length: Annotated[int, typer.Option("--sequence-length", min=8, help="Tokens of a sample.")] = 128,
    held_out: HeldOutOption = 0.05,
    kind: KindOption = "text",
    chat_template: TemplateOption = None,
    field: FieldOption = "text",
    hub: HubOption = "",
    config: ConfigOption = None,
    split: SplitOption = "train",
    limit: LimitOption = None,
    private: Annotated[
        bool, typer.Option("--private", help="The shards stay here: peers that have them train on them, nobody is sent them.")
    ] = False,
    license_: Annotated[
        str, typer.Option("--license", "--licence", help="The data's, for the manifest and the card; by default a hub's own.")
    ] = "",
    description: Annotated[str, typer.Option("--description", help="One paragraph about the data.")] = "",
    seed: SeedOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Tokenise, shuffle and pack texts into shards that are named by their content; copies are left out.

    `swarm run init --data data` makes a manifest of them; `swarm data generate` writes samples for prompts.

    Examples:

      swarm data build ./texts --tokenizer bpe:8192 --sequence-length 512 --license CC-BY-4.0

      swarm data build articles.jsonl --field body --to data

      swarm data build chats.jsonl --kind chat --tokenizer base/tokenizer.json --sequence-length 2048

      swarm data build questions.jsonl --kind prompts --tokenizer base/tokenizer.json --sequence-length 512 --to prompts

      swarm data build --hub roneneldan/TinyStories --column text --limit 100000 --tokenizer bpe:8192
    """
    from peer.dataset import FILE, Plan
    from peer.dataset import build as build_dataset

    source = Source(sources or [], kind, field, Hub(hub, config, split, limit))
    to = new_folder(to)
    with source.opened(to.parent, seed) as (documents, counts, bar):
        plan = Plan(
            tokenizer,
            sequence_length,
            held_out,
            license_ or source.license or "unknown",
            description,
            cast("Kind", kind),
            chat_template,
            private,
        )
        made = build_dataset(documents, to, plan, counts, bar("packing", counts.documents))
        copies = documents.copies
    fields: dict[str, object] = {
        "directory": str(to),
        "documents": counts.documents,
        "copies": copies,
        "skipped_files": len(counts.unreadable),
        "vocabulary_size": made.vocabulary_size,
        "license": made.data.license,
        **_left_out(kind, counts),
        **_samples(kind, made),
    }
    if as_json:
        print_json(fields)
        return
    print_fields(fields)
    following = f"run init --data {to}" if kind != "prompts" else f"data generate --base BASE --prompts {to} --to data"
    after = f"send that file to the run's owner, and join with: --data {to}" if private else f"swarm {following}"
    typer.echo(f"{to / FILE} written; next: {after}")


@app.command()
def combine(
    sources: Annotated[
        list[Path], typer.Argument(help="Folders made by `swarm data build`; of private data dataset.yaml alone will do.")
    ],
    to: Annotated[Path, typer.Option("--to", help="Folder for what they are together; new or empty.")] = Path("combined"),
    tokenizer: Annotated[
        str, typer.Option("--tokenizer", help="Where none of the folders has it: bytes, a tokenizer.json or its folder.")
    ] = "",
    as_json: JsonOption = False,
) -> None:
    """Put the data of several people together for one run: private shards are only named, all others copied.

    Examples:

      swarm data combine anna.yaml ben.yaml ./public --to data

      swarm data combine anna.yaml ben.yaml --tokenizer tokenizer --to data
    """
    from peer.combining import combine as put_together
    from peer.dataset import FILE

    to = new_folder(to)
    made = put_together(sources, to, tokenizer)
    fields: dict[str, object] = {
        "directory": str(to),
        "train_samples": made.data.train_samples,
        "private_samples": sum(shard.samples for shard in made.data.train if shard.private),
        "held_out_samples": sum(shard.samples for shard in made.data.validation),
        "license": made.data.license,
    }
    if as_json:
        print_json(fields)
        return
    print_fields(fields)
    typer.echo(f"{to / FILE} written; next: swarm run init --data {to}")


@app.command()
def teach(
    folder: Annotated[Path, typer.Argument(help="Made by `swarm data build`.")],
    teacher: Annotated[Path, typer.Option("--teacher", help="A directory of transformers: config, safetensors, tokenizer.json.")],
    to: Annotated[Path, typer.Option("--to", help="Folder for the data and what the teacher expects; new or empty.")],
    top_k: Annotated[int, typer.Option("--top-k", min=1, max=1024, help="How many of its likeliest tokens are kept.")] = 32,
    gpu: Annotated[str | None, typer.Option("--gpu", help="A GPU's number; without it the processor computes.")] = None,
    micro_batch: Annotated[int, typer.Option("--micro-batch", min=1, help="Samples at once.")] = 8,
    as_json: Annotated[bool, typer.Option("--json", help="One line of JSON.")] = False,
) -> None:
    """Add what a teacher expects at each training token, so that a run can learn from its logits.

    The teacher has to have the data's tokenizer. `swarm run init --data FOLDER` then makes a manifest with a `distillation`.

    Examples:

      swarm data teach data --teacher ./large-model --top-k 32 --to taught
    """
    from peer.dataset import FILE
    from peer.device import choose_devices
    from peer.teaching import teach as write_lessons

    to = new_folder(to)
    device = choose_devices(gpu or "", cpu=gpu is None)[0]
    with bars() as bar:
        made = write_lessons(folder, to, teacher, top_k, device, micro_batch, lambda total: bar("teaching", total))
    shards = made.data.teacher.shards if made.data.teacher is not None else ()
    fields: dict[str, object] = {
        "directory": str(to),
        "top_k": top_k,
        "train_samples": made.data.train_samples,
        "teacher_bytes": sum(tree.size_bytes for tree in shards),
    }
    if as_json:
        print_json(fields)
        return
    print_fields(fields)
    typer.echo(f"{to / FILE} written; next: swarm run init --data {to}")


def _samples(kind: str, made: Dataset) -> dict[str, object]:
    if kind == "prompts":
        return {"prompts": made.data.train_samples}
    return {
        "train_samples": made.data.train_samples,
        "held_out_samples": sum(shard.samples for shard in made.data.validation),
    }


@dataclass(frozen=True)
class Hub:
    """Which rows of which data set of a hub; none without a name."""

    name: str = ""
    config: str | None = None
    split: str = "train"
    limit: int | None = None


@dataclass
class Source:
    """Where documents come from: files, or a hub. `license` is what a hub says, once it is opened."""

    paths: Sequence[Path]
    kind: str
    field: str
    hub: Hub
    license: str = ""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UsageError(f"no such kind of data: {self.kind}", "choose text or chat, or prompts")
        if bool(self.paths) == bool(self.hub.name):
            raise UsageError("name files, or a data set with --hub", "for example: swarm data build ./texts")

    @contextmanager
    def opened(self, folder: Path, seed: int = 0) -> Iterator[tuple[Shuffled, Counts, Bar]]:
        """The documents, shuffled in temporary files in a folder; what reading came to; and what adds further bars."""
        from peer.documents import Counts, Shuffled

        counts = Counts()
        with bars() as bar, Shuffled(self._documents(counts, bar), seed, folder) as documents:
            yield documents, counts, bar

    def _documents(self, counts: Counts, bar: Bar) -> Iterator[str]:
        from peer.documents import files_of, read_documents, read_records

        if self.hub.name:
            return self._from(self._rows(counts, bar), counts)
        files = files_of(self.paths)
        on_file = bar("reading", len(files))
        if self.kind == "text":
            return read_documents(files, self.field, counts, on_file)
        return self._from(read_records(files, counts, on_file), counts)

    def _from(self, records: Iterable[Record], counts: Counts) -> Iterator[str]:
        from peer.chats import read_chats
        from peer.documents import texts_of
        from peer.prompts import read_prompts

        match self.kind:
            case "chat":
                return read_chats(records, counts)
            case "prompts":
                return read_prompts(records, counts)
        return texts_of(records, self.field, counts)

    def _rows(self, counts: Counts, bar: Bar) -> Iterator[Record]:
        from peer.hub import open_data

        hub = self.hub
        found = open_data(hub.name, hub.config, hub.split)
        self.license, counts.origin = found.license, found.origin
        total = min(filter(None, (found.rows, hub.limit)), default=None)
        on_row = bar("reading", total)
        for record in found.records(hub.limit):
            yield record
            on_row()


def _left_out(kind: str, counts: Counts) -> dict[str, object]:
    """The chats that can't be trained on, and prompts that don't fit; told on standard error where there are some."""
    if kind == "text":
        return {}
    if kind == "prompts":
        if counts.too_long:
            typer.echo(f"warning: left out {counts.too_long:,} of the prompts, longer than a row", err=True)
        return {"empty": counts.empty, "too_long": counts.too_long}
    found = {"empty": counts.empty, "too_long": counts.too_long, "not_split": counts.not_split}
    reasons = {
        "empty": "without an answer",
        "too_long": "longer than a sample: a larger --sequence-length takes them",
        "not_split": "of which the chat template doesn't write the beginning as in the whole",
    }
    for name, count in found.items():
        if count:
            typer.echo(f"warning: left out {count:,} of the chats, {reasons[name]}", err=True)
    return dict(found)
