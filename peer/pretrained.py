"""A pretrained model that a run begins with, or adapts: one safetensors file under the names of transformers, and its tokenizer.

Whoever makes a run takes it from a hub, a directory or a GGUF file; peers get the file by its hash, like the data.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from safetensors import SafetensorError, safe_open

from peer.folders import described
from peer.nf4 import packed_layers
from swarm.errors import DataInvalid
from swarm.manifest import Base, Tree

FILE = "base.yaml"
STORED = frozenset({"F32", "F16", "BF16"})
PACKED, LARGEST = "weight", "weight.absmax"
"""What the two tensors of a layer in 4 bits are called after its name, as bitsandbytes calls them."""


class Pretrained(BaseModel):
    """What `swarm run base` leaves for `swarm run init`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    config: dict[str, Any]
    base: Base
    tokenizer: Tree


def read_weights(network: torch.nn.Module, path: Path) -> None:
    """Copy a base's weights into a network of its architecture, where it has layers in 4 bits as they are stored.

    Raises `DataInvalid` for whatever doesn't fit.
    """
    wanted = _wanted(network)
    try:
        with safe_open(path, framework="pt") as file:
            _check_names(set(file.keys()), set(wanted))
            for name, (tensor, types) in wanted.items():
                stored = file.get_slice(name)
                if stored.get_dtype() not in types or tuple(stored.get_shape()) != tuple(tensor.shape):
                    shape = tuple(stored.get_shape())
                    raise DataInvalid(f"the base's {name} is {stored.get_dtype()} {shape} and not {tuple(tensor.shape)}")
                value = file.get_tensor(name)
                if not bool(torch.isfinite(value).all()):
                    raise DataInvalid(f"the base's {name} has values that are not finite")
                with torch.no_grad():
                    tensor.copy_(value)
    except (OSError, SafetensorError) as error:
        raise DataInvalid(f"the base {path} can't be read: {error}", "delete it; it will be fetched again") from error


def _wanted(network: torch.nn.Module) -> dict[str, tuple[torch.Tensor, frozenset[str]]]:
    """Every tensor that the file must have, and the types that it may have there."""
    wanted = {name: (tensor.detach(), STORED) for name, tensor in network.named_parameters()}
    for name, layer in packed_layers(network):
        wanted[f"{name}.{PACKED}"] = (layer.packed, frozenset({"U8"}))
        wanted[f"{name}.{LARGEST}"] = (layer.largest, frozenset({"F32"}))
    return wanted


def read_pretrained(folder: Path) -> Pretrained:
    """What `import_pretrained` has left in a folder. Raises `DataInvalid`."""
    return described(Pretrained, folder / FILE, f"make it with: swarm run base MODEL --to {folder}", "import the model anew")


def _check_names(found: set[str], wanted: set[str]) -> None:
    if found == wanted:
        return
    missing, unknown = sorted(wanted - found), sorted(found - wanted)
    problem = f"lacks {missing[0]}" if missing else f"has {unknown[0]}, which the model hasn't"
    raise DataInvalid(f"the base doesn't fit the model: it {problem}", "model.config and model.base must be of one model")
