"""What a model has written passes for it, in whatever batch; what it hasn't written doesn't."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from peer.corpus import byte_level_tokenizer
from peer.generating import LEEWAYS, Check, Sample, Writer, is_whole
from peer.importing import import_pretrained
from peer.pretrained import Pretrained
from peer.prompts import Ids
from swarm.errors import DataInvalid
from swarm.manifest import Model, Sampling
from tests.checkpoints import save_checkpoint
from tests.peer.conftest import CONFIGS

CPU = torch.device("cpu")
RUN = b"r" * 32
END = 256
SAMPLING = Sampling(max_tokens=20, temperature=0.8, top_p=0.95, stop=(END, *range(0, 256, 20)))
PROMPTS = [np.frombuffer(text, dtype=np.uint8).astype(np.int64) for text in (b"once", b"the quick", b"a", b"what is it")]
WIDE = {"llama": {"initializer_range": 0.3, "max_position_embeddings": 64}, "gpt2": {"initializer_range": 0.3, "n_positions": 64}}


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Pretrained]:
    """A small model with decided opinions, as `swarm run base` leaves it."""
    return made_base(tmp_path_factory.mktemp("base"), request.param, 5)


def made_base(folder: Path, kind: str, seed: int) -> tuple[Path, Pretrained]:
    torch.manual_seed(seed)
    source = save_checkpoint(folder / "tiny", CONFIGS[kind] | WIDE[kind], byte_level_tokenizer())
    return folder / "base", import_pretrained(str(source), folder / "base")


def writer_of(base: tuple[Path, Pretrained], run: bytes = RUN, dtype: torch.dtype | None = None) -> Writer:
    folder, made = base
    model = Model(config=made.config, parameters=1, base=made.base)
    return Writer(model, folder, 257, SAMPLING, run, CPU, dtype=dtype)


def written(writer: Writer, prompts: list[Ids] = PROMPTS, first: int = 40) -> list[Sample]:
    samples = writer.write(prompts, first)
    assert samples is not None
    return samples


def problems(writer: Writer, samples: list[Sample], precision: str = "fp32") -> list[str]:
    pairs = zip(PROMPTS, samples, strict=True)
    return [writer.check(prompt, sample, precision).problem(sample, precision) for prompt, sample in pairs]


def test_honest_samples_pass(base: tuple[Path, Pretrained]) -> None:
    """Whole ones, each with its tokens and its loss."""
    writer = writer_of(base)
    samples = written(writer)
    assert all(is_whole(sample, SAMPLING, 257) for sample in samples)
    assert problems(writer, samples) == [""] * 4
    assert len({sample.tokens.size for sample in samples}) > 1


def test_a_batch_gives_what_each_prompt_gives_alone(base: tuple[Path, Pretrained]) -> None:
    """Padding changes nothing but last bits: alone each sample is the same, and its loss."""
    writer = writer_of(base)
    for place, sample in enumerate(written(writer)):
        (alone,) = written(writer, [PROMPTS[place]], first=40 + place)
        assert alone.index == sample.index
        assert np.array_equal(alone.tokens, sample.tokens)
        assert alone.loss == pytest.approx(sample.loss, abs=1e-4)


def test_another_model_s_samples_fail(base: tuple[Path, Pretrained], tmp_path: Path) -> None:
    """A model of the same architecture with other weights can't write for this one."""
    kind = base[1].config["model_type"]
    others = written(writer_of(made_base(tmp_path, kind, 6)))
    assert problems(writer_of(base), others) == ["tokens"] * 4


def test_a_slightly_changed_model_s_samples_fail(base: tuple[Path, Pretrained]) -> None:
    """Weights that are off by two percent show in some of the samples."""
    cheap = writer_of(base)
    with torch.no_grad():
        for parameter in cheap.load().parameters():
            parameter.mul_(1 + 0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    assert "tokens" in problems(writer_of(base), written(cheap))


def test_samples_of_another_run_or_number_fail(base: tuple[Path, Pretrained]) -> None:
    """Who looks for a nicer sample, or for a shorter one, has to take other noise."""
    writer = writer_of(base)
    assert problems(writer, written(writer_of(base, b"s" * 32))) == ["tokens"] * 4
    renamed = [replace(sample, index=40 + place) for place, sample in enumerate(written(writer, first=90))]
    assert problems(writer, renamed) == ["tokens"] * 4


def test_an_edited_sample_fails(base: tuple[Path, Pretrained]) -> None:
    """One other token is enough; so are a wrong loss, and an end that comes too early or too late."""
    writer = writer_of(base)
    sample = max(written(writer), key=lambda found: found.tokens.size)
    prompt = PROMPTS[sample.index - 40]
    tokens = sample.tokens.copy()
    tokens[0] = (tokens[0] + 1) % 10
    assert writer.check(prompt, replace(sample, tokens=tokens)).problem(sample, "fp32") == "tokens"
    assert writer.check(prompt, sample).problem(replace(sample, loss=sample.loss + 0.1), "fp32") == "loss"
    for changed in (sample.tokens[:-1], np.append(sample.tokens, 5), np.array([300]), np.array([-1]), sample.tokens[:0]):
        assert not is_whole(replace(sample, tokens=changed), SAMPLING, 257)
    assert not is_whole(replace(sample, loss=float("nan")), SAMPLING, 257)


def test_samples_in_another_precision_pass_as_such(base: tuple[Path, Pretrained]) -> None:
    """What was computed in bf16 is checked in bf16, on a device that computes in fp32 else."""
    samples = written(writer_of(base, dtype=torch.bfloat16))
    assert problems(writer_of(base), samples, "bf16") == [""] * 4


def test_numbers_that_are_none_pass_for_nothing() -> None:
    """A check that came to no number is a problem."""
    sample = Sample(0, np.array([1]), 1.0)
    assert Check(float("nan"), 0.0, 1.0).problem(sample, "fp32") == "tokens"
    assert Check(0.0, 0.0, float("nan")).problem(sample, "fp32") == "loss"


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_short_samples_are_not_accused_of_one_token(precision: str) -> None:
    """A single token may be as far off as any, which in long samples only few may be."""
    off = LEEWAYS[precision].logit
    short, long = (Sample(0, np.ones(length, dtype=np.int64), 1.0) for length in (1, 1000))
    assert Check(off, off, 1.0 + off).problem(short, precision) == ""
    assert Check(off * 1.01, off, 1.0).problem(short, precision) == "tokens"
    assert Check(off, off / 1000, 1.0).problem(long, precision) == ""
    assert Check(off, off, 1.0).problem(long, precision) == "tokens"
    assert Check(0.0, 0.0, 1.0 + off).problem(long, precision) == "loss"


def test_a_stopped_writer_has_written_nothing(base: tuple[Path, Pretrained]) -> None:
    """It is asked before every token."""
    answers = iter([None, None, "pause"])
    assert writer_of(base).write(PROMPTS, 0, lambda: next(answers)) is None


def test_a_broken_model_is_refused(base: tuple[Path, Pretrained]) -> None:
    """One whose logits are no numbers."""
    writer = writer_of(base)
    with torch.no_grad():
        next(writer.load().parameters()).fill_(float("inf"))
    with pytest.raises(DataInvalid, match="finite"):
        writer.write(PROMPTS, 0)
