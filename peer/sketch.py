"""Small linear sketches of vectors as long as the model: what a peer shows of its gradients so that others can check them.

The sketch of x, [parameters], is [BLOCKS, WIDTH]: x is cut into BLOCKS equal stretches, and in each of them every value is added,
with a random sign, to one of WIDTH sums (a count sketch; Charikar, Chen and Farach-Colton, 2002). It is linear, so that sketches
of gradients add up to the sketch of their sum, and its squared norm is that of x in expectation. Signs follow from the state that
a round starts from: before that nobody can compute anything for them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

BLOCKS, WIDTH, ROW = 8, 32, 4096
SKETCH_BYTES = 4 * BLOCKS * WIDTH

Values = NDArray[np.float32]


def sketch_seed(run_id: bytes, round_number: int, base_root: bytes) -> bytes:
    """32 bytes that nobody knows before the round's base state."""
    message = run_id + round_number.to_bytes(8, "big") + base_root
    return hashlib.blake2b(message, digest_size=32, person=b"swarm.sketch").digest()


@dataclass
class Sketcher:
    """Sketches of vectors of `size` values. The sign of value i is that of its row i // ROW times that of its column i % ROW."""

    seed: bytes
    size: int
    _signs: dict[torch.device, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)

    @classmethod
    def of_round(cls, run_id: bytes, round_number: int, base_root: bytes, size: int) -> Sketcher:
        """That of everybody who starts this round from this state."""
        return cls(sketch_seed(run_id, round_number, base_root), size)

    @property
    def rows(self) -> int:
        """Into how many rows a vector is cut; the last may be shorter."""
        return -(-self.size // ROW)

    def span(self, block: int) -> tuple[int, int]:
        """First value of a block and the one after its last; blocks are whole rows, and some of a short vector's are empty."""
        start, end = (min(row * ROW, self.size) for row in self._row_span(block))
        return start, end

    def _row_span(self, block: int) -> tuple[int, int]:
        return -(-block * self.rows // BLOCKS), -(-(block + 1) * self.rows // BLOCKS)

    def of_tensors(self, pieces: Iterable[tuple[int, torch.Tensor | None]]) -> torch.Tensor:
        """The sketch, [BLOCKS, WIDTH], of a vector that lies in pieces on one device, each with its first value's place."""
        sums: torch.Tensor | None = None
        columns = torch.empty(0)
        for offset, piece in pieces:
            if piece is None:
                continue
            rows, columns = self._on(piece.device)
            if sums is None:
                sums = torch.zeros((BLOCKS, ROW), dtype=torch.float32, device=piece.device)
            first, front = divmod(offset, ROW)
            count = -(-(front + piece.numel()) // ROW)
            flat = piece.detach().reshape(-1).float()
            padded = functional.pad(flat, (front, count * ROW - front - piece.numel())).view(count, ROW)
            sums.addmm_(rows[:, first : first + count], padded)
        if sums is None:
            return torch.zeros((BLOCKS, WIDTH))
        return (sums * columns).view(BLOCKS, ROW // WIDTH, WIDTH).sum(dim=1)

    def of_vector(self, vector: Values, start: int = 0) -> Values:
        """The sketch, [BLOCKS, WIDTH], of a vector that is `vector` from value `start` on, and zero elsewhere."""
        piece = torch.from_numpy(vector if vector.flags.writeable else vector.copy())
        found: Values = self.of_tensors([(start, piece)]).numpy()
        return found

    def _on(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Signs of rows, [BLOCKS, rows] and zero outside of a row's block, and of columns, [ROW]."""
        if device not in self._signs:
            bits = np.frombuffer(hashlib.shake_256(self.seed).digest((self.rows + ROW + 7) // 8), dtype=np.uint8)
            signs = np.unpackbits(bits)[: self.rows + ROW].astype(np.float32) * 2 - 1
            rows = np.zeros((BLOCKS, self.rows), dtype=np.float32)
            for block in range(BLOCKS):
                start, end = self._row_span(block)
                rows[block, start:end] = signs[start:end]
            tensors = torch.from_numpy(rows).to(device), torch.from_numpy(signs[self.rows :].copy()).to(device)
            self._signs[device] = tensors
        return self._signs[device]
