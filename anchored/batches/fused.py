"""Norms and feed-forward layers that keep less for the backward pass, with the values and gradients of the originals.

In: a loaded model. `fuse` puts its own modules in the place of those it knows by class, on this one model: parameters,
their names and the state dict stay, transformers' classes stay, and layers of unknown classes stay as they are. What
eager layers keep for each token (three copies of a norm's states, four of a feed-forward layer's) becomes one and two,
and the rest is computed again where it is needed, without another matrix product.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import silu
from transformers import PreTrainedModel

_NORMS = frozenset({"LlamaRMSNorm", "MistralRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm"})
_FEED_FORWARDS = frozenset({"LlamaMLP", "MistralMLP", "Qwen2MLP", "Qwen3MLP"})
"""Classes of transformers whose forward is that of `RMSNorm` and of `FeedForward`, word for word."""

_LARGE = 2**27
"""Multiplications from which oneDNN is worth its preparation of every new shape."""


def fuse(model: PreTrainedModel) -> int:
    """Replace what is known, in place; returns how many layers."""
    replaced = 0
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            fused = _fused(layer)
            if fused is not None:
                setattr(parent, name, fused.train(layer.training))
                replaced += 1
    return replaced


def product(x: Float[Tensor, "rows inner"], weight: Float[Tensor, "columns inner"]) -> Float[Tensor, "rows columns"]:
    """x @ weight.T. Large ones on CPU go to oneDNN: PyTorch's own choice is MKL, a tenth slower on AMD's processors."""
    large = x.shape[0] * weight.numel() >= _LARGE
    if large and x.is_cpu and x.dtype is weight.dtype is torch.float32 and torch.backends.mkldnn.is_available():
        return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    return x @ weight.T


class RMSNorm(nn.Module):
    """States over their root mean square, times a weight (Zhang and Sennrich 2019, arXiv 1910.07467, eq. 4)."""

    def __init__(self, weight: nn.Parameter, epsilon: float) -> None:
        super().__init__()
        self.weight = weight
        self.variance_epsilon = epsilon

    def forward(self, states: Float[Tensor, "*tokens width"]) -> Float[Tensor, "*tokens width"]:
        return _RMSNorm.apply(states, self.weight, self.variance_epsilon)


class FeedForward(nn.Module):
    """down(silu(gate x) * up x) (Shazeer 2020, arXiv 2002.05202, eq. 6)."""

    def __init__(self, gate: nn.Module, up: nn.Module, down: nn.Module) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = gate, up, down

    def forward(self, states: Float[Tensor, "*tokens width"]) -> Float[Tensor, "*tokens width"]:
        layers = self.gate_proj, self.up_proj, self.down_proj
        if all(map(_is_bare, layers)):
            rows = states.reshape(-1, states.shape[-1])
            return _FeedForward.apply(rows, *(layer.weight for layer in layers)).view(states.shape)
        # an adapter, or whatever else was put around a projection since
        return self.down_proj(silu(self.gate_proj(states)) * self.up_proj(states))


def _fused(layer: nn.Module) -> nn.Module | None:
    kind = type(layer)
    if not kind.__module__.startswith("transformers.models."):
        return None
    if kind.__name__ in _NORMS:
        assert isinstance(layer.weight, nn.Parameter)
        return RMSNorm(layer.weight, float(layer.variance_epsilon))  # type: ignore[arg-type]
    if kind.__name__ in _FEED_FORWARDS and _is_silu(layer.act_fn):
        return FeedForward(layer.gate_proj, layer.up_proj, layer.down_proj)  # type: ignore[arg-type]
    return None


def _is_silu(activation: object) -> bool:
    return type(activation).__name__ in ("SiLU", "SiLUActivation")


def _is_bare(layer: nn.Module) -> bool:
    """A linear layer and nothing else: no bias, no hook, no adapter."""
    hooks = layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks
    return type(layer) is nn.Linear and layer.bias is None and not hooks


class _RMSNorm(torch.autograd.Function):
    """Keeps the states as they came and one number per token. Computes in float32, as the originals do."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        exact = states.to(torch.float32)
        scale = exact.pow(2).mean(-1, keepdim=True).add_(epsilon).rsqrt_()
        ctx.save_for_backward(states, weight, scale)
        normed = (exact * scale).to(states.dtype)
        return normed.mul_(weight) if normed.dtype == weight.dtype else normed * weight

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        states, weight, scale = ctx.saved_tensors
        exact, out = grad.to(torch.float32), weight.to(torch.float32)
        normed = states.to(torch.float32) * scale
        both = (exact * normed).reshape(-1, weight.shape[0])
        grad_weight = both.sum(0).to(weight.dtype) if ctx.needs_input_grad[1] else None
        if not ctx.needs_input_grad[0]:
            return None, grad_weight, None
        # d out / d states = scale (weight - normed mean(weight normed)): the norm's own part takes out the mean
        mean = torch.mv(both, out).div_(weight.shape[0]).view_as(scale)
        grad_states = (exact * out).addcmul_(normed, mean, value=-1).mul_(scale)
        return grad_states.to(states.dtype), grad_weight, None


class _FeedForward(torch.autograd.Function):
    """Keeps its input and the outputs of gate and up; their product is made again in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Float[Tensor, "tokens width"],
        gate_weight: Float[Tensor, "inner width"],
        up_weight: Float[Tensor, "inner width"],
        down_weight: Float[Tensor, "width inner"],
    ) -> Float[Tensor, "tokens width"]:
        gate, up = product(x, gate_weight), product(x, up_weight)
        ctx.save_for_backward(x, gate, up, gate_weight, up_weight, down_weight)
        return product(silu(gate).mul_(up), down_weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Float[Tensor, "tokens width"]) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, gate, up, gate_weight, up_weight, down_weight = ctx.saved_tensors
        needs_x, needs_gate, needs_up, needs_down = ctx.needs_input_grad
        active = silu(gate)
        grad_down = grad.T @ (active * up) if needs_down else None
        grad_inner = product(grad, down_weight.T)
        grad_up = active.mul_(grad_inner)
        grad_gate = torch.ops.aten.silu_backward(grad_inner.mul_(up), gate)
        grad_x = product(grad_gate, gate_weight.T).add_(product(grad_up, up_weight.T)) if needs_x else None
        return (
            grad_x,
            grad_gate.T @ x if needs_gate else None,
            grad_up.T @ x if needs_up else None,
            grad_down,
        )
