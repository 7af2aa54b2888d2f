"""The manifest of a run: one YAML file, parsed into frozen values, whose canonical bytes are hashed into the run id.

A manifest can never make a peer run code: models come from transformers' own registry by plain configuration values, weights
are safetensors, everything else is JSON, and every file is named by its hash.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from itertools import compress
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    field_validator,
    model_serializer,
    model_validator,
)

from swarm.errors import ManifestInvalid

MAX_MANIFEST_BYTES = 1 << 20
WITHOUT_DROPOUT = frozenset({"gemma", "gemma2", "gemma3_text", "llama", "mistral", "olmo", "olmo2", "qwen2", "qwen3"})
"""Architectures that drop nothing unless their configuration says so."""
PACKS_DOCUMENTS = frozenset(
    {
        "gemma",
        "gemma3_text",
        "gpt2",
        "gpt_neox",
        "granite",
        "llama",
        "mistral",
        "olmo",
        "olmo2",
        "phi3",
        "qwen2",
        "qwen3",
        "qwen3_moe",
        "smollm3",
    }
)
"""Architectures whose attention keeps documents apart where position ids start anew."""
FORBIDDEN_MODEL_KEYS = frozenset({"auto_map", "trust_remote_code", "custom_pipelines", "_attn_implementation_internal"})

Hash = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$", description="32 bytes in lower-case hexadecimal")]
Positive = Annotated[int, Field(gt=0, le=1 << 48)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
LayerName = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*(\.[A-Za-z0-9_]+)*$", max_length=200)]
LearningRate = Annotated[float, Field(gt=0.0, le=10.0)]
Prompt = Annotated[str, Field(min_length=1, max_length=200)]
Layout = Literal["plain", "marked", "prompts"]


class Frozen(BaseModel):
    """An immutable value that knows all its fields.

    `LATER` names fields that manifests signed by earlier versions don't have: left out of what is written while they have
    their default, so that such a manifest keeps its canonical bytes and with them its run id.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    LATER: ClassVar[frozenset[str]] = frozenset()

    @model_serializer(mode="wrap")
    def _without_unused(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        values: dict[str, Any] = write(self)
        unused = {name for name in self.LATER if getattr(self, name) == type(self).model_fields[name].get_default()}
        return {name: value for name, value in values.items() if name not in unused}


class Tree(Frozen):
    """A file named by the RFC 6962 Merkle root (over BLAKE2b-256 chunk hashes) of its chunks."""

    root: Hash
    size_bytes: Positive
    chunk_bytes: Positive = 1 << 20

    @property
    def chunk_count(self) -> int:
        """Number of chunks; only the last one may be shorter than `chunk_bytes`."""
        return -(-self.size_bytes // self.chunk_bytes)


class Shard(Tree):
    """Token ids, little-endian unsigned integers: `samples` rows of `sequence_length + 1` ids.

    In a `marked` layout the lower 28 bits are the id; the top bit says that it has no loss, the next that a document starts. In
    that of `prompts` they are the same, and a row is one prompt: it ends where the next document starts.
    """

    LATER: ClassVar[frozenset[str]] = frozenset({"private"})

    samples: Positive
    token_bytes: Literal[2, 4] = 2
    private: bool = Field(False, description="stays where it is: nobody serves or fetches it, and those who have it train on it")


class Base(Tree):
    """The safetensors file of a pretrained model: every parameter of `model.config`, in fp32, fp16 or bf16.

    In `nf4` the weights of linear layers other than the output head are in 4 bits, which only an adapter can be trained on.
    """

    LATER: ClassVar[frozenset[str]] = frozenset({"stored"})

    name: str = Field("", max_length=200, description="what it is called where it comes from, for model cards")
    stored: Literal["plain", "nf4"] = Field(
        "plain", description="`nf4`: 4 bits and a scale for each 64 weights (QLoRA, 2305.14314)"
    )


class Lora(Frozen):
    """A low-rank adapter (LoRA, 2106.09685): the base stays as it is, and `alpha / rank x B A` is added to each target."""

    kind: Literal["lora"] = "lora"
    rank: int = Field(8, ge=1, le=1024)
    alpha: int = Field(16, ge=1, le=1 << 16)
    targets: tuple[LayerName, ...] = Field(
        ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
        min_length=1,
        max_length=64,
        description="linear layers, by the end of their names",
    )


class Model(Frozen):
    """A transformers configuration by value; `model_type` names an architecture of transformers' own registry.

    With a `base` training begins from its weights; with an `adapter` they stay as they are and only the adapter is trained.
    """

    LATER: ClassVar[frozenset[str]] = frozenset({"base", "adapter"})

    config: dict[str, Any]
    seed: int = Field(0, ge=0, lt=1 << 32)
    parameters: Positive = Field(description="number of trained parameters")
    base: Base | None = None
    adapter: Lora | None = None

    @property
    def vocabulary_size(self) -> int:
        """How many tokens there are; of a model that doesn't say, more than any has."""
        return int(self.config.get("vocab_size", 1 << 32))

    @property
    def is_frozen(self) -> bool:
        """Whether it is only used as it is: the one trained parameter is a state that stays 0."""
        return self.base is not None and self.adapter is None and self.parameters == 1

    @model_validator(mode="after")
    def _adapts_something(self) -> Model:
        if self.adapter is not None and self.base is None:
            raise ValueError("an adapter needs a base")
        if self.adapter is None and self.base is not None and self.base.stored == "nf4":
            raise ValueError("a base in 4 bits (nf4) needs an adapter, as its own weights can't be trained")
        return self

    @field_validator("config")
    @classmethod
    def _plain_values_only(cls, config: dict[str, Any]) -> dict[str, Any]:
        if not isinstance(config.get("model_type"), str):
            raise ValueError("model_type is missing")
        bad = sorted(FORBIDDEN_MODEL_KEYS & config.keys())
        if bad:
            raise ValueError(f"{', '.join(bad)} not allowed: a manifest can't make a peer run code")
        json.dumps(config, allow_nan=False)
        return config


class Teacher(Frozen):
    """What another model expects after each training token: its likeliest tokens, and their log-probabilities in fp16.

    One shard for each of `data.train`, of as many samples: ids, ascending, [sequence_length, top_k], then log-probabilities,
    [sequence_length, top_k + 1], the last that of all other tokens.
    """

    shards: tuple[Tree, ...] = Field(min_length=1, max_length=65536)
    top_k: int = Field(ge=1, le=1024)
    token_bytes: Literal[2, 4] = 2
    name: str = Field("", max_length=200, description="what the teacher is called")


class Data(Frozen):
    """Ordered shards. Sample `i` of the training set is found by walking through `train`."""

    LATER: ClassVar[frozenset[str]] = frozenset({"layout", "counted_tokens", "chat_template", "teacher"})

    sequence_length: int = Field(ge=8, le=1 << 17)
    train: tuple[Shard, ...] = Field(min_length=1, max_length=65536)
    validation: tuple[Shard, ...] = Field(min_length=1, max_length=1024)
    layout: Layout = Field(
        "plain",
        description="`marked`: a row's values also say which tokens have no loss and where a document starts; `prompts`: a row "
        "is a prompt to generate from, and held-out ones aren't used",
    )
    counted_tokens: int = Field(
        0,
        ge=0,
        le=1 << 48,
        description="`marked`: training tokens with a loss; their mean number per sample is what losses are divided by",
    )
    chat_template: str = Field(
        "", max_length=1 << 16, description="how chats became text, for whoever uses the model; peers don't run it"
    )
    teacher: Teacher | None = None
    order: str = Field(
        "", max_length=64, description="runs with the same name here give a key the same samples in a round, to compare settings"
    )
    license: str = Field("unknown", max_length=200)
    description: str = Field("", max_length=2000)

    @property
    def train_samples(self) -> int:
        """Number of training samples over all shards."""
        return sum(shard.samples for shard in self.train)

    @model_validator(mode="after")
    def _sizes_fit(self) -> Data:
        for shard in (*self.train, *self.validation):
            if shard.size_bytes != shard.samples * (self.sequence_length + 1) * shard.token_bytes:
                raise ValueError(f"shard {shard.root[:12]}: size_bytes is not samples x (sequence_length + 1) x token_bytes")
        return self

    @model_validator(mode="after")
    def _marks_fit(self) -> Data:
        if self.layout != "plain" and any(shard.token_bytes != 4 for shard in (*self.train, *self.validation)):
            raise ValueError(f"the layout {self.layout} needs token_bytes 4")
        if self.layout != "marked":
            if self.counted_tokens:
                raise ValueError("counted_tokens are for the layout marked: in a plain one every token counts")
            return self
        if not 0 < self.counted_tokens <= self.train_samples * self.sequence_length:
            raise ValueError("counted_tokens is not between 1 and train samples x sequence_length")
        return self

    @model_validator(mode="after")
    def _teacher_fits(self) -> Data:
        if self.teacher is None:
            return self
        per_token = self.teacher.top_k * (self.teacher.token_bytes + 2) + 2
        sizes = [shard.samples * self.sequence_length * per_token for shard in self.train]
        if [tree.size_bytes for tree in self.teacher.shards] != sizes:
            raise ValueError("teacher: its shards aren't one for each training shard, of the size that its samples take")
        return self

    @property
    def trees(self) -> tuple[Tree, ...]:
        """The files that peers have from each other."""
        return tuple(tree for tree, private in self._files if not private)

    @property
    def private_trees(self) -> tuple[Tree, ...]:
        """The files that stay where they are, what a teacher expects in them included."""
        return tuple(tree for tree, private in self._files if private)

    @property
    def _files(self) -> list[tuple[Tree, bool]]:
        lessons = zip(self.teacher.shards, self.train, strict=True) if self.teacher is not None else ()
        shards = ((shard, shard.private) for shard in (*self.train, *self.validation))
        return [*shards, *((lesson, shard.private) for lesson, shard in lessons)]

    def held(self, is_here: Callable[[Tree], bool]) -> Data:
        """The same without the private shards that are not here; what is left may have none."""
        train = [not shard.private or is_here(shard) for shard in self.train]
        changes: dict[str, Any] = {
            "train": tuple(compress(self.train, train)),
            "validation": tuple(shard for shard in self.validation if not shard.private or is_here(shard)),
        }
        if self.teacher is not None:
            shards = tuple(compress(self.teacher.shards, train))
            changes["teacher"] = self.teacher.model_copy(update={"shards": shards})
        return self.model_copy(update=changes)

    @property
    def counted_per_sample(self) -> float:
        """How many tokens with a loss a training sample has in the mean."""
        return self.counted_tokens / self.train_samples if self.layout == "marked" else self.sequence_length


class Schedule(Frozen):
    """Learning rate by trained tokens: linear warm-up, then cosine down to `final_fraction`."""

    warmup_tokens: int = Field(0, ge=0)
    total_tokens: Positive
    final_fraction: Fraction = 0.1


class AdamW(Frozen):
    """AdamW (Loshchilov and Hutter, 2019)."""

    kind: Literal["adamw"] = "adamw"
    lr: LearningRate = 2e-3
    beta1: Fraction = 0.9
    beta2: Fraction = 0.95
    epsilon: float = Field(1e-8, gt=0, le=1e-2)
    weight_decay: float = Field(0.01, ge=0, le=1)


class Muon(Frozen):
    """Muon for the hidden matrices (Jordan et al., 2024), AdamW for everything else."""

    kind: Literal["muon"] = "muon"
    lr: LearningRate = 4e-3
    momentum: Fraction = 0.95
    weight_decay: float = Field(0.0, ge=0, le=1)
    adamw: AdamW = AdamW()


Inner = Annotated[AdamW | Muon, Field(discriminator="kind")]


class Outer(Frozen):
    """Outer step on the merged pseudo-gradient: `theta -= lr * (g + momentum * buffer)` (Nesterov) or plain averaging."""

    lr: LearningRate = 1.0
    momentum: Fraction = 0.0


class SkipSpikes(Frozen):
    """A round whose training loss jumps changes nothing: all peers go on from the weights before it (`peer/spikes.py`)."""

    window: int = Field(32, ge=8, le=64, description="rounds that a round is compared with; half of them must be there")
    deviations: float = Field(
        6.0, ge=2, le=1000, description="how far above their median the loss may be; half of it where the update is as far off"
    )


class Sync(Frozen):
    """Accumulate gradients until the swarm has `batch_samples`, then one optimizer step that every peer computes alike."""

    LATER: ClassVar[frozenset[str]] = frozenset({"skip_spikes"})

    kind: Literal["sync"] = "sync"
    batch_samples: Positive
    optimizer: AdamW = AdamW()
    schedule: Schedule
    clip_norm: float = Field(1.0, gt=0, le=1e6)
    skip_spikes: SkipSpikes | None = None


class Codec(Frozen):
    """How an update travels."""

    LATER: ClassVar[frozenset[str]] = frozenset({"leave_out_zeros"})

    kind: Literal["fp16", "int8", "int4", "int2", "sparse"] = "fp16"
    part_values: int = Field(1 << 17, ge=1 << 12, le=1 << 21, description="values per part; a multiple of 4096")
    density_top_k: int = Field(64, ge=4, le=1024, description="`sparse`: how many of 4096 values travel")
    leave_out_zeros: bool = Field(
        False, description="`sparse`: chunks of 4096 that are all zero don't travel, such as those of experts that nobody visited"
    )

    @field_validator("part_values")
    @classmethod
    def _whole_blocks(cls, value: int) -> int:
        if value % 4096:
            raise ValueError("must be a multiple of 4096")
        return value


class Phase(Frozen):
    """What changes from a round on: how many inner steps a round has, and how updates travel."""

    from_round: int = Field(ge=1, le=1 << 40)
    inner_steps: int = Field(ge=1, le=10_000)
    codec: Codec


class DiLoCo(Frozen):
    """`inner_steps` local optimizer steps of `batch_samples` each, then the difference is averaged (DiLoCo, 2311.08105)."""

    LATER: ClassVar[frozenset[str]] = frozenset({"skip_spikes"})

    kind: Literal["diloco"] = "diloco"
    inner_steps: int = Field(ge=1, le=10_000)
    batch_samples: Positive
    inner: Inner = Muon()
    outer: Outer = Outer()
    schedule: Schedule
    clip_norm: float = Field(1.0, gt=0, le=1e6)
    phases: tuple[Phase, ...] = Field((), max_length=64, description="later settings, in the order of their rounds")
    overlap: Literal["off", "on", "auto"] = Field(
        "off", description="train on while a round is exchanged; `auto`: where the exchange takes a noticeable share of a round"
    )
    inner_state: Literal["kept", "fresh"] = Field(
        "kept", description="the inner optimizer's between rounds; `fresh` lets others compute a round again, and so audit it"
    )
    skip_spikes: SkipSpikes | None = None

    @model_validator(mode="after")
    def _ordered(self) -> DiLoCo:
        starts = [phase.from_round for phase in self.phases]
        if starts != sorted(set(starts)):
            raise ValueError("phases are not in the order of from_round")
        return self


class Sampling(Frozen):
    """How tokens are drawn from what the model expects: the likeliest under logits / temperature plus keyed Gumbel noise.

    Nothing is drawn but the `top_k` likeliest tokens (0 = all), and of these the fewest that have `top_p` of the probability.
    """

    max_tokens: int = Field(256, ge=1, le=1 << 16, description="a sample ends after so many")
    temperature: float = Field(1.0, ge=0.05, le=10)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0, le=1 << 20)
    stop: tuple[int, ...] = Field((), max_length=16, description="tokens that end a sample, and are its last")

    @field_validator("stop")
    @classmethod
    def _tokens(cls, stop: tuple[int, ...]) -> tuple[int, ...]:
        if any(not 0 <= token < 1 << 28 for token in stop):
            raise ValueError("must be token ids")
        return tuple(sorted(set(stop)))


class Filters(Frozen):
    """Which samples are kept. Copies never are."""

    min_tokens: int = Field(1, ge=1, le=1 << 16)
    max_tokens: int = Field(1 << 16, ge=1, le=1 << 16)
    min_perplexity: float = Field(1.0, ge=1, description="under the model that wrote it: below, it is dull")
    max_perplexity: float = Field(1e6, ge=1, le=1e9, description="above, it is noise")
    max_repeated: Fraction = Field(0.5, description="share of a sample's n-grams that repeat an earlier one")
    max_overlap: Fraction = Field(0.8, description="share of n-grams that it has in common with one that is kept; 1 = any")
    n_gram: int = Field(5, ge=1, le=64, description="tokens of an n-gram")
    only_finished: bool = Field(False, description="leave out samples that didn't end by themselves")


class Generate(Frozen):
    """No training: the base writes `samples_per_prompt` samples for each prompt in `data.train`, `batch_samples` a round.

    The state is one value that stays 0.
    """

    kind: Literal["generate"] = "generate"
    batch_samples: Positive
    samples_per_prompt: int = Field(1, ge=1, le=1 << 20)
    sampling: Sampling = Sampling()
    filters: Filters = Filters()


MOST_ROUND_TOKENS = 1 << 22
"""What a round may generate at most, so that a peer's share of it stays a blob."""
Strategy = Annotated[Sync | DiLoCo | Generate, Field(discriminator="kind")]


class Mean(Frozen):
    """The mean by tokens; an update whose norm exceeds `clip_ratio` x the median norm is scaled down."""

    kind: Literal["mean"] = "mean"
    clip_ratio: float = Field(10.0, gt=1, le=1e6)


class CenteredClip(Frozen):
    """Centered clipping, for runs that strangers join: updates far from the median are pulled in.

    Far is more than `radius_ratio` x the median distance. With `worker_momentum` peers send a running average of their updates,
    so that honest ones differ less from each other.
    """

    kind: Literal["centered_clip"] = "centered_clip"
    radius_ratio: float = Field(2.0, gt=1, le=1e6)
    iterations: int = Field(3, ge=1, le=16)
    worker_momentum: Fraction = 0.0


Merge = Annotated[Mean | CenteredClip, Field(discriminator="kind")]


class Rounds(Frozen):
    """When rounds start and end."""

    min_peers: int = Field(1, ge=1, le=64, description="the first round waits for this many")
    max_peers: int = Field(32, ge=1, le=64)
    total: int = Field(0, ge=0, description="the run ends after this many rounds; 0 = never")
    scale_to_speed: bool = Field(True, description="give slower peers less work, so that all arrive together")
    grace_floor_s: float = Field(1.0, gt=0, le=3600, description="the least extra time that a late peer gets")
    grace_mads: float = Field(6.0, gt=0, le=100, description="k in the grace period: median + k x MAD of recent lateness")

    @model_validator(mode="after")
    def _ordered(self) -> Rounds:
        if self.min_peers > self.max_peers:
            raise ValueError("min_peers is larger than max_peers")
        return self


class Admission(Frozen):
    """Who may take part: any key, whoever has a ticket of the run's owner, or the keys under `allow`."""

    kind: Literal["open", "invitation", "allow_list"] = "open"
    allow: tuple[str, ...] = Field((), max_length=100_000)
    valid_s: Positive = 86_400


class Credit(Frozen):
    """1 credit = 10^15 verified training FLOPs."""

    flops_per_token: Positive
    hold_rounds: int = Field(3, ge=0, le=100_000, description="verified credit becomes final after this many further rounds")


UNAUDITED: dict[str, Any] = {"rate": 0.0, "first": 0}


class Audit(Frozen):
    """How others check contributions: by computing them again where that can be done, else by what they do to the loss."""

    rate: Fraction = Field(0.05, description="share of the contributions that is audited")
    first: int = Field(10, ge=0, le=1_000_000, description="so many of a new key's contributions are all audited")
    new_weight: float = Field(0.5, gt=0, le=1, description="until then a key gets at most this share of the others' work")
    within_rounds: int = Field(10, ge=2, le=100_000, description="an audit has so many rounds; credit isn't final before")


class Evaluation(Frozen):
    """Held-out loss every few rounds, measured by peers that the ledger draws; it counts where a quorum of them agrees."""

    every: int = Field(10, ge=1, le=1_000_000, description="after each round whose number this divides, and after the last")
    evaluators: int = Field(3, ge=1, le=16, description="peers that measure it")
    quorum: int = Field(2, ge=1, le=16, description="so many have to agree, and more than half of those who speak")
    tolerance: float = Field(0.01, gt=0, le=0.5, description="how far from the median, relative to it, agrees with it")
    samples: int = Field(256, ge=1, le=65_536, description="of `data.validation`, the first ones; all where there are fewer")
    prompts: tuple[Prompt, ...] = Field((), max_length=4, description="what evaluators let the model go on with")
    text_tokens: int = Field(32, ge=1, le=128, description="for so many tokens")

    @model_validator(mode="after")
    def _can_agree(self) -> Evaluation:
        if self.quorum > self.evaluators:
            raise ValueError("quorum is larger than evaluators")
        return self


class Distillation(Frozen):
    """Learning from `data.teacher`: (1 - share) x cross-entropy of the labels + share x forward KL divergence from the teacher.

    The divergence is over its likeliest tokens and all others together, both sides softened by the temperature T, times T squared
    (Hinton et al., 1503.02531).
    """

    temperature: float = Field(1.0, ge=0.1, le=20)
    share: float = Field(0.5, gt=0, le=1)


class Manifest(Frozen):
    """Everything that defines a run."""

    LATER: ClassVar[frozenset[str]] = frozenset({"distillation", "evaluation"})

    version: Literal[1] = 1
    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,62}$")
    description: str = Field("", max_length=2000)
    model: Model
    tokenizer: Tree
    data: Data
    objective: Literal["causal_lm"] = "causal_lm"
    distillation: Distillation | None = None
    strategy: Strategy
    codec: Codec = Codec()
    merge: Merge = Mean()
    rounds: Rounds = Rounds()
    admission: Admission = Admission()
    credit: Credit
    audit: Audit = Audit()
    evaluation: Evaluation | None = None
    min_client_version: str = Field("0.1.0", pattern=r"^\d+\.\d+\.\d+$")

    @model_validator(mode="after")
    def _documents_stay_apart(self) -> Manifest:
        kind = self.model.config["model_type"]
        if self.data.layout == "marked" and kind not in PACKS_DOCUMENTS:
            raise ValueError(
                f"{kind} can't train on the layout marked: only {', '.join(sorted(PACKS_DOCUMENTS))} keep documents apart"
            )
        return self

    @model_validator(mode="after")
    def _has_a_teacher(self) -> Manifest:
        if (self.distillation is None) != (self.data.teacher is None):
            raise ValueError("distillation and data.teacher are only there together")
        return self

    @model_validator(mode="after")
    def _private_data_have_no_strangers(self) -> Manifest:
        if not self.data.private_trees:
            return self
        if self.admission.kind == "open":
            raise ValueError("private shards need an admission by invitation or allow_list")
        if self.audit.rate or self.audit.first:
            raise ValueError("nobody can audit what was trained on private shards: set audit.rate and audit.first to 0")
        return self

    @model_validator(mode="after")
    def _generates_something(self) -> Manifest:
        strategy, model = self.strategy, self.model
        if isinstance(strategy, Generate) != (self.data.layout == "prompts"):
            raise ValueError("the strategy generate and the layout prompts are only there together")
        if not isinstance(strategy, Generate):
            return self
        if not model.is_frozen:
            raise ValueError("generating needs a model.base, no adapter, and model.parameters 1: nothing is trained")
        if strategy.batch_samples * strategy.sampling.max_tokens > MOST_ROUND_TOKENS:
            raise ValueError(f"batch_samples x sampling.max_tokens is more than {MOST_ROUND_TOKENS}")
        if self.merge.kind != "mean" or self.codec.kind != "fp16":
            raise ValueError("generating needs the merge mean and the codec fp16: there is no update to bound or to shorten")
        if self.evaluation is not None:
            raise ValueError("generating has no evaluation: the model stays as it is")
        return self

    def phase(self, round_index: int) -> Phase:
        """What holds in a round: the last phase that has begun; `inner_steps` is 1 but in `diloco`."""
        strategy = self.strategy
        if not isinstance(strategy, DiLoCo):
            return Phase(from_round=1, inner_steps=1, codec=self.codec)
        first = Phase(from_round=1, inner_steps=strategy.inner_steps, codec=self.codec)
        return next((phase for phase in reversed(strategy.phases) if phase.from_round <= round_index), first)

    @property
    def files(self) -> tuple[Tree, ...]:
        """All files that a peer needs and that others have, too: not those of private shards."""
        base = () if self.model.base is None else (self.model.base,)
        return (self.tokenizer, *base, *self.data.trees)

    @property
    def training(self) -> Sync | DiLoCo:
        """The strategy of a run that trains. Raises `ValueError` for one that generates."""
        if isinstance(self.strategy, Generate):
            raise ValueError("the run generates; it trains nothing")
        return self.strategy

    @property
    def planned_tokens(self) -> int:
        """How many tokens the run is planned for; where it generates, the most that its samples can have."""
        if isinstance(self.strategy, Generate):
            return self.data.train_samples * self.strategy.samples_per_prompt * self.strategy.sampling.max_tokens
        return self.strategy.schedule.total_tokens

    @property
    def tokens_per_weight(self) -> int:
        """Tokens for which a contribution gets credit, for each unit of its weight: samples, or tokens where it generates."""
        return 1 if isinstance(self.strategy, Generate) else self.data.sequence_length

    @property
    def most_round_weight(self) -> int:
        """What all peers together contribute to a round at most where they share its work."""
        strategy = self.strategy
        return strategy.batch_samples * (strategy.sampling.max_tokens if isinstance(strategy, Generate) else 1)

    @property
    def most_inner_steps(self) -> int:
        """The inner steps of the longest round."""
        strategy = self.strategy
        if not isinstance(strategy, DiLoCo):
            return 1
        return max(strategy.inner_steps, *(phase.inner_steps for phase in strategy.phases), 1)

    @property
    def why_not_replayed(self) -> str:
        """Why others can't compute a round again; empty where they can, as what it starts from is agreed and nothing is drawn."""
        strategy, config = self.strategy, self.model.config
        dropout = [value for key, value in config.items() if "drop" in key]
        problems = {
            "strategy.inner_state is kept, so others can't compute a round again": isinstance(strategy, DiLoCo)
            and strategy.inner_state == "kept",
            "strategy.overlap lets rounds begin before their base is agreed": isinstance(strategy, DiLoCo)
            and strategy.overlap != "off",
            "the architecture may have dropout": any(dropout) or not (dropout or config["model_type"] in WITHOUT_DROPOUT),
        }
        return next((problem for problem, holds in problems.items() if holds), "")

    @property
    def audited_by(self) -> Literal["replay", "loss", ""]:
        """How others check contributions: by computing them again, by what they do to the loss, or not at all."""
        if not (self.audit.rate or self.audit.first):
            return ""
        if not self.why_not_replayed:
            return "replay"
        return "loss" if isinstance(self.strategy, DiLoCo) else ""

    @property
    def why_not_audited(self) -> str:
        """Why contributions aren't audited; empty where they are."""
        if self.audited_by:
            return ""
        return self.why_not_replayed if self.audit.rate or self.audit.first else "audit.rate and audit.first are 0"

    @property
    def is_audited(self) -> bool:
        """Whether others check contributions."""
        return bool(self.audited_by)

    @property
    def is_replayed(self) -> bool:
        """Whether others compute contributions again, for which peers show their work in leaves."""
        return self.audited_by == "replay"

    def is_evaluated(self, round_index: int) -> bool:
        """Whether peers measure the held-out loss of the state after a round."""
        if self.evaluation is None:
            return False
        return round_index % self.evaluation.every == 0 or round_index == self.rounds.total

    @property
    def evaluation_samples(self) -> int:
        """On how many held-out samples they do."""
        held_out = sum(shard.samples for shard in self.data.validation)
        return 0 if self.evaluation is None else min(held_out, self.evaluation.samples)

    @property
    def skip_spikes(self) -> SkipSpikes | None:
        """Which rounds change nothing, where the run skips some."""
        return None if isinstance(self.strategy, Generate) else self.strategy.skip_spikes

    @property
    def generates(self) -> bool:
        """Whether peers write samples instead of training."""
        return isinstance(self.strategy, Generate)

    @property
    def shows_work(self) -> bool:
        """Whether commits name what others can look at: leaves, or samples."""
        return self.is_replayed or self.generates

    @property
    def hold_rounds(self) -> int:
        """After how many further rounds verified credit becomes final."""
        return max(self.credit.hold_rounds, self.audit.within_rounds) if self.is_audited else self.credit.hold_rounds

    @property
    def canonical_bytes(self) -> bytes:
        """The bytes that are hashed and signed: JSON with sorted keys and no spaces, every default written out."""
        return json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"), allow_nan=False).encode()

    @property
    def run_id(self) -> str:
        """BLAKE2b-256 of the canonical bytes, hexadecimal."""
        return hashlib.blake2b(self.canonical_bytes, digest_size=32).hexdigest()

    @property
    def order_key(self) -> str:
        """What samples are drawn by, 32 bytes in hexadecimal: the run id, or the hash of `data.order` where that is set."""
        return hashlib.blake2b(self.data.order.encode(), digest_size=32).hexdigest() if self.data.order else self.run_id

    @classmethod
    def parse(cls, raw: bytes, source: str = "manifest") -> Manifest:
        """Parse YAML or JSON. Raises `ManifestInvalid` with every problem at once."""
        if len(raw) > MAX_MANIFEST_BYTES:
            raise ManifestInvalid([f"larger than {MAX_MANIFEST_BYTES} bytes"], source)
        try:
            values = yaml.safe_load(raw)
        except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
            raise ManifestInvalid([f"not YAML: {' '.join(str(error).split())}"], source) from error
        if not isinstance(values, dict):
            raise ManifestInvalid(["not a mapping of fields"], source)
        return cls.from_values(values, source)

    @classmethod
    def from_values(cls, values: dict[str, Any], source: str = "manifest") -> Manifest:
        """Check fields by name. Raises `ManifestInvalid` with every problem at once."""
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise ManifestInvalid([_problem(dict(item)) for item in error.errors()], source) from error

    @classmethod
    def read(cls, path: Path) -> Manifest:
        """Parse the file at `path`."""
        try:
            return cls.parse(path.read_bytes(), str(path))
        except OSError as error:
            raise ManifestInvalid([f"can't be read: {error.strerror}"], str(path)) from error


def _problem(item: dict[str, Any]) -> str:
    place = ".".join(str(part) for part in item["loc"]) or "manifest"
    return f"{place}: {str(item['msg']).removeprefix('Value error, ').lower()}"
