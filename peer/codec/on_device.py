"""The lossy codecs by torch, many parts at a time, where the GPU can do it: the same bytes and the same values as part by part.

That holds because both do the same separate IEEE operations in float32, whose results are defined to the last bit: products,
quotients, sums of two, roundings, comparisons. Divisors are tensors, as by a number torch multiplies with the reciprocal.
What else differs between processors, the order of long sums, isn't used.

Whole parts are done here; a shorter last one is for the plain codec.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import numpy as np
import structlog
import torch
from numpy.typing import NDArray
from torch import Tensor

from peer.codec import Codec, Vector
from peer.codec.grouped import Grouped
from peer.codec.int2 import TRITS, Int2
from peer.codec.int4 import Int4
from peer.codec.scales import (
    HALF,
    HEADER,
    INFINITE_HALF,
    LARGEST_FLOAT,
    checked_scale,
    finite,
    largest_half,
    scale_exponent,
)
from peer.codec.sparse import CHUNK_VALUES, INDEX_BITS, LLOYD_STEPS, VALUE_BITS, Section, Sparse
from swarm.errors import Rejected

BATCH_VALUES = 1 << 24

log = structlog.get_logger(__name__)


def can_encode(codec: Codec) -> bool:
    """Whether a codec has a counterpart here; `fp16` loses nothing worth the way to the device."""
    return isinstance(codec, Grouped | Sparse)


def feed_all(
    codec: Codec, update: Vector, residual: Vector, decay: float, device: torch.device, batch_values: int = BATCH_VALUES
) -> list[bytes]:
    """What `feedback.feed` does, for the whole parts of a vector: their bytes; `residual`, [values], is replaced.

    Where the device's memory doesn't suffice for a single part, the bytes are those of the parts before it, and the rest is as it
    was. Raises `ValueError` for values that aren't finite; `residual` is of no more use then.
    """
    whole, parts = update.size // codec.part_values, list[bytes]()
    most = max(1, batch_values // codec.part_values)
    with _side_stream(device):
        while len(parts) < whole:
            span = slice(len(parts) * codec.part_values, min(whole, len(parts) + most) * codec.part_values)
            try:
                parts += _feed_batch(codec, update[span], residual[span], decay, device)
            except torch.OutOfMemoryError:
                torch.cuda.empty_cache()
                log.info("encoding_in_smaller_batches", parts=most // 2)
                if most == 1:
                    break
                most //= 2
    return parts


def _feed_batch(codec: Codec, update: Vector, residual: Vector, decay: float, device: torch.device) -> list[bytes]:
    values, owed = _sent(update, device), _sent(residual, device)
    if decay != 1:
        owed.mul_(_number(decay, device))
    values.add_(owed)
    parts, decoded = encode_parts(codec, values.view(-1, codec.part_values))
    residual[:] = values.sub_(decoded.view(-1)).cpu().numpy()
    return parts


def _side_stream(device: torch.device) -> AbstractContextManager[object]:
    """Training may go on meanwhile; the others wait for this, so that it goes first."""
    if device.type != "cuda":
        return nullcontext()
    stream: torch.cuda.Stream = torch.cuda.Stream(device, priority=-1)  # type: ignore[no-untyped-call] # torch gives no type
    return torch.cuda.stream(stream)


def encode_parts(codec: Codec, values: Tensor) -> tuple[list[bytes], Tensor]:
    """The bytes of whole parts, [parts, part values] in float32, and what others decode from them, of the same shape.

    Raises `ValueError` where a value isn't finite.
    """
    if isinstance(codec, Sparse):
        rows, decoded = _encode_sparse(codec, values)
        if codec.leave_out_zeros:
            return _without_zeros(codec, values, _received(rows)), decoded
    else:
        rows, decoded = _encode_grouped(_grouped(codec), values)
    return [row.tobytes() for row in _received(rows)], decoded


def decode_parts(codec: Codec, parts: Sequence[bytes], device: torch.device) -> Tensor:
    """The values of as many whole parts, [parts, part values]. Raises `Rejected("bad_part")` with the place among these."""
    size = codec.part_size_limit(0)
    if isinstance(codec, Sparse) and codec.leave_out_zeros:
        return _decode_without_zeros(codec, parts, device)
    if any(len(part) != size for part in parts):
        return _decode_plainly(codec, parts)
    scales = [checked_scale(HEADER.unpack_from(part)[0], index) for index, part in enumerate(parts)]
    decoded = _decode_rows(codec, _joined(parts, device)[:, HEADER.size :], scales)
    return _decode_plainly(codec, parts) if decoded is None else decoded


def _decode_rows(codec: Codec, rows: Tensor, scales: Sequence[float]) -> Tensor | None:
    """None where one of them is bad."""
    if isinstance(codec, Sparse):
        return _decode_sparse(codec, rows, scales)
    return _decode_grouped(_grouped(codec), rows, scales)


def _decode_plainly(codec: Codec, parts: Sequence[bytes]) -> Tensor:
    """One of the parts is bad: the plain codec says which, and why."""
    for index, part in enumerate(parts):
        codec.decode_part(part, index)
    raise Rejected("bad_part", "not as long as a whole part, or taken by only one of two decoders")


def _grouped(codec: Codec) -> Grouped:
    if not isinstance(codec, Grouped):
        raise TypeError(f"{codec.kind} isn't encoded here")
    return codec


def _sent(values: Vector, device: torch.device) -> Tensor:
    """A copy on the device, also where that is the CPU."""
    return torch.from_numpy(values).to(device, copy=True)


def _joined(parts: Sequence[bytes], device: torch.device) -> Tensor:
    """[parts, bytes] on the device, of parts of one size; a GPU takes them from pinned memory, several times as fast."""
    rows = torch.empty((len(parts), len(parts[0])), dtype=torch.uint8, pin_memory=device.type == "cuda")
    for row, part in zip(rows.numpy(), parts, strict=True):
        row[:] = np.frombuffer(part, dtype=np.uint8)
    return rows.to(device, non_blocking=True)


def _received(rows: Tensor) -> NDArray[np.uint8]:
    """[parts, bytes] in the host's memory, by way of pinned memory."""
    if rows.device.type != "cuda":
        return rows.numpy()
    pinned = torch.empty(rows.shape, dtype=rows.dtype, pin_memory=True)
    return pinned.copy_(rows).numpy()


