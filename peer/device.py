"""Which device trains, how precisely it computes, and how much memory it has. Moves no data and trains nothing."""

from __future__ import annotations

import platform
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import psutil
import torch

from swarm.errors import NoDevice, UsageError

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
CPU_HINT = "use --cpu to train on the processor"
MAX_DEVICES = 64
CGROUP = Path("/sys/fs/cgroup")


def empty_cache(device: torch.device) -> None:
    """Give memory that torch holds for later back to the device."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


@dataclass(frozen=True)
class GpuReading:
    """What the driver reports about one GPU at one moment."""

    temperature_c: float
    power_w: float
    memory_used_bytes: int
    memory_total_bytes: int
    utilisation_ratio: float


def choose_devices(gpu: str = "auto", *, cpu: bool = False) -> list[torch.device]:
    """The devices that `--gpu` names: `"0"`, `"0,1"` or `"auto"` (all of them); the processor when `cpu` is set.

    Raises `NoDevice` where there is no such GPU and `UsageError` for a specification that can't be read.
    """
    if cpu:
        return [torch.device("cpu")]
    available = torch.cuda.device_count() if torch.cuda.is_available() else 0
    wanted = list(range(available)) if gpu.strip().lower() == "auto" else _parse_indices(gpu)
    if available == 0:
        raise NoDevice("no usable GPU", CPU_HINT)
    missing = [index for index in wanted if index >= available]
    if missing:
        raise NoDevice(f"no GPU {missing[0]}: this machine has {available}", CPU_HINT)
    return [torch.device("cuda", index) for index in wanted]


def _parse_indices(spec: str) -> list[int]:
    fields = [field.strip() for field in spec.split(",")]
    if len(fields) > MAX_DEVICES or not all(field.isascii() and field.isdigit() for field in fields):
        raise UsageError(f"--gpu {spec!r} can't be read", 'use "auto", "0" or "0,1"')
    indices = [int(field) for field in fields]
    if len(set(indices)) != len(indices):
        raise UsageError(f"--gpu {spec!r} names a GPU twice", 'use "auto", "0" or "0,1"')
    return indices


def autocast_dtype(device: torch.device) -> torch.dtype:
    """What matrix products are computed in.

    Bf16 from compute capability 8.0 on, else fp16 (which needs loss scaling); fp32 on a CPU.
    """
    if device.type != "cuda":
        return torch.float32
    with torch.cuda.device(device):
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[Any]:
    """Matrix products in this type within; nothing for fp32."""
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype=dtype)


def precision_of(dtype: torch.dtype) -> str:
    """The name of what matrix products are computed in."""
    return next((name for name, of_that_name in PRECISIONS.items() if of_that_name == dtype), "fp32")


def hardware_class(device: torch.device) -> str:
    """What computes here and how precisely, for example `NVIDIA H100-bf16` or `cpu-x86_64-fp32`."""
    precision = precision_of(autocast_dtype(device))
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}-{precision}"
    return f"{device.type}-{platform.machine()}-{precision}"


def read_gpu(device: torch.device) -> GpuReading | None:
    """Temperature, power, memory and load of a GPU; None for a CPU or where NVML doesn't answer."""
    nvml = _nvml() if device.type == "cuda" else None
    if nvml is None:
        return None
    try:
        handle = nvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
        memory = nvml.nvmlDeviceGetMemoryInfo(handle)
        return GpuReading(
            temperature_c=float(nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU)),
            power_w=nvml.nvmlDeviceGetPowerUsage(handle) / 1000,
            memory_used_bytes=int(memory.used),
            memory_total_bytes=int(memory.total),
            utilisation_ratio=nvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100,
        )
    except nvml.NVMLError:
        return None


@lru_cache(maxsize=1)
def _nvml() -> Any:
    """The NVML module, initialised once in this process, or None."""
    try:
        import pynvml  # noqa: PLC0415 - loaded only where a GPU is read

        pynvml.nvmlInit()
    except ImportError:
        return None
    except pynvml.NVMLError:
        return None
    return pynvml


def ran_out(error: RuntimeError) -> bool:
    """Whether torch found no memory; its CPU allocator says so with a plain `RuntimeError`."""
    return isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error)


def free_bytes(device: torch.device) -> int:
    """Memory that a new allocation on the device could get."""
    if device.type != "cuda":
        return free_host_bytes()
    free, _ = torch.cuda.mem_get_info(device)
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(free + cached)


def free_host_bytes(cgroup: Path = CGROUP) -> int:
    """Host memory that is free, or what the container's limit leaves of it."""
    available = int(psutil.virtual_memory().available)
    try:
        limit = int((cgroup / "memory.max").read_text())
        used = int((cgroup / "memory.current").read_text())
    except (OSError, ValueError):
        return available
    return max(0, min(available, limit - used))
