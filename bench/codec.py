"""What codecs cost: seconds to encode and decode 124 M parameters on two cores, and bits per parameter."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from bench import report
from bench.report import Report
from peer.codec import Codec, Vector, make_codec
from peer.codec.feedback import ErrorFeedback
from peer.codec.on_device import BATCH_VALUES, decode_parts, encode_parts
from swarm import manifest

PARAMETERS = 124_000_000
QUICK_PARAMETERS = 12_400_000
THREADS = 2
KINDS = ("fp16", "int8", "int4", "int2", "sparse")
DENSITIES = (16, 32, 128, 256)
SECONDS_GOALS = {"sparse": "<= 3", "int4": "<= 3"}
GPU_GOALS = {"sparse": "<= 0.05", "int4": "<= 0.05"}
GPU_TIMES = 6
BITS_GOALS = {"sparse": "<= 0.25", "int4": "<= 4.5"}
STANDARD_DEVIATION = 1e-3
HOW = (
    f"encode with error feedback, then decode all parts, {PARAMETERS:,} normal values in parts of 131,072, {THREADS} threads; "
    "wall time, median of the runs after the first"
)


@dataclass(frozen=True)
class Run:
    """One update, sent and received."""

    encode_s: float
    decode_s: float
    cpu_s: float
    size_bytes: int
    lost: float

    @property
    def total_s(self) -> float:
        """Both together."""
        return self.encode_s + self.decode_s


def measure_speed(out: Report) -> None:
    """Every codec over the whole vector."""
    parameters = out.choose(PARAMETERS, QUICK_PARAMETERS)
    update = _update(parameters)
    for kind in KINDS:
        codec = make_codec(manifest.Codec.model_validate({"kind": kind}), parameters)
        runs = _send(codec, update, out.choose(6, 4))
        to_full = PARAMETERS / parameters
        total_s = statistics.median(run.total_s for run in runs[1:]) * to_full
        out.figure(f"{kind}_encode_decode_124m_s", total_s, HOW, SECONDS_GOALS.get(kind, ""))
        bits = runs[0].size_bytes * 8 / parameters
        out.figure(f"{kind}_codec_bits_per_parameter", bits, "all bytes of all parts, without framing", BITS_GOALS.get(kind, ""))
        out.row(
            "codecs",
            codec=kind,
            topology=codec.topology,
            bits_per_parameter=bits,
            encode_s=statistics.median(run.encode_s for run in runs[1:]) * to_full,
            decode_s=statistics.median(run.decode_s for run in runs[1:]) * to_full,
            fastest_s=min(run.total_s for run in runs[1:]) * to_full,
            processor_s=statistics.median(run.cpu_s for run in runs[1:]) * to_full,
            lost_at_first=runs[0].lost,
        )


def measure_gpu(out: Report) -> None:
    """The same on a GPU: from values there to bytes here, and back."""
    if not torch.cuda.is_available():
        out.say("  no CUDA device: left out")
        return
    device = torch.device("cuda")
    parameters = out.choose(PARAMETERS, QUICK_PARAMETERS)
    for kind, goal in GPU_GOALS.items():
        codec = make_codec(manifest.Codec.model_validate({"kind": kind}), parameters)
        batches = _batches(torch.from_numpy(_update(parameters)).to(device), codec.part_values)
        seconds = [_there_and_back(codec, batches, device) for _ in range(GPU_TIMES)]
        how = (
            f"{torch.cuda.get_device_name(device)}: whole parts of {parameters:,} normal values, from its memory to bytes in the "
            "host's and back; wall time, median of the runs after the first"
        )
        total_s = statistics.median(seconds[1:]) * PARAMETERS / parameters
        out.figure(f"{kind}_encode_decode_124m_gpu_s", total_s, how, goal)


def _batches(values: torch.Tensor, part_values: int) -> list[torch.Tensor]:
    """[parts, part values] each; a shorter last part is left out."""
    whole = values[: values.numel() // part_values * part_values].view(-1, part_values)
    most = BATCH_VALUES // part_values
    return [whole[start : start + most] for start in range(0, len(whole), most)]


def _there_and_back(codec: Codec, batches: Sequence[torch.Tensor], device: torch.device) -> float:
    torch.cuda.synchronize(device)
    started = time.perf_counter()
    for batch in batches:
        parts, _ = encode_parts(codec, batch)
        decode_parts(codec, parts, device)
    torch.cuda.synchronize(device)
    return time.perf_counter() - started


def measure_densities(out: Report) -> None:
    """`sparse` with other numbers of values per chunk."""
    parameters = QUICK_PARAMETERS
    update = _update(parameters)
    for top_k in DENSITIES:
        codec = make_codec(manifest.Codec(kind="sparse", density_top_k=top_k), parameters)
        runs = _send(codec, update, 3)
        out.row(
            "sparse by density",
            top_k=top_k,
            bits_per_parameter=runs[0].size_bytes * 8 / parameters,
            encode_decode_124m_s=min(run.total_s for run in runs) * PARAMETERS / parameters,
            lost_at_first=runs[0].lost,
        )


def _update(parameters: int) -> Vector:
    update = np.random.default_rng(0).standard_normal(parameters, dtype=np.float32)
    return np.multiply(update, np.float32(STANDARD_DEVIATION), out=update)


def _send(codec: Codec, update: Vector, times: int) -> list[Run]:
    """The same update in every round; what the first one loses comes back in the next."""
    feedback, decoded = ErrorFeedback(codec), np.empty_like(update)
    runs: list[Run] = []
    with ThreadPoolExecutor(THREADS) as pool:
        for _ in range(times):
            started, cpu_started = time.perf_counter(), time.process_time()
            parts = feedback.encode(update, threads=THREADS)
            encoded = time.perf_counter()
            list(pool.map(lambda index, sent=parts: _decode_part(codec, sent[index], index, decoded), range(codec.part_count)))
            ended, cpu_s = time.perf_counter(), time.process_time() - cpu_started
            size_bytes = sum(map(len, parts))
            runs.append(Run(encoded - started, ended - encoded, cpu_s, size_bytes, 0.0 if runs else _lost(update, decoded)))
    return runs


def _decode_part(codec: Codec, part: bytes, index: int, out: Vector) -> None:
    out[slice(*codec.part_span(index))] = codec.decode_part(part, index)


def _lost(update: Vector, decoded: Vector) -> float:
    """The share of the squared norm that didn't travel, over the first million values."""
    head = slice(1 << 20)
    return float(np.sum(np.square(update[head] - decoded[head])) / np.sum(np.square(update[head])))


def main(argv: Sequence[str] | None = None) -> int:
    """Measure."""
    return report.run("codec", __doc__, {"speed": measure_speed, "gpu": measure_gpu, "densities": measure_densities}, argv)


if __name__ == "__main__":
    sys.exit(main())