def _number(value: float, device: torch.device) -> Tensor:
    return torch.full((), value, dtype=torch.float32, device=device)


def _column(values: Sequence[float], device: torch.device) -> Tensor:
    """[parts, 1] in float32."""
    return torch.tensor(values, dtype=torch.float32).to(device)[:, None]


def _headers(scales: Sequence[float], device: torch.device) -> Tensor:
    raw = bytearray(b"".join(HEADER.pack(scale) for scale in scales))
    return torch.frombuffer(raw, dtype=torch.uint8).view(-1, HEADER.size).to(device)


def _scales(magnitudes: Tensor, levels: int) -> list[float]:
    """Each part's scale. Raises `ValueError` where a magnitude, [parts, part values], isn't finite."""
    largest = [finite(value) for value in magnitudes.amax(dim=1).tolist()]
    return [2.0 ** scale_exponent(value / levels) for value in largest]


def _to_halves(multiples: Tensor, scales: Sequence[float], factor: int) -> Tensor:
    """[parts, groups] in half precision; see `peer.codec.scales.to_halves`."""
    limits = [float(largest_half(scale, factor)) for scale in scales]
    return torch.minimum(multiples, _column(limits, multiples.device)).to(torch.float16)


def _bytes(values: Tensor) -> Tensor:
    """[parts, n] as [parts, bytes]."""
    return values.contiguous().view(torch.uint8)


def _checked_halves(raw: Tensor, scales: Sequence[float], factor: int) -> Tensor | None:
    """[parts, groups] in float32, times the part's scale; None where one isn't allowed."""
    halves = raw.contiguous().view(torch.float16)
    bits = halves.view(torch.int16)
    if bool(((bits < 0) | (bits >= INFINITE_HALF)).any()):
        return None
    largest = halves.amax(dim=1).tolist()
    if any(half * scale * factor > LARGEST_FLOAT for half, scale in zip(largest, scales, strict=True)):
        return None
    return halves.float() * _column(scales, raw.device)


