"""A folder of generated data: pieces, the samples of them that are kept as shards for a run, and where all of it comes from.

What is in it follows from the pieces and the settings alone, so that anybody can build it again and compare.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, JsonValue
from tokenizers import Tokenizer

from peer.chats import MARKERS
from peer.corpus import build_marked_shards, end_of_text_id, is_held_out, load_tokenizer
from peer.data import ShardReader, tree_path, verify_tree_file
from peer.dataset import CARD, FILE, Dataset, read
from peer.filtering import REASONS, Sieve
from peer.folders import appearing, describe, described
from peer.generating import Sample, Writer, check_length, write_span
from peer.marks import Values, marked
from peer.outcome import FILES, PIECES
from peer.pieces import Piece, pack, unpack
from peer.pretrained import read_pretrained
from peer.prompts import Ids, Prompts
from peer.rounds.gathering import PieceFolder
from swarm.errors import DataInvalid, Rejected
from swarm.manifest import Base, Data, Filters, Generate, Hash, Manifest, Model, Sampling, Shard, Tree
from swarm.merkle import blob_hash

PROVENANCE, SAMPLES = "provenance.yaml", "samples.jsonl"
PIECE_SAMPLES = 64
MADE_BY = "make it with: swarm data generate, or swarm data collect"


class Settings(BaseModel):
    """What the samples follow from. `run` is what noise is keyed by: a run's id, or for one machine the hash of the rest."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    run: Hash
    base: Base
    tokenizer: Tree
    prompts: tuple[Shard, ...]
    longest_prompt: int = Field(ge=1)
    samples_per_prompt: int = Field(ge=1)
    sampling: Sampling
    seed: int = 0

    @classmethod
    def for_one_machine(cls, base: Base, prompts: Dataset, samples_per_prompt: int, sampling: Sampling, seed: int) -> Settings:
        """Those of samples that no run asks for."""
        values = {
            "base": base,
            "tokenizer": prompts.tokenizer,
            "prompts": prompts.data.train,
            "longest_prompt": prompts.data.sequence_length + 1,
            "samples_per_prompt": samples_per_prompt,
            "sampling": sampling,
            "seed": seed,
        }
        draft = cls.model_validate({"run": "0" * 64, **values})
        text = json.dumps(draft.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
        run = hashlib.blake2b(text.encode(), digest_size=32, person=b"swarm.generate").hexdigest()
        return cls.model_validate({"run": run, **values})

    @classmethod
    def of_run(cls, run: Manifest) -> Settings:
        """Those of a run that generates. Raises `DataInvalid` for another."""
        strategy, base = run.strategy, run.model.base
        if not isinstance(strategy, Generate) or base is None:
            raise DataInvalid("the run trains, it doesn't generate", "its outcome is written by: swarm export --to DIR")
        return cls(
            run=run.run_id,
            base=base,
            tokenizer=run.tokenizer,
            prompts=run.data.train,
            longest_prompt=run.data.sequence_length + 1,
            samples_per_prompt=strategy.samples_per_prompt,
            sampling=strategy.sampling,
        )

    @property
    def samples(self) -> int:
        """How many samples there are to be."""
        return sum(shard.samples for shard in self.prompts) * self.samples_per_prompt

    def open_prompts(self, folder: Path, vocabulary: int) -> Prompts:
        """The prompts, which lie in a folder by their roots."""
        reader = ShardReader.open(self.prompts, folder, self.longest_prompt - 1, vocabulary, "prompts")
        return Prompts(reader, self.run, self.samples_per_prompt)


class Source(BaseModel):
    """A piece, and of a run who wrote it when."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    hash: Hash
    first: int = Field(ge=0)
    samples: int = Field(ge=1)
    tokens: int = Field(ge=1)
    precision: str
    round: int = 0
    peer: str = ""


class Keeping(BaseModel):
    """How samples become data: which are kept, and in rows of how many tokens."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    filters: Filters = Filters()
    sequence_length: int = Field(ge=8, le=1 << 17)
    held_out: float = Field(0.05, gt=0, le=0.5)
    license: str = "unknown"
    description: str = ""


class Provenance(BaseModel):
    """Where the data in a folder come from."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    settings: Settings
    keeping: Keeping
    pieces: tuple[Source, ...]
    counts: dict[str, int]
    about: dict[str, JsonValue] = {}


@dataclass(frozen=True)
class Found:
    """A piece that was read, and where it comes from."""

    source: Source
    piece: Piece
    raw: bytes


@dataclass
class _Kept:
    """The samples that are kept, as documents, and as lines for people."""

    train: list[Values] = field(default_factory=list)
    held_out: list[Values] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)


def source_of(raw: bytes, piece: Piece, round_index: int = 0, peer: str = "") -> Source:
    """What is to be said of a piece."""
    return Source(
        hash=blob_hash(raw).hex(),
        first=piece.first,
        samples=len(piece.samples),
        tokens=piece.tokens,
        precision=piece.precision,
        round=round_index,
        peer=peer,
    )


def generate(
    base: Path,
    prompts: Path,
    to: Path,
    settings: Settings,
    keeping: Keeping,
    device: torch.device,
    micro_batch: int = 0,
    begin: Callable[[int, int], Callable[[int], None]] = lambda done, total: lambda samples: None,
) -> Provenance:
    """Write all samples and make a folder of them, all or nothing; what an interrupted call has written is gone on from.

    `micro_batch` is how many samples are written at once, 0 = as many as is usual for the device. `begin` is told how many are
    there already and how many there are to be; what it gives hears of each few. Raises `DataInvalid` and `OutOfMemory`.
    """
    data = read(prompts)
    unfinished = to.with_name(f".{to.name}-{settings.run[:16]}")
    unfinished.mkdir(parents=True, exist_ok=True)
    writer = open_writer(base, settings, device)
    writer.micro_batch = micro_batch or writer.micro_batch
    lines = settings.open_prompts(prompts, writer.vocabulary)
    starts = range(0, settings.samples, PIECE_SAMPLES)
    there = {first for first in starts if _read_piece(_piece_path(unfinished, first), settings, writer.vocabulary)}
    on_samples = begin(min(len(there) * PIECE_SAMPLES, settings.samples), settings.samples)
    for first in starts:
        if first not in there:
            samples = write_span(writer, lines, first, PIECE_SAMPLES, on_samples=lambda found: on_samples(len(found)))
            temporary = unfinished / "piece"
            temporary.write_bytes(pack(samples, writer.precision))
            temporary.replace(_piece_path(unfinished, first))
    found = (_read_piece(_piece_path(unfinished, first), settings, writer.vocabulary) for first in starts)
    writer.release()
    made = build([piece for piece in found if piece is not None], data, prompts, to, settings, keeping)
    shutil.rmtree(unfinished)
    return made


def stop_ids(config: Mapping[str, Any], prompts: Dataset, folder: Path, names: Sequence[str] = ()) -> tuple[int, ...]:
    """The tokens that end a sample: what ends a text or, by the model's configuration, what it writes; a turn of ChatML; `names`.

    Raises `DataInvalid` for a name that is no token.
    """
    tokenizer: Tokenizer = load_tokenizer(tree_path(folder, prompts.tokenizer)).backend_tokenizer
    named = {name: tokenizer.token_to_id(name) for name in names}
    unknown = [name for name, found in named.items() if found is None]
    if unknown:
        raise DataInvalid(f"the tokenizer has no token {unknown[0]!r}", "name a whole token with --stop")
    own = config.get("eos_token_id")
    turn = tokenizer.token_to_id(MARKERS[1]) if MARKERS[1] in prompts.data.chat_template else None
    found = [prompts.end_of_text, turn, *(own if isinstance(own, list) else [own]), *named.values()]
    return tuple(sorted({token for token in found if isinstance(token, int) and token >= 0}))


def open_writer(base: Path, settings: Settings, device: torch.device) -> Writer:
    """The model in a folder that `swarm run base` has left. Raises `DataInvalid` where it is another, or doesn't fit."""
    pretrained = read_pretrained(base)
    if (pretrained.base.root, pretrained.tokenizer.root) != (settings.base.root, settings.tokenizer.root):
        hint = f"build the prompts with --tokenizer {tree_path(base, pretrained.tokenizer)}, and name the base that is asked for"
        raise DataInvalid(f"the model in {base} is another than that of the prompts or the samples", hint)
    check_length(pretrained.config, settings.longest_prompt, settings.sampling)
    for tree in (pretrained.base, pretrained.tokenizer):
        verify_tree_file(tree_path(base, tree), tree)
    model = Model(config=pretrained.config, parameters=1, base=pretrained.base)
    return Writer.open(model, pretrained.tokenizer, base, settings.sampling, bytes.fromhex(settings.run), device)


@dataclass(frozen=True)
class Completing:
    """With what samples are written that a run has left out: the model's folder, and a device."""

    base: Path
    device: torch.device


def collect(
    run: Manifest,
    directory: Path,
    to: Path,
    keeping: Keeping,
    suspended: Collection[str],
    about: dict[str, Any],
    completing: Completing | None = None,
) -> Provenance:
    """Make a folder of the pieces that a peer of a run that generates has kept in its own, but for those of `suspended` keys.

    What is missing then is written here, where that is asked for. Raises `DataInvalid` for a run that doesn't generate, and where
    there is no piece.
    """
    settings, files = Settings.of_run(run), directory / FILES
    tokenizer: Tokenizer = load_tokenizer(tree_path(files, run.tokenizer)).backend_tokenizer
    size = tokenizer.get_vocab_size()
    found, left_out = _kept_pieces(run, directory, settings, min(size, run.model.vocabulary_size), suspended)
    prompts = Dataset(tokenizer=run.tokenizer, data=run.data, vocabulary_size=size, end_of_text=end_of_text_id(tokenizer))
    if completing is not None:
        writer = open_writer(completing.base, settings, completing.device)
        lines = settings.open_prompts(files, writer.vocabulary)
        for first, count in missing_spans(found, settings.samples):
            samples = write_span(writer, lines, first, count)
            raw = pack(samples, writer.precision)
            piece = Piece(tuple(samples), writer.precision)
            found.append(Found(source_of(raw, piece), piece, raw))
    if not found:
        raise DataInvalid(f"{directory} has no piece of this run", "name the folder of a peer that took part with --dir")
    return build(found, prompts, files, to, settings, keeping, {**about, "pieces_left_out": dict(left_out)})


def missing_spans(found: Sequence[Found], total: int) -> list[tuple[int, int]]:
    """The first of the samples that no piece has, and how many follow it, no more than go into a piece."""
    spans, at = list[tuple[int, int]](), 0
    held = sorted((item.piece.first, item.piece.samples[-1].index + 1) for item in found)
    for start, end in [*held, (total, total)]:
        spans += [(first, min(PIECE_SAMPLES, start - first)) for first in range(at, start, PIECE_SAMPLES)]
        at = max(at, end)
    return spans


def _kept_pieces(
    run: Manifest, directory: Path, settings: Settings, vocabulary: int, suspended: Collection[str]
) -> tuple[list[Found], Counter[str]]:
    """What counts of what a peer has kept, and how many pieces don't."""
    found, left_out = list[Found](), Counter[str]()
    for kept in PieceFolder(directory / PIECES).pieces(bytes.fromhex(run.run_id)):
        if kept.peer in suspended:
            left_out["suspended"] += 1
            continue
        try:
            piece = unpack(kept.raw, settings.sampling, vocabulary, kept.peer)
        except Rejected:
            left_out["malformed"] += 1
            continue
        if piece.samples[-1].index >= settings.samples:
            left_out["malformed"] += 1
            continue
        found.append(Found(source_of(kept.raw, piece, kept.round_index, kept.peer), piece, kept.raw))
    return found, left_out


def longest_row(run: Manifest) -> int:
    """The `sequence_length` into whose rows every sample of a run fits."""
    most = run.strategy.sampling.max_tokens if isinstance(run.strategy, Generate) else 0
    return run.data.sequence_length + most


def _piece_path(folder: Path, first: int) -> Path:
    return folder / f"{first:012d}.piece"


def _read_piece(path: Path, settings: Settings, vocabulary: int) -> Found | None:
    """A piece that is there and whole."""
    try:
        raw = path.read_bytes()
        piece = unpack(raw, settings.sampling, vocabulary)
    except (OSError, Rejected):
        return None
    return Found(source_of(raw, piece), piece, raw)


def build(
    found: Sequence[Found],
    prompts: Dataset,
    prompts_folder: Path,
    to: Path,
    settings: Settings,
    keeping: Keeping,
    about: dict[str, Any] | None = None,
) -> Provenance:
    """Write a data folder of pieces, all or nothing: pieces, prompts, shards, a list of samples, a card. Raises `DataInvalid`.

    A sample that is in several pieces counts once.
    """
    with appearing(to) as unfinished:
        (unfinished / PIECES).mkdir()
        for item in found:
            (unfinished / PIECES / item.source.hash).write_bytes(item.raw)
        for tree in {tree.root: tree for tree in (settings.tokenizer, *settings.prompts)}.values():
            verify_tree_file(tree_path(prompts_folder, tree), tree)
            shutil.copyfile(tree_path(prompts_folder, tree), tree_path(unfinished, tree))
        sieve = Sieve(keeping.filters)
        kept = _kept(found, unfinished, settings, keeping, sieve)
        made = _dataset(kept, prompts, unfinished, keeping)
        described_ = Provenance(
            settings=settings,
            keeping=keeping,
            pieces=tuple(item.source for item in found),
            counts=_counts(found, settings, sieve),
            about=about or {},
        )
        describe(unfinished / FILE, made)
        describe(unfinished / PROVENANCE, described_)
        (unfinished / SAMPLES).write_text("".join(kept.lines), encoding="utf-8")
        (unfinished / CARD).write_text(card(described_, made), encoding="utf-8")
        unfinished.chmod(0o755)
    return described_


def _counts(found: Sequence[Found], settings: Settings, sieve: Sieve) -> dict[str, int]:
    """What became of the samples that there were to be."""
    generated = sieve.counts.total()
    dropped = {reason: sieve.counts[reason] for reason in REASONS if sieve.counts[reason]}
    tokens = sum(item.piece.tokens for item in found)
    return {
        "asked_for": settings.samples,
        "missing": settings.samples - generated,
        "generated": generated,
        "generated_tokens": tokens,
        "kept": sieve.counts["kept"],
        **dropped,
    }


def _kept(found: Sequence[Found], folder: Path, settings: Settings, keeping: Keeping, sieve: Sieve) -> _Kept:
    tokenizer: Tokenizer = load_tokenizer(tree_path(folder, settings.tokenizer)).backend_tokenizer
    prompts, kept = settings.open_prompts(folder, tokenizer.get_vocab_size()), _Kept()
    for prompt, sample in _in_order(found, prompts):
        finished = bool(np.isin(sample.tokens[-1], settings.sampling.stop))
        if sieve.reason(prompt, sample.tokens, sample.loss, finished=finished):
            continue
        said = np.arange(prompt.size + sample.tokens.size) >= prompt.size
        asked = tokenizer.decode(prompt.tolist(), skip_special_tokens=False)
        side = kept.held_out if is_held_out(asked, keeping.held_out) else kept.train
        side.append(marked(np.concatenate([prompt, sample.tokens]), said))
        line = {
            "index": sample.index,
            "prompt": asked,
            "text": tokenizer.decode(sample.tokens.tolist(), skip_special_tokens=False),
            "perplexity": round(float(np.exp(sample.loss)), 4),
        }
        kept.lines.append(json.dumps(line, ensure_ascii=False) + "\n")
    return kept


def _in_order(found: Sequence[Found], prompts: Prompts) -> Iterator[tuple[Ids, Sample]]:
    """Samples by their numbers, each once, with their prompts."""
    after = 0
    for item in sorted(found, key=lambda item: item.piece.first):
        pairs = zip(prompts.of(item.piece.first, len(item.piece.samples)), item.piece.samples, strict=True)
        yield from ((prompt, sample) for prompt, sample in pairs if sample.index >= after)
        after = max(after, item.piece.samples[-1].index + 1)


def _dataset(kept: _Kept, prompts: Dataset, folder: Path, keeping: Keeping) -> Dataset:
    def shards(documents: Iterable[Values], side: str) -> tuple[tuple[Shard, ...], int]:
        fitting = (document for document in documents if document.size <= keeping.sequence_length + 1)
        try:
            return build_marked_shards(fitting, folder, sequence_length=keeping.sequence_length, end_of_text=prompts.end_of_text)
        except DataInvalid as error:
            hint = "generate more samples, let the filters keep more, or hold another share out with --held-out"
            raise DataInvalid(f"the {side} side has no sample", hint) from error

    (train, counted), (validation, _) = shards(kept.train, "training"), shards(kept.held_out, "held-out")
    data = Data(
        sequence_length=keeping.sequence_length,
        train=train,
        validation=validation,
        layout="marked",
        counted_tokens=counted,
        chat_template=prompts.data.chat_template,
        license=keeping.license,
        description=keeping.description,
    )
    return Dataset(
        tokenizer=prompts.tokenizer, data=data, vocabulary_size=prompts.vocabulary_size, end_of_text=prompts.end_of_text
    )


def card(made: Provenance, data: Dataset) -> str:
    """The data card in Markdown."""
    settings, counts, sampling = made.settings, made.counts, made.settings.sampling
    peers = sorted({source.peer for source in made.pieces} - {""})
    rounds = sorted({source.round for source in made.pieces} - {0})
    dropped = ", ".join(f"{counts[reason]:,} {reason.replace('_', ' ')}" for reason in REASONS if reason in counts)
    rows = {
        "run": f"`{settings.run}`",
        "base": f"{_plain(settings.base.name) or 'unnamed'}, root `{settings.base.root}`",
        "prompts": ", ".join(f"`{shard.root}`" for shard in settings.prompts),
        "samples per prompt": f"{settings.samples_per_prompt:,}",
        "sampling": f"temperature {sampling.temperature:g}, top-p {sampling.top_p:g}, top-k {sampling.top_k}, "
        f"at most {sampling.max_tokens:,} tokens",
        "generated": f"{counts['generated']:,} of {counts['asked_for']:,} samples, {counts['generated_tokens']:,} tokens",
        "kept": f"{counts['kept']:,}",
        "dropped": dropped or "none",
        "licence": _plain(made.keeping.license),
    }
    if rounds:
        rows |= {"rounds": f"{len(rounds):,}, from {rounds[0]:,} to {rounds[-1]:,}", "peers": f"{len(peers):,}"}
    rows["tokens with a loss"] = f"{data.data.counted_tokens:,}: those that the model wrote"
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    authors = "".join(f"- `{peer}`\n" for peer in peers)
    return (
        f"# Synthetic data\n\n{made.keeping.description}\n\n| | |\n| --- | --- |\n{table}\n\n"
        + (f"## Peers\n\n{authors}\n" if authors else "")
        + f"Pieces with their hashes, rounds and authors are in `{PROVENANCE}`, kept samples in `{SAMPLES}`.\n"
        "Whoever has the base checks them: `swarm data verify-generated`.\n"
    )


def _plain(text: str) -> str:
    return "".join(character for character in text if character.isalnum() or character in " .,:;@+()/-_")[:200]


@dataclass(frozen=True)
class Verified:
    """What checking a folder has come to: samples computed again, those the model can't have written, and the worst gap."""

    checked: int
    failed: tuple[int, ...]
    worst_gap: float


def verify(
    folder: Path, base: Path, device: torch.device, most: int, seed: int = 0, on_sample: Callable[[], None] = lambda: None
) -> Verified:
    """Build the folder's shards again from its pieces, and check up to `most` samples, drawn by `seed`, against the model.

    Raises `DataInvalid` for a folder that isn't what its pieces and settings give.
    """
    made = described(Provenance, folder / PROVENANCE, MADE_BY, "generate or collect the data anew")
    writer = open_writer(base, made.settings, device)
    found = [_found(folder, source, made.settings, writer.vocabulary) for source in made.pieces]
    _check_built(folder, found, made)
    prompts = made.settings.open_prompts(folder, writer.vocabulary)
    places = [(item, place) for item in found for place in range(len(item.piece.samples))]
    drawn = np.sort(np.random.default_rng(seed).permutation(len(places))[:most])
    worst, failed = 0.0, list[int]()
    for item, place in sorted((places[number] for number in drawn), key=lambda pair: pair[0].piece.precision):
        sample = item.piece.samples[place]
        check = writer.check(prompts.of(sample.index, 1)[0], sample, item.piece.precision)
        if check.problem(sample, item.piece.precision):
            failed.append(sample.index)
        worst = max(worst, check.worst)
        on_sample()
    return Verified(len(drawn), tuple(sorted(failed)), worst)


def _found(folder: Path, source: Source, settings: Settings, vocabulary: int) -> Found:
    """A piece in a finished folder. Raises `DataInvalid` unless it is what is said of it."""
    try:
        raw = (folder / PIECES / source.hash).read_bytes()
        piece = unpack(raw, settings.sampling, vocabulary)
    except (OSError, Rejected) as error:
        raise DataInvalid(f"piece {source.hash[:12]} can't be read: {error}", "get the folder anew") from error
    if source_of(raw, piece, source.round, source.peer) != source or piece.first + len(piece.samples) > settings.samples:
        raise DataInvalid(f"piece {source.hash[:12]} is damaged", "get the folder anew")
    return Found(source, piece, raw)


def _check_built(folder: Path, found: Sequence[Found], made: Provenance) -> None:
    """The shards have to be those that the pieces give."""
    there = read(folder)
    for tree in (*there.data.train, *there.data.validation, made.settings.tokenizer, *made.settings.prompts):
        verify_tree_file(tree_path(folder, tree), tree)
    with tempfile.TemporaryDirectory(prefix="swarm-verify-") as temporary:
        again = Path(temporary) / "again"
        rebuilt = build(found, there, folder, again, made.settings, made.keeping, made.about)
        if read(again) != there or rebuilt != made:
            raise DataInvalid(f"the shards in {folder} are not those that its pieces give", "get the folder anew")
