"""`swarm data`: a run's data from texts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from swarm.cli.output import print_fields, print_json
from swarm.errors import UsageError

if TYPE_CHECKING:
    from peer.documents import Counts

app = typer.Typer(help="Make a run's data from texts: build, teach.", no_args_is_help=True, rich_markup_mode=None)


@app.callback()
def data() -> None:
    """Make a run's data from texts: build, and teach for what a larger model makes of them."""


@app.command()
def build(
    sources: Annotated[list[Path], typer.Argument(help="Text files, JSON lines, Parquet files, or folders of them.")],
    to: Annotated[Path, typer.Option("--to", help="Folder for tokenizer and shards; new or empty.")] = Path("data"),
    tokenizer: Annotated[
        str, typer.Option("--tokenizer", help="bytes, bpe:8192 to train one of that size, or a tokenizer.json.")
    ] = "bytes",
    sequence_length: Annotated[int, typer.Option("--sequence-length", min=8, help="Tokens of a sample.")] = 128,
    held_out: Annotated[
        float, typer.Option("--held-out", min=0.001, max=0.5, help="Share of the documents that is kept for validation.")
    ] = 0.05,
    kind: Annotated[str, typer.Option("--kind", help="text, or chat: loss on what the assistant says only.")] = "text",
    chat_template: Annotated[
        Path | None, typer.Option("--chat-template", help="A Jinja file instead of the tokenizer's own, or ChatML.")
    ] = None,
    field: Annotated[str, typer.Option("--field", help="Where a JSON line or a Parquet row has its text.")] = "text",
    license_: Annotated[str, typer.Option("--license", help="The data's licence, for the manifest and the card.")] = "unknown",
    description: Annotated[str, typer.Option("--description", help="One paragraph about the data.")] = "",
    seed: Annotated[int, typer.Option("--seed", help="Another order of the same documents.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="One line of JSON.")] = False,
) -> None:
    """Tokenise, shuffle and pack texts into shards that are named by their content; copies are left out.

    `swarm run init --data data` makes a manifest of them.

    Examples:

      swarm data build ./texts --tokenizer bpe:8192 --sequence-length 512 --license CC-BY-4.0

      swarm data build articles.jsonl --field body --to data

      swarm data build chats.jsonl --kind chat --tokenizer base/tokenizer.json --sequence-length 2048
    """
    from peer.chats import read_chats
    from peer.dataset import FILE, Plan
    from peer.dataset import build as build_dataset
    from peer.documents import Counts, Shuffled, files_of, read_documents

    if kind not in ("text", "chat"):
        raise UsageError(f"no such kind of data: {kind}", "choose text or chat")
    to = new_folder(to)
    counts, files = Counts(), files_of(sources)
    plan = Plan(tokenizer, sequence_length, held_out, license_, description, "chat" if kind == "chat" else "text", chat_template)
    with ExitStack() as stack:
        bar = stack.enter_context(_bars())
        on_file = bar("reading", len(files))
        read = read_chats(files, counts, on_file) if kind == "chat" else read_documents(files, field, counts, on_file)
        documents = stack.enter_context(Shuffled(read, seed, to.parent))
        made = build_dataset(documents, to, plan, counts, bar("packing", counts.documents))
        copies = documents.copies
    fields: dict[str, object] = {
        "directory": str(to),
        "documents": counts.documents,
        "copies": copies,
        "skipped_files": len(counts.unreadable),
        "vocabulary_size": made.vocabulary_size,
        **_left_out(kind, counts),
        "train_samples": sum(shard.samples for shard in made.data.train),
        "held_out_samples": sum(shard.samples for shard in made.data.validation),
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
    with _bars() as bar:
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


def new_folder(to: Path) -> Path:
    """Where to write a folder, whose parents are made. Raises `UsageError` unless it is new or empty."""
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise UsageError(f"{to} exists already", "choose another folder with --to, or empty it")
    to = to.absolute()
    to.parent.mkdir(parents=True, exist_ok=True)
    return to


def _left_out(kind: str, counts: Counts) -> dict[str, object]:
    """The chats that can't be trained on; told on standard error where there are some."""
    if kind == "text":
        return {}
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


@contextmanager
def _bars() -> Iterator[Callable[[str, int], Callable[[], None]]]:
    """Bars on the terminal; nothing where there is none. `bar(what, total)` adds one, and gives what moves it on by one."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:

        def bar(what: str, total: int) -> Callable[[], None]:
            task = progress.add_task(what, total=total)
            return lambda: progress.advance(task)

        yield bar
