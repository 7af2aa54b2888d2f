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
from swarm.errors import DataInvalid
from swarm.manifest import Base, Tree

FILE = "base.yaml"
STORED = frozenset({"F32", "F16", "BF16"})


class Pretrained(BaseModel):
    """What `swarm run base` leaves for `swarm run init`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    config: dict[str, Any]
    base: Base
    tokenizer: Tree


def read_weights(network: torch.nn.Module, path: Path) -> None:
    """Copy a base's weights into a network of its architecture. Raises `DataInvalid` for whatever doesn't fit."""
    parameters = dict(network.named_parameters())
    try:
        with safe_open(path, framework="pt") as file:
            _check_names(set(file.keys()), set(parameters))
            for name, parameter in parameters.items():
                stored = file.get_slice(name)
                if stored.get_dtype() not in STORED or tuple(stored.get_shape()) != tuple(parameter.shape):
                    shape = tuple(stored.get_shape())
                    raise DataInvalid(f"the base's {name} is {stored.get_dtype()} {shape} and not {tuple(parameter.shape)}")
                value = file.get_tensor(name)
                if not bool(torch.isfinite(value).all()):
                    raise DataInvalid(f"the base's {name} has values that are not finite")
                with torch.no_grad():
                    parameter.copy_(value)
    except (OSError, SafetensorError) as error:
        raise DataInvalid(f"the base {path} can't be read: {error}", "delete it; it will be fetched again") from error


def read_pretrained(folder: Path) -> Pretrained:
    """What `import_pretrained` has left in a folder. Raises `DataInvalid`."""
    return described(Pretrained, folder / FILE, f"make it with: swarm run base MODEL --to {folder}", "import the model anew")


def _check_names(found: set[str], wanted: set[str]) -> None:
    if found == wanted:
        return
    missing, unknown = sorted(wanted - found), sorted(found - wanted)
    problem = f"lacks {missing[0]}" if missing else f"has {unknown[0]}, which the model hasn't"
    raise DataInvalid(f"the base doesn't fit the model: it {problem}", "model.config and model.base must be of one model")
