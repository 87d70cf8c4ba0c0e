"""The optimizer, and the learning rate as a function of the step: there is no scheduler whose state must be kept."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch

from anchored.train.settings import OptimizerSettings
from anchored.train.sharding import whole


def build_optimizer(parameters: Iterable[torch.nn.Parameter], settings: OptimizerSettings) -> torch.optim.Optimizer:
    """PyTorch's own, with its own defaults for all that shapes the result and is no setting.

    Only matrices decay: norms and biases, which are vectors, stay as they are, as in transformers' trainers.
    """
    parameters = list(parameters)
    matrices = [parameter for parameter in parameters if parameter.dim() > 1]
    vectors = [parameter for parameter in parameters if parameter.dim() <= 1]
    decays = ((matrices, settings.weight_decay), (vectors, 0.0))
    groups = [{"params": group, "weight_decay": decay} for group, decay in decays if group]
    if settings.name == "rmsprop":
        # one parameter at a time: all at once need room for as many numbers again
        return torch.optim.RMSprop(groups, lr=settings.lr, foreach=False)
    fused = all(parameter.is_cuda for parameter in parameters) or None
    return torch.optim.AdamW(groups, lr=settings.lr, fused=fused)


def learning_rate(settings: OptimizerSettings, step: int, steps: int) -> float:
    """The rate of the step that follows `step` finished ones, of `steps` in all."""
    if step < settings.warmup_steps:
        return settings.lr * (step + 1) / (settings.warmup_steps + 1)
    left = (steps - step) / (steps - settings.warmup_steps)
    if settings.schedule == "linear":
        return settings.lr * left
    if settings.schedule == "cosine":
        return settings.lr * 0.5 * (1 - math.cos(math.pi * left))
    return settings.lr


def clip_gradients(parameters: Iterable[torch.nn.Parameter], max_norm: float | None) -> torch.Tensor:
    """Scale the gradients down to `max_norm` if they exceed it; returns their norm before, still on the device."""
    parameters = list(parameters)
    norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
    norm = whole(norm)
    if max_norm is not None:
        torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm
