"""The inner optimizers and the learning rate schedule."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from swarm import manifest

SIGNIFICANT_DIGITS = 6


def lr_factor(schedule: manifest.Schedule, tokens: int) -> float:
    """What the learning rate is multiplied with after `tokens` tokens: linear warm-up, then a cosine to the final fraction.

    Rounded to six significant digits, so that it is equal on machines whose cosines differ in the last bit.
    """
    if tokens < schedule.warmup_tokens:
        return _rounded(tokens / schedule.warmup_tokens)
    length = max(1, schedule.total_tokens - schedule.warmup_tokens)
    progress = min(1.0, (tokens - schedule.warmup_tokens) / length)
    cosine = (1 + math.cos(math.pi * progress)) / 2
    return _rounded(schedule.final_fraction + (1 - schedule.final_fraction) * cosine)


def _rounded(value: float) -> float:
    return float(f"{value:.{SIGNIFICANT_DIGITS}g}")


def hidden_matrices(network: Any) -> list[nn.Parameter]:
    """The two-dimensional weights of hidden layers: neither embeddings nor the output head."""
    outside = {id(module.weight) for module in network.modules() if isinstance(module, nn.Embedding)}
    head = network.get_output_embeddings()
    if head is not None:
        outside.add(id(head.weight))
    return [parameter for parameter in _trained(network) if parameter.ndim == 2 and id(parameter) not in outside]


def make_inner(inner: manifest.AdamW | manifest.Muon, network: Any) -> InnerOptimizer:
    """The manifest's inner optimizer over the trained parameters of `network`."""
    match inner:
        case manifest.AdamW():
            return InnerOptimizer([_adamw(inner, _trained(network))])
        case manifest.Muon():
            matrices = hidden_matrices(network)
            chosen = {id(parameter) for parameter in matrices}
            others = [parameter for parameter in _trained(network) if id(parameter) not in chosen]
            parts: list[torch.optim.Optimizer] = [_muon(inner, matrices)] if matrices else []
            return InnerOptimizer([*parts, *([_adamw(inner.adamw, others)] if others else [])])


def _trained(network: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in network.parameters() if parameter.requires_grad]


def _adamw(settings: manifest.AdamW, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(
        parameters,
        lr=settings.lr,
        betas=(settings.beta1, settings.beta2),
        eps=settings.epsilon,
        weight_decay=settings.weight_decay,
    )


def _muon(settings: manifest.Muon, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """Muon whose update is multiplied with 0.2 sqrt(larger side), so that its size is like AdamW's (Liu et al., 2502.16982)."""
    kind = MuonOnProcessor if parameters[0].device.type == "cpu" else torch.optim.Muon
    return kind(
        parameters,
        lr=settings.lr,
        momentum=settings.momentum,
        weight_decay=settings.weight_decay,
        adjust_lr_fn="match_rms_adamw",
    )


class MuonOnProcessor(torch.optim.Muon):
    """torch's Muon, which orthogonalises in fp32 instead of bf16.

    Processors without bf16 take 16 to 43 times as long for it as for fp32. An update differs by about 1 % from that of a GPU; its
    size is that of `match_rms_adamw`.
    """

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # torch declares overloads
        """A step on the gradients that are there; a `closure` is not called."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(parameter.grad)
                momentum, rate = state["momentum_buffer"], group["lr"]
                momentum.lerp_(parameter.grad, 1 - group["momentum"])
                update = parameter.grad.lerp(momentum, group["momentum"]) if group["nesterov"] else momentum
                update = orthogonalised(update, group["ns_coefficients"], group["ns_steps"], group["eps"])
                parameter.mul_(1 - rate * group["weight_decay"])
                parameter.add_(update, alpha=-rate * 0.2 * math.sqrt(max(parameter.shape)))


def orthogonalised(matrix: torch.Tensor, coefficients: tuple[float, float, float], steps: int, epsilon: float) -> torch.Tensor:
    """Newton-Schulz iterations in the matrix's own precision, as Muon's authors do them (Jordan et al., 2024)."""
    first, second, third = coefficients
    wide = matrix.T if matrix.size(0) > matrix.size(1) else matrix
    wide = wide / wide.norm().clamp(min=epsilon)
    for _ in range(steps):
        gram = wide @ wide.T
        wide = torch.addmm(wide, torch.addmm(gram, gram, gram, beta=second, alpha=third), wide, beta=first)
    return wide.T if matrix.size(0) > matrix.size(1) else wide


class InnerOptimizer:
    """One or two torch optimizers that step together, with one factor on their learning rates."""

    def __init__(self, parts: Sequence[torch.optim.Optimizer]) -> None:
        self.parts = tuple(parts)
        self._rates = [[float(group["lr"]) for group in part.param_groups] for part in self.parts]

    def set_factor(self, factor: float) -> None:
        """Multiply the manifest's learning rates with `factor`."""
        for part, rates in zip(self.parts, self._rates, strict=True):
            for group, rate in zip(part.param_groups, rates, strict=True):
                group["lr"] = rate * factor

    def zero_grad(self) -> None:
        """Drop the gradients."""
        for part in self.parts:
            part.zero_grad(set_to_none=True)

    def state(self) -> list[dict[str, Any]]:
        """A copy of the state on the host."""
        return [_to_host(part.state_dict()) for part in self.parts]

    def load_state(self, state: Sequence[dict[str, Any]]) -> None:
        """Take over a state that `state` gave."""
        for part, values in zip(self.parts, state, strict=True):
            part.load_state_dict(values)


def _to_host(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: _to_host(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_to_host(item) for item in value]
    return value
