"""The settings that `bench.quality` and `bench.simulate` compare: four peers, the demo's model and data, equal tokens."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peer.recipes import DEMO_DATA_BYTES, demo_manifest
from swarm import auto
from swarm.manifest import UNAUDITED, Manifest

PEERS, BATCH_SAMPLES, SEQUENCE_LENGTH = 4, 8, 128
DATA_BYTES = DEMO_DATA_BYTES

SYNC, MUON, AUTO = "sync, AdamW 2e-3, fp16", "every step, Muon 4e-3, fp16", "auto"
FP16, INT8 = "10 steps, fp16", "10 steps, int8"
TUNED_MUON, TUNED_SYNC = "every step, fp16", "sync, AdamW 6e-3, fp16"


@dataclass(frozen=True)
class Setting:
    """One way to train: `codec` and `interval` for all rounds, or `kind` `auto`, or `sync`.

    Muon's learning rates and the schedule are those that `auto` would take, unless `untuned`;
    `lr` is `sync`'s, with that schedule; `momentum` is the outer step's, Nesterov's.
    """

    codec: str = "fp16"
    interval: int = 1
    inner: str = "muon"
    kind: str = "diloco"
    untuned: bool = False
    lr: float | None = None
    momentum: float = 0.0


def longer() -> dict[str, Setting]:
    """What is compared over longer budgets."""
    found = {f"{steps} steps, {codec}": Setting(codec, steps) for codec, steps in (("int4", 10), ("int4", 30), ("int2", 30))}
    found |= {f"{steps} steps, sparse": Setting("sparse", steps) for steps in (10, 30)}
    found["30 steps, int4, Nesterov 0.5"] = Setting("int4", 30, momentum=0.5)
    return {AUTO: Setting(kind="auto"), **found, TUNED_MUON: Setting(), SYNC: Setting(kind="sync")}


def settings() -> dict[str, Setting]:
    """By name; the ones that figures are made of come first. Without a name of an optimizer: Muon, as in `auto`."""
    found = {
        SYNC: Setting(kind="sync"),
        MUON: Setting(untuned=True),
        AUTO: Setting(kind="auto"),
        FP16: Setting("fp16", 10),
        INT8: Setting("int8", 10),
        TUNED_MUON: Setting(),
    }
    found[TUNED_SYNC] = Setting(kind="sync", lr=6e-3)
    for codec, interval in (("sparse", 10), ("int2", 5), ("int4", 30), ("int4", 5), ("int2", 10), ("int4", 10)):
        found[f"{interval} steps, {codec}"] = Setting(codec, interval)
    found["10 steps, Muon 4e-3, int4"] = Setting("int4", 10, untuned=True)
    found["10 steps, AdamW 2e-3, int4"] = Setting("int4", 10, "adamw", untuned=True)
    return found


def made(setting: Setting, files: Path, seed: int, steps: int) -> Manifest:
    """The manifest of a setting for `steps` inner steps of each of the peers, all with equal work.

    With the same keys and interval two settings draw the same samples.
    """
    interval = setting.interval if setting.kind == "diloco" else 1
    base = demo_manifest(
        files,
        seed,
        sequence_length=SEQUENCE_LENGTH,
        data_bytes=DATA_BYTES,
        peers=PEERS,
        rounds=-(-steps // interval),
        inner_steps=interval,
        batch_samples=BATCH_SAMPLES,
        strategy="sync" if setting.kind == "sync" else "diloco",
        name="bench-quality",
    )
    values = base.model_dump(mode="json")
    values["rounds"]["scale_to_speed"] = False
    values["data"]["order"] = f"quality-{seed}"
    plan = auto.plan(draft(base, steps))
    match setting.kind:
        case "sync":
            if setting.lr is not None:
                values["strategy"]["optimizer"]["lr"] = setting.lr
                values["strategy"]["schedule"]["final_fraction"] = plan.strategy.schedule.final_fraction
        case "diloco":
            _fix(values, setting, plan)
        case "auto":
            values = plan.applied(values)
    return Manifest.model_validate(values)


def draft(base: Manifest, steps: int) -> auto.Draft:
    """A home link and a device that takes 2 s a step, as for a model of 124 M parameters."""
    return auto.Draft(
        parameters=base.model.parameters,
        sequence_length=SEQUENCE_LENGTH,
        tokens=steps * PEERS * BATCH_SAMPLES * SEQUENCE_LENGTH,
        batch_samples=BATCH_SAMPLES,
        peers=PEERS,
    )


def _fix(values: dict[str, Any], setting: Setting, plan: auto.Plan) -> None:
    values["codec"]["kind"] = setting.codec
    values["audit"] |= UNAUDITED
    strategy = values["strategy"]
    strategy["outer"]["momentum"] = setting.momentum
    if not setting.untuned:
        strategy["inner"] = plan.strategy.inner.model_dump(mode="json")
        strategy["schedule"]["final_fraction"] = plan.strategy.schedule.final_fraction
        strategy["schedule"]["warmup_tokens"] = plan.strategy.schedule.warmup_tokens
    if setting.inner == "adamw":
        strategy["inner"] = {"kind": "adamw", "lr": 2e-3}
