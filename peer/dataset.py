"""A run's data from documents: tokenizer, shards, and a card that says what is in them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field
from tokenizers import Tokenizer

from peer.chats import TEMPLATE_FILE, asked_in, format_of, texts_in
from peer.corpus import (
    TOKENIZER,
    build_marked_shards,
    build_prompt_shards,
    build_shards,
    byte_level_tokenizer,
    encode_bytes,
    encode_documents,
    end_of_text_id,
    is_held_out,
    load_tokenizer,
    save_tokenizer,
    train_bpe_tokenizer,
)
from peer.documents import Counts, Shuffled
from peer.folders import appearing, describe, described
from peer.prompts import encoded_prompts, is_chat, texts_of_prompts
from swarm.errors import DataInvalid, UsageError
from swarm.manifest import Data, Shard, Tree

FILE, CARD = "dataset.yaml", "README.md"
BYTES, BPE = "bytes", "bpe:"
LEAST_VOCABULARY = 257

Kind = Literal["text", "chat", "prompts"]


class Dataset(BaseModel):
    """What `swarm data build` leaves for `swarm run init`: the sections of a manifest that name the data."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    tokenizer: Tree
    data: Data
    vocabulary_size: int = Field(ge=2)
    end_of_text: int = Field(ge=0)


@dataclass(frozen=True)
class Plan:
    """How documents become samples: texts as one stream, `chat`s each apart, with a loss on what the assistant says.

    `prompts` are what samples are generated from.
    """

    tokenizer: str = BYTES
    sequence_length: int = 128
    held_out: float = 0.05
    license: str = "unknown"
    description: str = ""
    kind: Kind = "text"
    chat_template: Path | None = None
    private: bool = False


def make_tokenizer(name: str, documents: Iterable[str]) -> Tokenizer:
    """`bytes`, `bpe:SIZE` trained on the documents, or that of a file or folder. Raises `UsageError` or `DataInvalid`."""
    if name == BYTES:
        return byte_level_tokenizer()
    path = tokenizer_path(name)
    if path is not None:
        loaded: Tokenizer = load_tokenizer(path).backend_tokenizer
        return loaded
    size = name.removeprefix(BPE)
    if not size.isdecimal() or int(size) < LEAST_VOCABULARY:
        raise UsageError(f"{name!r} is no vocabulary", f"a BPE tokenizer has {LEAST_VOCABULARY} tokens or more, like bpe:8192")
    return train_bpe_tokenizer(documents, int(size))


def tokenizer_path(name: str) -> Path | None:
    """The file of a tokenizer that is named by it, or by the folder that it lies in; None for one that is made here."""
    if name == BYTES or name.startswith(BPE):
        return None
    path = Path(name)
    return path / TOKENIZER if path.is_dir() else path


def train_tokenizer(documents: Shuffled, to: Path, vocabulary_size: int, plan: Plan) -> Tokenizer:
    """Write a tokenizer trained on the documents that `plan` doesn't hold out into `to`, all or nothing.

    One for chats has ChatML's markers, and the template beside it. Raises `DataInvalid` and `UsageError`.
    """
    with appearing(to) as unfinished:
        tokenizer = make_tokenizer(f"{BPE}{vocabulary_size}", _learned_from(documents, plan))
        if plan.kind == "chat":
            (unfinished / TEMPLATE_FILE).write_text(format_of(tokenizer, None, plan.chat_template).template)
        tokenizer.save(str(unfinished / TOKENIZER))
    return tokenizer


def _learned_from(documents: Shuffled, plan: Plan) -> Iterator[str]:
    """What a tokenizer is trained on."""
    if plan.kind == "chat":
        return texts_in(_side(documents, plan.held_out, held_out=False, by=asked_in))
    return _side(documents, plan.held_out, held_out=False)


def build(documents: Shuffled, to: Path, plan: Plan, counts: Counts, on_document: Callable[[], None] = lambda: None) -> Dataset:
    """Write tokenizer, shards, `dataset.yaml` and a card into `to`, all or nothing.

    `on_document` hears of each one that is packed. Raises `DataInvalid` and `UsageError`.
    """
    with appearing(to) as unfinished:
        return _write(documents, unfinished, plan, counts, on_document)


