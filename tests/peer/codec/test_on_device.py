"""By torch, many parts at once: the bytes, values and refusals of the plain codecs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from peer.codec import Codec, make_codec, on_device
from peer.codec.feedback import ErrorFeedback
from peer.codec.on_device import can_encode, decode_parts, encode_parts, feed_all
from swarm import manifest
from swarm.errors import Rejected
from tests.peer.codec.codec_cases import damaged, finite, normal

PART = 4096
KINDS = ("int8", "int4", "int2", "sparse", "sparse without zeros")
CPU = torch.device("cpu")
LARGEST = float(np.finfo(np.float32).max)
devices = pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]),
    ],
)


def made(kind: str, parts: int, part_values: int = PART, top_k: int = 64) -> Codec:
    values = {
        "kind": kind.split(maxsplit=1)[0],
        "part_values": part_values,
        "density_top_k": top_k,
        "leave_out_zeros": " " in kind,
    }
    return make_codec(manifest.Codec.model_validate(values), parts * part_values)


def plainly(codec: Codec, vector: np.ndarray) -> tuple[list[bytes], np.ndarray]:
    """The parts, and what others decode from them, [parts, part values]."""
    rows = vector.reshape(codec.part_count, -1)
    parts = [codec.encode_part(row, index) for index, row in enumerate(rows)]
    return parts, np.stack([codec.decode_part(part, index) for index, part in enumerate(parts)])


def same_bits(one: np.ndarray, other: np.ndarray) -> bool:
    return bool(np.array_equal(one.view(np.uint32), other.view(np.uint32)))


def check_equal(codec: Codec, vector: np.ndarray, device: str) -> None:
    """Encoded and decoded, here and part by part."""
    parts, decoded = plainly(codec, vector)
    encoded, values = encode_parts(codec, torch.from_numpy(vector.copy()).to(device).view(codec.part_count, -1))
    assert encoded == parts
    assert np.array_equal(values.cpu().numpy(), decoded)
    assert same_bits(decode_parts(codec, parts, torch.device(device)).cpu().numpy(), decoded)


@devices
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", [1e-3, 1e-41, 1e33, 0.0])
@pytest.mark.parametrize("part_values", [PART, 3 * PART])
def test_the_bytes_are_the_same(kind: str, scale: float, part_values: int, device: str) -> None:
    """For values as of updates, and as small or large as float32 goes."""
    codec = made(kind, 3, part_values)
    check_equal(codec, (normal(3 * part_values, 1, 1.0) * scale).astype(np.float32), device)


@devices
@pytest.mark.parametrize("zeros", [(), (0,), (0, 1, 2), (3, 4, 5), (0, 1, 2, 3, 4, 5, 6, 7, 8)])
def test_the_same_chunks_are_left_out(zeros: tuple[int, ...], device: str) -> None:
    """None of a part, some, or all of them."""
    vector = normal(9 * PART).reshape(9, -1)
    vector[list(zeros)] = 0
    check_equal(made("sparse without zeros", 3, 3 * PART), vector.reshape(-1), device)


@devices
@pytest.mark.parametrize("kind", KINDS)
@given(
    corner=arrays(np.float32, 40, elements=finite | st.sampled_from([0.0, -0.0, 1.0, -1.0, 1e-45, LARGEST, -LARGEST])),
    places=st.lists(st.integers(0, 2 * PART - 1), min_size=40, max_size=40),
)
@settings(max_examples=60, deadline=None)
def test_the_bytes_are_the_same_for_odd_values(kind: str, corner: np.ndarray, places: list[int], device: str) -> None:
    """Equal magnitudes, zeros of both signs, subnormal and huge numbers among few others."""
    vector = np.zeros(2 * PART, dtype=np.float32)
    vector[places] = corner
    check_equal(made(kind, 2), vector, device)


@devices
@pytest.mark.parametrize("top_k", [4, 32, 100, 1024])
def test_every_density(top_k: int, device: str) -> None:
    """Also where tables end within a byte, and where many magnitudes are equal."""
    codec = made("sparse", 2, 2 * PART, top_k)
    check_equal(codec, normal(4 * PART, 2), device)
    check_equal(codec, np.sign(normal(4 * PART, 3)), device)


@devices
@pytest.mark.parametrize("kind", KINDS)
def test_error_feedback_is_the_same(kind: str, device: str) -> None:
    """Over rounds, in several batches, with the same residual."""
    codec = made(kind, 5)
    feedback, residual = ErrorFeedback(codec), np.zeros(5 * PART, dtype=np.float32)
    for seed in range(3):
        update = normal(5 * PART, seed)
        kept = update.copy()
        found = feed_all(codec, update, residual, feedback.decay, torch.device(device), batch_values=2 * PART)
        assert found == feedback.encode(update)
        assert np.array_equal(residual, np.concatenate([feedback.residual(index) for index in range(5)]))
        assert np.array_equal(update, kept)


@devices
@pytest.mark.parametrize("kind", KINDS)
@given(flips=st.lists(st.tuples(st.integers(0, 1 << 20), st.integers(1, 255)), min_size=1, max_size=4))
@settings(max_examples=60, deadline=None)
def test_it_refuses_what_the_plain_codec_refuses(kind: str, flips: list[tuple[int, int]], device: str) -> None:
    """A damaged part is decoded to the same values by both, or by neither."""
    codec = made(kind, 2)
    parts, _ = plainly(codec, normal(2 * PART, 5))
    parts[1] = damaged(parts[1], flips)
    try:
        expected = np.stack([codec.decode_part(part, index) for index, part in enumerate(parts)])
    except Rejected:
        with pytest.raises(Rejected, match="bad_part"):
            decode_parts(codec, parts, torch.device(device))
    else:
        assert same_bits(decode_parts(codec, parts, torch.device(device)).cpu().numpy(), expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_do_not_travel(kind: str, value: float) -> None:
    """As with the plain codec, wherever they are."""
    vector = normal(2 * PART)
    vector[PART + 7] = value
    with pytest.raises(ValueError, match="not finite"):
        encode_parts(made(kind, 2), torch.from_numpy(vector).view(2, -1))


def test_a_part_of_the_wrong_size_is_refused() -> None:
    """Before anything is decoded."""
    codec = made("int4", 2)
    parts, _ = plainly(codec, normal(2 * PART))
    with pytest.raises(Rejected, match="bytes instead of"):
        decode_parts(codec, [parts[0], parts[1][:-1]], CPU)


def test_what_is_encoded_here() -> None:
    """Everything that loses something."""
    assert [kind for kind in ("fp16", *KINDS) if can_encode(made(kind, 1))] == list(KINDS)


def test_a_full_gpu_leaves_the_rest_to_the_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches get smaller; what doesn't fit even so is encoded by the plain codec, as is a shorter last part."""
    codec = make_codec(manifest.Codec(kind="int4", part_values=PART), 7 * PART + 100)
    encode, sizes = on_device.encode_parts, list[int]()

    def crowded(codec: Codec, values: torch.Tensor) -> tuple[list[bytes], torch.Tensor]:
        sizes.append(len(values))
        if len(values) > 2 or len(sizes) > 3:
            raise torch.OutOfMemoryError
        return encode(codec, values)

    def crowded_gpu(codec: Codec, update: np.ndarray, residual: np.ndarray, decay: float, device: torch.device) -> list[bytes]:
        assert device.type == "cuda"
        return feed_all(codec, update, residual, decay, CPU, batch_values=4 * PART)

    monkeypatch.setattr(on_device, "encode_parts", crowded)
    monkeypatch.setattr(on_device, "feed_all", crowded_gpu)
    feedback, plain, update = ErrorFeedback(codec), ErrorFeedback(codec), normal(codec.values)
    assert feedback.encode(update, device=torch.device("cuda")) == plain.encode(update)
    assert sizes == [4, 2, 2, 2, 1]
    assert feedback.hash() == plain.hash()