# --- dense ------------------------------------------------------------------------------------------------------------------


def _encode_grouped(codec: Grouped, values: Tensor) -> tuple[Tensor, Tensor]:
    count, device = values.shape[0], values.device
    magnitudes = values.abs()
    scales = _scales(magnitudes, codec.levels)
    groups = values.view(count, -1, codec.group)
    unit = _column([1 / scale for scale in scales], device)
    fitting = _fitting_scales(codec, magnitudes.view(count, -1, codec.group), unit)
    halves = _to_halves(fitting, scales, codec.levels)
    factors = (halves.float() * _column(scales, device))[..., None]
    divisors = torch.where(factors == 0, torch.inf, factors)
    quotients = torch.div(groups, divisors).round_().clamp_(-codec.levels, codec.levels)
    integers = quotients.to(torch.int8).view(count, -1)
    rows = torch.cat((_headers(scales, device), _bytes(halves), _pack(codec, integers)), dim=1)
    return rows, quotients.mul_(factors).view(count, -1).add_(0.0)


def _fitting_scales(codec: Grouped, magnitudes: Tensor, unit: Tensor) -> Tensor:
    """[parts, groups], of magnitudes [parts, groups, group]."""
    device = magnitudes.device
    if not isinstance(codec, Int2):
        return torch.div(magnitudes.amax(dim=2) * unit, _number(codec.levels, device))
    ranked = torch.sort(magnitudes * unit[..., None], dim=2, descending=True).values
    total = ranked[..., 0].clone()
    scales, best = total.clone(), total * total
    for place in range(1, codec.group):
        total.add_(ranked[..., place])
        mean = torch.div(total, _number(place + 1, device))
        gain = mean * total
        scales = torch.where(gain > best, mean, scales)
        best = torch.maximum(best, gain)
    return scales


def _pack(codec: Grouped, integers: Tensor) -> Tensor:
    """[parts, bytes] of integers [parts, part values]."""
    if isinstance(codec, Int4):
        nibbles = (integers & 0x0F).view(torch.uint8)
        return nibbles[:, 0::2] | (nibbles[:, 1::2] << 4)
    if not isinstance(codec, Int2):
        return integers.view(torch.uint8)
    count, values = integers.shape
    rows = integers.new_zeros((count, TRITS * codec.packed_bytes(values)), dtype=torch.uint8)
    rows[:, :values] = torch.where(integers < 0, 2, integers).to(torch.uint8)
    digits = rows.view(count, TRITS, -1)
    packed = digits[:, TRITS - 1].clone()
    for row in range(TRITS - 2, -1, -1):
        packed = packed * 3 + digits[:, row]
    return packed


def _unpack(codec: Grouped, packed: Tensor) -> Tensor:
    """[parts, part values and padding] in int8, of [parts, bytes]."""
    count = packed.shape[0]
    if isinstance(codec, Int4):
        nibbles = torch.stack((packed & 0x0F, packed >> 4), dim=2).view(count, -1).view(torch.int8)
        return (nibbles ^ 8) - 8
    if not isinstance(codec, Int2):
        return packed.contiguous().view(torch.int8)
    digits, rest = [], packed
    for _ in range(TRITS - 1):
        quotient = rest // 3
        digits.append(rest - quotient * 3)
        rest = quotient
    trits = torch.cat([*digits, rest], dim=1).to(torch.int8)
    return torch.where(trits == 2, -1, trits)