def _write(documents: Shuffled, to: Path, plan: Plan, counts: Counts, on_document: Callable[[], None]) -> Dataset:
    match plan.kind:
        case "chat":
            return _write_chats(documents, to, plan, counts, on_document)
        case "prompts":
            return _write_prompts(documents, to, plan, counts, on_document)
        case "text":
            return _write_texts(documents, to, plan, counts, on_document)


def _write_texts(documents: Shuffled, to: Path, plan: Plan, counts: Counts, on_document: Callable[[], None]) -> Dataset:
    tokenizer = make_tokenizer(plan.tokenizer, _learned_from(documents, plan))
    end, size = end_of_text_id(tokenizer), tokenizer.get_vocab_size()

    def shards(held_out: bool) -> tuple[Shard, ...]:
        texts = _told(_side(documents, plan.held_out, held_out=held_out), on_document)
        encoded = encode_bytes(texts) if plan.tokenizer == BYTES else encode_documents(tokenizer, texts)
        with _named(held_out):
            made = build_shards(encoded, to, sequence_length=plan.sequence_length, end_of_text=end, vocabulary_size=size)
            return _as_planned(made, plan)

    data = Data(
        sequence_length=plan.sequence_length,
        train=shards(held_out=False),
        validation=shards(held_out=True),
        license=plan.license,
        description=plan.description,
    )
    made = Dataset(tokenizer=save_tokenizer(tokenizer, to), data=data, vocabulary_size=size, end_of_text=end)
    return _described(made, to, plan, counts, documents.copies)


def _write_chats(documents: Shuffled, to: Path, plan: Plan, counts: Counts, on_document: Callable[[], None]) -> Dataset:
    """The same of chats; each side's rows are counted as well as its documents."""
    tokenizer = make_tokenizer(plan.tokenizer, _learned_from(documents, plan))
    chats = format_of(tokenizer, tokenizer_path(plan.tokenizer), plan.chat_template)
    end = end_of_text_id(tokenizer)

    def shards(held_out: bool) -> tuple[tuple[Shard, ...], int]:
        texts = _told(_side(documents, plan.held_out, held_out=held_out, by=asked_in), on_document)
        values = chats.documents(texts, plan.sequence_length + 1, counts)
        with _named(held_out):
            made, counted = build_marked_shards(values, to, sequence_length=plan.sequence_length, end_of_text=end)
            return _as_planned(made, plan), counted

    (train, counted), (validation, _) = shards(held_out=False), shards(held_out=True)
    data = Data(
        sequence_length=plan.sequence_length,
        train=train,
        validation=validation,
        layout="marked",
        counted_tokens=counted,
        chat_template=chats.template,
        license=plan.license,
        description=plan.description,
    )
    size = tokenizer.get_vocab_size()
    made = Dataset(tokenizer=save_tokenizer(tokenizer, to), data=data, vocabulary_size=size, end_of_text=end)
    return _described(made, to, plan, counts, documents.copies)


def _as_planned(shards: tuple[Shard, ...], plan: Plan) -> tuple[Shard, ...]:
    return tuple(shard.model_copy(update={"private": plan.private}) for shard in shards)


def _write_prompts(documents: Shuffled, to: Path, plan: Plan, counts: Counts, on_document: Callable[[], None]) -> Dataset:
    """The same of prompts, one a row. None is held out: a part of them stands in the place of such samples."""
    tokenizer = make_tokenizer(plan.tokenizer, texts_of_prompts(documents))
    chats = format_of(tokenizer, tokenizer_path(plan.tokenizer), plan.chat_template) if any(map(is_chat, documents)) else None
    end = end_of_text_id(tokenizer)
    values = encoded_prompts(_told(documents, on_document), tokenizer, chats, plan.sequence_length + 1, counts)
    shards = _as_planned(build_prompt_shards(values, to, sequence_length=plan.sequence_length, end_of_text=end), plan)
    data = Data(
        sequence_length=plan.sequence_length,
        train=shards,
        validation=shards[-1:],
        layout="prompts",
        chat_template=chats.template if chats is not None else "",
        license=plan.license,
        description=plan.description,
    )
    size = tokenizer.get_vocab_size()
    made = Dataset(tokenizer=save_tokenizer(tokenizer, to), data=data, vocabulary_size=size, end_of_text=end)
    return _described(made, to, plan, counts, documents.copies)


