"""Whether recipes do what they are for: an adapter on a pretrained model, a teacher's logits, experts, and the speed."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

from bench import report
from bench.adapters import Adapters
from bench.daemon import OVER_BARE, Daemons
from bench.mixture import measure_mixture
from bench.report import Report, workspace
from bench.single import one_thread
from peer.corpus import TOKENIZER, standard_library_documents
from peer.data import tree_path
from peer.dataset import Dataset, Plan, build
from peer.documents import Counts, Shuffled
from peer.model import FlatParameters, count_parameters, flops_per_token, initial_theta
from peer.recipes import llama_config
from peer.teaching import teach
from peer.trainer import Trainer, Vector
from swarm.manifest import AdamW, Distillation, Manifest, Muon

SEQUENCE_LENGTH, BATCH_SAMPLES = 128, 8
DATA_BYTES, QUICK_DATA_BYTES = 450_000, 150_000
TEACHER_STEPS, QUICK_TEACHER_STEPS = 200, 5
STUDENT_STEPS, QUICK_STUDENT_STEPS = 250, 10
SEEDS = (0, 1, 2)
TOP_K = 16
CHOSEN = Distillation(share=0.9)
VALIDATION_SAMPLES = 200
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Learner:
    """A Llama, and the optimizer that trains it."""

    width: int
    layers: int
    inner: AdamW | Muon


TEACHER = Learner(128, 2, Muon(lr=1.6e-2))
STUDENT = Learner(32, 2, AdamW(lr=4e-3))


@dataclass(frozen=True)
class Reached:
    """What a training came to: weights, [parameters], and the held-out loss in nats per byte."""

    theta: Vector
    loss: float


@one_thread()
def measure_distillation(out: Report) -> None:
    """A small student on labels alone, and with a larger model's logits besides.

    All in this process, through the parts that a peer has: shards on disk, `swarm data teach`, the trainer's rounds.
    """
    with workspace() as folder:
        plain = _built(folder / "plain", out.choose(DATA_BYTES, QUICK_DATA_BYTES))
        big = _manifest(plain, TEACHER, out.choose(TEACHER_STEPS, QUICK_TEACHER_STEPS), 0)
        teacher = _trained(big, folder / "plain")
        out.row("distillation", student="the teacher itself", parameters=big.model.parameters, loss=teacher.loss)
        _save(big, teacher.theta, folder / "plain", folder / "teacher")
        taught = teach(folder / "plain", folder / "taught", folder / "teacher", TOP_K, CPU, micro_batch=32)
        out.say("  the teacher has written its shards")
        steps = out.choose(STUDENT_STEPS, QUICK_STUDENT_STEPS)
        losses = {settings: _losses(out, plain, taught, folder, settings, steps) for settings in (None, CHOSEN)}
    gains = [alone - distilled for alone, distilled in zip(losses[None], losses[CHOSEN], strict=True)]
    how = (
        f"held-out loss in nats per byte of a student of {STUDENT.layers} layers of width {STUDENT.width} after {steps} steps of "
        f"{BATCH_SAMPLES} x {SEQUENCE_LENGTH} bytes, on labels alone minus with a teacher's {TOP_K} likeliest bytes (share "
        f"{CHOSEN.share}, temperature {CHOSEN.temperature}); same samples and initial weights; mean over {len(SEEDS)} seeds"
    )
    out.figure("distillation_gain", statistics.mean(gains), how, "> 0")
    out.figure("distillation_gain_spread", max(gains) - min(gains), "largest minus smallest gain over the seeds")


async def measure_speed(daemons: Daemons, out: Report) -> None:
    """One peer with everything that it does, and a bare loop, by turns."""
    ratios = await daemons.over_bare(out)
    out.figure("tokens_per_s_over_bare", statistics.median(ratios), f"{OVER_BARE}; median of {len(ratios)} turns", ">= 0.98")


def _losses(out: Report, plain: Dataset, taught: Dataset, folder: Path, settings: Distillation | None, steps: int) -> list[float]:
    """The held-out losses of a student by its seeds."""
    data, files = (plain, folder / "plain") if settings is None else (taught, folder / "taught")
    found = []
    for seed in SEEDS:
        run = _manifest(data, STUDENT, steps, seed, settings)
        found.append(_trained(run, files).loss)
        name = "labels alone" if settings is None else f"with logits, share {settings.share}, temperature {settings.temperature}"
        out.row("distillation", student=name, seed=seed, parameters=run.model.parameters, loss=found[-1])
        out.say(f"  {name}, seed {seed}: {found[-1]:.4f}")
    return found


def _built(to: Path, data_bytes: int) -> Dataset:
    plan = Plan(sequence_length=SEQUENCE_LENGTH, license="PSF-2.0")
    with Shuffled(standard_library_documents(data_bytes), 0, to.parent) as documents:
        return build(documents, to, plan, Counts())


def _manifest(data: Dataset, learner: Learner, steps: int, seed: int, distillation: Distillation | None = None) -> Manifest:
    """A run of one peer and one round; with the same seed the same samples in the same order."""
    config = llama_config(data.vocabulary_size, SEQUENCE_LENGTH, learner.width, learner.layers, data.end_of_text)
    strategy = {
        "kind": "diloco",
        "inner_steps": steps,
        "batch_samples": BATCH_SAMPLES,
        "inner": learner.inner,
        "schedule": {"total_tokens": steps * BATCH_SAMPLES * SEQUENCE_LENGTH, "final_fraction": 0.0},
    }
    values: dict[str, Any] = {
        "name": "recipe",
        "model": {"config": config, "seed": seed, "parameters": count_parameters(config)},
        "tokenizer": data.tokenizer,
        "data": data.data.model_dump(mode="json") | {"order": f"seed {seed}"},
        "distillation": distillation,
        "strategy": strategy,
        "credit": {"flops_per_token": flops_per_token(config, SEQUENCE_LENGTH)},
    }
    return Manifest.model_validate(values)


def _trained(run: Manifest, files: Path) -> Reached:
    """One round of the whole schedule."""
    trainer, theta = Trainer.open(run, CPU, files), initial_theta(run.model)
    made = trainer.train_round(theta, 0, "bench", run.most_inner_steps, 0)
    theta = theta - made.update
    return Reached(theta, trainer.evaluate(theta, VALIDATION_SAMPLES))


def _save(run: Manifest, theta: Vector, files: Path, to: Path) -> None:
    """A directory as transformers writes it."""
    disable_progress_bar()
    values = dict(run.model.config)
    network: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model(values.pop("model_type"), **values))
    FlatParameters(network).write(network, theta)
    network.save_pretrained(to)
    (to / TOKENIZER).write_bytes(tree_path(files, run.tokenizer).read_bytes())


def main(argv: Sequence[str] | None = None) -> int:
    """Measure in a folder of its own."""
    with report.workspace() as folder:
        adapters = Adapters(folder)
        speed = partial(measure_speed, Daemons(folder / "daemon"))
        sections: dict[str, report.Section] = {
            "lora": adapters.lora,
            "adapter_speed": adapters.bare,
            "four_bits": adapters.four_bits,
            "speed": speed,
            "distillation": measure_distillation,
            "mixture": measure_mixture,
        }
        return report.run("recipes", __doc__, sections, argv)


if __name__ == "__main__":
    sys.exit(main())