def _decode_grouped(codec: Grouped, rows: Tensor, scales: Sequence[float]) -> Tensor | None:
    count, size = rows.shape[0], codec.part_values
    header = HALF.itemsize * (size // codec.group)
    factors = _checked_halves(rows[:, :header], scales, codec.levels)
    integers = _unpack(codec, rows[:, header:])
    if factors is None or bool((integers.abs() > codec.levels).any() | (integers == -128).any() | integers[:, size:].any()):
        return None
    groups = integers[:, :size].reshape(count, -1, codec.group)
    if bool(((factors == 0) & groups.any(dim=2)).any()):
        return None
    return (groups.float() * factors[..., None]).view(count, size)


# --- sparse -----------------------------------------------------------------------------------------------------------------


def _encode_sparse(codec: Sparse, values: Tensor) -> tuple[Tensor, Tensor]:
    count, device = values.shape[0], values.device
    section = _section(codec)
    magnitudes = values.abs()
    scales = _scales(magnitudes, 1)
    indices = _strongest(magnitudes.view(-1, CHUNK_VALUES), section.kept)
    kept = magnitudes.view(-1, CHUNK_VALUES).gather(1, indices).view(count, -1) * _column([1 / scale for scale in scales], device)
    levels = _levels(kept.view(-1, section.kept))
    halves = _to_halves(levels.view(count, -1), scales, 1)
    both = halves.float().view(-1, 2)
    is_upper = kept.view(-1, section.kept) > (both[:, :1] + both[:, 1:]) * _number(0.5, device)
    is_negative = values.view(-1, CHUNK_VALUES).gather(1, indices) < 0
    pairs = torch.stack((is_upper, is_negative), dim=2)
    low = indices[..., None] >> torch.arange(section.low_bits, device=device) & 1
    high = torch.zeros((len(indices), section.high_width), dtype=torch.uint8, device=device)
    high.scatter_(1, (indices >> section.low_bits) + torch.arange(section.kept, device=device), 1)
    tables = [_packed(table.reshape(count, -1)) for table in (pairs, low, high)]
    rows = torch.cat((_headers(scales, device), _bytes(halves), *tables), dim=1)
    factors = (halves.float() * _column(scales, device)).view(-1, 2)
    return rows, _placed(indices, _signed(factors, is_upper, is_negative)).view(count, -1)


def _decode_sparse(codec: Sparse, rows: Tensor, scales: Sequence[float]) -> Tensor | None:
    count, device = rows.shape[0], rows.device
    section = _section(codec)
    ends = list(itertools.accumulate(section.table_bytes))
    raw, *packed = (rows[:, end - size : end] for size, end in zip(section.table_bytes, ends, strict=True))
    factors = _checked_halves(raw, scales, 1)
    chunks = count * section.chunks
    bits = (section.kept * VALUE_BITS, section.kept * section.low_bits, section.high_width)
    unpacked = [_unpacked(table, section.chunks * width) for table, width in zip(packed, bits, strict=True)]
    tables = [table for table in unpacked if table is not None]
    if factors is None or len(tables) < len(unpacked):
        return None
    factors = factors.view(chunks, 2)
    pairs, low, high = (table.reshape(chunks, -1) for table in tables)
    if bool((factors[:, 0] > factors[:, 1]).any()) or bool((high.sum(dim=1, dtype=torch.int32) != section.kept).any()):
        return None
    columns = high.nonzero()[:, 1].view(chunks, section.kept)
    rests = columns - torch.arange(section.kept, device=device)
    powers = 1 << torch.arange(section.low_bits, device=device)
    indices = (rests << section.low_bits) + (low.view(chunks, section.kept, -1) * powers).sum(dim=2)
    if bool((indices[:, -1] >= CHUNK_VALUES).any()) or bool((indices[:, 1:] <= indices[:, :-1]).any()):
        return None
    chosen = pairs.view(chunks, section.kept, VALUE_BITS).bool()
    return _placed(indices, _signed(factors, chosen[..., 0], chosen[..., 1])).view(count, -1)


def _without_zeros(codec: Sparse, values: Tensor, rows: NDArray[np.uint8]) -> list[bytes]:
    """The bytes of parts, [parts, part values], whose zeros are left out; `rows` are what all chunks of each take.

    Experts are large: of most parts all chunks travel, or none. The others are left to the plain codec.
    """
    is_whole = (values.view(len(rows), -1, CHUNK_VALUES) != 0).any(dim=2).all(dim=1).tolist()
    bits, parts = _all_travel(codec), list[bytes]()
    for place, row in enumerate(rows):
        if is_whole[place]:
            parts.append(row[: HEADER.size].tobytes() + bits + row[HEADER.size :].tobytes())
        else:
            parts.append(codec.encode_part(values[place].cpu().numpy(), 0))
    return parts


def _decode_without_zeros(codec: Sparse, parts: Sequence[bytes], device: torch.device) -> Tensor:
    bits = _all_travel(codec)
    end = HEADER.size + len(bits)
    if all(part[HEADER.size : end] == bits for part in parts):
        return decode_parts(replace(codec, leave_out_zeros=False), [part[: HEADER.size] + part[end:] for part in parts], device)
    decoded = [codec.decode_part(part, index) for index, part in enumerate(parts)]
    return torch.from_numpy(np.stack(decoded)).to(device)


def _all_travel(codec: Sparse) -> bytes:
    """The bits of a whole part that has no chunk of zeros."""
    chunks = codec.part_values // CHUNK_VALUES
    return np.packbits(np.ones(chunks, dtype=np.uint8), bitorder="little").tobytes()


def _section(codec: Sparse) -> Section:
    """That of a whole part, which has whole chunks only."""
    return Section(0, codec.part_values // CHUNK_VALUES, CHUNK_VALUES, codec.top_k)


def _strongest(magnitudes: Tensor, kept: int) -> Tensor:
    """Ascending indices of the `kept` largest magnitudes of each chunk, [chunks, kept]; of equal ones the lowest indices."""
    places = torch.arange(CHUNK_VALUES - 1, -1, -1, device=magnitudes.device)
    keys = (magnitudes.view(torch.int32).long() << INDEX_BITS) + places  # positive floats are ordered as their bits
    top = torch.topk(keys, kept, dim=1, sorted=False).values
    return torch.sort((CHUNK_VALUES - 1) - (top & (CHUNK_VALUES - 1)), dim=1).values


def _levels(kept: Tensor) -> Tensor:
    """The lower and the upper level of each chunk, [chunks, 2], for magnitudes [chunks, kept]."""
    by_value = kept.T.contiguous()
    lower = upper = threshold = _mean(by_value, torch.ones_like(by_value, dtype=torch.bool))
    for _ in range(LLOYD_STEPS):
        above = by_value > threshold
        lower, upper = _mean(by_value, ~above), _mean(by_value, above)
        threshold = (lower + upper) * _number(0.5, kept.device)
    return torch.stack((lower, torch.maximum(lower, upper)), dim=1)


def _mean(by_value: Tensor, chosen: Tensor) -> Tensor:
    """The mean of the chosen values of each column of [kept, chunks], zero where there are none; added by halving."""
    rows = by_value * chosen
    count = rows.shape[0]
    while count > 1:
        half = 1 << (count - 1).bit_length() - 1
        rows[: count - half] += rows[half:count]
        count = half
    return torch.div(rows[0], chosen.sum(dim=0).clamp_(min=1).float())


def _signed(factors: Tensor, is_upper: Tensor, is_negative: Tensor) -> Tensor:
    values = torch.where(is_upper, factors[:, 1:], factors[:, :1])
    return torch.where(is_negative, -values, values)


def _placed(indices: Tensor, values: Tensor) -> Tensor:
    """[chunks, 4096], zero where nothing travels."""
    return values.new_zeros((len(indices), CHUNK_VALUES)).scatter_(1, indices, values)


def _packed(bits: Tensor) -> Tensor:
    """[parts, bytes] of bits [parts, n], the first the least significant."""
    count, width = bits.shape
    whole = torch.zeros((count, -(-width // 8) * 8), dtype=torch.uint8, device=bits.device)
    whole[:, :width] = bits
    octets = whole.view(count, -1, 8)
    packed = octets[..., 0].clone()
    for place in range(1, 8):
        packed |= octets[..., place] << place
    return packed


def _unpacked(packed: Tensor, width: int) -> Tensor | None:
    """Bits, [parts, width], of [parts, bytes]; None where the padding isn't zero."""
    places = torch.arange(8, dtype=torch.uint8, device=packed.device)
    bits = ((packed[..., None] >> places) & 1).reshape(packed.shape[0], -1)
    return None if bool(bits[:, width:].any()) else bits[:, :width]
