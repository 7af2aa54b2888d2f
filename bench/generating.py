"""Checking generated samples: how far honest ones are off, how surely others are found out, and what a check costs.

A real pretrained model (SmolLM2-135M-Instruct) goes on from Python source. Honest samples are written in batches, token by token,
and checked alone in one pass on another number of threads, as an auditor does, in each precision. Cheats write with weights of
fewer bits, or compute less precisely than they say.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench import report
from bench.adapters import smollm2
from bench.report import Report
from bench.single import threads
from peer.corpus import load_tokenizer, standard_library_documents
from peer.data import tree_path
from peer.device import PRECISIONS
from peer.generating import LEEWAYS, LOSS_TOLERANCES, MEAN_GAPS, Check, Sample, Writer
from peer.pretrained import Pretrained
from peer.prompts import Ids
from swarm.manifest import Model, Sampling

CPU = torch.device("cpu")
RUN = b"bench.generating".ljust(32, b".")
SAMPLING = Sampling(max_tokens=64, temperature=0.8, top_p=0.95)
BATCH, PROMPT_TOKENS = 8, 48
DATA_BYTES = 2_000_000
BITS = (8, 4)


@dataclass(frozen=True)
class Writing:
    """The model, and prompts for it of different lengths."""

    folder: Path
    made: Pretrained
    prompts: list[Ids]

    def writer(self, precision: str = "fp32", run: bytes = RUN) -> Writer:
        """It, computing in this precision."""
        model = Model(config=self.made.config, parameters=1, base=self.made.base)
        vocabulary = int(self.made.config["vocab_size"])
        return Writer(model, self.folder, vocabulary, SAMPLING, run, CPU, dtype=PRECISIONS[precision])


class Generating:
    """The sections; all use the same model."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._made: Writing | None = None

    async def honest(self, out: Report) -> None:
        """Gaps of honest samples, relative to what passes."""
        model = await self._model(out)
        for precision in PRECISIONS:
            checks, samples, written_s, checked_s = measured(model, model.writer(precision), precision)
            largest = {
                "gap": max(check.worst for check in checks) / LEEWAYS[precision].logit,
                "mean": max(check.mean for check in checks) / MEAN_GAPS[precision],
                "loss": max(abs(check.loss - sample.loss) for check, sample in zip(checks, samples, strict=True))
                / LOSS_TOLERANCES[precision],
            }
            out.row(
                "honest",
                precision=precision,
                samples=len(samples),
                tokens=sum(sample.tokens.size for sample in samples),
                worst_gap=max(check.worst for check in checks),
                worst_mean_gap=max(check.mean for check in checks),
                check_s_per_written_s=checked_s / written_s,
            )
            how = f"the largest of gap, mean gap and loss, over what passes, of {len(samples)} honest samples in {precision}"
            out.figure(f"honest_share_of_tolerance_{precision}", max(largest.values()), how, "<= 0.5")
            accused = sum(bool(check.problem(sample, precision)) for check, sample in zip(checks, samples, strict=True))
            out.figure(f"honest_accused_{precision}", accused, f"of {len(samples)} honest samples in {precision}", "== 0")

    async def cheats(self, out: Report) -> None:
        """Which share of a cheat's samples is found out."""
        model = await self._model(out)
        for precision in ("fp32", "bf16"):
            for bits in BITS:
                writer = model.writer(precision)
                round_weights(writer.load(), bits)
                found(out, model, writer, precision, f"weights of {bits} bits")
            found(out, model, model.writer(precision, RUN[::-1]), precision, "another key's noise")
        found(out, model, model.writer("bf16"), "fp32", "bf16 in the place of fp32")

    async def _model(self, out: Report) -> Writing:
        if self._made is None:
            base, made = await smollm2(self._folder)
            tokenizer = load_tokenizer(tree_path(base, made.tokenizer)).backend_tokenizer
            texts = [text for text in standard_library_documents(DATA_BYTES) if len(text) > 40 * PROMPT_TOKENS]
            count = out.choose(64, 8)
            ids = [np.array(tokenizer.encode(text[:2000]).ids, dtype=np.int64) for text in texts[:count]]
            self._made = Writing(base, made, [tokens[: PROMPT_TOKENS - place % 16] for place, tokens in enumerate(ids)])
        return self._made


def measured(model: Writing, writer: Writer, precision: str) -> tuple[list[Check], list[Sample], float, float]:
    """Samples that a writer has written, checked in a precision as an auditor does; and how long either took."""
    started = time.monotonic()
    with threads(1):
        samples = [sample for first in range(0, len(model.prompts), BATCH) for sample in written(model, writer, first)]
    between = time.monotonic()
    writer.release()
    auditor = model.writer()
    with threads(2):
        auditor.load(precision)
        loaded = time.monotonic()
        checks = [auditor.check(model.prompts[sample.index], sample, precision) for sample in samples]
    return checks, samples, between - started, time.monotonic() - loaded


def written(model: Writing, writer: Writer, first: int) -> Sequence[Sample]:
    """A batch of samples."""
    return writer.write(model.prompts[first : first + BATCH], first) or []


def found(out: Report, model: Writing, writer: Writer, precision: str, cheat: str) -> None:
    """Which share of samples doesn't pass as computed in this precision."""
    checks, samples, _, _ = measured(model, writer, precision)
    wrong = [bool(check.problem(sample, precision)) for check, sample in zip(checks, samples, strict=True)]
    out.row(
        "cheats",
        cheat=cheat,
        as_=precision,
        found=float(np.mean(wrong)),
        median_worst_gap=float(np.median([check.worst for check in checks])),
        median_mean_gap=float(np.median([check.mean for check in checks])),
    )
    name = f"found_{cheat.replace(' ', '_').replace(chr(39), '')}_{precision}"
    out.figure(name, float(np.mean(wrong)), f"share of {len(samples)} samples of {SAMPLING.max_tokens} tokens, as {precision}")


def round_weights(network: Any, bits: int) -> None:
    """Round every linear layer's weights to so many bits, symmetrically, with a scale for each row."""
    most = 2 ** (bits - 1) - 1
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, torch.nn.Linear):
                scale = module.weight.float().abs().amax(dim=1, keepdim=True) / most
                module.weight.copy_((module.weight.float() / scale).round() * scale)


def main() -> int:
    """Measure."""
    with report.workspace() as folder:
        sections = Generating(folder)
        return report.run("generating", __doc__, {"honest": sections.honest, "cheats": sections.cheats})


if __name__ == "__main__":
    sys.exit(main())
