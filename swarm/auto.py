"""`auto`: from a run's size, token budget and slowest links to explicit settings, with the reason for each.

The ladder's order and the shape of the phases come from measurements (`docs/tuning.md`); what a link can carry is arithmetic.
Everything is decided before the manifest is signed: peers see explicit phases only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, ValidationError

from swarm.errors import ManifestInvalid
from swarm.manifest import (
    MAX_MANIFEST_BYTES,
    UNAUDITED,
    AdamW,
    Codec,
    DiLoCo,
    Frozen,
    Manifest,
    Muon,
    Outer,
    Phase,
    Positive,
    Schedule,
)

AUTO = "auto"
CHUNK_VALUES = 4096
SPARSE_BITS_PER_VALUE = 10.5  # two bits of value and an entropy-coded place, for one in 64
BITS = {"fp16": 16.0, "int8": 8.0625, "int4": 4.25, "int2": 2.1}
FP16_BITS = BITS["fp16"]

TRAFFIC_SHARE = 0.025  # int4 about every 11 steps: half the interval gains less than 3 % of the loss
ROUND_S = 0.5  # what a round takes besides its payload: signatures, proposal, results
LATE_SHARE = 0.2  # an exchange of up to this share of a round can overlap with it at hardly any cost
QUIET_SHARE = 0.05  # below this share waiting costs less than a late result
FEW_ROUNDS = 24  # with fewer, late results were worse by 4 % of the loss: more than the wait is worth
FRESH_FROM_STEPS = 10  # rounds of 12 steps that each begin with a fresh inner state cost 2 % of the loss
UNSEEN = "kept, as nobody audits"
FRESH = "fresh in every round, so that others can compute a contribution again; it costs about 2 % of the loss"
BY_LOSS = "audits go by what a contribution does to the loss"
LONG_RUN_STEPS = 20_000  # from here on `sparse` had enough rounds to pay in the literature
LEAST_ROUNDS = 8
MOST_PEERS = 64
MOST_PEERS_ALL_GATHER = 32
PART_SIZES = tuple(1 << bits for bits in (17, 18, 19, 20))
FEWEST_PARTS, FEWEST_PARTS_ALL_GATHER = 4 * MOST_PEERS, 64

REFERENCE_PARAMETERS, REFERENCE_STEPS = 870_000, 300
REFERENCE_LR, MOST_LR = 1.6e-2, 2e-2
SIZE_EXPONENT = 1 / 3
STEPS_EXPONENT, LEAST_FOR_STEPS = 1 / 4, 1 / 3  # measured from 160 to 1,200 steps; longer runs aren't guessed too far
FINAL_FRACTION = 0.0
WARM_UP_FROM_STEPS, WARM_UP_SHARE = 1000, 0.02
EARLY_SHARE, EARLY_FACTOR = 0.07, 0.45  # the first steps, while weights change fast, have rounds of about half the length
SHAPED_FROM = 4


class Draft(Frozen):
    """What is known before settings are chosen: the model, the budget and the weakest machine that shall be able to take part."""

    parameters: Positive
    sequence_length: int = Field(ge=8, le=1 << 17)
    tokens: Positive = Field(description="the budget: how many tokens all peers together shall train on")
    batch_samples: int = Field(8, ge=1, le=1 << 20, description="samples per inner step and peer")
    peers: int = Field(4, ge=1, le=MOST_PEERS, description="how many peers are expected")
    upload_mbit: Annotated[float, Field(gt=0, le=1e6)] = 20.0
    download_mbit: Annotated[float, Field(gt=0, le=1e6)] = 100.0
    step_s: Annotated[float, Field(gt=0, le=1e5)] = Field(2.0, description="an inner step on the slowest device")
    traffic_share: Annotated[float, Field(gt=0, le=1)] = Field(
        TRAFFIC_SHARE, description="the most traffic, relative to fp16 averaging after every step"
    )
    codec: Literal["fp16", "int8", "int4", "int2", "sparse"] | None = Field(None, description="decided already")
    inner_steps: int | None = Field(None, ge=1, le=10_000, description="decided already: inner steps of a round")
    audited: bool = Field(True, description="whether others shall check contributions; not where the data are private")

    @property
    def steps(self) -> int:
        """Inner steps that every peer has to take."""
        return -(-self.tokens // self.tokens_per_step)

    @property
    def tokens_per_step(self) -> int:
        """Tokens that all expected peers train on while each takes one inner step."""
        return self.peers * self.batch_samples * self.sequence_length


@dataclass(frozen=True)
class Segment:
    """Rounds that are alike."""

    rounds: int
    inner_steps: int
    codec: Codec


@dataclass(frozen=True)
class Rung:
    """A way to exchange: the ladder goes from the best outcome to the least traffic."""

    kind: str
    inner_steps: int


DENSE = (
    *(Rung("fp16", 1), Rung("int8", 1), Rung("int4", 1), Rung("int4", 2), Rung("int4", 5)),
    *(Rung("int4", 11), Rung("int4", 15), Rung("int4", 20), Rung("int2", 15), Rung("int2", 20), Rung("int2", 30)),
)
SLOW_SHORT = tuple(Rung("int2", steps) for steps in (50, 100, 200, 500))
LAVISH = ("fp16", "int8")  # more bits than int4 gain next to nothing
INTERVALS = (1, 2, 5, 10, 15, 20, 30, 50, 100, 200, 500)
SLOW_LONG = tuple(Rung("sparse", steps) for steps in (30, 50, 100, 200, 500))


@dataclass(frozen=True)
class Plan:
    """Explicit settings. `why` has a sentence for each decision."""

    draft: Draft
    segments: tuple[Segment, ...]
    strategy: DiLoCo
    max_peers: int
    why: tuple[str, ...]

    @property
    def rounds(self) -> int:
        """Training rounds until the budget is used."""
        return sum(segment.rounds for segment in self.segments)

    @property
    def steps(self) -> int:
        """Inner steps of every peer."""
        return sum(segment.rounds * segment.inner_steps for segment in self.segments)

    def applied(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """A manifest's fields with these settings written out; its other fields and limits stay."""
        limits = dict(values.get("rounds") or {})
        most = min(int(limits.get("max_peers", self.max_peers)), self.max_peers)
        limits |= {"min_peers": min(int(limits.get("min_peers", 1)), most), "max_peers": most, "total": self.rounds}
        kind = self.segments[0].codec.kind
        codec = {**dict(values.get("codec") or {}), "kind": kind}
        if codec.get("part_values") in (None, Codec().part_values):
            codec["part_values"] = part_values(kind, self.draft.parameters)
        audit = {**dict(values.get("audit") or {}), **(UNAUDITED if self.rounds < FEW_ROUNDS else {})}
        part = {name: value for name, value in codec.items() if name != "kind"}
        strategy = self.strategy.model_dump(mode="json")
        strategy["phases"] = [{**phase, "codec": {**phase["codec"], **part}} for phase in strategy["phases"]]
        return {**values, "strategy": strategy, "codec": codec, "rounds": limits, "audit": audit}