@contextmanager
def _named(held_out: bool) -> Iterator[None]:
    """Say of which side an error is."""
    try:
        yield
    except DataInvalid as error:
        side = "held-out" if held_out else "training"
        hint = (
            error.hint
            or "a document is a file, a JSON line or a row: split large files, or hold another share out with --held-out"
        )
        raise DataInvalid(f"the {side} side: {error.message}", hint) from error


def _described(made: Dataset, to: Path, plan: Plan, counts: Counts, copies: int) -> Dataset:
    describe(to / FILE, made)
    (to / CARD).write_text(_card(made, plan, counts, copies))
    return made


def read(folder: Path) -> Dataset:
    """What `build` has left in a folder. Raises `DataInvalid`."""
    return read_description(folder / FILE)


def read_description(path: Path) -> Dataset:
    """The same from the file that describes the folder, which may have been sent here without it. Raises `DataInvalid`."""
    return described(Dataset, path, f"make it with: swarm data build SOURCE --to {path.parent}", "build the data anew")


def _side(
    documents: Iterable[str], fraction: float, *, held_out: bool, by: Callable[[str], str] = lambda text: text
) -> Iterator[str]:
    return (text for text in documents if is_held_out(by(text), fraction) == held_out)


def _chats_row(counts: Counts, plan: Plan) -> dict[str, str]:
    if plan.kind == "text":
        return {}
    if plan.kind == "prompts":
        return {"prompts left out": f"{counts.too_long:,} longer than a row"}
    return {
        "chats left out": f"{counts.empty:,} without an answer, {counts.too_long:,} longer than a sample, "
        f"{counts.not_split:,} that the template doesn't write piece by piece",
    }


def _source_row(counts: Counts) -> dict[str, str]:
    if counts.origin:
        return {"source": counts.origin}
    return {"files": f"{counts.files:,}, {len(counts.unreadable):,} of them skipped because they are no UTF-8 text"}


def _told(documents: Iterable[str], on_document: Callable[[], None]) -> Iterator[str]:
    for text in documents:
        yield text
        on_document()


def _card(made: Dataset, plan: Plan, counts: Counts, copies: int) -> str:
    samples = {name: sum(shard.samples for shard in getattr(made.data, name)) for name in ("train", "validation")}
    rows = {
        "licence": made.data.license,
        **_source_row(counts),
        "documents": f"{counts.documents:,}, {copies:,} of them copies that were left out",
        **_chats_row(counts, plan),
        "bytes of text": f"{counts.bytes_read:,}",
        "tokenizer": f"{plan.tokenizer}, {made.vocabulary_size:,} tokens, root {made.tokenizer.root}",
    }
    if made.data.layout == "prompts":
        rows["prompts"] = f"{samples['train']:,} of at most {made.data.sequence_length + 1:,} tokens"
    else:
        rows["training samples"] = f"{samples['train']:,} of {made.data.sequence_length:,} tokens"
        rows["held-out samples"] = f"{samples['validation']:,}, from documents of their own"
    if plan.private:
        rows["private"] = "yes: these shards stay where they are"
    if made.data.layout == "marked":
        share = made.data.counted_per_sample / made.data.sequence_length
        rows["tokens with a loss"] = (
            f"{made.data.counted_tokens:,}, {share:.0%} of the training samples': what the assistant says"
        )
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    return f"# Data\n\n{made.data.description}\n\n| | |\n| --- | --- |\n{table}\n\nFiles are named by the roots in `{FILE}`.\n"
