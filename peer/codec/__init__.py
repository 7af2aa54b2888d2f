"""How an update travels: parts of a fixed number of values, each encoded by itself.

A codec is a pure function of one part's values. What a lossy codec loses is kept outside of it, by whoever sends
(`peer.codec.feedback`). Everything downstream works on decoded values.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from peer.codec.fp16 import Fp16
from peer.codec.int2 import Int2
from peer.codec.int4 import Int4
from peer.codec.int8 import Int8
from peer.codec.sparse import Sparse
from swarm import manifest
from swarm.errors import Rejected

Vector = NDArray[np.float32]
Topology = Literal["butterfly", "all_gather"]


class Codec(Protocol):
    """Turns a vector of `values` float32 into parts and back."""

    @property
    def kind(self) -> str:
        """The name in the manifest."""

    @property
    def topology(self) -> Topology:
        """`butterfly`: reducers merge spans of parts; `all_gather`: everybody pulls everybody's parts."""

    @property
    def values(self) -> int:
        """Length of the whole vector."""

    @property
    def part_values(self) -> int:
        """Values per part; the last part may have fewer."""

    @property
    def part_count(self) -> int:
        """Number of parts."""

    def part_span(self, index: int) -> tuple[int, int]:
        """First value of part `index` and the one after its last."""

    def part_size_limit(self, index: int) -> int:
        """The most bytes that part `index` can have."""

    def encode_part(self, values: Vector, index: int) -> bytes:
        """The bytes of part `index` with these values. Raises `ValueError` where they are not finite."""

    def decode_part(self, data: bytes | bytearray | memoryview, index: int) -> Vector:
        """The values of part `index`. Raises `Rejected("bad_part")` for a wrong length or values that are not finite."""


def make_codec(codec: manifest.Codec, parameters: int) -> Codec:
    """The codec that the manifest names, for vectors of `parameters` values."""
    match codec.kind:
        case "fp16":
            return Fp16(parameters, codec.part_values)
        case "int8":
            return Int8(parameters, codec.part_values)
        case "int4":
            return Int4(parameters, codec.part_values)
        case "int2":
            return Int2(parameters, codec.part_values)
        case "sparse":
            return Sparse(parameters, codec.part_values, codec.density_top_k, codec.leave_out_zeros)


@dataclass(frozen=True)
class Codecs:
    """The codec of each round of a run."""

    manifest: manifest.Manifest

    def at(self, round_index: int) -> Codec:
        """What the manifest says for a round."""
        return make_codec(self.manifest.phase(round_index).codec, self.manifest.model.parameters)


def encode(codec: Codec, vector: Vector) -> list[bytes]:
    """All parts of `vector`, [values]. Raises `ValueError` where a value is not finite."""
    if vector.shape != (codec.values,):
        raise ValueError(f"a vector of shape {vector.shape} is not one of {codec.values} values")
    return [codec.encode_part(vector[slice(*codec.part_span(index))], index) for index in range(codec.part_count)]


def decode(codec: Codec, parts: Sequence[bytes | bytearray | memoryview]) -> Vector:
    """The vector, [values], behind all its parts. Raises `Rejected("bad_part")`."""
    if len(parts) != codec.part_count:
        raise Rejected("bad_part", f"{len(parts)} parts instead of {codec.part_count}")
    out = np.empty(codec.values, dtype=np.float32)
    for index, part in enumerate(parts):
        out[slice(*codec.part_span(index))] = codec.decode_part(part, index)
    return out