def plan(draft: Draft) -> Plan:
    """The settings for a draft, always the same ones for the same draft."""
    rung, reason = _choose(draft)
    if draft.inner_steps is None:
        rung = Rung(rung.kind, min(rung.inner_steps, max(1, draft.steps // LEAST_ROUNDS)))
    segments = _segments(draft, rung)
    share = _wait_share(draft, rung, draft.peers)
    rounds = sum(segment.rounds for segment in segments)
    inner, inner_reason = _inner(draft)
    first, *later = _phases(segments)
    most, most_reason = _most_peers(draft, rung)
    overlap: Literal["off", "auto"] = "off" if share <= QUIET_SHARE or rounds < FEW_ROUNDS else "auto"
    kept_reason = _why_kept(overlap, rounds, rung.inner_steps) if draft.audited else UNSEEN
    strategy = DiLoCo(
        inner_steps=first.inner_steps,
        batch_samples=draft.batch_samples,
        inner=inner,
        outer=Outer(),
        schedule=_schedule(draft),
        phases=tuple(later),
        overlap=overlap,
        inner_state="kept" if kept_reason else "fresh",
    )
    why = (
        inner_reason,
        reason,
        _why_phases(draft, segments),
        "outer step: plain averaging; outer momentum needs far more rounds before it pays",
        _why_overlap(share, rounds),
        f"inner state: {kept_reason or FRESH}",
        most_reason,
        f"length: {rounds:,} rounds, {draft.steps:,} steps of {draft.tokens_per_step:,} tokens "
        f"with {draft.peers} peers; the learning rate falls with the tokens that were really trained on",
    )
    return Plan(draft, segments, strategy, most, why)


def part_values(kind: str, parameters: int) -> int:
    """Values per part: large parts are encoded and merged faster; there are enough of them for the largest group to share."""
    fewest = FEWEST_PARTS_ALL_GATHER if kind == "sparse" else FEWEST_PARTS
    fitting = [size for size in PART_SIZES if parameters // size >= fewest]
    return max(fitting, default=PART_SIZES[0])


def round_bytes(codec: Codec, parameters: int, peers: int) -> float:
    """The payload that a peer sends in a round, and the same again that it receives, without framing and control.

    A dense codec goes through the butterfly: nearly twice its size. A sparse update goes to each other peer.
    """
    if peers < 2:
        return 0.0
    if codec.kind == "sparse":
        bits = SPARSE_BITS_PER_VALUE * codec.density_top_k / CHUNK_VALUES
        return (peers - 1) * parameters * bits / 8
    return 2 * (peers - 1) / peers * parameters * BITS[codec.kind] / 8


def exchange_s(codec: Codec, parameters: int, peers: int, upload_mbit: float, download_mbit: float) -> float:
    """How long the exchange of a round takes over equal links of this speed."""
    return ROUND_S + 8 * round_bytes(codec, parameters, peers) / (1e6 * min(upload_mbit, download_mbit))


@dataclass(frozen=True)
class Cost:
    """What the rounds of one phase cost a peer; `last_round` 0 = the run never ends."""

    first_round: int
    last_round: int
    inner_steps: int
    codec: str
    sent_bytes: float
    train_s: float
    exchange_s: float


def costs(manifest: Manifest, peers: int, upload_mbit: float, download_mbit: float, step_s: float) -> tuple[Cost, ...]:
    """By phase, for equal peers; in `sync` a step is a peer's share of the batch."""
    strategy, parameters = manifest.strategy, manifest.model.parameters
    later = strategy.phases if isinstance(strategy, DiLoCo) else ()
    starts = sorted({1, *(phase.from_round for phase in later)})
    ends = [start - 1 for start in starts[1:]] + [manifest.rounds.total]
    found = []
    for start, end in zip(starts, ends, strict=True):
        phase = manifest.phase(start)
        sent, train_s = round_bytes(phase.codec, parameters, peers), phase.inner_steps * step_s
        wait_s = exchange_s(phase.codec, parameters, peers, upload_mbit, download_mbit)
        found.append(Cost(start, end, phase.inner_steps, phase.codec.kind, sent, train_s, wait_s))
    return tuple(found)


def resolve(raw: bytes, source: str = "manifest") -> tuple[Manifest, Plan | None]:
    """A manifest, and the plan behind it where its strategy is the single word `auto` and `budget` says for what.

    Raises `ManifestInvalid` with every problem that was found.
    """
    values = _auto_values(raw)
    if values is None:
        return Manifest.parse(raw, source), None
    budget = values.pop("budget", None)
    made = plan(_draft(values, budget, source))
    return Manifest.from_values(made.applied(values), source), made


def read(path: Path) -> tuple[Manifest, Plan | None]:
    """`resolve` for the file at `path`."""
    try:
        return resolve(path.read_bytes(), str(path))
    except OSError as error:
        raise ManifestInvalid([f"can't be read: {error.strerror}"], str(path)) from error


def _auto_values(raw: bytes) -> dict[str, Any] | None:
    """The fields of a manifest that leaves its strategy to us, or None for all others, broken ones too."""
    if len(raw) > MAX_MANIFEST_BYTES:
        return None
    try:
        values = yaml.safe_load(raw)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError):
        return None
    return values if isinstance(values, dict) and values.get("strategy") == AUTO else None


def _draft(values: Mapping[str, Any], budget: object, source: str) -> Draft:
    if not isinstance(budget, dict):
        raise ManifestInvalid(["budget: strategy auto needs a budget with at least tokens"], source)
    known = {
        "parameters": _inside(values, "model", "parameters"),
        "sequence_length": _inside(values, "data", "sequence_length"),
    }
    try:
        return Draft.model_validate({**budget, **known})
    except ValidationError as error:
        raise ManifestInvalid([_placed(dict(item)) for item in error.errors()], source) from error


def _placed(item: Mapping[str, Any]) -> str:
    name = ".".join(map(str, item["loc"]))
    place = {"parameters": "model.parameters", "sequence_length": "data.sequence_length"}.get(name, f"budget.{name}")
    return f"{place}: {str(item['msg']).lower()}"


def _inside(values: Mapping[str, Any], section: str, name: str) -> object:
    found = values.get(section)
    return found.get(name) if isinstance(found, dict) else None


def ladder(draft: Draft) -> tuple[Rung, ...]:
    """From the best outcome to the least traffic, of what is not decided already."""
    rungs = DENSE + (SLOW_LONG if draft.steps >= LONG_RUN_STEPS else SLOW_SHORT)
    if draft.inner_steps is not None:
        kinds = dict.fromkeys(rung.kind for rung in rungs if rung.kind not in LAVISH)
        return tuple(Rung(kind, draft.inner_steps) for kind in ([draft.codec] if draft.codec else kinds))
    return rungs if draft.codec is None else tuple(Rung(draft.codec, steps) for steps in INTERVALS)


def _choose(draft: Draft) -> tuple[Rung, str]:
    """The first rung that the budget of traffic and the slowest link allow."""
    thrifty = [rung for rung in ladder(draft) if traffic_share(draft, rung) <= draft.traffic_share]
    rungs = thrifty or list(ladder(draft)[-1:] if draft.inner_steps is None else ladder(draft))
    fitting = [rung for rung in rungs if _wait_share(draft, rung, draft.peers) <= LATE_SHARE]
    chosen = fitting[0] if fitting else rungs[-1]
    wait = _wait_share(draft, chosen, draft.peers)
    link = f"over {draft.upload_mbit:g}/{draft.download_mbit:g} Mbit/s an exchange takes {wait:.1%} of a round's training"
    what = f"{chosen.kind} every {chosen.inner_steps} steps"
    if len(rungs) == 1 and draft.inner_steps is not None:
        return chosen, f"codec and interval: {what}, as given; {link}"
    if not fitting:
        return chosen, f"codec and interval: {what}, the least that there is, and yet {link}: peers will wait"
    if chosen is rungs[0]:
        return chosen, f"codec and interval: {what}, the best that {draft.traffic_share:.1%} of fp16 traffic allows; {link}"
    return chosen, f"codec and interval: {what}, because the link demands it; {link}"


def traffic_share(draft: Draft, rung: Rung) -> float:
    """What a peer sends relative to fp16 averaging after every step."""
    reference = round_bytes(Codec(kind="fp16"), draft.parameters, draft.peers) or 1.0
    return round_bytes(_codec(rung), draft.parameters, draft.peers) / rung.inner_steps / reference


def _wait_share(draft: Draft, rung: Rung, peers: int) -> float:
    """The exchange relative to the training of a round on the slowest device."""
    wait_s = exchange_s(_codec(rung), draft.parameters, peers, draft.upload_mbit, draft.download_mbit)
    return wait_s / (rung.inner_steps * draft.step_s)


def _codec(rung: Rung) -> Codec:
    return Codec.model_validate({"kind": rung.kind})


def _segments(draft: Draft, rung: Rung) -> tuple[Segment, ...]:
    """As many rounds as the rung allows for exactly the budget: short ones while weights change fast, the others evenly longer.

    Where the interval was given, all rounds have it but for the last.
    """
    codec, interval, steps = _codec(rung), rung.inner_steps, draft.steps
    parts: tuple[tuple[int, int], ...]
    if draft.inner_steps is not None:
        whole, rest = divmod(steps, interval)
        parts = ((whole, interval), (min(rest, 1), rest))
    else:
        short = max(1, round(interval * EARLY_FACTOR))
        total = max(1, steps // interval)
        early = min(round(EARLY_SHARE * steps / short), total // 2) if interval >= SHAPED_FROM else 0
        base, longer = divmod(steps - early * short, total - early)
        parts = ((early, short), (total - early - longer, base), (longer, base + 1))
    return tuple(Segment(rounds, length, codec) for rounds, length in parts if rounds)


def _phases(segments: Sequence[Segment]) -> list[Phase]:
    starts = accumulate((segment.rounds for segment in segments), initial=1)
    return [
        Phase(from_round=start, inner_steps=segment.inner_steps, codec=segment.codec)
        for start, segment in zip(starts, segments, strict=False)
    ]


def _schedule(draft: Draft) -> Schedule:
    total = draft.steps * draft.tokens_per_step
    warm_up = int(WARM_UP_SHARE * total) if draft.steps >= WARM_UP_FROM_STEPS else 0
    return Schedule(warmup_tokens=warm_up, total_tokens=total, final_fraction=FINAL_FRACTION)


def _inner(draft: Draft) -> tuple[Muon, str]:
    """Muon; the learning rate falls with the length of the run, and with the cube root of the size, which is a rule of thumb."""
    scale = (REFERENCE_PARAMETERS / draft.parameters) ** SIZE_EXPONENT
    scale *= max(LEAST_FOR_STEPS, (REFERENCE_STEPS / draft.steps) ** STEPS_EXPONENT)
    lr = min(MOST_LR, float(f"{REFERENCE_LR * scale:.2g}"))
    inner = Muon(lr=lr, adamw=AdamW(lr=float(f"{lr / 2:.2g}")))
    return (
        inner,
        f"inner optimizer: Muon ({lr:g}) for matrices, AdamW for the rest, which learns most from a token",
    )


def _most_peers(draft: Draft, rung: Rung) -> tuple[int, str]:
    if rung.kind != "sparse":
        return MOST_PEERS, f"group: up to {MOST_PEERS} peers; what a peer sends hardly grows with their number"
    fits = [count for count in range(2, MOST_PEERS_ALL_GATHER + 1) if _wait_share(draft, rung, count) <= LATE_SHARE]
    most = max([draft.peers, *fits])
    return most, f"group: up to {most} peers, as everybody fetches everybody's update"


def _why_overlap(share: float, rounds: int) -> str:
    if share <= QUIET_SHARE:
        return f"overlap: off; waiting takes {share:.1%} of the time, and a late result costs quality"
    if rounds < FEW_ROUNDS:
        return f"overlap: off; waiting takes {share:.0%} of a round's training, but with {rounds} rounds late results cost more"
    if share <= LATE_SHARE:
        return f"overlap: auto; a result that comes {share:.0%} of a round late costs little and saves the wait"
    return f"overlap: auto; waiting would take {share:.0%} of a round's training"


def _why_kept(overlap: str, rounds: int, inner_steps: int) -> str:
    """Why the inner optimizer's state is kept between rounds, so that nobody can compute them again; empty where it isn't."""
    if rounds < FEW_ROUNDS:
        return f"kept, and nobody audits: with {rounds} rounds there is little to audit"
    if overlap != "off":
        return f"kept; a round that begins before its base is agreed can't be computed again anyway: {BY_LOSS}"
    if inner_steps < FRESH_FROM_STEPS:
        return f"kept; rounds of {inner_steps} steps are too short to begin it anew: {BY_LOSS}"
    return ""


def _why_phases(draft: Draft, segments: Sequence[Segment]) -> str:
    kinds = ", ".join(f"{item.rounds:,} x {item.inner_steps}" for item in segments)
    return f"phases (rounds x inner steps): {kinds}"
