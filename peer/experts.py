"""Mixtures of experts: the loss that keeps their load even (Switch Transformer, 2101.03961, section 2.2).

It is taken for each sample by itself and not for a micro-batch, as transformers does: so it doesn't depend on how many fit
on a device, and others can compute it again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional

COEFFICIENT = "router_aux_loss_coef"


def balance_coefficient(settings: Any) -> float:
    """What the balance loss is multiplied with by a model of this configuration; 0 where it has none."""
    return float(getattr(settings, COEFFICIENT, None) or 0.0)


def is_routed(settings: Any) -> bool:
    """Whether a model of this configuration has a balance loss, perhaps with a coefficient of 0, and so tells its routes."""
    return getattr(settings, COEFFICIENT, None) is not None


def routes_of(router_logits: Sequence[torch.Tensor], samples: int, chosen: int) -> tuple[torch.Tensor, torch.Tensor]:
    """How unevenly each sample is spread over the experts, [samples], and the visits of all samples, [layers, experts].

    The first is `chosen` where a sample is spread evenly, more where not: the number of experts times the sum over them of the
    share of visits and the mean probability; over all layers together. `router_logits` are [samples x tokens, experts] for each
    layer that has experts; `chosen` is how many a token visits.
    """
    layers = torch.stack([logits.float().view(samples, -1, logits.shape[-1]) for logits in router_logits], dim=1)
    experts = layers.shape[-1]
    probabilities = functional.softmax(layers, dim=-1).flatten(1, 2)  # [samples, layers x tokens, experts]
    visits = functional.one_hot(probabilities.topk(chosen, dim=-1).indices, experts).float().sum(dim=2)
    losses = experts * (visits.mean(dim=1) * probabilities.mean(dim=1)).sum(dim=-1)
    return losses, visits.view(samples, layers.shape[1], -1, experts).sum(dim=(0, 2))
