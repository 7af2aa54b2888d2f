"""Which device trains."""

from __future__ import annotations

import platform
from pathlib import Path

import pytest
import torch

from peer.device import (
    autocast_dtype,
    choose_devices,
    free_bytes,
    free_host_bytes,
    hardware_class,
    read_gpu,
)
from swarm.errors import NoDevice, UsageError

CPU = torch.device("cpu")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.mark.parametrize(("spec", "expected"), [("auto", [0, 1]), ("0", [0]), ("1", [1]), ("1,0", [1, 0]), (" 0 , 1 ", [0, 1])])
@pytest.mark.usefixtures("two_gpus")
def test_a_specification_names_gpus_in_the_given_order(spec: str, expected: list[int]) -> None:
    """`--gpu` takes one index, several, or all."""
    assert choose_devices(spec) == [torch.device("cuda", index) for index in expected]


@pytest.mark.parametrize("spec", ["", "x", "0,", "-1", "0,0", "²", "0;1"])
@pytest.mark.usefixtures("two_gpus")
def test_a_specification_that_cant_be_read_is_a_usage_error(spec: str) -> None:
    """Nonsense after `--gpu` is the user's mistake, not a missing device."""
    with pytest.raises(UsageError, match="--gpu"):
        choose_devices(spec)


@pytest.mark.usefixtures("two_gpus")
def test_a_gpu_that_isnt_there_is_named() -> None:
    """The error says which index is missing and how many there are."""
    with pytest.raises(NoDevice, match="no GPU 2: this machine has 2"):
        choose_devices("0,2")


@pytest.mark.parametrize("spec", ["auto", "0"])
@pytest.mark.usefixtures("no_gpu")
def test_without_a_gpu_the_hint_is_to_use_the_processor(spec: str) -> None:
    """A machine without a GPU is told about `--cpu`."""
    with pytest.raises(NoDevice) as raised:
        choose_devices(spec)
    assert "--cpu" in raised.value.hint


@pytest.mark.usefixtures("no_gpu")
def test_the_processor_is_used_when_asked_for() -> None:
    """`--cpu` works with no GPU."""
    assert choose_devices(cpu=True) == [CPU]


def test_a_cpu_computes_in_fp32_and_says_so_in_its_class() -> None:
    """Audits compare CPU results at fp32 tolerance."""
    assert autocast_dtype(CPU) == torch.float32
    assert hardware_class(CPU) == f"cpu-{platform.machine()}-fp32"


def test_a_cpu_has_no_gpu_reading() -> None:
    """Temperature and power are unknown without NVML."""
    assert read_gpu(CPU) is None


def test_free_memory_respects_a_containers_limit(tmp_path: Path) -> None:
    """A container with 1000 bytes left has 1000 bytes left, whatever the host has."""
    (tmp_path / "memory.max").write_text("5000\n")
    (tmp_path / "memory.current").write_text("4000\n")
    assert free_host_bytes(tmp_path) == 1000


@pytest.mark.parametrize("limit", ["max\n", None])
def test_free_memory_without_a_limit_is_the_hosts(tmp_path: Path, limit: str | None) -> None:
    """No limit, or no control group at all, means the host's free memory."""
    if limit is not None:
        (tmp_path / "memory.max").write_text(limit)
    assert free_host_bytes(tmp_path) > 1 << 20
    assert free_bytes(CPU) > 1 << 20


@pytest.mark.gpu
@needs_gpu
def test_a_gpu_is_read() -> None:
    """NVML reports temperature and memory of the GPU that torch names."""
    device = choose_devices("auto")[0]
    reading = read_gpu(device)
    assert reading is not None
    assert 0 < reading.temperature_c < 120
    assert 0 < reading.memory_used_bytes < reading.memory_total_bytes
    assert hardware_class(device).startswith(torch.cuda.get_device_name(device))
