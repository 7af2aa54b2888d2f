"""Low-rank adapters on a frozen model (LoRA, Hu et al., 2106.09685): peft's own layers, so that anybody loads what comes out."""

from __future__ import annotations

import warnings
from typing import Any

import torch

from swarm import manifest
from swarm.errors import DataInvalid

FIRST = ".lora_A."
HINT = "name linear layers by the end of their names, such as q_proj and v_proj"


def adapted(network: Any, adapter: manifest.Lora, name: str = "") -> Any:
    """`network` frozen, with an adapter in every layer that `adapter.targets` name; `name` is what its export calls the model.

    Raises `DataInvalid` for a target that matches no layer, or one that can't be adapted.
    """
    from peft import LoraConfig, get_peft_model  # noqa: PLC0415 - takes as long to import as everything else, and few runs need it

    _check_targets(network, adapter.targets)
    settings = LoraConfig(
        r=adapter.rank,
        lora_alpha=adapter.alpha,
        target_modules=list(adapter.targets),
        lora_dropout=0.0,
        bias="none",
        task_type="CAUSAL_LM",
    )
    network.name_or_path = name  # what peft writes into the export
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)  # peft still asks by that name
        return get_peft_model(network, settings)


def is_first(name: str) -> bool:
    """Whether a parameter is drawn at random when an adapter is made; the others begin at zero."""
    return FIRST in name


def deviation(first: torch.Tensor) -> float:
    """The standard deviation that peft draws with for a first matrix, [rank, inputs]: uniform, 1 / sqrt(3 inputs)."""
    return float(f"{(3 * first.shape[1]) ** -0.5:.1e}")


def _check_targets(network: Any, targets: tuple[str, ...]) -> None:
    modules = dict(network.named_modules())
    for target in targets:
        found = [module for name, module in modules.items() if name == target or name.endswith(f".{target}")]
        if not found:
            raise DataInvalid(f"model.adapter.targets: no layer is called {target}", HINT)
        if not all(isinstance(module, torch.nn.Linear) for module in found):
            raise DataInvalid(f"model.adapter.targets: {target} is no linear layer", HINT)
