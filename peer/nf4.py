"""Linear layers whose frozen weights are held in 4 bits: NormalFloat (QLoRA, Dettmers et al., 2305.14314, appendix E).

A weight is one of 16 values times the largest magnitude of its block of 64, row by row. Two weights share a byte, the first in
its upper half; that is the layout of bitsandbytes' `nf4` without double quantisation. Products are computed in the precision of
what comes in, from weights that are there for one product only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from swarm.errors import DataInvalid

BLOCK_VALUES = 64
CODE = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
BYTES_PER_WEIGHT = 0.5 + 4 / BLOCK_VALUES
HINT = "leave the base as it is: train the adapter without 4 bits"


class Nf4Linear(nn.Linear):
    """A linear layer with frozen weights in 4 bits; zero until `packed` and `largest` are filled in."""

    packed: torch.Tensor  # [outputs x inputs / 2] uint8
    largest: torch.Tensor  # [outputs x inputs / 64] float32

    def __init__(self, like: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.bias = like.in_features, like.out_features, like.bias
        count = like.weight.numel()
        for name, size, dtype in (("packed", count // 2, torch.uint8), ("largest", count // BLOCK_VALUES, torch.float32)):
            self.register_buffer(name, torch.zeros(size, dtype=dtype), persistent=False)

    @property
    def weight(self) -> torch.Tensor:  # type: ignore[override]  # a plain layer's is a parameter
        """The weights in float32, [outputs, inputs], made anew at every call."""
        return unpacked(self.packed, self.largest, torch.float32).view(self.out_features, self.in_features)

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """As of a plain layer, [..., outputs]."""
        device = values.device.type
        if torch.is_autocast_enabled(device):
            values = values.to(torch.get_autocast_dtype(device))
        product = _product(values, self.packed, self.largest, self.out_features)
        return product if self.bias is None else product + self.bias.to(product.dtype)

    def plain(self) -> nn.Linear:
        """The layer with its weights written out in float32."""
        layer = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        layer.weight = nn.Parameter(self.weight, requires_grad=False)
        layer.bias = self.bias
        return layer


class _Product(torch.autograd.Function):
    """`values` times weights that are unpacked for it, and again for its gradient, which only `values` have."""

    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, packed: torch.Tensor, largest: torch.Tensor, outputs: int) -> torch.Tensor:
        ctx.save_for_backward(packed, largest)
        ctx.outputs = outputs
        return functional.linear(values, unpacked(packed, largest, values.dtype).view(outputs, -1))

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        packed, largest = ctx.saved_tensors
        gradient = gradients[0]
        return gradient @ unpacked(packed, largest, gradient.dtype).view(ctx.outputs, -1), None, None, None


def _product(*arguments: Any) -> torch.Tensor:
    apply: Callable[..., torch.Tensor] = _Product.apply
    return apply(*arguments)


def packed_weights(weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The nearest values in 4 bits, [weights / 2] uint8, and the largest magnitude of each block, [weights / 64] float32."""
    blocks = weights.float().reshape(-1, BLOCK_VALUES)
    largest = blocks.abs().amax(dim=1)
    multiples = blocks / largest.masked_fill(largest == 0, 1.0)[:, None]
    code = torch.tensor(CODE)
    nearest = torch.bucketize(multiples.flatten(), (code[1:] + code[:-1]) / 2, out_int32=True)
    return (nearest[0::2] << 4 | nearest[1::2]).to(torch.uint8), largest


def unpacked(packed: torch.Tensor, largest: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What `packed_weights` stand for, [blocks, 64]: one float32 product each, then rounded to `dtype`."""
    pairs = _pairs(packed.device).index_select(0, packed.int())
    return (pairs.view(-1, BLOCK_VALUES) * largest[:, None]).to(dtype)


@lru_cache(maxsize=64)
def _pairs(device: torch.device) -> torch.Tensor:
    """The two values that each byte stands for, [256, 2]."""
    code, byte = torch.tensor(CODE), torch.arange(256)
    return torch.stack((code[byte >> 4], code[byte & 15]), dim=1).to(device)


def layers_of(network: Any) -> dict[str, nn.Linear]:
    """The layers whose weights are held in 4 bits: linear ones but the output head, by their names.

    Raises `DataInvalid` where there are none, and for one that isn't whole blocks.
    """
    head = network.get_output_embeddings()
    found = {name: item for name, item in network.named_modules() if isinstance(item, nn.Linear) and item is not head}
    if not found:
        raise DataInvalid(f"a {network.config.model_type} model has no linear layers to hold in 4 bits", HINT)
    for name, layer in found.items():
        if math.prod(layer.weight.shape) % BLOCK_VALUES:
            shape = f"{layer.out_features} x {layer.in_features}"
            raise DataInvalid(f"{name} has {shape} weights, which are no whole blocks of {BLOCK_VALUES}: no 4 bits for it", HINT)
    return found


def pack_layers(network: Any) -> None:
    """Put layers in 4 bits, still zero, in the place of `layers_of` the network. Raises what that raises."""
    for name, layer in layers_of(network).items():
        network.set_submodule(name, Nf4Linear(layer))


def unpack_layers(network: nn.Module) -> None:
    """Put plain layers with the same weights in the place of those in 4 bits."""
    for name, layer in list(packed_layers(network)):
        network.set_submodule(name, layer.plain())


def packed_layers(network: nn.Module) -> Iterator[tuple[str, Nf4Linear]]:
    """The layers in 4 bits, by their names."""
    return ((name, item) for name, item in network.named_modules() if isinstance(item, Nf4Linear))
